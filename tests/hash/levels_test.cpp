// SPDX-License-Identifier: Apache-2.0
// Quantisers whose bits add up.
#include "magicpig/hash/levels.hpp"

#include <doctest/doctest.h>

#include <cmath>

namespace {

using namespace magicpig;

// Mean square error on a standard normal number, by the midpoint rule in steps of 1/1000.
double mean_square_error(const Levels& levels) {
  constexpr double kUnit = 1 << Levels::kFraction;
  double sum = 0.0;
  double mass = 0.0;
  for (int i = -8000; i < 8000; ++i) {
    const double x = (i + 0.5) / 1000.0;
    int level = 0;
    while (level + 1 < levels.count() && x >= levels.bound(level) / kUnit) ++level;
    const double error = x - levels.value(levels.code(level)) / kUnit;
    const double weight = std::exp(-x * x / 2.0);
    sum += weight * error * error;
    mass += weight;
  }
  return sum / mass;
}

TEST_CASE("Levels.have_the_error_of_the_best_quantisers_or_nearly") {
  // Max 1960, table I: .3634, .1175, .03454, .009497 without the restriction that bits add up.
  const double best[] = {0.3634, 0.1175, 0.03454, 0.009497};
  const double above[] = {1.001, 1.001, 1.03, 1.10};
  for (int bits = 1; bits <= Levels::kMaxBits; ++bits) {
    CAPTURE(bits);
    const double error = mean_square_error(Levels(bits));
    CHECK(error >= 0.999 * best[bits - 1]);
    CHECK(error <= above[bits - 1] * best[bits - 1]);
  }
}

TEST_CASE("Levels.ascend_and_are_symmetric_with_bounds_half_way") {
  for (int bits = 1; bits <= Levels::kMaxBits; ++bits) {
    const Levels levels(bits);
    const int last = levels.count() - 1;
    for (int i = 0; i < last; ++i) {
      const int below = levels.value(levels.code(i));
      const int above = levels.value(levels.code(i + 1));
      CHECK(below < above);
      CHECK(std::abs(2 * levels.bound(i) - below - above) <= 1);
      CHECK(levels.code(i) == (last ^ levels.code(last - i)));
    }
  }
  CHECK(Levels(2).code(0) == 0);  // --
  CHECK(Levels(2).code(2) == 1);  // the sign and not the other bit
}

}  // namespace

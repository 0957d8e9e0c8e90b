// SPDX-License-Identifier: Apache-2.0
// How the planes of each family are distributed.
#include "planes.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "magicpig/hash/orthogonal.hpp"
#include "magicpig/hash/rademacher.hpp"
#include "magicpig/hash/simhash.hpp"

namespace {

using namespace magicpig;
using test::planes_of;

double dot(std::span<const float> planes, int a, int b, int dim) {
  double sum = 0.0;
  for (int j = 0; j < dim; ++j) {
    sum += static_cast<double>(planes[static_cast<std::size_t>(a * dim + j)]) *
           static_cast<double>(planes[static_cast<std::size_t>(b * dim + j)]);
  }
  return sum;
}

TEST_CASE("orthogonal planes are orthonormal within blocks of dim tables") {
  constexpr int kBits = 3;
  constexpr int kTables = 70;
  for (const int dim : {1, 2, 7, 64, 100}) {
    CAPTURE(dim);
    const auto family = OrthogonalHash::create({.dim = dim, .bits = kBits, .tables = kTables});
    REQUIRE(family.ok());
    const std::vector<float> planes = planes_of(*family);
    double largest = 0.0;
    for (int b = 0; b < kBits; ++b) {
      for (int l = 0; l < kTables; ++l) {
        for (int m = l / dim * dim; m <= l; ++m) {
          const double expected = m == l ? 1.0 : 0.0;
          const double product = dot(planes, b * kTables + l, b * kTables + m, dim);
          largest = std::fmax(largest, std::fabs(product - expected));
        }
      }
    }
    // Entries of two unit vectors are rounded to float: at most 2 * 2^-24 of sum |x_j y_j| <= 1.
    CHECK(largest <= 2.01 * 0x1p-24);
  }
}

TEST_CASE("the K planes of a table come from different blocks, which are independent") {
  constexpr int kBits = 6;
  constexpr int kTables = 40;
  for (const int dim : {2, 3, 16, 64}) {
    CAPTURE(dim);
    const auto family = OrthogonalHash::create({.dim = dim, .bits = kBits, .tables = kTables});
    REQUIRE(family.ok());
    // Two planes of one block would be orthogonal to 1e-7. Independent ones are within 1e-5 by
    // chance with probability below 1e-5 sqrt(dim): about 0.05 for the 600 pairs at dim 64.
    const std::vector<float> planes = planes_of(*family);
    int orthogonal = 0;
    double squares = 0.0;
    for (int l = 0; l < kTables; ++l) {
      for (int b = 0; b < kBits; ++b) {
        for (int c = 0; c < b; ++c) {
          const double product = dot(planes, b * kTables + l, c * kTables + l, dim);
          orthogonal += std::fabs(product) < 1e-5 ? 1 : 0;
          squares += product * product;
        }
      }
    }
    CHECK(orthogonal == 0);
    // The square of the cosine of independent directions is 1 / dim on average, with a standard
    // deviation below 1.5 / dim; the 600 pairs share planes, but are pairwise uncorrelated.
    CHECK(squares / 600.0 == doctest::Approx(1.0 / dim).epsilon(5.0 * 1.5 / std::sqrt(600.0)));
  }
}

TEST_CASE(
    "a plane of an orthogonal block may point anywhere: coordinates have mean 0, square 1/dim") {
  constexpr int kDim = 16;
  double sum = 0.0;
  double square_of_first = 0.0;
  int rows = 0;
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    const auto family =
        OrthogonalHash::create({.dim = kDim, .bits = 1, .tables = kDim, .seed = seed});
    REQUIRE(family.ok());
    // The last row of a block is the one that Gram and Schmidt change most.
    const auto last = static_cast<double>(planes_of(*family)[(kDim - 1) * kDim]);
    sum += last;
    square_of_first += last * last;
    ++rows;
  }
  // Coordinate x of a uniform direction: E x = 0, E x^2 = 1/d, Var x^2 < 2/d^2. 4.9 deviations.
  CHECK(std::fabs(sum / rows) < 4.9 * std::sqrt(1.0 / kDim / rows));
  CHECK(std::fabs(square_of_first / rows - 1.0 / kDim) < 4.9 * std::sqrt(2.0 / rows) / kDim);
}

TEST_CASE("coin planes are +1 and -1, equally often and independently of the neighbour") {
  for (const int dim : {1, 31, 32, 33, 129, 300}) {
    CAPTURE(dim);
    const auto family = RademacherHash::create({.dim = dim, .bits = 10, .tables = 100});
    REQUIRE(family.ok());
    int others = 0;
    double sum = 0.0;
    double products = 0.0;
    float before = 0.0F;
    for (const float x : planes_of(*family)) {
      others += x != 1.0F && x != -1.0F;
      sum += static_cast<double>(x);
      products += static_cast<double>(x * before);
      before = x;
    }
    CHECK(others == 0);
    const double bound = 4.9 * std::sqrt(static_cast<double>(planes_of(*family).size()));
    CHECK(std::fabs(sum) < bound);
    CHECK(std::fabs(products) < bound);
  }
}

TEST_CASE("Gaussian planes are standard normal, for odd dimensions too") {
  for (const int dim : {1, 3, 128, 129}) {
    CAPTURE(dim);
    const auto family = SimHash::create({.dim = dim, .bits = 10, .tables = 150});
    REQUIRE(family.ok());
    double moments[5] = {};
    for (const float x : planes_of(*family)) {
      for (int m = 1; m <= 4; ++m) moments[m] += std::pow(static_cast<double>(x), m);
    }
    const auto n = static_cast<double>(planes_of(*family).size());
    const double expected[5] = {0.0, 0.0, 1.0, 0.0, 3.0};
    const double variance[5] = {0.0, 1.0, 2.0, 15.0, 96.0};
    for (int m = 1; m <= 4; ++m) {
      CAPTURE(m);
      CHECK(std::fabs(moments[m] / n - expected[m]) < 4.9 * std::sqrt(variance[m] / n));
    }
  }
}

}  // namespace

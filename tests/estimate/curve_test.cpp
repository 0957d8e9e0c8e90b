// SPDX-License-Identifier: Apache-2.0
// The tabulated inclusion probability against the function it tabulates.
#include "magicpig/estimate/curve.hpp"

#include <doctest/doctest.h>

#include <cmath>

#include "magicpig/cpu/scalar.hpp"
#include "magicpig/estimate/rule.hpp"
#include "magicpig/hash/simhash.hpp"

namespace {

using namespace magicpig;

struct Rule {
  int bits, tables, t, radius;
};

// Largest error of log u over 40,001 float cosines of [from, to], evaluated in float as decode
// does.
double largest_error(const Rule& rule, double from, double to) {
  const auto family = SimHash::create({.dim = 1, .bits = rule.bits, .tables = rule.tables});
  REQUIRE(family.ok());
  const auto exact = [&](double cosine) {
    return log_at_least(rule.t, rule.tables, family->table_collision(cosine, rule.radius));
  };
  const auto curve = InclusionCurve::create(exact);
  REQUIRE(curve.ok());
  double largest = 0.0;
  for (int i = 0; i <= 40000; ++i) {
    const auto cosine = static_cast<float>(from + (to - from) * i / 40000);
    float value = cosine;
    ScalarOps::interpolate(curve->view(), &value, 1);
    const double expected = std::fmax(exact(static_cast<double>(cosine)), -80.0);
    largest = std::fmax(largest, std::abs(static_cast<double>(value) - expected));
  }
  return largest;
}

TEST_CASE("InclusionCurve.error_is_below_2e_5_for_the_published_rule") {
  CHECK(largest_error({10, 150, 2, 0}, -0.5, 1.0) < 2e-5);  // 1.99e-5
}

TEST_CASE("InclusionCurve.error_is_below_5e_5_for_the_steepest_rules") {
  for (int t = 1; t <= 3; ++t) {
    for (int radius = 0; radius <= 2; ++radius) {
      CAPTURE(t);
      CAPTURE(radius);
      CHECK(largest_error({15, 1024, t, radius}, -0.5, 1.0) < 5e-5);     // up to 4.5e-5
      CHECK(largest_error({15, 1024, t, radius}, -0.9, -0.5) < 1.2e-3);  // up to 1.06e-3
    }
  }
}

TEST_CASE("InclusionCurve.error_is_small_where_the_collision_probability_has_its_tangent") {
  // Near cosine 1 the angle law has a vertical tangent in the cosine; with one table of one bit
  // nothing flattens it.
  CHECK(largest_error({1, 1, 1, 0}, 0.99, 1.0) < 1e-7);
  CHECK(largest_error({1, 1, 1, 0}, -0.5, 0.99) < 2e-6);  // 1.03e-6
}

TEST_CASE("InclusionCurve.is_exact_at_cosine_1_for_every_rule") {
  for (const Rule& rule : {Rule{1, 1, 1, 0}, Rule{10, 150, 2, 0}, Rule{15, 1024, 3, 2}}) {
    CHECK(largest_error(rule, 1.0, 1.0) == 0.0);
  }
}

TEST_CASE("InclusionCurve.stays_finite_and_falls_all_the_way_to_cosine_minus_1") {
  for (const Rule& rule : {Rule{1, 1, 1, 0}, Rule{10, 150, 2, 0}, Rule{15, 1024, 3, 2}}) {
    const auto family = SimHash::create({.dim = 1, .bits = rule.bits, .tables = rule.tables});
    REQUIRE(family.ok());
    const auto curve = InclusionCurve::create([&](double cosine) {
      return log_at_least(rule.t, rule.tables, family->table_collision(cosine, rule.radius));
    });
    REQUIRE(curve.ok());
    float last = 0.0F;
    for (int i = 0; i <= 100000; ++i) {
      float value = 1.0F - 2.0F * static_cast<float>(i) / 100000.0F;
      ScalarOps::interpolate(curve->view(), &value, 1);
      // Interpolation between equal nodes may differ by an ulp of 80.
      CHECK(value <= last + 1e-5F);
      CHECK(value >= -80.0F);
      last = value;
    }
  }
}

TEST_CASE("InclusionCurve.treats_cosines_beyond_1_as_1_and_nan_as_minus_1") {
  const auto family = SimHash::create({.dim = 1, .bits = 10, .tables = 150});
  REQUIRE(family.ok());
  const auto curve = InclusionCurve::create(
      [&](double cosine) { return log_at_least(2, 150, family->table_collision(cosine, 0)); });
  REQUIRE(curve.ok());
  float x[] = {1.5F, -1.5F, std::nanf(""), 1.0F, -1.0F};
  ScalarOps::interpolate(curve->view(), x, 5);
  CHECK(x[0] == x[3]);
  CHECK(x[1] == x[4]);
  CHECK(x[2] == x[4]);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Collision rules: against sums in long double, published values, identities and their limits.
#include "magicpig/estimate/rule.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "magicpig/hash/hamming_ball.hpp"
#include "magicpig/hash/simhash.hpp"

namespace {

using namespace magicpig;

constexpr int kBits[] = {1, 2, 5, 10, 15};
constexpr int kTables[] = {1, 2, 3, 10, 150, 1024};

// log P(Bin(tables, a) >= t) from both tails summed in 64-bit mantissas: the shorter one decides.
long double reference(int t, int tables, long double a) {
  long double below = 0.0L;
  long double above = 0.0L;
  long double ways = 1.0L;
  for (int c = 0; c <= tables; ++c) {
    const long double term = ways * std::pow(a, static_cast<long double>(c)) *
                             std::pow(1.0L - a, static_cast<long double>(tables - c));
    (c < t ? below : above) += term;
    ways = ways * static_cast<long double>(tables - c) / static_cast<long double>(c + 1);
  }
  return below < above ? std::log1p(-below) : std::log(above);
}

double u(int t, int tables, double collision) {
  return std::exp(log_at_least(t, tables, collision));
}

double u_at(double cosine, int bits, int tables) {
  const double agree = 1.0 - std::acos(cosine) / 3.14159265358979323846;
  return u(2, tables, std::pow(agree, bits));
}

TEST_CASE("LogAtLeast.agrees_with_sums_in_long_double") {
  // a * ways stays finite in long double: C(1024, 512) is about 10^307, its maximum 10^4932.
  for (const int tables : kTables) {
    for (int t = 1; t <= 3 && t <= tables; ++t) {
      for (const int bits : kBits) {
        for (int i = 1; i < 200; ++i) {
          const double a = std::pow(i / 200.0, bits);
          const auto expected = static_cast<double>(reference(t, tables, a));
          CAPTURE(tables);
          CAPTURE(t);
          CAPTURE(a);
          // The documented bound. Below 1e-300 the shorter tail is subnormal in double.
          if (expected > -1e-300) {
            CHECK(log_at_least(t, tables, a) >= -1e-290);
            continue;
          }
          CHECK(log_at_least(t, tables, a) == doctest::Approx(expected).epsilon(1e-12).scale(0.0));
        }
      }
    }
  }
}

TEST_CASE("LogAtLeast.gives_the_tabulated_probabilities_at_10_150") {
  struct {
    double cosine, u;
  } const grid[] = {{-0.5, 3.200e-6}, {-0.35, 6.038e-5}, {-0.25, 3.141e-4}, {-0.1, 2.715e-3},
                    {0.0, 9.684e-3},  {0.1, .03074},     {0.2, .08674},     {0.3, .2137},
                    {0.4, .4433},     {0.5, .7356},      {0.6, .9434},      {0.7, .9977}};
  // Half a unit of the fourth digit of a number whose first digit is at least 1.
  for (const auto& point : grid) {
    CHECK(u_at(point.cosine, 10, 150) == doctest::Approx(point.u).epsilon(5e-4).scale(0.0));
  }
}

TEST_CASE("LogAtLeast.gives_the_published_budgets_of_orthogonal_keys") {
  // Chen et al. 2024, eq. 21, to the digits given.
  CHECK(std::abs(u_at(0.0, 10, 150) - .00968) < 5e-6);
  CHECK(std::abs(u_at(0.0, 11, 300) - .00971) < 5e-6);
  CHECK(std::abs(u_at(0.0, 9, 120) - .0234) < 5e-5);
  CHECK(std::abs(u_at(0.0, 8, 75) - .0351) < 5e-5);
}

TEST_CASE("LogAtLeast.is_right_where_float_arithmetic_cancels") {
  // 1 - (1-a)^L - L a (1-a)^(L-1) in float gives 1.12e-5 and -2.4e-7 here.
  const double published[] = {1.49e-5, 3.9e-7};
  const double agree[] = {0.36, 0.30};
  for (int i = 0; i < 2; ++i) {
    const double a = std::pow(agree[i], 10);
    const auto expected = static_cast<double>(std::exp(reference(2, 150, a)));
    CHECK(u(2, 150, a) == doctest::Approx(expected).epsilon(1e-6).scale(0.0));
    CHECK(u(2, 150, a) == doctest::Approx(published[i]).epsilon(0.02).scale(0.0));
    // The series in small L a.
    const double series =
        150.0 * 149.0 / 2.0 * a * a * (1.0 - 2.0 * 148.0 * a / 3.0 + 148.0 * 147.0 * a * a / 4.0);
    CHECK(u(2, 150, a) == doctest::Approx(series).epsilon(1e-6).scale(0.0));
  }
}

TEST_CASE("LogAtLeast.differences_in_t_add_up_to_the_collision_of_any_table") {
  // Rounding of at most L terms of size below 1.
  for (const double a : {1e-4, 0.01, 0.3, 0.9}) {
    for (const int tables : {3, 10, 150}) {
      double sum = 0.0;
      for (int t = 1; t <= tables; ++t) sum += u(t, tables, a) - u(t + 1, tables, a);
      const double any = -std::expm1(tables * std::log1p(-a));
      CHECK(sum == doctest::Approx(any).epsilon(1e-12));
    }
  }
}

TEST_CASE("LogAtLeast.sums_over_t_to_the_expected_number_of_collisions") {
  for (const double a : {1e-4, 0.01, 0.3, 0.9}) {
    double sum = 0.0;
    for (int t = 1; t <= 150; ++t) sum += u(t, 150, a);
    CHECK(sum == doctest::Approx(150 * a).epsilon(1e-12));
  }
}

TEST_CASE("LogAtLeast.grows_with_the_collision_probability_and_with_tables_and_falls_with_t") {
  for (const int tables : kTables) {
    for (int t = 1; t <= 3; ++t) {
      double last = log_at_least(t, tables, 0.0);
      for (int i = 1; i <= 1000; ++i) {
        const double a = std::pow(i / 1000.0, 10);
        const double now = log_at_least(t, tables, a);
        CHECK(now >= last);
        // Of probabilities within rounding of 1 the order is lost.
        CHECK(log_at_least(t, tables + 1, a) >= now - 1e-15);
        CHECK(log_at_least(t + 1, tables, a) <= now);
        last = now;
      }
    }
  }
}

TEST_CASE("LogAtLeast.falls_as_codes_get_longer") {
  for (const int tables : kTables) {
    for (int t = 1; t <= 3; ++t) {
      for (int i = 1; i < 100; ++i) {
        for (int bits = 1; bits < 15; ++bits) {
          CHECK(log_at_least(t, tables, std::pow(i / 100.0, bits + 1)) <=
                log_at_least(t, tables, std::pow(i / 100.0, bits)));
        }
      }
    }
  }
}

TEST_CASE("LogAtLeast.is_exact_at_certainty_and_impossibility") {
  const double never = -std::numeric_limits<double>::infinity();
  for (const int tables : kTables) {
    CHECK(log_at_least(0, tables, 0.0) == 0.0);
    CHECK(log_at_least(0, tables, 0.5) == 0.0);
    CHECK(log_at_least(tables + 1, tables, 1.0) == never);
    CHECK(log_at_least(tables + 1, tables, 0.5) == never);
    for (int t = 1; t <= 3 && t <= tables; ++t) {
      CHECK(log_at_least(t, tables, 1.0) == 0.0);
      CHECK(log_at_least(t, tables, 0.0) == never);
    }
  }
}

TEST_CASE("LogAtLeast.is_never_nan_nor_positive") {
  const double extremes[] = {5e-324, 1e-310, 1e-200, 1e-17, 0.5, 1.0 - 1e-12, 1.0 - 1.2e-16};
  for (const int tables : kTables) {
    for (int t = 0; t <= 4; ++t) {
      for (const double a : extremes) {
        CAPTURE(tables);
        CAPTURE(t);
        CAPTURE(a);
        CHECK(log_at_least(t, tables, a) <= 0.0);  // false for NaN
      }
    }
  }
}

TEST_CASE("TableCollision.is_certain_at_angle_zero_and_impossible_at_angle_pi") {
  for (const int bits : kBits) {
    const auto family = SimHash::create({.dim = 2, .bits = bits, .tables = 1});
    REQUIRE(family.ok());
    for (int radius = 0; radius < bits; ++radius) {
      CHECK(family->table_collision(1.0, radius) == 1.0);
      // 1 - acos(-1) / pi in double is 0 or an ulp of 1.
      CHECK(family->table_collision(-1.0, radius) <= 1e-15);
      CHECK(log_at_least(2, 150, family->table_collision(1.0, radius)) == 0.0);
    }
    CHECK(family->table_collision(-1.0, bits) == 1.0);
    CHECK(family->table_collision(1.5, 0) == 1.0);
    CHECK(family->table_collision(-1.5, 0) <= 1e-15);
  }
}

TEST_CASE("HammingBallProbability.at_one_half_counts_the_codes_of_the_ball") {
  for (int bits = 1; bits <= 15; ++bits) {
    double codes = 0.0;
    double choose = 1.0;
    for (int radius = 0; radius <= bits; ++radius) {
      codes += choose;
      choose = choose * (bits - radius) / (radius + 1);
      // Powers of one half are exact in every term.
      CHECK(hamming_ball_probability(bits, radius, 0.5) == codes / (1 << bits));
      const auto ball = HammingBall::create(bits, radius);
      REQUIRE(ball.ok());
      CHECK(static_cast<double>(ball->masks().size()) == codes);
    }
  }
}

}  // namespace

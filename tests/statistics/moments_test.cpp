// SPDX-License-Identifier: Apache-2.0
// The closed forms that the statistical tests compare with, checked by enumerating everything.
#include "moments.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>

namespace {

using namespace magicpig::test;

// Probabilities of the four outcomes of one bit or table: bit 0 set when the first token is found
// there, bit 1 when the second is.
struct Outcomes {
  double probability[4];

  explicit Outcomes(const TablePair& pair)
      : probability{1.0 - pair.first - pair.second + pair.both, pair.first - pair.both,
                    pair.second - pair.both, pair.both} {}
};

// Sums over all 4^trials sequences of outcomes; `accept` is given how often each token was found.
template <class Accept>
double enumerate(const Outcomes& outcomes, int trials, const Accept& accept) {
  double sum = 0.0;
  for (int sequence = 0; sequence < (1 << (2 * trials)); ++sequence) {
    double probability = 1.0;
    int first = 0;
    int second = 0;
    for (int i = 0; i < trials; ++i) {
      const int outcome = (sequence >> (2 * i)) & 3;
      probability *= outcomes.probability[outcome];
      first += outcome & 1;
      second += outcome >> 1;
    }
    if (accept(first, second)) sum += probability;
  }
  return sum;
}

constexpr TablePair kPairs[] = {{.first = 0.3, .second = 0.6, .both = 0.25},
                                {.first = 0.5, .second = 0.5, .both = 0.5},
                                {.first = 0.9, .second = 0.05, .both = 0.02}};

// Sums of fewer than 2^14 terms below 1: rounding stays below 1e-12.
constexpr double kRounding = 1e-12;

TEST_CASE("Moments.joint_collision_counts_equal_their_enumeration") {
  for (const TablePair& pair : kPairs) {
    for (int tables = 1; tables <= 6; ++tables) {
      for (int t = 1; t <= 3; ++t) {
        const double expected = enumerate(Outcomes(pair), tables, [t](int first, int second) {
          return first >= t && second >= t;
        });
        CHECK(std::abs(both_at_least(t, tables, pair) - expected) < kRounding);
      }
    }
  }
}

TEST_CASE("Moments.joint_collision_counts_equal_the_published_forms_for_one_and_two") {
  const TablePair pair = kPairs[0];
  const int tables = 24;
  const double e = 1.0 - pair.first - pair.second + pair.both;
  const double x = pair.first - pair.both;
  const double y = pair.second - pair.both;
  const auto below_two = [&](double a) {
    return std::pow(1.0 - a, tables) + tables * a * std::pow(1.0 - a, tables - 1);
  };
  const double one = 1.0 - std::pow(1.0 - pair.first, tables) -
                     std::pow(1.0 - pair.second, tables) + std::pow(e, tables);
  const double two = 1.0 - below_two(pair.first) - below_two(pair.second) + std::pow(e, tables) +
                     tables * (x + y + pair.both) * std::pow(e, tables - 1) +
                     tables * (tables - 1) * x * y * std::pow(e, tables - 2);
  CHECK(std::abs(both_at_least(1, tables, pair) - one) < kRounding);
  CHECK(std::abs(both_at_least(2, tables, pair) - two) < kRounding);
}

TEST_CASE("Moments.joint_membership_in_a_hamming_ball_equals_its_enumeration") {
  for (const BitPair& bit : kPairs) {
    for (int bits = 1; bits <= 6; ++bits) {
      for (int radius = 0; radius <= 2; ++radius) {
        const double expected = enumerate(Outcomes(bit), bits, [&](int first, int second) {
          return bits - first <= radius && bits - second <= radius;
        });
        CHECK(std::abs(both_in_ball(bits, radius, bit) - expected) < kRounding);
      }
    }
  }
}

TEST_CASE("Moments.three_vectors_on_one_side_agree_with_hyperplanes_of_the_plane") {
  // In two dimensions the hyperplane's normal is one angle: 720,000 of them integrate the piecewise
  // constant indicator with an error of at most 6 jumps of one step each.
  const double angles[3] = {0.2, 1.3, -0.7};
  const int steps = 720000;
  int together = 0;
  for (int i = 0; i < steps; ++i) {
    const double normal = 6.283185307179586 * (i + 0.5) / steps;
    int positive = 0;
    for (const double angle : angles) positive += std::cos(normal - angle) > 0.0 ? 1 : 0;
    together += positive == 0 || positive == 3 ? 1 : 0;
  }
  const auto pair = [&](int i, int j) { return same_side(std::cos(angles[i] - angles[j])); };
  const double expected = same_side(pair(0, 1), pair(0, 2), pair(1, 2));
  CHECK(std::abs(static_cast<double>(together) / steps - expected) < 6.0 / steps);
}

TEST_CASE("Moments.pairs_without_replacement_equal_the_count_of_subsets") {
  const int n = 7;
  const int m = 3;
  int subsets = 0;
  int with_first = 0;
  int with_both = 0;
  for (unsigned set = 0; set < (1U << n); ++set) {
    if (std::popcount(set) != m) continue;
    ++subsets;
    with_first += static_cast<int>(set & 1U);
    with_both += (set & 3U) == 3U ? 1 : 0;
  }
  const TablePair pair = without_replacement(m, n);
  CHECK(pair.first == doctest::Approx(static_cast<double>(with_first) / subsets).epsilon(1e-12));
  CHECK(pair.both == doctest::Approx(static_cast<double>(with_both) / subsets).epsilon(1e-12));
}

TEST_CASE("Moments.a_union_of_designs_equals_its_enumeration") {
  const TablePair pair = union_of(kPairs[0], kPairs[2]);
  double first = 0.0;
  double both = 0.0;
  const Outcomes a(kPairs[0]);
  const Outcomes b(kPairs[2]);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const double probability = a.probability[i] * b.probability[j];
      first += ((i | j) & 1) != 0 ? probability : 0.0;
      both += (i | j) == 3 ? probability : 0.0;
    }
  }
  CHECK(std::abs(pair.first - first) < kRounding);
  CHECK(std::abs(pair.both - both) < kRounding);
}

TEST_CASE("Moments.covariance_equals_that_of_all_subsets") {
  // Four tokens, two drawn without replacement: six equally likely samples.
  const int n = 4;
  const std::vector<double> x = {1.0, -2.0, 0.5, 3.0};
  const std::vector<double> y = {0.3, 1.0, 4.0, -1.0};
  const TablePair pair = without_replacement(2, n);
  Design design;
  design.single.assign(n, pair.first);
  design.both.assign(n, std::vector<double>(n, pair.both));
  for (std::size_t i = 0; i < n; ++i) design.both[i][i] = pair.first;
  double sum_x = 0.0;
  double sum_y = 0.0;
  double product = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const double estimate_x = (x[i] + x[j]) / pair.first;
      const double estimate_y = (y[i] + y[j]) / pair.first;
      sum_x += estimate_x / 6.0;
      sum_y += estimate_y / 6.0;
      product += estimate_x * estimate_y / 6.0;
    }
  }
  CHECK(std::abs(covariance(design, x, y) - (product - sum_x * sum_y)) < kRounding);
}

}  // namespace

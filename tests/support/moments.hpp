// SPDX-License-Identifier: Apache-2.0
// Closed forms of what sampled sums do over the draw of planes: joint inclusion probabilities, and
// the variances and biases that follow from them.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace magicpig::test {

/// P(a random hyperplane has two vectors on one side), by their cosine.
[[nodiscard]] inline double same_side(double cosine) {
  const double clamped = cosine < -1.0 ? -1.0 : cosine > 1.0 ? 1.0 : cosine;
  return 1.0 - std::acos(clamped) / 3.14159265358979323846;
}

/// P(a random hyperplane has three vectors on one side), from the same for their pairs: the orthant
/// probability 1 - (angle_1 + angle_2 + angle_3) / (2 pi).
[[nodiscard]] inline double same_side(double first, double second, double third) {
  return 0.5 * (first + second + third - 1.0);
}

/// What two tokens do in one table.
struct TablePair {
  double first = 0.0;   ///< P(the first is found)
  double second = 0.0;  ///< P(the second is found)
  double both = 0.0;
};

/// The bits of one table: P(a bit of the first, second, both, equals the query's).
using BitPair = TablePair;

[[nodiscard]] inline double factorial(int n) { return std::tgamma(n + 1.0); }

/// Both tokens within `radius` flips of the query's code of `bits` bits: sum over the number of
/// bits in which only the first, only the second, and both differ.
[[nodiscard]] inline double both_in_ball(int bits, int radius, const BitPair& bit) {
  const double only_first_differs = bit.second - bit.both;
  const double only_second_differs = bit.first - bit.both;
  const double both_differ = 1.0 - bit.first - bit.second + bit.both;
  double sum = 0.0;
  for (int e = 0; e <= radius; ++e) {
    for (int x = 0; x + e <= radius; ++x) {
      for (int y = 0; y + e <= radius; ++y) {
        const int rest = bits - e - x - y;
        if (rest < 0) continue;
        const double ways =
            factorial(bits) / (factorial(e) * factorial(x) * factorial(y) * factorial(rest));
        sum += ways * std::pow(bit.both, rest) * std::pow(only_first_differs, x) *
               std::pow(only_second_differs, y) * std::pow(both_differ, e);
      }
    }
  }
  return sum;
}

/// P(Bin(tables, probability) < at_least), at_least small.
[[nodiscard]] inline double fewer_than(int at_least, int tables, double probability) {
  double sum = 0.0;
  for (int c = 0; c < at_least; ++c) {
    sum += factorial(tables) / (factorial(c) * factorial(tables - c)) * std::pow(probability, c) *
           std::pow(1.0 - probability, tables - c);
  }
  return sum;
}

/// P(both tokens are found in at least t of L tables), by summing the trinomial distribution of the
/// counts over all outcomes in which both stay below t. tables up to 100.
[[nodiscard]] inline double both_at_least(int at_least, int tables, const TablePair& table) {
  const double only_first = table.first - table.both;
  const double only_second = table.second - table.both;
  const double neither = 1.0 - table.first - table.second + table.both;
  double both_below = 0.0;
  for (int g = 0; g < at_least; ++g) {
    for (int x = 0; x + g < at_least; ++x) {
      for (int y = 0; y + g < at_least; ++y) {
        const int rest = tables - g - x - y;
        if (rest < 0) continue;
        const double ways =
            factorial(tables) / (factorial(g) * factorial(x) * factorial(y) * factorial(rest));
        both_below += ways * std::pow(table.both, g) * std::pow(only_first, x) *
                      std::pow(only_second, y) * std::pow(neither, rest);
      }
    }
  }
  return 1.0 - fewer_than(at_least, tables, table.first) -
         fewer_than(at_least, tables, table.second) + both_below;
}

/// A pair under the union of two independent designs: from (first, second, both) of each.
[[nodiscard]] inline TablePair union_of(const TablePair& a, const TablePair& b) {
  const auto either = [](double x, double y) { return 1.0 - (1.0 - x) * (1.0 - y); };
  const TablePair pair{.first = either(a.first, b.first), .second = either(a.second, b.second)};
  const double neither = (1.0 - a.first - a.second + a.both) * (1.0 - b.first - b.second + b.both);
  return {
      .first = pair.first, .second = pair.second, .both = pair.first + pair.second - 1.0 + neither};
}

/// A pair under `m` of `n` tokens drawn without replacement.
[[nodiscard]] inline TablePair without_replacement(int m, int n) {
  const double single = static_cast<double>(m) / n;
  return {.first = single, .second = single, .both = single * (m - 1.0) / (n - 1.0)};
}

/// Inclusion probabilities of n tokens and of all their pairs.
struct Design {
  std::vector<double> single;             ///< [n]
  std::vector<std::vector<double>> both;  ///< [n][n], symmetric; the diagonal is `single`

  /// Relative covariance of two indicators, (pi_ij - pi_i pi_j) / (pi_i pi_j).
  [[nodiscard]] double relative(std::size_t i, std::size_t j) const {
    return both[i][j] / (single[i] * single[j]) - 1.0;
  }
};

/// Exact covariance of the Horvitz-Thompson sums of x and y.
[[nodiscard]] inline double covariance(const Design& design, const std::vector<double>& x,
                                       const std::vector<double>& y) {
  double sum = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    for (std::size_t j = 0; j < y.size(); ++j) sum += design.relative(i, j) * x[i] * y[j];
  }
  return sum;
}

}  // namespace magicpig::test

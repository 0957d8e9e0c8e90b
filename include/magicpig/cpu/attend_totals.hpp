// SPDX-License-Identifier: Apache-2.0
// Running sums of attention over some of the tokens, which add up to those over all of them.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "magicpig/core/state.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cpu/error_sketch.hpp"
#include "magicpig/estimate/promise.hpp"
#include "magicpig/estimate/report.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Sums of one head, all scaled by exp(-largest) or its square.
struct AttendSums {
  float largest = kEmptyLse;         // logit so far
  double weight = 0.0;               // sum of weights, exact and drawn
  double omega = 0.0;                // sum of weights of drawn tokens that are not certain
  double omega_squared = 0.0;        // sum of their squares
  double spread = 0.0;               // sum of (1 - pi) omega^2
  double spread_square = 0.0;        // sum of (1 - pi) omega^2 |v|^2
  double spread_2 = 0.0;             // sum of ((1 - pi) omega^2)^2
  double spread_2_square = 0.0;      // times |v|^2
  double spread_2_fourth = 0.0;      // times |v|^4
  double largest_omega = 0.0;        // of a drawn token that is not certain
  double largest_value = 0.0;        // omega |v| of one
  int groups = 0;                    // of tables that tokens were drawn from; 0 for none
  double groups_square = 0.0;        // sum of |d_j|^2 over them, see ErrorSketch::squares()
  double groups_weight = 0.0;        // and of the squares of their weights
  double inverse_pi = 0.0;           // sum of 1 / pi
  double inverse_pi_variance = 0.0;  // sum of (1 - pi) / pi^2
  std::int64_t exact = 0;
  std::int64_t drawn = 0;
};

/// What a promise took.
struct Looks {
  PromiseOutcome outcome = PromiseOutcome::kNone;
  int count = 0;
  std::int64_t reread = 0;  // rows of all but the last
  std::int64_t bytes = 0;   // of all but the last, of rows and index
};

/// Sums of all heads of a group. Those of disjoint sets of tokens add up, in double: the order of
/// parts matters to rounding alone, and parts that are cut in the same places give the same bits.
struct AttendTotals {
  int group = 0;
  int value_dim = 0;
  double* values = nullptr;         // [group, value_dim] weighted values
  double* spread_values = nullptr;  // [group, value_dim] values weighted by spread
  double* groups_values = nullptr;  // [group, value_dim] sum of d_j by their weights
  AttendSums* sums = nullptr;       // [group]
  std::int64_t* read = nullptr;     // [1] rows gathered
  std::int64_t* bytes = nullptr;    // [1] of rows, exact and gathered, and of the index
  std::int64_t* indexed = nullptr;  // [1] tokens drawn from
  Looks* looks = nullptr;           // [1]

  [[nodiscard]] static AttendTotals carve(Arena& arena, int group, int value_dim) {
    const auto outputs = static_cast<std::size_t>(group) * static_cast<std::size_t>(value_dim);
    return {.group = group,
            .value_dim = value_dim,
            .values = arena.take<double>(outputs),
            .spread_values = arena.take<double>(outputs),
            .groups_values = arena.take<double>(outputs),
            .sums = arena.take<AttendSums>(static_cast<std::size_t>(group)),
            .read = arena.take<std::int64_t>(1),
            .bytes = arena.take<std::int64_t>(1),
            .indexed = arena.take<std::int64_t>(1),
            .looks = arena.take<Looks>(1)};
  }

  void clear() const {
    const std::int64_t outputs = std::int64_t{group} * value_dim;
    for (std::int64_t i = 0; i < outputs; ++i) {
      values[i] = spread_values[i] = groups_values[i] = 0.0;
    }
    for (int g = 0; g < group; ++g) sums[g] = AttendSums{};
    *read = *bytes = *indexed = 0;
    *looks = {};
  }

  /// Becomes what `other`, of the same shape, is.
  void assign(const AttendTotals& other) const {
    const std::int64_t outputs = std::int64_t{group} * value_dim;
    for (std::int64_t i = 0; i < outputs; ++i) {
      values[i] = other.values[i];
      spread_values[i] = other.spread_values[i];
      groups_values[i] = other.groups_values[i];
    }
    for (int g = 0; g < group; ++g) sums[g] = other.sums[g];
    *read = *other.read;
    *bytes = *other.bytes;
    *indexed = *other.indexed;
    *looks = *other.looks;
  }

  /// By which raise() multiplies weights.
  [[nodiscard]] double factor(int g, float largest) const {
    return scale_from(sums[g].largest, largest);
  }

  /// Brings the sums of head g to the scale of a largest logit not below the present one.
  void raise(int g, float largest) const {
    AttendSums& s = sums[g];
    const double scale = factor(g, largest);
    const double squared = scale * scale;
    for (int j = 0; j < value_dim; ++j) {
      values[std::int64_t{g} * value_dim + j] *= scale;
      spread_values[std::int64_t{g} * value_dim + j] *= squared;
      groups_values[std::int64_t{g} * value_dim + j] *= squared;
    }
    s.weight *= scale;
    s.omega *= scale;
    s.omega_squared *= squared;
    s.spread *= squared;
    s.spread_square *= squared;
    const double fourth = squared * squared;
    s.spread_2 *= fourth;
    s.spread_2_square *= fourth;
    s.spread_2_fourth *= fourth;
    s.groups_square *= squared;
    s.groups_weight *= squared;
    s.largest_omega *= scale;
    s.largest_value *= scale;
    s.largest = largest;
  }

  /// Adds the sums over other tokens.
  void add(const AttendTotals& part) const {
    for (int g = 0; g < group; ++g) {
      if (part.sums[g].largest > sums[g].largest) raise(g, part.sums[g].largest);
      add_head(part, g, scale_from(part.sums[g].largest, sums[g].largest));
    }
    *read += *part.read;
    *bytes += *part.bytes;
    *indexed += *part.indexed;
    if (part.looks->outcome != PromiseOutcome::kNone) *looks = *part.looks;
  }

  /// Writes head g of the group to states[g] and, unless null, reports[g]; `sketch` as in error().
  void write(AttentionState* states, HeadReport* reports, const ErrorSketch* sketch) const {
    for (int g = 0; g < group; ++g) {
      write_output(g, states[g].out);
      states[g].lse =
          sums[g].weight == 0.0
              ? kEmptyLse
              : static_cast<float>(static_cast<double>(sums[g].largest) + ::log(sums[g].weight));
      if (reports != nullptr) reports[g] = report(g, states[g], sketch);
    }
  }

  /// Normalised values of head g; zeros for none.
  void write_output(int g, std::span<float> out) const {
    const bool empty = sums[g].weight == 0.0;
    for (int j = 0; j < value_dim; ++j) {
      out[static_cast<std::size_t>(j)] =
          empty ? 0.0F
                : static_cast<float>(values[std::int64_t{g} * value_dim + j] / sums[g].weight);
    }
  }

  /// Moments of the error of head g, whose output is `out`. Without the sketch of its draw all
  /// errors are taken to lie in one direction; see ErrorSketch::frobenius_square().
  ///
  /// Of draws from tables, whose tokens come in clusters, the covariance is that of a
  /// delete-a-group jackknife over G groups of tables: with R_j the sum of omega (v - out) over the
  /// tokens that are essential to group j (TableGroups) and d_j = R_j less its share of them all,
  /// it is G / (G - 1) sum_j d_j d_j^T of G - 1 degrees of freedom. That probabilities would be
  /// others without a group cancels to first order. It errs upwards in the mean, a token that is
  /// essential to two groups counting twice, but low where what a draw missed is heavy: the
  /// variance of independent draws is the allowance that bounds make for that. Source: Efron and
  /// Stein 1981; the allowance is ours, found by measuring (docs/promise.md).
  [[nodiscard]] OutputError error(int g, std::span<const float> out,
                                  const ErrorSketch* sketch) const {
    const AttendSums& s = sums[g];
    double cross = 0.0;
    double square = 0.0;
    for (std::size_t j = 0; j < out.size(); ++j) {
      const auto x = static_cast<double>(out[j]);
      cross += x * spread_values[std::int64_t{g} * value_dim + static_cast<std::int64_t>(j)];
      square += x * x;
    }
    // sum spread |v - out|^2, expanded; rounding may push it below 0.
    const double trace = larger(s.spread_square - 2.0 * cross + s.spread * square, 0.0);
    if (s.groups > 1) return grouped_error(g, out, sketch, trace, square);
    double frobenius = trace;
    if (sketch != nullptr && trace > 0.0) {
      const double sketched = ::sqrt(sketch->frobenius_square(g, out.data()));
      frobenius = sketched < trace ? sketched : trace;
    }
    const double norm = ::sqrt(square);
    const double unit = s.weight * norm;
    const double sizes = s.spread_square + s.spread * square;
    const double sizes_2 =
        s.spread_2_fourth + 2.0 * s.spread_2_square * square + s.spread_2 * square * square;
    return {.trace = trace / (unit * unit),
            .frobenius = frobenius / (unit * unit),
            .terms = sizes_2 > 0.0 ? sizes * sizes / sizes_2 : 0.0,
            .range = (s.largest_value + norm * s.largest_omega) / unit};
  }

 private:
  static double larger(double a, double b) { return a > b ? a : b; }

  // exp(from - to); 1 where both are -inf.
  static double scale_from(float from, float to) {
    return from == to ? 1.0 : ::exp(static_cast<double>(from) - static_cast<double>(to));
  }

  // error() of draws from tables; the variance of independent draws is `independent`.
  [[nodiscard]] OutputError grouped_error(int g, std::span<const float> out,
                                          const ErrorSketch* sketch, double independent,
                                          double square) const {
    const AttendSums& s = sums[g];
    double cross = 0.0;
    for (std::size_t j = 0; j < out.size(); ++j) {
      cross += static_cast<double>(out[j]) *
               groups_values[std::int64_t{g} * value_dim + static_cast<std::int64_t>(j)];
    }
    const double freedom = s.groups - 1;
    const double trace = (s.groups / freedom) *
                         larger(s.groups_square - 2.0 * cross + s.groups_weight * square, 0.0);
    double share = 1.0;  // of the Frobenius norm in the trace
    if (sketch != nullptr && trace > 0.0) {
      share = frobenius_share(sketch->group_moments(g, out.data()), freedom);
    }
    const double norm = ::sqrt(square);
    const double unit = s.weight * norm;
    return {.trace = trace / (unit * unit),
            .frobenius = share * trace / (unit * unit),
            .terms = freedom / (share * share),
            .range = (s.largest_value + norm * s.largest_omega) / unit,
            .allowance = independent / (unit * unit)};
  }

  // ||S|| / tr S of a covariance of which n degrees of freedom were seen, between its least and 1:
  // (tr S)^2 / n of the squared norm that was seen is what chance adds.
  [[nodiscard]] double frobenius_share(const ErrorSketch::Moments& seen, double n) const {
    if (n < 2.0 || seen.trace <= 0.0) return 1.0;
    const double square = seen.square / (seen.trace * seen.trace);
    const double unbiased = n * n / ((n - 1.0) * (n + 2.0)) * (square - 1.0 / n);
    const double least = 1.0 / value_dim;
    return ::sqrt(unbiased > 1.0 ? 1.0 : larger(unbiased, least));
  }

  void add_head(const AttendTotals& part, int g, double factor) const {
    const AttendSums& from = part.sums[g];
    AttendSums& s = sums[g];
    const double squared = factor * factor;
    for (std::int64_t i = std::int64_t{g} * value_dim; i < (g + 1) * std::int64_t{value_dim}; ++i) {
      values[i] += factor * part.values[i];
      spread_values[i] += squared * part.spread_values[i];
      groups_values[i] += squared * part.groups_values[i];
    }
    s.weight += factor * from.weight;
    s.omega += factor * from.omega;
    s.omega_squared += squared * from.omega_squared;
    s.spread += squared * from.spread;
    s.spread_square += squared * from.spread_square;
    const double fourth = squared * squared;
    s.spread_2 += fourth * from.spread_2;
    s.spread_2_square += fourth * from.spread_2_square;
    s.spread_2_fourth += fourth * from.spread_2_fourth;
    s.groups = from.groups > s.groups ? from.groups : s.groups;
    s.groups_square += squared * from.groups_square;
    s.groups_weight += squared * from.groups_weight;
    s.largest_omega = larger(s.largest_omega, factor * from.largest_omega);
    s.largest_value = larger(s.largest_value, factor * from.largest_value);
    s.inverse_pi += from.inverse_pi;
    s.inverse_pi_variance += from.inverse_pi_variance;
    s.exact += from.exact;
    s.drawn += from.drawn;
  }

  // Nothing of the tokens that could have been drawn, or of a single table.
  [[nodiscard]] bool tells_nothing(const AttendSums& s) const {
    return s.groups == 1 ||
           (s.drawn == 0 && *indexed > 0 && looks->outcome != PromiseOutcome::kDense);
  }

  [[nodiscard]] HeadReport report(int g, const AttentionState& state,
                                  const ErrorSketch* sketch) const {
    const AttendSums& s = sums[g];
    const OutputError off = error(g, state.out, sketch);
    const double surplus = s.inverse_pi - static_cast<double>(*indexed);
    return {.exact = s.exact,
            .drawn = s.drawn,
            .rows_read = *read,
            .bytes = *bytes + looks->bytes,
            .indexed = *indexed,
            .effective_sample_size = s.omega_squared > 0.0
                                         ? static_cast<float>(s.omega * s.omega / s.omega_squared)
                                         : 0.0F,
            .relative_error = static_cast<float>(::sqrt(off.trace)),
            .error_95 = tells_nothing(s) ? std::numeric_limits<float>::quiet_NaN()
                                         : static_cast<float>(off.normal(0.05)),
            .estimated_tokens = static_cast<float>(s.inverse_pi),
            .alarm = s.inverse_pi_variance > 0.0
                         ? static_cast<float>(surplus / ::sqrt(s.inverse_pi_variance))
                         : 0.0F,
            .promise = looks->outcome,
            .looks = looks->count,
            .rows_reread = looks->reread};
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

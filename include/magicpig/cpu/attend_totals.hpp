// SPDX-License-Identifier: Apache-2.0
// Running sums of attention over some of the tokens, which add up to those over all of them.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "magicpig/core/state.hpp"
#include "magicpig/core/workspace.hpp"
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
  double inverse_pi = 0.0;           // sum of 1 / pi
  double inverse_pi_variance = 0.0;  // sum of (1 - pi) / pi^2
  std::int64_t exact = 0;
  std::int64_t drawn = 0;
};

/// Sums of all heads of a group. Those of disjoint sets of tokens add up, in double: the order of
/// parts matters to rounding alone, and parts that are cut in the same places give the same bits.
struct AttendTotals {
  int group = 0;
  int value_dim = 0;
  double* values = nullptr;         // [group, value_dim] weighted values
  double* spread_values = nullptr;  // [group, value_dim] values weighted by spread
  AttendSums* sums = nullptr;       // [group]
  std::int64_t* read = nullptr;     // [1] rows gathered
  std::int64_t* indexed = nullptr;  // [1] tokens drawn from

  [[nodiscard]] static AttendTotals carve(Arena& arena, int group, int value_dim) {
    const auto outputs = static_cast<std::size_t>(group) * static_cast<std::size_t>(value_dim);
    return {.group = group,
            .value_dim = value_dim,
            .values = arena.take<double>(outputs),
            .spread_values = arena.take<double>(outputs),
            .sums = arena.take<AttendSums>(static_cast<std::size_t>(group)),
            .read = arena.take<std::int64_t>(1),
            .indexed = arena.take<std::int64_t>(1)};
  }

  void clear() const {
    const std::int64_t outputs = std::int64_t{group} * value_dim;
    for (std::int64_t i = 0; i < outputs; ++i) values[i] = spread_values[i] = 0.0;
    for (int g = 0; g < group; ++g) sums[g] = AttendSums{};
    *read = *indexed = 0;
  }

  /// Brings the sums of head g to the scale of a largest logit not below the present one.
  void raise(int g, float largest) const {
    AttendSums& s = sums[g];
    const double factor = scale_from(s.largest, largest);
    const double squared = factor * factor;
    for (int j = 0; j < value_dim; ++j) {
      values[std::int64_t{g} * value_dim + j] *= factor;
      spread_values[std::int64_t{g} * value_dim + j] *= squared;
    }
    s.weight *= factor;
    s.omega *= factor;
    s.omega_squared *= squared;
    s.spread *= squared;
    s.spread_square *= squared;
    s.largest = largest;
  }

  /// Adds the sums over other tokens.
  void add(const AttendTotals& part) const {
    for (int g = 0; g < group; ++g) {
      if (part.sums[g].largest > sums[g].largest) raise(g, part.sums[g].largest);
      add_head(part, g, scale_from(part.sums[g].largest, sums[g].largest));
    }
    *read += *part.read;
    *indexed += *part.indexed;
  }

  /// Writes head g of the group to states[g] and, unless null, reports[g].
  void write(AttentionState* states, HeadReport* reports) const {
    for (int g = 0; g < group; ++g) {
      const bool empty = sums[g].weight == 0.0;
      for (int j = 0; j < value_dim; ++j) {
        states[g].out[static_cast<std::size_t>(j)] =
            empty ? 0.0F
                  : static_cast<float>(values[std::int64_t{g} * value_dim + j] / sums[g].weight);
      }
      states[g].lse =
          empty ? kEmptyLse
                : static_cast<float>(static_cast<double>(sums[g].largest) + ::log(sums[g].weight));
      if (reports != nullptr) reports[g] = report(g, states[g]);
    }
  }

 private:
  // exp(from - to); 1 where both are -inf.
  static double scale_from(float from, float to) {
    return from == to ? 1.0 : ::exp(static_cast<double>(from) - static_cast<double>(to));
  }

  void add_head(const AttendTotals& part, int g, double factor) const {
    const AttendSums& from = part.sums[g];
    AttendSums& s = sums[g];
    const double squared = factor * factor;
    for (std::int64_t i = std::int64_t{g} * value_dim; i < (g + 1) * std::int64_t{value_dim}; ++i) {
      values[i] += factor * part.values[i];
      spread_values[i] += squared * part.spread_values[i];
    }
    s.weight += factor * from.weight;
    s.omega += factor * from.omega;
    s.omega_squared += squared * from.omega_squared;
    s.spread += squared * from.spread;
    s.spread_square += squared * from.spread_square;
    s.inverse_pi += from.inverse_pi;
    s.inverse_pi_variance += from.inverse_pi_variance;
    s.exact += from.exact;
    s.drawn += from.drawn;
  }

  [[nodiscard]] HeadReport report(int g, const AttentionState& state) const {
    const AttendSums& s = sums[g];
    double cross = 0.0;
    double square = 0.0;
    for (std::size_t j = 0; j < state.out.size(); ++j) {
      const auto out = static_cast<double>(state.out[j]);
      cross += out * spread_values[std::int64_t{g} * value_dim + static_cast<std::int64_t>(j)];
      square += out * out;
    }
    // sum spread |v - out|^2, expanded; rounding may push it below 0.
    const double error = s.spread_square - 2.0 * cross + s.spread * square;
    const double relative = ::sqrt(error > 0.0 ? error : 0.0) / (s.weight * ::sqrt(square));
    const double surplus = s.inverse_pi - static_cast<double>(*indexed);
    return {.exact = s.exact,
            .drawn = s.drawn,
            .rows_read = *read,
            .indexed = *indexed,
            .effective_sample_size = s.omega_squared > 0.0
                                         ? static_cast<float>(s.omega * s.omega / s.omega_squared)
                                         : 0.0F,
            .relative_error = static_cast<float>(relative),
            .estimated_tokens = static_cast<float>(s.inverse_pi),
            .alarm = s.inverse_pi_variance > 0.0
                         ? static_cast<float>(surplus / ::sqrt(s.inverse_pi_variance))
                         : 0.0F};
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Attention of one group of query heads over exact tokens and candidates: one list, one softmax.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/state.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/estimate/estimator.hpp"
#include "magicpig/estimate/report.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Rows per tile. With 32 heads the logits fill 16 KiB, half a first-level cache.
inline constexpr int kAttendTile = 128;

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

/// Scratch of one worker.
struct AttendScratch {
  float* weights = nullptr;     // [group, kAttendTile] inner products, then logits, then weights
  float* log_pi = nullptr;      // [group, kAttendTile]
  float* correction = nullptr;  // [kAttendTile] log of the estimator's factor
  float* spread = nullptr;      // [group, kAttendTile] (1 - pi) omega^2
  float* tile = nullptr;        // [group, value_dim] weighted values of one tile
  double* values = nullptr;     // [group, value_dim] weighted values of all tiles
  double* spread_values = nullptr;  // [group, value_dim] values weighted by spread
  AttendSums* sums = nullptr;       // [group]

  [[nodiscard]] static AttendScratch carve(Arena& arena, int group, int value_dim) {
    const auto heads = static_cast<std::size_t>(group);
    const auto outputs = heads * static_cast<std::size_t>(value_dim);
    return {.weights = arena.take<float>(heads * kAttendTile),
            .log_pi = arena.take<float>(heads * kAttendTile),
            .correction = arena.take<float>(kAttendTile),
            .spread = arena.take<float>(heads * kAttendTile),
            .tile = arena.take<float>(outputs),
            .values = arena.take<double>(outputs),
            .spread_values = arena.take<double>(outputs),
            .sums = arena.take<AttendSums>(heads)};
  }
};

/// Accumulates the sum of weights and the weighted sum of values over tiles of tokens, with a
/// running maximum per head so that no exponential overflows and one pass over the rows is enough.
/// Tiles are summed in float and added up in double: the error does not grow with the number of
/// tokens. Not-a-number in a key ends up in the lse, in a value in the output.
/// Source: online softmax, Milakov and Gimelshein 2018; by tiles, Dao et al. 2022.
template <class Ops, KeyValueSource Source>
class Attend {
  using Scalar = typename Source::Scalar;
  static constexpr int kTile = kAttendTile;

 public:
  struct Input {
    const Source& key_values;
    int kv_head = 0;
    QueryGroup queries;
    float scale = 1.0F;
    bool report = false;  ///< whether to gather what HeadReport needs
  };

  Attend(const Input& input, const AttendScratch& scratch) : in_(input), s_(scratch) {
    const std::int64_t outputs = std::int64_t{in_.queries.count} * in_.key_values.value_dim();
    for (std::int64_t i = 0; i < outputs; ++i) s_.values[i] = s_.spread_values[i] = 0.0;
    for (int g = 0; g < in_.queries.count; ++g) s_.sums[g] = AttendSums{};
  }

  /// Every token of `range`, weight exp(logit).
  void add_exact(TokenRange range) {
    for (TokenId first = range.begin; first < range.end; first += kTile) {
      const int count = range.end - first < kTile ? range.end - first : kTile;
      for (int i = 0; i < count; ++i) {
        keys_[i] = in_.key_values.key(in_.kv_head, first + i);
        values_[i] = in_.key_values.value(in_.kv_head, first + i);
      }
      compute_dots(count);
      for (std::int64_t i = 0; i < std::int64_t{in_.queries.count} * count; ++i) {
        s_.weights[i] *= in_.scale;
      }
      absorb(count);
    }
    for (int g = 0; g < in_.queries.count; ++g) s_.sums[g].exact += range.size();
  }

  /// Drawn tokens, weight exp(logit) times the estimator's factor.
  template <class Inclusion, class Estimator>
  requires InclusionOver<Inclusion, Ops> && EstimatorOver<Estimator, Ops>
  void add_candidates(const Candidates<Inclusion>& candidates, const Estimator& estimator) {
    const auto total = static_cast<int>(candidates.tokens.size());
    for (int first = 0; first < total; first += kTile) {
      const int count = total - first < kTile ? total - first : kTile;
      const TokenId* tokens = candidates.tokens.data() + first;
      for (int i = 0; i < count; ++i) {
        keys_[i] = in_.key_values.key(in_.kv_head, tokens[i]);
        values_[i] = in_.key_values.value(in_.kv_head, tokens[i]);
      }
      compute_dots(count);
      for (int g = 0; g < in_.queries.count; ++g) {
        float* dots = s_.weights + std::int64_t{g} * count;
        float* log_pi = s_.log_pi + std::int64_t{g} * count;
        candidates.inclusion.template log_probability<Ops>(
            {.tokens = tokens, .dots = dots, .first = first, .count = count, .head = g}, log_pi);
        for (int i = 0; i < count; ++i) s_.correction[i] = log_pi[i];
        estimator.template log_weight<Ops>(s_.correction, count);
        for (int i = 0; i < count; ++i) dots[i] = dots[i] * in_.scale + s_.correction[i];
        if (!candidates.members.empty()) {
          drop_others(candidates.members.data() + first, g, count, dots);
        }
      }
      absorb(count);
      if (in_.report) account(candidates.members, first, count);
    }
  }

  /// What only the caller knows of a report.
  struct Totals {
    std::int64_t read = 0;     ///< rows gathered
    std::int64_t indexed = 0;  ///< tokens drawn from
  };

  /// Writes head g of the group to states[g] and, unless null, reports[g].
  void finish(AttentionState* states, HeadReport* reports, const Totals& totals) {
    const int dim = in_.key_values.value_dim();
    for (int g = 0; g < in_.queries.count; ++g) {
      const AttendSums& sums = s_.sums[g];
      const double* values = s_.values + std::int64_t{g} * dim;
      const bool empty = sums.weight == 0.0;
      for (int j = 0; j < dim; ++j) {
        states[g].out[static_cast<std::size_t>(j)] =
            empty ? 0.0F : static_cast<float>(values[j] / sums.weight);
      }
      states[g].lse =
          empty ? kEmptyLse
                : static_cast<float>(static_cast<double>(sums.largest) + ::log(sums.weight));
      if (reports == nullptr) continue;
      reports[g] = make_report(sums, states[g], s_.spread_values + std::int64_t{g} * dim);
      reports[g].rows_read = totals.read;
      reports[g].indexed = totals.indexed;
      if (sums.inverse_pi_variance > 0.0) {
        reports[g].alarm =
            static_cast<float>((sums.inverse_pi - static_cast<double>(totals.indexed)) /
                               ::sqrt(sums.inverse_pi_variance));
      }
    }
  }

 private:
  void compute_dots(int count) {
    Ops::dot_rows(Rows<Scalar>{.rows = keys_, .count = count, .dim = in_.queries.dim},
                  in_.queries.data, in_.queries.count, s_.weights);
  }

  // Candidates that only other heads drew get weight 0.
  static void drop_others(const std::uint32_t* members, int g, int count, float* logits) {
    for (int i = 0; i < count; ++i) {
      if (((members[i] >> g) & 1U) == 0) logits[i] = kEmptyLse;
    }
  }

  // Turns the tile's logits into weights and adds its values.
  void absorb(int count) {
    const int group = in_.queries.count;
    const int dim = in_.key_values.value_dim();
    for (int g = 0; g < group; ++g) {
      float* logits = s_.weights + std::int64_t{g} * count;
      rescale(g, (Ops::max)(logits, count));
      const float largest = s_.sums[g].largest;
      // All logits -inf: any finite shift keeps the weights 0 and NaN visible.
      const float shift = largest == kEmptyLse ? 0.0F : largest;
      s_.sums[g].weight += static_cast<double>(Ops::exp_sum(logits, count, shift));
    }
    add_values(s_.weights, count, s_.values, std::int64_t{group} * dim);
  }

  // sums += weights * values of the tile, for all heads.
  void add_values(const float* weights, int count, double* sums, std::int64_t outputs) {
    for (std::int64_t i = 0; i < outputs; ++i) s_.tile[i] = 0.0F;
    Ops::add_rows(Rows<Scalar>{.rows = values_, .count = count, .dim = in_.key_values.value_dim()},
                  weights, in_.queries.count, s_.tile);
    for (std::int64_t i = 0; i < outputs; ++i) sums[i] += static_cast<double>(s_.tile[i]);
  }

  // Raises the running maximum of a head, and brings its sums to the new scale.
  void rescale(int g, float tile_largest) {
    AttendSums& sums = s_.sums[g];
    if (!(tile_largest > sums.largest)) return;
    const double factor = ::exp(static_cast<double>(sums.largest - tile_largest));
    const double squared = factor * factor;
    const int dim = in_.key_values.value_dim();
    for (int j = 0; j < dim; ++j) {
      s_.values[std::int64_t{g} * dim + j] *= factor;
      s_.spread_values[std::int64_t{g} * dim + j] *= squared;
    }
    sums.weight *= factor;
    sums.omega *= factor;
    sums.omega_squared *= squared;
    sums.spread *= squared;
    sums.spread_square *= squared;
    sums.largest = tile_largest;
  }

  // Gathers the report's sums.
  void account(std::span<const std::uint32_t> members, int first, int count) {
    const int dim = in_.key_values.value_dim();
    double norms[kTile];
    for (int i = 0; i < count; ++i) {
      norms[i] = 0.0;
      for (int j = 0; j < dim; ++j) {
        const auto v = static_cast<double>(to_float(values_[i][j]));
        norms[i] += v * v;
      }
    }
    const std::uint32_t* drawn_by = members.empty() ? nullptr : members.data() + first;
    for (int g = 0; g < in_.queries.count; ++g) account_head(g, count, drawn_by, norms);
    add_values(s_.spread, count, s_.spread_values, std::int64_t{in_.queries.count} * dim);
  }

  void account_head(int g, int count, const std::uint32_t* drawn_by, const double* norms) {
    AttendSums& sums = s_.sums[g];
    for (int i = 0; i < count; ++i) {
      const std::int64_t at = std::int64_t{g} * count + i;
      const auto omega = static_cast<double>(s_.weights[at]);
      const double pi = ::exp(static_cast<double>(s_.log_pi[at]));
      const double spread = (1.0 - pi) * omega * omega;
      s_.spread[at] = static_cast<float>(spread);
      if (drawn_by != nullptr && ((drawn_by[i] >> g) & 1U) == 0) continue;
      sums.drawn += 1;
      sums.inverse_pi += 1.0 / pi;
      sums.inverse_pi_variance += (1.0 - pi) / (pi * pi);
      sums.spread += spread;
      sums.spread_square += spread * norms[i];
      if (pi >= 1.0) continue;
      sums.omega += omega;
      sums.omega_squared += omega * omega;
    }
  }

  HeadReport make_report(const AttendSums& sums, const AttentionState& state,
                         const double* spread_values) const {
    double cross = 0.0;
    double square = 0.0;
    for (std::size_t j = 0; j < state.out.size(); ++j) {
      const auto out = static_cast<double>(state.out[j]);
      cross += out * spread_values[j];
      square += out * out;
    }
    // sum spread |v - out|^2, expanded; rounding may push it below 0.
    const double error = sums.spread_square - 2.0 * cross + sums.spread * square;
    const double relative = ::sqrt(error > 0.0 ? error : 0.0) / (sums.weight * ::sqrt(square));
    return {.exact = sums.exact,
            .drawn = sums.drawn,
            .effective_sample_size =
                sums.omega_squared > 0.0
                    ? static_cast<float>(sums.omega * sums.omega / sums.omega_squared)
                    : 0.0F,
            .relative_error = static_cast<float>(relative),
            .estimated_tokens = static_cast<float>(sums.inverse_pi)};
  }

  Input in_;
  AttendScratch s_;
  const Scalar* keys_[kTile];
  const Scalar* values_[kTile];
};

}  // namespace magicpig::inline MAGICPIG_ABI

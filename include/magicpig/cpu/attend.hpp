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
#include "magicpig/cpu/attend_totals.hpp"
#include "magicpig/estimate/estimator.hpp"
#include "magicpig/estimate/report.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Rows per tile. The keys of a tile are read while its values travel from memory, and these while
/// the next keys do: 32 rows of 256 bytes are 8 KiB each, about a microsecond of memory bandwidth.
/// Of 32, 48, 64, 96 and 128 rows 32 is the fastest at one head per group (bench: decode/exact).
inline constexpr int kAttendTile = 32;

/// Scratch of one worker.
struct AttendScratch {
  float* weights = nullptr;      // [group, kAttendTile] inner products, then logits, then weights
  float* log_pi = nullptr;       // [group, kAttendTile]
  float* correction = nullptr;   // [kAttendTile] log of the estimator's factor
  float* spread = nullptr;       // [group, kAttendTile] (1 - pi) omega^2
  float* recent = nullptr;       // [group, value_dim] weighted values not yet in `values`
  double* values = nullptr;      // [group, value_dim] weighted values
  float* spread_tile = nullptr;  // [group, value_dim] values of one tile weighted by spread

  [[nodiscard]] static AttendScratch carve(Arena& arena, int group, int value_dim) {
    const auto heads = static_cast<std::size_t>(group);
    const auto outputs = heads * static_cast<std::size_t>(value_dim);
    return {.weights = arena.take<float>(heads * kAttendTile),
            .log_pi = arena.take<float>(heads * kAttendTile),
            .correction = arena.take<float>(heads * kAttendTile),
            .spread = arena.take<float>(heads * kAttendTile),
            .recent = arena.take<float>(outputs),
            .spread_tile = arena.take<float>(outputs)};
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
  static constexpr int kRecentRows = 256;  // summed in float before they are added up in double

 public:
  struct Input {
    const Source& key_values;
    int kv_head = 0;
    QueryGroup queries;
    float scale = 1.0F;
    bool report = false;  ///< whether to gather what HeadReport needs
  };

  /// Clears `totals`, to which everything is added.
  Attend(const Input& input, const AttendScratch& scratch, const AttendTotals& totals)
      : in_(input), s_(scratch), totals_(totals) {
    totals_.clear();
    const std::int64_t outputs = std::int64_t{in_.queries.count} * in_.key_values.value_dim();
    for (std::int64_t i = 0; i < outputs; ++i) s_.recent[i] = 0.0F;
  }

  /// Every token of `range`, weight exp(logit).
  void add_exact(TokenRange range) {
    const auto token_at = [&](int i) { return range.begin + i; };
    for_each_tile(range.size(), token_at, [&](int, int count) {
      for (std::int64_t i = 0; i < std::int64_t{in_.queries.count} * count; ++i) {
        s_.weights[i] *= in_.scale;
      }
      absorb(count);
    });
    for (int g = 0; g < in_.queries.count; ++g) totals_.sums[g].exact += range.size();
  }

  /// Drawn tokens, weight exp(logit) times the estimator's factor.
  template <class Inclusion, class Estimator>
  requires InclusionOver<Inclusion, Ops> && EstimatorOver<Estimator, Ops>
  void add_candidates(const Candidates<Inclusion>& candidates, const Estimator& estimator) {
    const TokenId* tokens = candidates.tokens.data();
    const auto total = static_cast<int>(candidates.tokens.size());
    const auto token_at = [&](int i) { return tokens[i]; };
    prefetch_inclusion(candidates.inclusion, tokens, total < kTile ? total : kTile);
    *totals_.read += total;
    for_each_tile(total, token_at, [&](int first, int count) {
      const int next = first + count;
      prefetch_inclusion(candidates.inclusion, tokens + next,
                         total - next < kTile ? total - next : kTile);
      const int all = in_.queries.count * count;
      candidates.inclusion.template log_probability<Ops>({.tokens = tokens + first,
                                                          .dots = s_.weights,
                                                          .first = first,
                                                          .count = count,
                                                          .head = 0,
                                                          .heads = in_.queries.count},
                                                         s_.log_pi);
      for (int i = 0; i < all; ++i) s_.correction[i] = s_.log_pi[i];
      estimator.template log_weight<Ops>(s_.correction, all);
      for (int i = 0; i < all; ++i) {
        s_.weights[i] = s_.weights[i] * in_.scale + s_.correction[i];
      }
      if (!candidates.members.empty()) drop_others(candidates.members.data() + first, count);
      absorb(count);
      if (in_.report) account(candidates.members, first, count);
    });
  }

  /// After the last tokens; then the totals are complete.
  void finish() { add_up_recent(); }

 private:
  // For each tile of `total` tokens, the i-th of which is token_at(i): computes the inner products,
  // then calls use(first, count), which reads the values. While the keys of a tile are read its
  // values are fetched into cache, and while those are read the keys of the next tile.
  template <class TokenAt, class Use>
  void for_each_tile(int total, const TokenAt& token_at, const Use& use) {
    next_keys_ = point_at_keys(0, total, token_at);
    for (int first = 0; first < total; first += kTile) {
      const Rows<Scalar> keys{.rows = next_keys_.rows,
                              .count = next_keys_.count,
                              .dim = next_keys_.dim,
                              .next = &values_};
      values_ = {.rows = value_rows_, .count = keys.count, .dim = in_.key_values.value_dim()};
      for (int i = 0; i < keys.count; ++i) {
        value_rows_[i] = in_.key_values.value(in_.kv_head, token_at(first + i));
      }
      Ops::dot_rows(keys, in_.queries.data, in_.queries.count, s_.weights);
      next_keys_ = point_at_keys(first + kTile, total, token_at);
      use(first, keys.count);
    }
  }

  template <class TokenAt>
  Rows<Scalar> point_at_keys(int first, int total, const TokenAt& token_at) {
    const int rest = total > first ? total - first : 0;
    const int count = rest < kTile ? rest : kTile;
    for (int i = 0; i < count; ++i) {
      key_rows_[i] = in_.key_values.key(in_.kv_head, token_at(first + i));
    }
    return {.rows = key_rows_, .count = count, .dim = in_.queries.dim};
  }

  // Candidates that only other heads drew get weight 0.
  void drop_others(const std::uint32_t* members, int count) {
    for (int g = 0; g < in_.queries.count; ++g) {
      float* logits = s_.weights + std::int64_t{g} * count;
      for (int i = 0; i < count; ++i) {
        if (((members[i] >> g) & 1U) == 0) logits[i] = kEmptyLse;
      }
    }
  }

  // Turns the tile's logits into weights and adds its values.
  void absorb(int count) {
    for (int g = 0; g < in_.queries.count; ++g) {
      float* logits = s_.weights + std::int64_t{g} * count;
      const float tile_largest = (Ops::max)(logits, count);
      if (tile_largest > totals_.sums[g].largest) {
        add_up_recent();
        totals_.raise(g, tile_largest);
      }
      const float largest = totals_.sums[g].largest;
      // All logits -inf: any finite shift keeps the weights 0 and NaN visible.
      const float shift = largest == kEmptyLse ? 0.0F : largest;
      totals_.sums[g].weight += static_cast<double>(Ops::exp_sum(logits, count, shift));
    }
    if (recent_rows_ + count > kRecentRows) add_up_recent();
    recent_rows_ += count;
    values_.next = &next_keys_;
    Ops::add_rows(values_, s_.weights, in_.queries.count, s_.recent);
  }

  void add_up_recent() {
    const std::int64_t outputs = std::int64_t{in_.queries.count} * in_.key_values.value_dim();
    for (std::int64_t i = 0; i < outputs; ++i) {
      totals_.values[i] += static_cast<double>(s_.recent[i]);
      s_.recent[i] = 0.0F;
    }
    recent_rows_ = 0;
  }

  // Gathers the report's sums.
  void account(std::span<const std::uint32_t> members, int first, int count) {
    const int dim = in_.key_values.value_dim();
    double norms[kTile];
    for (int i = 0; i < count; ++i) {
      norms[i] = 0.0;
      for (int j = 0; j < dim; ++j) {
        const auto v = static_cast<double>(scalar_at(value_rows_[i], j));
        norms[i] += v * v;
      }
    }
    const std::uint32_t* drawn_by = members.empty() ? nullptr : members.data() + first;
    for (int g = 0; g < in_.queries.count; ++g) account_head(g, count, drawn_by, norms);
    const std::int64_t outputs = std::int64_t{in_.queries.count} * dim;
    for (std::int64_t i = 0; i < outputs; ++i) s_.spread_tile[i] = 0.0F;
    Ops::add_rows(values_, s_.spread, in_.queries.count, s_.spread_tile);
    for (std::int64_t i = 0; i < outputs; ++i) {
      totals_.spread_values[i] += static_cast<double>(s_.spread_tile[i]);
    }
  }

  void account_head(int g, int count, const std::uint32_t* drawn_by, const double* norms) {
    AttendSums& sums = totals_.sums[g];
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

  Input in_;
  AttendScratch s_;
  AttendTotals totals_;
  int recent_rows_ = 0;  // in recent
  Rows<Scalar> next_keys_;
  Rows<Scalar> values_;
  const Scalar* key_rows_[kTile];
  const Scalar* value_rows_[kTile];
};

}  // namespace magicpig::inline MAGICPIG_ABI

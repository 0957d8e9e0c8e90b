// SPDX-License-Identifier: Apache-2.0
// What models do to a logit beside scaling it.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The logit of token t for query head h is
///   l = cap(scale q.k) + slope_h (p_t - p_q),   cap(x) = soft_cap tanh(x / soft_cap),
/// with positions p of token and query, and a head's sink adds exp(sink_h) to its normaliser,
/// without a value. All of it changes the weight of a token that was read and never the probability
/// of reading it, which goes by q.k: sums stay unbiased, and where caps and slopes reorder tokens
/// much, rows are spent less well.
/// Source: Gemma 2 (soft cap), Press et al. 2022 (ALiBi), gpt-oss (learned sinks); in this order,
/// as ggml has them.
struct LogitTerms {
  float soft_cap = 0.0F;                     ///< above 0, or 0 for none
  std::span<const float> alibi_slopes = {};  ///< [query_heads], or empty for none
  /// [query_heads] logits of sinks, -inf where a head has none; or empty. Part of the output's lse:
  /// where states are merged, one of them may have sinks.
  std::span<const float> sink_logits = {};

  /// Error: sizes that are not `query_heads`, numbers that are not finite or out of bounds.
  [[nodiscard]] Status check(std::size_t query_heads) const noexcept {
    if (!(std::isfinite(soft_cap) && soft_cap >= 0.0F)) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "soft_cap %g must be above 0, or 0 for none",
                           static_cast<double>(soft_cap));
    }
    if ((!alibi_slopes.empty() && alibi_slopes.size() != query_heads) ||
        (!sink_logits.empty() && sink_logits.size() != query_heads)) {
      return Status::error(
          ErrorCode::kShapeMismatch,
          "%zu alibi_slopes and %zu sink_logits: %zu query heads need one each, or "
          "none at all",
          alibi_slopes.size(), sink_logits.size(), query_heads);
    }
    for (std::size_t h = 0; h < alibi_slopes.size(); ++h) {
      if (std::isfinite(alibi_slopes[h])) continue;
      return Status::error(ErrorCode::kNonFinite, "the ALiBi slope of head %zu is not finite", h);
    }
    for (std::size_t h = 0; h < sink_logits.size(); ++h) {
      if (std::isfinite(sink_logits[h]) || (std::isinf(sink_logits[h]) && sink_logits[h] < 0.0F)) {
        continue;
      }
      return Status::error(ErrorCode::kNonFinite,
                           "the sink logit of head %zu must be finite, or -inf for none", h);
    }
    return Status();
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// TopP: as many tokens as hold a share of the softmax, deterministic and therefore biased.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/index.hpp"
#include "magicpig/sample/exact_scores.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/sample/softmax.hpp"
#include "magicpig/sample/token_scores.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Each query head takes the fewest indexed tokens whose softmax, over the indexed range, comes to
/// at least p; ties go to the older token. How many rows that are is the query's affair: a peaked
/// head reads few, a flat one most of them, and there is no bound but the range.
///
/// With exact logits, the default, the estimate misses (1 - M)(o_top - o_rest), M >= p the softmax
/// mass kept; with estimates of them p is a share of estimated mass and promises nothing.
/// Source: top-p sparse attention on estimated weights, Twilight, Lin et al. 2025; there estimates
/// are of 4-bit keys and of a quarter of the tokens, here CodeScores and of all.
template <class Scores = ExactScores>
class TopP {
  static_assert(Scores::kLogits, "a softmax of these scores means nothing");

 public:
  static constexpr bool kUnbiased = false;

  /// Error: p outside (0, 1].
  [[nodiscard]] static Result<TopP> create(double p, const Scores& scores = {}) noexcept {
    if (!(p > 0.0 && p <= 1.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "p %g must lie in (0, 1]", p);
    }
    return TopP(p, scores);
  }

  /// Error: an index that the scores are not for.
  template <Index I>
  [[nodiscard]] Status supports(const I& index) const noexcept {
    return supported_by(scores_, index);
  }

  struct Scratch {
    typename Scores::Scratch scores;
    double* probabilities = nullptr;  // [n] of one head
    TokenId* order = nullptr;         // [n]
    ChosenTokens::Scratch chosen;
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto n = static_cast<std::size_t>(limits.tokens);
    return {.scores = scores_.carve(arena, limits),
            .probabilities = arena.take<double>(n),
            .order = arena.take<TokenId>(n),
            .chosen = ChosenTokens::carve(arena, limits, limits.tokens)};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<ConstantInclusion> draw(const DrawInput<Source, Index>& input,
                                                   Scratch& scratch) const {
    static_assert(TokenScoresOver<Scores, Ops, Source, Index>);
    const TokenRange range = input.index.indexed();
    const TokenId n = range.size();
    const TokenId present = input.present();
    const float* scores = scores_.template compute<Ops>(input, scratch.scores);
    ChosenTokens chosen(range, scratch.chosen);
    for (int g = 0; g < input.queries.count; ++g) {
      const float* own = scores + std::int64_t{g} * n;
      rank_tokens(own, n, present, scratch.order, input.gone, range.begin);
      softmax(own, n, input.scale, scratch.probabilities, input.gone, range.begin);
      double mass = 0.0;
      for (TokenId r = 0; r < present && !(mass >= p_); ++r) {
        mass += scratch.probabilities[scratch.order[r]];
        chosen.add(scratch.order[r], g);
      }
    }
    return chosen.candidates(score_bytes<Scores>(input));
  }

 private:
  TopP(double p, const Scores& scores) : p_(p), scores_(scores) {}

  double p_;
  Scores scores_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

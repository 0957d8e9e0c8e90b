// SPDX-License-Identifier: Apache-2.0
// TopK: the tokens of largest score, deterministic and therefore biased.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/index.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/exact_scores.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/sample/token_scores.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Each query head takes its own tokens of largest score, by default q.k, rank by rank in turn with
/// the other heads of the group, until the union holds `budget` tokens; ties go to the older token.
/// Tokens left out have probability 0: the estimate misses (1 - M)(o_top - o_rest), M the softmax
/// mass kept.
template <class Scores = ExactScores>
class TopK {
 public:
  static constexpr bool kUnbiased = false;

  /// Error: as Budget::check().
  [[nodiscard]] static Result<TopK> create(const Budget& budget,
                                           const Scores& scores = {}) noexcept {
    const Status status = budget.check();
    if (!status.ok()) return status;
    return TopK(budget, scores);
  }

  /// Error: an index that the scores are not for.
  template <Index I>
  [[nodiscard]] Status supports(const I& index) const noexcept {
    return supported_by(scores_, index);
  }

  struct Scratch {
    typename Scores::Scratch scores;
    TokenId* order = nullptr;   // [n]
    TokenId* ranked = nullptr;  // [group, budget]
    ChosenTokens::Scratch chosen;
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const TokenId rows = budget_.of(limits.tokens);
    return {.scores = scores_.carve(arena, limits),
            .order = arena.take<TokenId>(static_cast<std::size_t>(limits.tokens)),
            .ranked = arena.take<TokenId>(static_cast<std::size_t>(rows) *
                                          static_cast<std::size_t>(limits.group)),
            .chosen = ChosenTokens::carve(arena, limits, rows)};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<ConstantInclusion> draw(const DrawInput<Source, Index>& input,
                                                   Scratch& scratch) const {
    static_assert(TokenScoresOver<Scores, Ops, Source, Index>);
    const TokenRange range = input.index.indexed();
    const TokenId n = range.size();
    const TokenId rows = budget_.of(input.present());
    const int group = input.queries.count;
    const float* scores = scores_.template compute<Ops>(input, scratch.scores);
    for (int g = 0; g < group; ++g) {
      rank_tokens(scores + std::int64_t{g} * n, n, rows, scratch.order, input.gone, range.begin);
      std::copy(scratch.order, scratch.order + rows, scratch.ranked + std::int64_t{g} * rows);
    }
    ChosenTokens chosen(range, scratch.chosen);
    choose(rows, group, scratch.ranked, chosen);
    return chosen.candidates(score_bytes<Scores>(input));
  }

 private:
  TopK(const Budget& budget, const Scores& scores) : budget_(budget), scores_(scores) {}

  static void choose(TokenId rows, int group, const TokenId* ranked, ChosenTokens& chosen) {
    for (TokenId r = 0; r < rows; ++r) {
      for (int g = 0; g < group; ++g) {
        const TokenId token = ranked[std::int64_t{g} * rows + r];
        if (!chosen.has(token) && chosen.count() == rows) return;
        chosen.add(token, g);
      }
    }
  }

  Budget budget_;
  Scores scores_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

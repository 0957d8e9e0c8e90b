// SPDX-License-Identifier: Apache-2.0
// Exact TopK: the tokens of largest logit, deterministic and therefore biased.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/exact_scores.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Each query head takes its own tokens of largest q.k, rank by rank in turn with the other heads
/// of the group, until the union holds `budget` tokens; ties go to the older token. Tokens left out
/// have probability 0: the estimate misses (1 - M)(o_top - o_rest), M the softmax mass kept.
class TopK {
 public:
  static constexpr bool kUnbiased = false;

  /// Error: as Budget::check().
  [[nodiscard]] static Result<TopK> create(const Budget& budget) noexcept {
    const Status status = budget.check();
    if (!status.ok()) return status;
    return TopK(budget);
  }

  struct Scratch {
    ExactScores::Scratch scores;
    TokenId* order = nullptr;          // [n]
    TokenId* ranked = nullptr;         // [group, budget]
    std::uint32_t* chosen = nullptr;   // [n] members by token
    TokenId* tokens = nullptr;         // [budget]
    std::uint32_t* members = nullptr;  // [budget]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto n = static_cast<std::size_t>(limits.tokens);
    const auto rows = static_cast<std::size_t>(budget_.of(limits.tokens));
    return {.scores = ExactScores::carve(arena, limits),
            .order = arena.take<TokenId>(n),
            .ranked = arena.take<TokenId>(rows * static_cast<std::size_t>(limits.group)),
            .chosen = arena.take<std::uint32_t>(n),
            .tokens = arena.take<TokenId>(rows),
            .members = arena.take<std::uint32_t>(rows)};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<ConstantInclusion> draw(const DrawInput<Source, Index>& input,
                                                   Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const TokenId n = range.size();
    const TokenId rows = budget_.of(n);
    const int group = input.queries.count;
    const float* dots = ExactScores::compute<Ops>(input, scratch.scores);
    for (int g = 0; g < group; ++g) {
      rank(dots + std::int64_t{g} * n, n, rows, scratch.order);
      std::copy(scratch.order, scratch.order + rows, scratch.ranked + std::int64_t{g} * rows);
    }
    choose(n, rows, group, scratch);
    std::size_t count = 0;
    for (TokenId i = 0; i < n; ++i) {
      if (scratch.chosen[i] == 0) continue;
      scratch.tokens[count] = range.begin + i;
      scratch.members[count++] = scratch.chosen[i];
    }
    return {.tokens = {scratch.tokens, count},
            .members = {scratch.members, count},
            .inclusion = {.log_pi = 0.0F}};
  }

 private:
  explicit TopK(const Budget& budget) : budget_(budget) {}

  // order[0, rows) = tokens by falling dot, then rising id.
  static void rank(const float* dots, TokenId n, TokenId rows, TokenId* order) {
    for (TokenId i = 0; i < n; ++i) order[i] = i;
    std::partial_sort(order, order + rows, order + n, [dots](TokenId a, TokenId b) {
      return dots[a] > dots[b] || (dots[a] == dots[b] && a < b);
    });
  }

  static void choose(TokenId n, TokenId rows, int group, Scratch& scratch) {
    std::fill(scratch.chosen, scratch.chosen + n, 0U);
    TokenId taken = 0;
    for (TokenId r = 0; r < rows; ++r) {
      for (int g = 0; g < group; ++g) {
        std::uint32_t& members = scratch.chosen[scratch.ranked[std::int64_t{g} * rows + r]];
        if (members == 0 && taken == rows) return;
        taken += members == 0 ? 1 : 0;
        members |= 1U << g;
      }
    }
  }

  Budget budget_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

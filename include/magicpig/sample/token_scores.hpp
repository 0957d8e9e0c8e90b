// SPDX-License-Identifier: Apache-2.0
// Scores: what a method that selects tokens ranks them by, and the ranking.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A number for each query head of a group and each indexed token of its KV head, the larger the
/// more the token is wanted: head g, token indexed().begin + i at [g * n + i], n =
/// indexed().size(). Models: ExactScores, CodeScores, PageScores, SoftCollisions, AgreementScores,
/// LabelScores, ClusterScores. Immutable; `carve` takes scratch from an arena, `compute` fills it.
/// What reads scores takes any of them: TopK, TopP.
///
/// kLogits says that a score estimates q.k, unscaled, but for what all tokens share, so that
/// a softmax of the scores estimates that of the logits.
template <class S, class Ops, class Source, class Index>
concept TokenScoresOver = requires(const S& scores, Arena& arena, const DrawLimits& limits,
                                   const DrawInput<Source, Index>& input,
                                   const typename S::Scratch& scratch) {
  { S::kLogits } -> std::convertible_to<bool>;
  { scores.carve(arena, limits) } -> std::same_as<typename S::Scratch>;
  { scores.template compute<Ops>(input, scratch) } -> std::same_as<const float*>;
};

/// Bytes that computing scores reads, each once: what they say themselves, or all that the index
/// keeps for them.
template <class Scores, class Input>
[[nodiscard]] std::int64_t score_bytes(const Input& input) {
  if constexpr (requires { Scores::bytes(input); }) {
    return Scores::bytes(input);
  } else if constexpr (requires { input.index.scan_bytes(); }) {
    return input.index.scan_bytes();
  } else {
    return 0;
  }
}

/// order[0, ranks) = the numbers of the largest of n scores, largest first. Ties go to the older
/// token; a score that is not a number is the least of all. Tokens that `gone` has, scores[i] being
/// that of token first + i, are left out: `ranks` is at most the number of the others. The rest of
/// `order`, [n], is scratch.
inline void rank_tokens(const float* scores, TokenId n, TokenId ranks, TokenId* order,
                        const TokenMask& gone = {}, TokenId first = 0) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  const auto value = [scores](TokenId i) {
    const float score = scores[i];
    return score == score ? score : kLeast;
  };
  TokenId count = 0;
  for (TokenId i = 0; i < n; ++i) {
    order[count] = i;
    count += gone.any() && gone.has(first + i) ? 0 : 1;
  }
  std::partial_sort(order, order + ranks, order + count, [&](TokenId a, TokenId b) {
    return value(a) > value(b) || (value(a) == value(b) && a < b);
  });
}

/// Which heads of a group take which of the indexed tokens, and these as candidates.
class ChosenTokens {
 public:
  struct Scratch {
    std::uint32_t* chosen = nullptr;   // [n] members by token
    TokenId* tokens = nullptr;         // [most]
    std::uint32_t* members = nullptr;  // [most]
  };

  /// For up to `most` tokens.
  [[nodiscard]] static Scratch carve(Arena& arena, const DrawLimits& limits, TokenId most) {
    const auto rows = static_cast<std::size_t>(most);
    return {.chosen = arena.take<std::uint32_t>(static_cast<std::size_t>(limits.tokens)),
            .tokens = arena.take<TokenId>(rows),
            .members = arena.take<std::uint32_t>(rows)};
  }

  ChosenTokens(TokenRange range, const Scratch& scratch) : range_(range), scratch_(scratch) {
    std::fill(scratch_.chosen, scratch_.chosen + range_.size(), 0U);
  }

  /// Token range.begin + i for `head`.
  void add(TokenId i, int head) {
    std::uint32_t& members = scratch_.chosen[i];
    count_ += members == 0 ? 1 : 0;
    members |= 1U << head;
  }
  [[nodiscard]] bool has(TokenId i) const { return scratch_.chosen[i] != 0; }
  /// Tokens so far.
  [[nodiscard]] TokenId count() const { return count_; }

  /// Each is read for certain, by the heads that took it; `bytes` were read to choose them.
  [[nodiscard]] Candidates<ConstantInclusion> candidates(std::int64_t bytes) const {
    std::size_t count = 0;
    for (TokenId i = 0; i < range_.size(); ++i) {
      if (scratch_.chosen[i] == 0) continue;
      scratch_.tokens[count] = range_.begin + i;
      scratch_.members[count++] = scratch_.chosen[i];
    }
    return {.tokens = {scratch_.tokens, count},
            .members = {scratch_.members, count},
            .inclusion = {.log_pi = 0.0F},
            .index_bytes = bytes};
  }

 private:
  TokenRange range_;
  Scratch scratch_;
  TokenId count_ = 0;
};

}  // namespace magicpig::inline MAGICPIG_ABI

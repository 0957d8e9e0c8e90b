// SPDX-License-Identifier: Apache-2.0
// Oracle sampling: tokens drawn with their true softmax probabilities, the bound for every sampler.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/exact_scores.hpp"
#include "magicpig/sample/softmax.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// One Poisson draw for the whole group: every indexed token independently with pi = min(1, s /
/// tau), s the sum over the group of its softmax probabilities in the indexed range, tau such that
/// the expected number of tokens is the budget. All heads use every drawn token.
/// Source: Horvitz and Thompson 1952; pi proportional to size, Hajek 1964.
class OraclePoisson {
 public:
  static constexpr bool kUnbiased = true;

  /// Error: as Budget::check().
  [[nodiscard]] static Result<OraclePoisson> create(const Budget& budget) noexcept {
    const Status status = budget.check();
    if (!status.ok()) return status;
    return OraclePoisson(budget);
  }

  struct Scratch {
    ExactScores::Scratch scores;
    double* probabilities = nullptr;  // [n] of one head
    double* size = nullptr;           // [n] summed over the group
    TokenId* tokens = nullptr;        // [n]
    float* log_pi = nullptr;          // [n]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto n = static_cast<std::size_t>(limits.tokens);
    return {.scores = ExactScores::carve(arena, limits),
            .probabilities = arena.take<double>(n),
            .size = arena.take<double>(n),
            .tokens = arena.take<TokenId>(n),
            .log_pi = arena.take<float>(n)};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<KnownInclusion> draw(const DrawInput<Source, Index>& input,
                                                Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const TokenId n = range.size();
    const float* dots = ExactScores::compute<Ops>(input, scratch.scores);
    std::fill(scratch.size, scratch.size + n, 0.0);
    for (int g = 0; g < input.queries.count; ++g) {
      softmax(dots + std::int64_t{g} * n, n, input.scale, scratch.probabilities, input.gone,
              range.begin);
      for (TokenId i = 0; i < n; ++i) scratch.size[i] += scratch.probabilities[i];
    }
    const TokenId present = input.present();
    const double tau =
        budget_.of(present) < present ? threshold(scratch.size, n, budget_.of(present)) : 0.0;
    const RandomStream stream = input.noise_for(Purpose::kPoisson);
    std::size_t count = 0;
    for (TokenId i = 0; i < n; ++i) {
      const double pi = scratch.size[i] < tau ? scratch.size[i] / tau : 1.0;
      if (stream.uniform(static_cast<std::uint32_t>(i)) > pi) continue;
      if (input.gone.has(range.begin + i)) continue;
      scratch.tokens[count] = range.begin + i;
      scratch.log_pi[count++] = static_cast<float>(::log(pi));
    }
    return {.tokens = {scratch.tokens, count},
            .members = {},
            .inclusion = {.log_pi = scratch.log_pi},
            .index_bytes = ExactScores::bytes(input)};
  }

 private:
  explicit OraclePoisson(const Budget& budget) : budget_(budget) {}

  // tau with sum_i min(1, size_i / tau) = rows. Tokens above tau are certain; removing them lowers
  // tau, until no more are found.
  static double threshold(const double* size, TokenId n, TokenId rows) {
    double tau = std::numeric_limits<double>::infinity();
    for (;;) {
      TokenId certain = 0;
      double rest = 0.0;
      for (TokenId i = 0; i < n; ++i) {
        certain += size[i] >= tau ? 1 : 0;
        rest += size[i] >= tau ? 0.0 : size[i];
      }
      const double lower = rest / (rows - certain);
      if (certain >= rows || !(lower < tau)) return tau;
      tau = lower;
    }
  }

  Budget budget_;
};

/// Independent draws with replacement from each head's softmax over the indexed range. A token
/// drawn c times of B weighs c / (B p): its log pi here is log(B p / c). Reads at most B rows per
/// head, fewer as draws repeat.
/// Source: Chen et al. 2024, definition 3.1 (oracle sampling).
class OracleMultinomial {
 public:
  static constexpr bool kUnbiased = true;

  /// `draws` is the budget of the group, shared equally by its heads, at least 1 each. Error: as
  /// Budget::check().
  [[nodiscard]] static Result<OracleMultinomial> create(const Budget& draws) noexcept {
    const Status status = draws.check();
    if (!status.ok()) return status;
    return OracleMultinomial(draws);
  }

  struct Scratch {
    ExactScores::Scratch scores;
    double* cumulative = nullptr;      // [n]
    float* log_share = nullptr;        // [group, n] log(p / c)
    std::uint32_t* drawn = nullptr;    // [n] counts of one head
    std::uint32_t* chosen = nullptr;   // [n] members by token
    TokenId* tokens = nullptr;         // [n]
    std::uint32_t* members = nullptr;  // [n]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto n = static_cast<std::size_t>(limits.tokens);
    return {.scores = ExactScores::carve(arena, limits),
            .cumulative = arena.take<double>(n),
            .log_share = arena.take<float>(n * static_cast<std::size_t>(limits.group)),
            .drawn = arena.take<std::uint32_t>(n),
            .chosen = arena.take<std::uint32_t>(n),
            .tokens = arena.take<TokenId>(n),
            .members = arena.take<std::uint32_t>(n)};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<KnownInclusion> draw(const DrawInput<Source, Index>& input,
                                                Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const TokenId n = range.size();
    if (n == 0) return {};
    const float* dots = ExactScores::compute<Ops>(input, scratch.scores);
    std::fill(scratch.chosen, scratch.chosen + n, 0U);
    for (int g = 0; g < input.queries.count; ++g) {
      softmax(dots + std::int64_t{g} * n, n, input.scale, scratch.cumulative, input.gone,
              range.begin);
      draw_head(input, g, n, scratch);
    }
    std::size_t count = 0;  // compact the shares to the chosen tokens, which only moves them down
    for (TokenId i = 0; i < n; ++i) {
      if (scratch.chosen[i] == 0) continue;
      for (int g = 0; g < input.queries.count; ++g) {
        const std::int64_t row = std::int64_t{g} * n;
        scratch.log_share[row + static_cast<std::int64_t>(count)] = scratch.log_share[row + i];
      }
      scratch.tokens[count] = range.begin + i;
      scratch.members[count++] = scratch.chosen[i];
    }
    return {.tokens = {scratch.tokens, count},
            .members = {scratch.members, count},
            .inclusion = {.log_pi = scratch.log_share, .stride = n},
            .index_bytes = ExactScores::bytes(input)};
  }

 private:
  explicit OracleMultinomial(const Budget& draws) : draws_(draws) {}

  // Draws one head's tokens; scratch.cumulative holds its probabilities and is summed up here.
  template <class Source, class Index>
  void draw_head(const DrawInput<Source, Index>& input, int g, TokenId n, Scratch& scratch) const {
    const TokenId each = draws_.of(input.present()) / input.queries.count;
    const TokenId draws = each > 0 ? each : 1;
    const RandomStream stream = input.noise_for(Purpose::kMultinomial);
    for (TokenId i = 1; i < n; ++i) scratch.cumulative[i] += scratch.cumulative[i - 1];
    std::fill(scratch.drawn, scratch.drawn + n, 0U);
    for (TokenId d = 0; d < draws; ++d) {
      const double u =
          stream.uniform(static_cast<std::uint32_t>(g * draws + d)) * scratch.cumulative[n - 1];
      ++scratch.drawn[std::lower_bound(scratch.cumulative, scratch.cumulative + n, u) -
                      scratch.cumulative];
    }
    for (TokenId i = 0; i < n; ++i) {
      float& share = scratch.log_share[std::int64_t{g} * n + i];
      share = 0.0F;
      if (scratch.drawn[i] == 0) continue;
      const double p = scratch.cumulative[i] - (i > 0 ? scratch.cumulative[i - 1] : 0.0);
      scratch.chosen[i] |= 1U << g;
      share = static_cast<float>(::log(p * draws / scratch.drawn[i]));
    }
  }

  Budget draws_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

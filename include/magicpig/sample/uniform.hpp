// SPDX-License-Identifier: Apache-2.0
// Uniform sampling without replacement: every indexed token with the same, known probability.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Draws m = budget tokens of the n indexed ones, all subsets of that size equally likely; one draw
/// for the whole group, fresh for every noise key. pi = m / n.
/// Source: Floyd's algorithm, Bentley and Floyd 1987: m random numbers and a bit set of n.
class Uniform {
 public:
  static constexpr bool kUnbiased = true;

  /// Error: a budget below one token or above the whole range's fraction 1.
  [[nodiscard]] static Result<Uniform> create(const Budget& budget) noexcept {
    const Status status = budget.check();
    if (!status.ok()) return status;
    return Uniform(budget);
  }

  struct Scratch {
    std::uint64_t* drawn = nullptr;  // bit set over the range
    TokenId* tokens = nullptr;       // [budget]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto words = static_cast<std::size_t>(limits.tokens) / 64 + 1;
    return {.drawn = arena.take<std::uint64_t>(words),
            .tokens = arena.take<TokenId>(static_cast<std::size_t>(budget_.of(limits.tokens)))};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<ConstantInclusion> draw(const DrawInput<Source, Index>& input,
                                                   Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const TokenId n = range.size();
    const TokenId m = budget_.of(n);
    mark(input, n, m, scratch.drawn);
    std::size_t count = 0;
    for (TokenId word = 0; std::int64_t{word} * 64 < n; ++word) {
      for (std::uint64_t bits = scratch.drawn[word]; bits != 0; bits &= bits - 1) {
        scratch.tokens[count++] = range.begin + word * 64 + std::countr_zero(bits);
      }
    }
    const double pi = n > 0 ? static_cast<double>(m) / n : 1.0;
    return {.tokens = {scratch.tokens, count},
            .members = {},
            .inclusion = {.log_pi = static_cast<float>(::log(pi))}};
  }

  /// m / n for a range of n tokens: the probability with which each is drawn.
  [[nodiscard]] double probability(TokenId n) const {
    return n > 0 ? static_cast<double>(budget_.of(n)) / n : 1.0;
  }

 private:
  explicit Uniform(const Budget& budget) : budget_(budget) {}

  template <class Source, class Index>
  static void mark(const DrawInput<Source, Index>& input, TokenId n, TokenId m,
                   std::uint64_t* drawn) {
    const RandomStream stream = input.noise_for(Purpose::kUniform);
    std::memset(drawn, 0, (static_cast<std::size_t>(n) / 64 + 1) * sizeof *drawn);
    for (TokenId last = n - m; last < n; ++last) {
      const std::uint32_t any =
          stream.below(static_cast<std::uint32_t>(last), static_cast<std::uint32_t>(last) + 1);
      const std::uint64_t bit = std::uint64_t{1} << (any % 64);
      const bool taken = (drawn[any / 64] & bit) != 0;
      const auto pick = taken ? static_cast<std::uint32_t>(last) : any;
      drawn[pick / 64] |= std::uint64_t{1} << (pick % 64);
    }
  }

  Budget budget_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

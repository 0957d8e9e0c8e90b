// SPDX-License-Identifier: Apache-2.0
// A uniform tail: what another sampler or selection finds is certain, all else is drawn alike.
#pragma once

#include <math.h>

#include <cstddef>
#include <utility>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/index.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/sample/uniform.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Tokens that `Finder` draws (TopK, Collisions, anything) count once, for all heads of the group;
/// of the others m = budget are drawn uniformly, pi = m / others.
///
/// Unbiased given what was found, however it was found: with tables, unlike their own draws, step
/// by step and not only in the mean over tables, so that a promise may rest on it. The price is
/// that the weights of tokens which the finder misses are those of a uniform sample (evidence:
/// twelve times the variance of the defensive union at equal cost where tables miss many).
template <class Finder>
class UniformTail {
 public:
  static constexpr bool kUnbiased = true;
  static constexpr bool kVerifiable = true;

  /// Error: as Budget::check() for the tail's.
  [[nodiscard]] static Result<UniformTail> create(Finder finder, const Budget& tail) noexcept {
    const Status status = tail.check();
    if (!status.ok()) return status;
    return UniformTail(std::move(finder), tail);
  }

  /// As the finder's.
  template <class Index>
  [[nodiscard]] Status supports(const Index& index) const noexcept {
    return supported_by(finder_, index);
  }

  struct Scratch {
    typename Finder::Scratch finder;
    TokenSet::Scratch drawn;
    TokenId* tokens = nullptr;  // [limits.tokens]
    float* log_pi = nullptr;    // [limits.tokens]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto tokens = static_cast<std::size_t>(limits.tokens);
    return {.finder = finder_.carve(arena, limits),
            .drawn = TokenSet::carve(arena, limits.tokens),
            .tokens = arena.take<TokenId>(tokens),
            .log_pi = arena.take<float>(tokens)};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<KnownInclusion> draw(const DrawInput<Source, Index>& input,
                                                Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const auto found = finder_.template draw<Ops>(input, scratch.finder);
    TokenSet drawn(range.size(), scratch.drawn);
    drawn.add(input.gone, range.begin);
    for (const TokenId token : found.tokens) drawn.add(token - range.begin);
    const TokenId others = range.size() - drawn.count();
    const TokenId tail = tail_.of(others, input.doublings);
    drawn.pick(input.noise_for(Purpose::kUniform), tail);
    const float log_pi =
        others > 0 ? static_cast<float>(::log(static_cast<double>(tail) / others)) : 0.0F;
    std::size_t count = 0;
    std::size_t next = 0;  // of those found
    drawn.for_each([&](TokenId i) {
      if (input.gone.has(range.begin + i)) return;
      const bool certain = next < found.tokens.size() && found.tokens[next] == range.begin + i;
      next += certain ? 1U : 0U;
      scratch.tokens[count] = range.begin + i;
      scratch.log_pi[count++] = certain ? 0.0F : log_pi;
    });
    // No groups: the error is that of the tail alone.
    return {.tokens = {scratch.tokens, count},
            .members = {},
            .inclusion = {.log_pi = scratch.log_pi},
            .index_bytes = found.index_bytes};
  }

 private:
  UniformTail(Finder finder, const Budget& tail) : finder_(std::move(finder)), tail_(tail) {}

  Finder finder_;
  Budget tail_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

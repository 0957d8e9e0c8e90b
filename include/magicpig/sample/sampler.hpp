// SPDX-License-Identifier: Apache-2.0
// Samplers: anything that returns tokens with their inclusion probabilities.
#pragma once

#include <concepts>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/index.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Draws candidates of one KV head from the indexed range. Immutable; any number of threads share
/// one. `carve` takes scratch from an arena (the same code measures and carves), `draw` fills it;
/// what draw returns points into the scratch and lives until the next draw.
///
/// kUnbiased says whether every indexed token has an inclusion probability above 0 that draw
/// reports: then Horvitz-Thompson sums over the candidates are unbiased.
template <class S, class Ops, class Source, class I>
concept SamplerOver = Index<I> &&
    requires(const S& sampler, Arena& arena, const DrawLimits& limits,
             const DrawInput<Source, I>& input, typename S::Scratch& scratch) {
  { S::kUnbiased } -> std::convertible_to<bool>;
  { sampler.carve(arena, limits) } -> std::same_as<typename S::Scratch>;
  sampler.template draw<Ops>(input, scratch);
};

/// Whether a promise (estimate/promise.hpp) may rest on a sampler's draws, which its kVerifiable
/// says: sum (1 - pi) omega^2 |v - out|^2 over the draw does not fall short of the variance in the
/// mean, as for tokens drawn independently or uniformly, and a draw of more doublings for the same
/// noise contains those of fewer.
template <class S>
[[nodiscard]] constexpr bool verifiable() {
  if constexpr (requires { S::kVerifiable; }) return S::kVerifiable;
  return false;
}

/// Whether a draw tells how far it may be off: not where tokens come in clusters of which it does
/// not name the groups (TableGroups), as a sampler's kClustered says, and not where some are left
/// out.
template <class S>
[[nodiscard]] constexpr bool error_is_told() {
  if constexpr (requires { S::kClustered; }) return !S::kClustered;
  if constexpr (requires { S::kUnbiased; }) return S::kUnbiased;
  return false;
}

/// The same for one KV head, of samplers that do not draw alike for all.
template <class S>
[[nodiscard]] constexpr bool error_is_told(const S& sampler, int kv_head) {
  if constexpr (requires { sampler.error_is_told(kv_head); }) {
    return sampler.error_is_told(kv_head);
  } else {
    return error_is_told<S>();
  }
}

/// Whether a sampler can draw from an index: what its `supports(index)` says, where it has one.
/// Samplers that look at more than the range of an index have one, and decode() asks it first.
template <class Sampler, Index IndexType>
Status supported_by(const Sampler& sampler, const IndexType& index) noexcept {
  if constexpr (requires { sampler.supports(index); }) {
    return sampler.supports(index);
  } else {
    return Status();
  }
}

/// Draws nothing: with it decode() attends to every token exactly, and of an index knows only which
/// tokens were erased.
struct Exact {
  static constexpr bool kUnbiased = true;
  struct Scratch {};

  [[nodiscard]] static Scratch carve(Arena&, const DrawLimits&) { return {}; }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<ConstantInclusion> draw(const DrawInput<Source, Index>&,
                                                   Scratch&) const {
    return {};
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

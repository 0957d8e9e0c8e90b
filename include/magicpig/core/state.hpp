// SPDX-License-Identifier: Apache-2.0
// Attention states: an output with the log of its normaliser, and how two of them become one.
#pragma once

#include <math.h>

#include <cstddef>
#include <limits>
#include <span>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// log-sum-exp of the empty set.
inline constexpr float kEmptyLse = -std::numeric_limits<float>::infinity();

/// Attention of one query over some set of tokens. The memory of `out` is the host's.
struct AttentionState {
  std::span<float> out;   ///< [value_dim], normalised; zeros for the empty set
  float lse = kEmptyLse;  ///< natural log of the sum of weights; -inf for the empty set
};

/// Natural log to the base-2 lse that FlashInfer and others exchange.
[[nodiscard]] constexpr float to_base2(float lse) { return lse * 1.4426950408889634F; }
/// Base-2 lse to natural log.
[[nodiscard]] constexpr float from_base2(float lse) { return lse * 0.6931471805599453F; }

/// Adds to `into` the state of a disjoint set of tokens. Commutative and associative up to
/// rounding; the empty state is the exact identity. `part.out` has the size of `into.out` and may
/// be the same memory. Natural log. Source: Ye et al. 2024 (FlashInfer), "recursive attention".
inline void merge(AttentionState& into, const AttentionState& part) noexcept {
  if (part.lse == kEmptyLse) return;
  if (into.lse == kEmptyLse) {
    for (std::size_t i = 0; i < into.out.size(); ++i) into.out[i] = part.out[i];
    into.lse = part.lse;
    return;
  }
  const double larger = into.lse > part.lse ? into.lse : part.lse;
  const double into_weight = ::exp(into.lse - larger);
  const double part_weight = ::exp(part.lse - larger);
  const double total = into_weight + part_weight;
  const auto into_share = static_cast<float>(into_weight / total);
  const auto part_share = static_cast<float>(part_weight / total);
  for (std::size_t i = 0; i < into.out.size(); ++i) {
    into.out[i] = into_share * into.out[i] + part_share * part.out[i];
  }
  into.lse = static_cast<float>(larger + ::log(total));
}

}  // namespace magicpig::inline MAGICPIG_ABI

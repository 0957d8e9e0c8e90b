// SPDX-License-Identifier: Apache-2.0
// Quest: tokens by the largest inner product that any key of their page could have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/page_bounds.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The score of a token is its page's: sum_j max(q_j least_j, q_j largest_j), at or above q.k for
/// every key of the page, but for rounding. As one product per bound it is <max(q, 0), largest> +
/// <min(q, 0), least>. Tokens of one page tie, so that TopK takes pages from their first token on
/// and the last one in part.
/// Source: Quest, Tang et al. 2024.
class PageScores {
 public:
  static constexpr bool kLogits = false;

  /// For keys of dimension `dim`.
  explicit PageScores(int dim) : dim_(dim) {}

  /// Error: an index of another dimension.
  template <class T>
  [[nodiscard]] Status supports(const PageBounds<T>& index) const noexcept {
    if (index.dim() == dim_) return Status();
    return Status::error(ErrorCode::kShapeMismatch,
                         "the scores are made for dimension %d, the index has %d", dim_,
                         index.dim());
  }

  struct Scratch {
    float* rising = nullptr;   // [group, dim] max(q, 0)
    float* falling = nullptr;  // [group, dim] min(q, 0)
    float* above = nullptr;    // [group, kTile]
    float* below = nullptr;    // [group, kTile]
    float* scores = nullptr;   // [group, n]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    const std::size_t queries = group * static_cast<std::size_t>(dim_);
    return {.rising = arena.take<float>(queries),
            .falling = arena.take<float>(queries),
            .above = arena.take<float>(group * kTile),
            .below = arena.take<float>(group * kTile),
            .scores = arena.take<float>(group * static_cast<std::size_t>(limits.tokens))};
  }

  template <class Ops, class Source, class T>
  const float* compute(const DrawInput<Source, PageBounds<T>>& input,
                       const Scratch& scratch) const {
    const PageBounds<T>& index = input.index;
    const int group = input.queries.count;
    for (std::int64_t i = 0; i < std::int64_t{group} * dim_; ++i) {
      const float x = input.queries.data[i];
      scratch.rising[i] = x > 0.0F ? x : 0.0F;
      scratch.falling[i] = x > 0.0F ? 0.0F : x;
    }
    const TokenId n = index.indexed().size();
    const T* least[kTile];
    const T* largest[kTile];
    for (int first = 0; first < index.pages(); first += kTile) {
      const int count = index.pages() - first < kTile ? index.pages() - first : kTile;
      for (int i = 0; i < count; ++i) {
        least[i] = index.least(input.kv_head, first + i);
        largest[i] = index.largest(input.kv_head, first + i);
      }
      Ops::dot_rows(Rows<T>{.rows = largest, .count = count, .dim = dim_}, scratch.rising, group,
                    scratch.above);
      Ops::dot_rows(Rows<T>{.rows = least, .count = count, .dim = dim_}, scratch.falling, group,
                    scratch.below);
      for (int g = 0; g < group; ++g) {
        for (int i = 0; i < count; ++i) {
          const int at = g * count + i;
          const float score = scratch.above[at] + scratch.below[at];
          const std::int64_t begin = std::int64_t{first + i} * index.page();
          const std::int64_t end = begin + index.page() < n ? begin + index.page() : n;
          for (std::int64_t t = begin; t < end; ++t)
            scratch.scores[std::int64_t{g} * n + t] = score;
        }
      }
    }
    return scratch.scores;
  }

 private:
  static constexpr int kTile = 64;

  int dim_;
};

/// Each query head reads its own pages of largest bound.
using Quest = TopK<PageScores>;

}  // namespace magicpig::inline MAGICPIG_ABI

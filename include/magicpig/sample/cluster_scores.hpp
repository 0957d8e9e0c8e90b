// SPDX-License-Identifier: Apache-2.0
// An inverted file: tokens by the centroid of the list that they are in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/key_clusters.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The score of a token is <q, centroid> of its list, an estimate of <q, k - c>. Tokens of one list
/// tie, so that TopK takes whole lists, as many as the budget has room for, and the oldest tokens
/// of the next. Source: Sivic and Zisserman 2003; Jegou, Douze and Schmid 2011 (IVF).
class ClusterScores {
 public:
  static constexpr bool kLogits = true;

  /// For indexes of up to `lists` lists per KV head.
  explicit ClusterScores(int lists) : lists_(lists) {}

  /// Error: an index of more lists.
  [[nodiscard]] Status supports(const KeyClusters& index) const noexcept {
    if (index.lists() <= lists_) return Status();
    return Status::error(ErrorCode::kShapeMismatch,
                         "the scores are made for up to %d lists, the index has %d", lists_,
                         index.lists());
  }

  struct Scratch {
    float* products = nullptr;  // [group, lists]
    float* scores = nullptr;    // [group, n]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    return {.products = arena.take<float>(group * static_cast<std::size_t>(lists_)),
            .scores = arena.take<float>(group * static_cast<std::size_t>(limits.tokens))};
  }

  template <class Ops, class Source>
  const float* compute(const DrawInput<Source, KeyClusters>& input, const Scratch& scratch) const {
    const KeyClusters& index = input.index;
    const std::int64_t n = index.indexed().size();
    if (n == 0) return scratch.scores;
    const std::uint16_t* list_of = index.list_of(input.kv_head);
    Ops::project(index.centroids(input.kv_head), input.queries.data, input.queries.count,
                 scratch.products);
    for (int g = 0; g < input.queries.count; ++g) {
      const float* products = scratch.products + std::int64_t{g} * index.lists();
      for (std::int64_t i = 0; i < n; ++i) scratch.scores[g * n + i] = products[list_of[i]];
    }
    return scratch.scores;
  }

 private:
  int lists_;
};

/// TopK of the tokens by their lists.
using InvertedFile = TopK<ClusterScores>;

}  // namespace magicpig::inline MAGICPIG_ABI

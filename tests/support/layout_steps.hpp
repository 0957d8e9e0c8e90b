// SPDX-License-Identifier: Apache-2.0
// The shapes in which layouts are compared, and their queries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "layouts.hpp"
#include "magicpig/core/types.hpp"
#include "random.hpp"

namespace magicpig::test {

inline constexpr int kLayoutHeads = 2;  ///< KV heads
inline constexpr TokenId kLayoutTokens = 150;
/// Of these tokens those that are indexed.
inline constexpr TokenRange kLayoutMiddle{.begin = 5, .end = kLayoutTokens - 9};

inline constexpr int kLayoutGroups[] = {1, 2, 3, 4, 5, 7, 8, 16};
struct LayoutDims {
  int key;
  int value;
};
inline constexpr LayoutDims kLayoutDims[] = {{64, 64},   {80, 80},   {96, 96},
                                             {128, 128}, {256, 256}, {192, 128}};
inline constexpr int kLayoutDimsCount = 6;

/// Whether rows of K and of V may have these dimensions.
template <class K, class V>
[[nodiscard]] bool fits(const LayoutDims& dims) {
  return fits<K>(dims.key) && fits<V>(dims.value);
}

/// The queries of a decode step.
struct LayoutStep {
  LayoutStep(const LayoutDims& dims, int group)
      : shape{.query_heads = kLayoutHeads * group,
              .kv_heads = kLayoutHeads,
              .head_dim = dims.key,
              .value_dim = dims.value} {
    Random random(static_cast<std::uint64_t>(dims.key * 100 + group));
    query.resize(static_cast<std::size_t>(shape.query_heads * shape.head_dim));
    for (float& x : query) x = static_cast<float>(0.4 * random.normal());
  }
  [[nodiscard]] const float* query_of(int head) const {
    return query.data() + std::int64_t{head} * shape.head_dim;
  }

  Shape shape;
  std::vector<float> query;
};

template <template <class, class> class... Layouts>
struct LayoutList {};
using AllLayouts =
    LayoutList<TokenMajorLayout, AdjacentLayout, RingLayout, Paged16Layout, Paged32Layout,
               Paged64Layout, ListedLayout, GgmlLayout, BlockColumnLayout>;
/// Without the one that has no blocks.
using BlockLayouts = LayoutList<TokenMajorLayout, AdjacentLayout, RingLayout, Paged16Layout,
                                Paged32Layout, Paged64Layout, ListedLayout, GgmlLayout>;

}  // namespace magicpig::test

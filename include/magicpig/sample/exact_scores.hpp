// SPDX-License-Identifier: Apache-2.0
// Exact inner products of a group's queries with all indexed keys: what oracles and TopK select by.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Reads every key of the indexed range; for comparison and tests, not for speed.
class ExactScores {
 public:
  static constexpr bool kLogits = true;

  struct Scratch {
    float* dots = nullptr;      // [group, n]
    float* tile = nullptr;      // [group, kTile]
    std::byte* keys = nullptr;  // [kTile] copies, where keys must be copied
  };

  [[nodiscard]] static Scratch carve(Arena& arena, const DrawLimits& limits) {
    const auto group = static_cast<std::size_t>(limits.group);
    return {.dots = arena.take<float>(group * static_cast<std::size_t>(limits.tokens)),
            .tile = arena.take<float>(group * kTile),
            .keys = arena.take<std::byte>(kTile * limits.copies.key)};
  }

  /// q.k, unscaled: head g, token indexed().begin + i at [g * n + i], n = indexed().size().
  template <class Ops, class Source, class Index>
  static const float* compute(const DrawInput<Source, Index>& input, const Scratch& scratch) {
    using Scalar = typename Source::KeyScalar;
    const TokenRange range = input.index.indexed();
    const std::int64_t n = range.size();
    const Scalar* rows[kTile];
    const RowCopies copies = RowCopies::of<Source>(input.queries.dim, 0);
    for (TokenId first = 0; first < n; first += kTile) {
      const int count = static_cast<int>(n - first < kTile ? n - first : kTile);
      for (int i = 0; i < count; ++i) {
        rows[i] = key_row(input.key_values, input.kv_head, range.begin + first + i,
                          scratch.keys + static_cast<std::size_t>(i) * copies.key);
      }
      Ops::dot_rows(Rows<Scalar>{.rows = rows, .count = count, .dim = input.queries.dim},
                    input.queries.data, input.queries.count, scratch.tile);
      for (int g = 0; g < input.queries.count; ++g) {
        for (int i = 0; i < count; ++i) {
          scratch.dots[g * n + first + i] = scratch.tile[g * count + i];
        }
      }
    }
    return scratch.dots;
  }

  /// Bytes that compute() reads: the keys.
  template <class Source, class Index>
  [[nodiscard]] static std::int64_t bytes(const DrawInput<Source, Index>& input) {
    const auto dim = static_cast<std::size_t>(input.queries.dim);
    return input.index.indexed().size() *
           static_cast<std::int64_t>(row_bytes<typename Source::KeyScalar>(dim));
  }

 private:
  static constexpr int kTile = 128;
};

}  // namespace magicpig::inline MAGICPIG_ABI

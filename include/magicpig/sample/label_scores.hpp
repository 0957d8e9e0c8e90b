// SPDX-License-Identifier: Apache-2.0
// Double Sparsity: tokens by the inner product over a few channels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/label_cache.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// sum_j q_j k_j over the channels of the labels, the keys' as LabelCache stores them.
/// Source: Double Sparsity, Yang et al. 2024.
class LabelScores {
 public:
  static constexpr bool kLogits = true;

  /// For labels of `channels` channels.
  explicit LabelScores(int channels) : channels_(channels) {}

  /// Error: an index of other labels.
  [[nodiscard]] Status supports(const LabelCache& index) const noexcept {
    if (index.label_size() == channels_) return Status();
    return Status::error(ErrorCode::kShapeMismatch,
                         "the scores are made for labels of %d channels, the index has %d",
                         channels_, index.label_size());
  }

  struct Scratch {
    float* queries = nullptr;  // [group, r]
    float* labels = nullptr;   // [kTile, r]
    float* tile = nullptr;     // [group, kTile]
    float* scores = nullptr;   // [group, n]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    const auto channels = static_cast<std::size_t>(channels_);
    return {.queries = arena.take<float>(group * channels),
            .labels = arena.take<float>(kTile * channels),
            .tile = arena.take<float>(group * kTile),
            .scores = arena.take<float>(group * static_cast<std::size_t>(limits.tokens))};
  }

  template <class Ops, class Source>
  const float* compute(const DrawInput<Source, LabelCache>& input, const Scratch& scratch) const {
    const LabelCache& index = input.index;
    const int group = input.queries.count;
    const std::int32_t* channels = index.channels(input.kv_head);
    const TokenId n = index.indexed().size();
    for (int g = 0; g < group && n > 0; ++g) {
      for (int c = 0; c < channels_; ++c) {
        scratch.queries[std::int64_t{g} * channels_ + c] = input.queries[g][channels[c]];
      }
    }
    const float* rows[kTile];
    for (int i = 0; i < kTile; ++i) rows[i] = scratch.labels + std::int64_t{i} * channels_;
    for (TokenId first = 0; first < n; first += kTile) {
      const int count = n - first < kTile ? n - first : kTile;
      for (int i = 0; i < count; ++i) {
        index.label(input.kv_head, first + i, scratch.labels + std::int64_t{i} * channels_);
      }
      Ops::dot_rows(Rows<float>{.rows = rows, .count = count, .dim = channels_}, scratch.queries,
                    group, scratch.tile);
      for (int g = 0; g < group; ++g) {
        for (int i = 0; i < count; ++i) {
          scratch.scores[std::int64_t{g} * n + first + i] = scratch.tile[g * count + i];
        }
      }
    }
    return scratch.scores;
  }

 private:
  static constexpr int kTile = 64;

  int channels_;
};

/// TopK of the tokens by their labels.
using DoubleSparsity = TopK<LabelScores>;

}  // namespace magicpig::inline MAGICPIG_ABI

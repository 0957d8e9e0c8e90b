// SPDX-License-Identifier: Apache-2.0
// Attention of one layer over one stream of a cache, with the index that it draws from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <magicpig/core/error.hpp>
#include <magicpig/core/ggml_key_values.hpp>
#include <magicpig/core/logit_terms.hpp>
#include <magicpig/core/state.hpp>
#include <magicpig/core/types.hpp>
#include <memory>
#include <span>
#include <vector>

#include "cells.hpp"
#include "settings.hpp"

namespace magicpig::llama {

/// Types of keys and values that code is compiled for.
using CacheTypes = GgmlPairs<GgmlPair<fp16>, GgmlPair<q8_0>>;

/// The keys and values of a layer as ggml's attention takes them, and which stream of them is
/// meant.
struct StreamCache {
  GgmlTensor keys;
  GgmlTensor values;
  int stream = 0;  ///< of ne[3]
};

/// One query of all heads.
struct StepRow {
  std::span<const float> query;      ///< [query_heads, head_dim]
  std::span<AttentionState> states;  ///< [query_heads]; written
  const VisibleCells* visible = nullptr;
};

/// Queries over one stream at once: of one sequence, or of several whose cells are in it.
struct Step {
  StreamCache cache;
  Shape shape;
  float scale = 0.0F;
  LogitTerms logits;
  std::span<const StepRow> rows;  ///< at least one
  std::uint64_t seed = 0;
  int threads = 1;
};

class LayerAttention {
 public:
  LayerAttention() = default;
  LayerAttention(const LayerAttention&) = delete;
  LayerAttention& operator=(const LayerAttention&) = delete;
  virtual ~LayerAttention() = default;

  /// Brings the index up to date, of which `written` are the cells that have changed since, and
  /// attends. Takes out of `written` what the index has seen. `workspace` grows as needed. Errors:
  /// as decode() and the index's operations; nothing that the caller needs is lost then.
  virtual Status attend(const Step& step, CellSet& written, std::vector<std::byte>& workspace,
                        Totals& totals) = 0;

  [[nodiscard]] virtual std::size_t index_bytes() const = 0;

  /// Error: an index that is not, to the byte, the one built at once from the cells as they are
  /// now, with the same centres; nothing must have been written since the last step. Also where
  /// memory is short.
  [[nodiscard]] virtual Status verify(const StreamCache& cache) const = 0;
};

/// For the layer `layer` of heads of this shape. Errors: settings outside their bounds, memory.
[[nodiscard]] Result<std::unique_ptr<LayerAttention>> make_layer_attention(const Settings& settings,
                                                                           const Shape& shape,
                                                                           int layer);

}  // namespace magicpig::llama

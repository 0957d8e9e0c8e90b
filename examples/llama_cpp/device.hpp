// SPDX-License-Identifier: Apache-2.0
// A device of ggml that answers attention for generated tokens, and nothing else.
#pragma once

#include <cstddef>
#include <magicpig/core/error.hpp>

#include "settings.hpp"

namespace magicpig::llama {

/// Registers the device, once per process. Contexts of llama.cpp that are made afterwards, with
/// flash attention enabled, attend through it when they decode a single token (of each sequence,
/// where every sequence has a cache of its own), or up to Settings::max_rows; those made before do
/// not. Prompts go to ggml's own kernel, and so does what the library does not support: ALiBi,
/// masks with biases, other types than f16 and q8_0.
///
/// A context's indexes live with it. They follow writes of new tokens, removed and shifted
/// sequences. What writes a cache past the graph needs invalidate(): llama_state_*set_data(), and
/// llama_memory_seq_cp() between sequences with caches of their own.
///
/// Threads: those of the context (llama_set_n_threads), OpenMP's. Contexts may compute at once; the
/// functions here must not be called meanwhile. Memory: index_bytes(), and scratch that
/// grows with the cache.
void register_device();

/// The settings from the next step on, of contexts that are there and of those to come. Indexes are
/// made anew. Errors show in the next step: ggml's own kernel answers it, and totals() say why.
void use(const Settings& settings);

/// Forgets all indexes; the next step makes them anew.
void invalidate();

/// Bytes of the indexes of all contexts.
[[nodiscard]] std::size_t index_bytes();

/// Sums of all contexts.
[[nodiscard]] Totals totals();
void reset_totals();

/// Error: an index that is not the one built at once from the cells as they are; see
/// LayerAttention.
[[nodiscard]] Status verify_indexes();

}  // namespace magicpig::llama

// SPDX-License-Identifier: Apache-2.0
// What a host chooses: the method, how much it reads, and which layers it leaves exact.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <magicpig/core/types.hpp>
#include <magicpig/request.hpp>
#include <string>
#include <vector>

namespace magicpig::llama {

enum class Method {
  kExact,       ///< every token, by this library's kernels
  kSignatures,  ///< draws by signatures: the method to use
  kTables,      ///< MagicPIG as published: K, L hash tables, at least two collisions
  kTopK,        ///< the tokens of largest q.k, of all of which it reads the keys
  kQuest,       ///< pages by bounds of their keys
  kUniform,     ///< draws at random
};

/// The settings of all layers of all contexts that attend through the adapter.
struct Settings {
  Method method = Method::kSignatures;
  double rows = 0.04;   ///< share of the middle's rows read per KV head; kTables does not use it
  int bits = 2;         ///< kSignatures: of a code per dimension
  int table_bits = 10;  ///< kTables: K
  int tables = 150;     ///< kTables: L
  int page = 16;        ///< kQuest: tokens of a page
  /// The first cells and the newest ones, which are always attended to.
  Window window = {.sink = 4, .local = 64};
  /// Middles of fewer visible cells are read whole.
  TokenId exact_below = kExactBelow;
  /// Query rows that the adapter takes at most in one operation: tokens of several sequences in one
  /// cache, or of a draft; more go to the engine as a prompt does. For contexts made afterwards.
  int max_rows = 1;
  std::vector<int> dense_layers = {0, 16};  ///< attend to every token
  std::uint64_t seed = 1;
  /// Rows and bytes are counted at every so-manieth step, as it takes time of its own; 0 for never.
  int report_every = 0;

  [[nodiscard]] bool is_dense(int layer) const {
    return method == Method::kExact ||
           std::find(dense_layers.begin(), dense_layers.end(), layer) != dense_layers.end();
  }
};

/// Sums over layers and steps since the last reset.
struct Totals {
  std::int64_t counted = 0;     ///< KV heads, of layers of steps, that drew and were counted
  double rows_read = 0.0;       ///< shares of the middle that they read, summed
  std::int64_t bytes = 0;       ///< that they read of index, keys and values
  std::int64_t attentions = 0;  ///< layers of steps that the adapter answered
  std::int64_t fallbacks = 0;   ///< those that it left to ggml's own kernel, for `error`
  std::string error;            ///< the last one

  /// Share of the middle read per KV head in the mean, 0 if none was counted.
  [[nodiscard]] double mean_rows() const {
    return counted == 0 ? 0.0 : rows_read / static_cast<double>(counted);
  }
};

}  // namespace magicpig::llama

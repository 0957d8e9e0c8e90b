// SPDX-License-Identifier: Apache-2.0
// Means of keys and values, which an index subtracts from them.
#pragma once

#include <cmath>
#include <cstdint>

#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// For each KV head the mean over `tokens`, at least one, of row(head, token) [dim], to `means`
/// [kv_heads, dim]; `sums` [kv_heads, dim] is scratch. One pass over the rows, summed in double and
/// in the order of tokens, on the backend's workers: the same bits on every machine.
template <class Backend, class Row>
void mean_of_rows(const Backend& backend, int kv_heads, int dim, TokenRange tokens, const Row& row,
                  double* sums, float* means) noexcept {
  backend.executor.parallel_for(kv_heads, [&](int h, int) {
    double* sum = sums + std::int64_t{h} * dim;
    float* mean = means + std::int64_t{h} * dim;
    for (int j = 0; j < dim; ++j) sum[j] = 0.0;
    for (TokenId t = tokens.begin; t < tokens.end; ++t) {
      const auto* from = row(h, t);
      for (int j = 0; j < dim; ++j) sum[j] += static_cast<double>(scalar_at(from, j));
    }
    for (int j = 0; j < dim; ++j) mean[j] = static_cast<float>(sum[j] / tokens.size());
  });
}

/// The first token of `tokens` whose key of a KV head is not finite; `otherwise` if all are.
template <KeyValueSource Source>
[[nodiscard]] TokenId first_not_finite(const Source& source, int kv_head, TokenRange tokens,
                                       TokenId otherwise) noexcept {
  for (TokenId t = tokens.begin; t < tokens.end; ++t) {
    const auto* key = source.key(kv_head, t);
    for (int j = 0; j < source.head_dim(); ++j) {
      if (!std::isfinite(scalar_at(key, j))) return t;
    }
  }
  return otherwise;
}

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Means of keys and values, which an index subtracts from them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "magicpig/core/prefetch.hpp"
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
    TokenId t = tokens.begin;
    // Eight rows at a time, as sums are read and written once for all of them.
    for (; t + 8 <= tokens.end; t += 8) {
      for (TokenId next = t + 16; next < t + 24 && next < tokens.end; ++next) {
        const auto* from = row(h, next);
        prefetch_far(
            from, row_bytes<std::remove_cvref_t<decltype(*from)>>(static_cast<std::size_t>(dim)));
      }
      const auto* r0 = row(h, t);
      const auto* r1 = row(h, t + 1);
      const auto* r2 = row(h, t + 2);
      const auto* r3 = row(h, t + 3);
      const auto* r4 = row(h, t + 4);
      const auto* r5 = row(h, t + 5);
      const auto* r6 = row(h, t + 6);
      const auto* r7 = row(h, t + 7);
      for (int j = 0; j < dim; ++j) {
        const auto at = [j](const auto* from) { return static_cast<double>(scalar_at(from, j)); };
        sum[j] = sum[j] + at(r0) + at(r1) + at(r2) + at(r3) + at(r4) + at(r5) + at(r6) + at(r7);
      }
    }
    for (; t < tokens.end; ++t) {
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

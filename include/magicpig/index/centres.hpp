// SPDX-License-Identifier: Apache-2.0
// Means of keys and values, which an index subtracts from them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Rows that a mean is taken of, at most. The error it leaves, a spread of at most 1/64 of the
/// rows' own, is nothing to an index, which may subtract any vector at all; reading every row was a
/// quarter of the time to encode 98,304 keys.
inline constexpr int kMeanRows = 8192;

/// Rows that mean_of_rows() has at once, of each worker.
inline constexpr int kMeanSlots = 8;

/// For each KV head the mean over `tokens`, at least one, of its rows [dim], to `means`
/// [kv_heads, dim]; `sums` [kv_heads, dim] is scratch. `from` is a RowReader with kMeanSlots
/// slots, or has row() and prefetch() as one has. Of more than kMeanRows tokens it reads groups of
/// eight, equally far apart. Summed in double and in the order of tokens, on the backend's workers:
/// the same bits on every machine. Nothing is read where dim is 0.
template <class Backend, class Reader>
void mean_of_rows(const Backend& backend, int kv_heads, int dim, TokenRange tokens, Reader& from,
                  double* sums, float* means) noexcept {
  if (dim == 0) return;
  const std::int64_t stride = std::int64_t{8} * ((tokens.size() - 1) / kMeanRows + 1);
  backend.executor.parallel_for(kv_heads, [&](int h, int worker) {
    double* sum = sums + std::int64_t{h} * dim;
    float* mean = means + std::int64_t{h} * dim;
    for (int j = 0; j < dim; ++j) sum[j] = 0.0;
    std::int64_t t = tokens.begin;  // may go past the last TokenId
    int rows = 0;
    // Eight rows at a time, as sums are read and written once for all of them.
    for (; t + 8 <= tokens.end; t += stride, rows += 8) {
      for (std::int64_t next = t + 2 * stride; next < t + 2 * stride + 8; ++next) {
        if (next >= tokens.end) break;
        from.prefetch(h, static_cast<TokenId>(next));
      }
      const auto at_row = [&](int i) {
        return from.row(h, static_cast<TokenId>(t + i), worker, i);
      };
      const auto* r0 = at_row(0);
      const auto* r1 = at_row(1);
      const auto* r2 = at_row(2);
      const auto* r3 = at_row(3);
      const auto* r4 = at_row(4);
      const auto* r5 = at_row(5);
      const auto* r6 = at_row(6);
      const auto* r7 = at_row(7);
      for (int j = 0; j < dim; ++j) {
        const auto at = [j](const auto* row) { return static_cast<double>(scalar_at(row, j)); };
        sum[j] = sum[j] + at(r0) + at(r1) + at(r2) + at(r3) + at(r4) + at(r5) + at(r6) + at(r7);
      }
    }
    for (; t < tokens.end; ++t, ++rows) {
      const auto* row = from.row(h, static_cast<TokenId>(t), worker, 0);
      for (int j = 0; j < dim; ++j) sum[j] += static_cast<double>(scalar_at(row, j));
    }
    for (int j = 0; j < dim; ++j) mean[j] = static_cast<float>(sum[j] / rows);
  });
}

/// The first token of `tokens` whose key of a KV head is not finite; `otherwise` if all are.
template <KeyValueSource Source>
[[nodiscard]] TokenId first_not_finite(KeyReader<Source>& keys, int kv_head, TokenRange tokens,
                                       TokenId otherwise) noexcept {
  for (TokenId t = tokens.begin; t < tokens.end; ++t) {
    const auto* key = keys.row(kv_head, t);
    for (int j = 0; j < keys.dim(); ++j) {
      if (!std::isfinite(scalar_at(key, j))) return t;
    }
  }
  return otherwise;
}

}  // namespace magicpig::inline MAGICPIG_ABI

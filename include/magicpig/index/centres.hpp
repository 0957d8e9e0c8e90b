// SPDX-License-Identifier: Apache-2.0
// Means of keys and values, which an index subtracts from them, and how far they have drifted.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/mapped_rows.hpp"
#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What an index subtracts from keys and from values, to build another one with the same.
struct Centres {
  std::span<const float> keys;         ///< [kv_heads, dim]
  std::span<const float> values = {};  ///< [kv_heads, value_dim]; of an index without values: empty
};

/// Errors: other sizes than these, a coordinate that is not finite.
[[nodiscard]] inline Status check_centres(const Centres& centres, std::size_t keys,
                                          std::size_t values) noexcept {
  if (centres.keys.size() != keys || centres.values.size() != values) {
    return Status::error(ErrorCode::kShapeMismatch,
                         "centres have %zu floats for keys and %zu for values, the index %zu and "
                         "%zu",
                         centres.keys.size(), centres.values.size(), keys, values);
  }
  for (const std::span<const float> all : {centres.keys, centres.values}) {
    for (const float x : all) {
      if (std::isfinite(x)) continue;
      return Status::error(ErrorCode::kNonFinite, "a centre has %g for a coordinate",
                           static_cast<double>(x));
    }
  }
  return Status();
}

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

/// The tokens of a range that were not erased, by rank. Memory: 4 bytes each if any was erased.
class PresentTokens {
 public:
  /// False when memory is short.
  [[nodiscard]] bool list(TokenRange range, const TokenMask& gone) noexcept {
    begin_ = range.begin;
    count_ = gone.present(range);
    listed_ = count_ != range.size();
    if (!listed_) return true;
    if (!tokens_.resize(static_cast<std::size_t>(count_))) return false;
    TokenId* to = tokens_.data();
    for (TokenId t = range.begin; t < range.end; ++t) {
      if (!gone.has(t)) *to++ = t;
    }
    return true;
  }

  [[nodiscard]] TokenId count() const { return count_; }
  [[nodiscard]] TokenId operator[](TokenId rank) const {
    return listed_ ? tokens_.data()[rank] : begin_ + rank;
  }

 private:
  TokenId begin_ = 0;
  TokenId count_ = 0;
  bool listed_ = false;
  Buffer<TokenId> tokens_;
};

/// The rows of present tokens by their rank, for mean_of_rows().
template <class Reader>
class PresentReader {
 public:
  /// Both must outlive it.
  PresentReader(Reader& rows, const PresentTokens& tokens) : rows_(rows), tokens_(tokens) {}

  [[nodiscard]] const auto* row(int kv_head, TokenId rank, int worker, int slot) {
    return rows_.row(kv_head, tokens_[rank], worker, slot);
  }
  void prefetch(int kv_head, TokenId rank) const { rows_.prefetch(kv_head, tokens_[rank]); }

 private:
  Reader& rows_;
  const PresentTokens& tokens_;
};

/// How far `centres` [kv_heads, dim] are from the means of the keys of `tokens`: |mean - c| over
/// the root mean square of |k - c|, the largest of all KV heads, in [0, 1]; 0 without tokens. Of
/// more than kMeanRows tokens it reads those that mean_of_rows() reads. Errors: a key that is not
/// finite, memory.
template <class Backend, KeyValueSource Source>
[[nodiscard]] Result<double> drift_of_keys(const Backend& backend, const Source& source,
                                           const PresentTokens& tokens,
                                           const float* centres) noexcept {
  const int dim = source.head_dim();
  const int heads = source.kv_heads();
  if (tokens.count() == 0) return 0.0;
  Buffer<double> sums;  // [kv_heads, 2, dim]
  KeyReader<Source> keys(source);
  if (!sums.resize(2 * static_cast<std::size_t>(heads) * static_cast<std::size_t>(dim)) ||
      !keys.reserve(backend.executor.workers(), 1)) {
    return Status::error(ErrorCode::kOutOfMemory, "no memory to measure %d KV heads", heads);
  }
  const std::int64_t stride = std::int64_t{8} * ((tokens.count() - 1) / kMeanRows + 1);
  backend.executor.parallel_for(heads, [&](int h, int worker) {
    double* sum = sums.data() + std::int64_t{2} * h * dim;
    double* square = sum + dim;
    const float* centre = centres + std::int64_t{h} * dim;
    for (int j = 0; j < 2 * dim; ++j) sum[j] = 0.0;
    int rows = 0;
    for (std::int64_t first = 0; first < tokens.count(); first += stride) {
      for (std::int64_t i = first; i < first + 8 && i < tokens.count(); ++i, ++rows) {
        const auto* key = keys.row(h, tokens[static_cast<TokenId>(i)], worker);
        for (int j = 0; j < dim; ++j) {
          const auto off = static_cast<double>(scalar_at(key, j) - centre[j]);
          sum[j] += off;
          square[j] += off * off;
        }
      }
    }
    double of_mean = 0.0;
    double of_all = 0.0;
    for (int j = 0; j < dim; ++j) {
      of_mean += sum[j] / rows * (sum[j] / rows);
      of_all += square[j] / rows;
    }
    sum[0] = of_all > 0.0 ? ::sqrt(of_mean / of_all) : of_all;  // NaN stays
  });
  double largest = 0.0;
  for (int h = 0; h < heads; ++h) {
    const double own = sums.data()[std::int64_t{2} * h * dim];
    if (!std::isfinite(own)) {
      return Status::error(ErrorCode::kNonFinite, "a key of KV head %d is not finite", h);
    }
    largest = own > largest ? own : largest;
  }
  return largest;
}

/// Where PresentRows finds its rows.
struct PresentPlace {
  TokenMask gone;
  TokenId instead = 0;

  [[nodiscard]] static int kv_head(int kv_head) { return kv_head; }
  [[nodiscard]] TokenId token(TokenId token) const { return gone.has(token) ? instead : token; }
};

/// `source` as a rehash reads it: the rows of erased tokens, which a host may have given away, are
/// those of `instead`.
template <KeyValueSource SourceType>
class PresentRows : public MappedRows<SourceType, PresentPlace> {
 public:
  PresentRows(const SourceType& source, const TokenMask& gone, TokenId instead)
      : MappedRows<SourceType, PresentPlace>(source, {.gone = gone, .instead = instead}) {}

  [[nodiscard]] TokenId tokens() const { return this->source().tokens(); }
  [[nodiscard]] int kv_heads() const { return this->source().kv_heads(); }
};

}  // namespace magicpig::inline MAGICPIG_ABI

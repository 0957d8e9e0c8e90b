// SPDX-License-Identifier: Apache-2.0
// Pages of keys by their least and largest coordinates: an index that bounds inner products.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What an index of pages is made of.
struct PageBoundsConfig {
  int kv_heads = 1;
  int dim = 0;    ///< head_dim of the keys
  int page = 16;  ///< tokens of a page, in [1, 4096]
  MemoryAdvice memory_advice = nullptr;
};

/// For every `page` consecutive tokens of a KV head and every coordinate the least and the largest
/// value that their keys have. They bound what any query's inner product with a key of the page can
/// be (PageScores). Stored as T, float, fp16 or bf16, rounded outwards, so that the bounds stay
/// bounds; keys of the same type are kept exactly.
///
/// Memory: 2 dim / page scalars per token and KV head. Threads: reads from any number of them;
/// build, append and truncate one at a time, with no reader.
/// Source: Quest, Tang et al. 2024.
template <class T = fp16>
class PageBounds {
 public:
  using Scalar = T;

  /// An empty index. Errors: kv_heads, dim or page out of range.
  [[nodiscard]] static Result<PageBounds> create(const PageBoundsConfig& config) noexcept {
    const Status status = check_kv_heads(config.kv_heads);
    if (!status.ok()) return status;
    if (config.dim < 1 || config.dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument, "dim %d must lie in [1, %d]", config.dim,
                           kMaxDim);
    }
    if (config.page < 1 || config.page > 4096) {
      return Status::error(ErrorCode::kInvalidArgument, "page %d must lie in [1, 4096]",
                           config.page);
    }
    return PageBounds(config);
  }

  /// Replaces the content by the tokens of `range`. Errors: source and config disagree, range
  /// outside the source, a key that is not finite or beyond what T holds, memory, a backend without
  /// workers; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Status status = check_range(range);
    if (!status.ok()) return status;
    PageBounds fresh(config_);
    fresh.range_ = {.begin = range.begin, .end = range.begin};
    status = check_source(source, kv_heads(), dim(), range.end);
    if (status.ok()) status = fresh.append(backend, source, range.end);
    if (status.ok()) *this = std::move(fresh);
    return status;
  }

  /// Takes over tokens [indexed().end, end). An `end` at or below indexed().end changes nothing.
  /// Errors: as build().
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    Status status = check_source(source, kv_heads(), dim(), end);
    if (status.ok()) status = check_workers(backend);
    const TokenRange fresh{.begin = range_.end, .end = end};
    if (!status.ok()) return status;
    KeyReader<Source> keys(source);
    const bool readable = keys.reserve(backend.executor.workers(), 1);
    if (readable) status = check_keys(backend, keys, fresh);
    if (!status.ok()) return status;
    const std::size_t size = static_cast<std::size_t>(pages_of(end - range_.begin)) * page_size();
    // Twice as much as there was, so that appending token by token copies each page a few times.
    const std::size_t twice = 2 * bounds_.size();
    if (!readable || (size > bounds_.bytes() / sizeof(T) &&
                      !bounds_.reserve(size > twice ? size : twice, config_.memory_advice))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens", fresh.size());
    }
    (void)bounds_.resize(size);
    backend.executor.parallel_for(kv_heads(), [&](int h, int worker) {
      for (TokenId t = fresh.begin; t < fresh.end; ++t) widen(keys.row(h, t, worker), h, t);
    });
    range_.end = end;
    return status;
  }

  /// Forgets tokens from `end` on. The page that `end` falls into keeps the bounds it had: still
  /// bounds, and as tight as before only when it has been appended to in full again. An `end` at or
  /// beyond indexed().end changes nothing, one at or below indexed().begin leaves an empty index.
  /// Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    (void)bounds_.resize(static_cast<std::size_t>(pages()) * page_size());
    return Status();
  }

  [[nodiscard]] TokenRange indexed() const { return range_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return config_.dim; }
  /// Tokens of a page, but for the last.
  [[nodiscard]] int page() const { return config_.page; }
  [[nodiscard]] int pages() const { return pages_of(range_.size()); }
  /// Coordinates of page p, [dim]: none of its keys has a smaller one.
  [[nodiscard]] const T* least(int kv_head, int p) const { return bounds_.data() + at(kv_head, p); }
  /// The same of the largest.
  [[nodiscard]] const T* largest(int kv_head, int p) const { return least(kv_head, p) + dim(); }

  /// Bytes held.
  [[nodiscard]] std::size_t bytes() const { return bounds_.bytes(); }
  /// Bytes per token and KV head in full pages.
  [[nodiscard]] static constexpr double bytes_per_token(int dim, int page) {
    return 2.0 * dim * sizeof(T) / page;
  }
  /// Bytes of one KV head that scoring every page reads.
  [[nodiscard]] std::int64_t scan_bytes() const {
    return std::int64_t{2} * pages() * dim() * static_cast<std::int64_t>(sizeof(T));
  }

 private:
  explicit PageBounds(const PageBoundsConfig& config) : config_(config) {}

  // The largest finite magnitude.
  static constexpr float kLimit = std::is_same_v<T, fp16>   ? 65504.0F
                                  : std::is_same_v<T, bf16> ? 0x1.FEp127F
                                                            : (std::numeric_limits<float>::max)();

  [[nodiscard]] int pages_of(TokenId tokens) const {
    return tokens / config_.page + (tokens % config_.page != 0 ? 1 : 0);
  }
  // Scalars of a page of all KV heads.
  [[nodiscard]] std::size_t page_size() const {
    return 2 * static_cast<std::size_t>(kv_heads()) * static_cast<std::size_t>(dim());
  }
  [[nodiscard]] std::size_t at(int kv_head, int p) const {
    return static_cast<std::size_t>(p) * page_size() +
           2 * static_cast<std::size_t>(kv_head) * static_cast<std::size_t>(dim());
  }

  template <class Backend, KeyValueSource Source>
  [[nodiscard]] Status check_keys(const Backend& backend, KeyReader<Source>& keys,
                                  TokenRange tokens) const noexcept {
    const KeyPlace bad = first_key_beyond(backend, keys, tokens, kLimit);
    if (bad.token < 0) return Status();
    for (int j = 0; j < dim(); ++j) {
      if (!std::isfinite(scalar_at(keys.row(bad.kv_head, bad.token), j))) {
        return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                             bad.token, bad.kv_head);
      }
    }
    return Status::error(ErrorCode::kInvalidArgument,
                         "the key of token %d, KV head %d has a coordinate beyond the %g that page "
                         "bounds can hold",
                         bad.token, bad.kv_head, static_cast<double>(kLimit));
  }

  // Takes `key` into the page of token t, whose first token begins it.
  template <class Scalar>
  void widen(const Scalar* key, int kv_head, TokenId t) {
    T* least = bounds_.data() + at(kv_head, (t - range_.begin) / config_.page);
    T* largest = least + dim();
    const bool first = (t - range_.begin) % config_.page == 0;
    for (int j = 0; j < dim(); ++j) {
      const float x = scalar_at(key, j);
      if (first || x < to_float(least[j])) least[j] = below(x);
      if (first || x > to_float(largest[j])) largest[j] = above(x);
    }
  }

  static float nearest(float x, float) { return x; }
  static fp16 nearest(float x, fp16) { return to_fp16(x); }
  static bf16 nearest(float x, bf16) { return to_bf16(x); }

  // The largest T at or below x, |x| <= kLimit.
  static T below(float x) {
    T rounded = nearest(x, T());
    if constexpr (!std::is_same_v<T, float>) {
      if (to_float(rounded) > x) {  // one step down: away from 0 where negative
        const auto bits = rounded.bits;
        rounded.bits = (bits & 0x7fffU) == 0   ? std::uint16_t{0x8001}
                       : (bits & 0x8000U) != 0 ? static_cast<std::uint16_t>(bits + 1)
                                               : static_cast<std::uint16_t>(bits - 1);
      }
    }
    return rounded;
  }
  static T above(float x) {
    T rounded = below(-x);
    if constexpr (std::is_same_v<T, float>) {
      rounded = -rounded;
    } else {
      rounded.bits ^= 0x8000U;
    }
    return rounded;
  }

  PageBoundsConfig config_;
  TokenRange range_;
  Buffer<T> bounds_;  // [pages, kv_heads, 2, dim]
};

}  // namespace magicpig::inline MAGICPIG_ABI

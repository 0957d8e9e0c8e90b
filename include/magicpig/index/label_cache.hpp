// SPDX-License-Identifier: Apache-2.0
// A few channels of every key in 4 bits: an index that estimates inner products by part of them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What a cache of labels is made of.
struct LabelCacheConfig {
  int kv_heads = 1;
  int dim = 0;        ///< head_dim of the keys
  int channels = 16;  ///< r of the label, in [1, dim]
  MemoryAdvice memory_advice = nullptr;
};

/// The label of a key: its r most important channels, each as least + step code, code in [0, 15],
/// with least and step those of the key's own channels, as bf16; magnitudes beyond 2^127 count as
/// nearly that. What is important is calibrated
/// once per KV head: by scores that the caller has, such as the mean of |q_j k_j| over queries and
/// keys of a sample, or else by the mean of |k_j| over the keys of the first append, which are then
/// used for all that follow.
///
/// 4 bits and not 16, as published: at equal bytes that is three times the channels, and channels
/// are what counts: with 8, 16 and 32 of 64 the errors at 2 % of the rows are .208, .143 and .116
/// (magicpig_compare --methods double_sparsity).
///
/// Memory: r / 2 rounded up and 4 bytes per token and KV head. Threads: reads from any number of
/// them; build, append and truncate one at a time, with no reader.
/// Source: Double Sparsity, Yang et al. 2024.
class LabelCache {
 public:
  /// An empty index. `importance` [kv_heads, dim] says how much a channel matters, or is empty.
  /// Errors: kv_heads, dim or channels out of range, importance of another size, or with a number
  /// that is negative or not finite; memory.
  [[nodiscard]] static Result<LabelCache> create(const LabelCacheConfig& config,
                                                 std::span<const float> importance = {}) noexcept {
    const Status status = check(config, importance);
    if (!status.ok()) return status;
    LabelCache index(config);
    if (!index.reserve_heads()) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", config.kv_heads);
    }
    for (int h = 0; h < config.kv_heads && !importance.empty(); ++h) {
      const float* own = importance.data() + std::int64_t{h} * config.dim;
      for (int j = 0; j < config.dim; ++j) index.importance(h)[j] = static_cast<double>(own[j]);
      index.choose_channels(h);
    }
    index.calibrated_ = !importance.empty();
    return index;
  }

  /// Replaces the content by the tokens of `range`; without given importance channels are chosen
  /// anew. Errors: source and config disagree, range outside the source, a key that is not finite,
  /// memory, a backend without workers; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Status status = check_range(range);
    if (!status.ok()) return status;
    LabelCache fresh(config_);
    if (!fresh.reserve_heads()) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", kv_heads());
    }
    fresh.calibrated_ = calibrated_;
    for (std::size_t i = 0; calibrated_ && i < channels_.size(); ++i) {
      fresh.channels_.data()[i] = channels_.data()[i];
    }
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
    const TokenRange fresh{.begin = range_.end, .end = end};
    Status status = check_source(source, kv_heads(), dim(), end);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    KeyReader<Source> keys(source);
    const bool readable = keys.reserve(backend.executor.workers(), 1);
    if (readable) status = check_finite_keys(backend, keys, fresh);
    if (!status.ok()) return status;
    if (!readable || !reserve(end - range_.begin)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens", fresh.size());
    }
    backend.executor.parallel_for(kv_heads(), [&](int h, int worker) {
      if (!calibrated_ && range_.empty()) {
        measure(keys, h, fresh, worker);
        choose_channels(h);
      }
      for (TokenId t = fresh.begin; t < end; ++t) {
        encode(keys.row(h, t, worker), h, t - range_.begin);
      }
    });
    range_.end = end;
    return status;
  }

  /// Forgets tokens from `end` on. An `end` at or beyond indexed().end changes nothing; one at or
  /// below indexed().begin leaves an empty index, whose channels, where not given, the next append
  /// chooses anew. Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    return status;
  }

  [[nodiscard]] TokenRange indexed() const { return range_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return config_.dim; }
  /// Channels of a label, r.
  [[nodiscard]] int label_size() const { return config_.channels; }
  /// Which they are, [r], ascending. Without meaning before the first append unless importance was
  /// given.
  [[nodiscard]] const std::int32_t* channels(int kv_head) const {
    return channels_.data() + std::int64_t{kv_head} * label_size();
  }
  /// The label of token indexed().begin + i to `out` [r].
  void label(int kv_head, TokenId i, float* out) const {
    const Head& head = heads_[static_cast<std::size_t>(kv_head)];
    const float least = to_float(head.scales.data()[2 * std::int64_t{i}]);
    const float step = to_float(head.scales.data()[2 * std::int64_t{i} + 1]);
    const std::uint8_t* codes = head.codes.data() + std::int64_t{i} * row_bytes();
    for (int c = 0; c < label_size(); ++c) {
      out[c] = least + step * static_cast<float>((codes[c / 2] >> (c % 2 * 4)) & 15);
    }
  }

  /// Bytes held.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = importance_.bytes() + channels_.bytes();
    for (int h = 0; h < kv_heads(); ++h) {
      const Head& head = heads_[static_cast<std::size_t>(h)];
      sum += head.codes.bytes() + head.scales.bytes();
    }
    return sum;
  }
  /// Bytes per token and KV head where no memory is kept for more tokens.
  [[nodiscard]] static constexpr std::size_t bytes_per_token(int channels) {
    return static_cast<std::size_t>((channels + 1) / 2) + 2 * sizeof(bf16);
  }
  /// Bytes of one KV head that scoring every token reads.
  [[nodiscard]] std::int64_t scan_bytes() const {
    return range_.size() * static_cast<std::int64_t>(bytes_per_token(label_size()));
  }

 private:
  struct Head {
    Buffer<std::uint8_t> codes;  // [tokens, (r + 1) / 2], the even channel in the lower half
    Buffer<bf16> scales;         // [tokens, 2] least, step
  };

  explicit LabelCache(const LabelCacheConfig& config) : config_(config) {}

  [[nodiscard]] static Status check(const LabelCacheConfig& config,
                                    std::span<const float> importance) {
    const Status status = check_kv_heads(config.kv_heads);
    if (!status.ok()) return status;
    if (config.dim < 1 || config.dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument, "dim %d must lie in [1, %d]", config.dim,
                           kMaxDim);
    }
    if (config.channels < 1 || config.channels > config.dim) {
      return Status::error(ErrorCode::kInvalidArgument, "channels %d must lie in [1, dim = %d]",
                           config.channels, config.dim);
    }
    const auto numbers =
        static_cast<std::size_t>(config.kv_heads) * static_cast<std::size_t>(config.dim);
    if (!importance.empty() && importance.size() != numbers) {
      return Status::error(ErrorCode::kShapeMismatch,
                           "importance of %zu channels, the index has %d KV heads of dimension %d",
                           importance.size(), config.kv_heads, config.dim);
    }
    for (std::size_t i = 0; i < importance.size(); ++i) {
      if (importance[i] >= 0.0F && std::isfinite(importance[i])) continue;
      return Status::error(ErrorCode::kInvalidArgument,
                           "importance %g of channel %zu must be finite and not negative",
                           static_cast<double>(importance[i]), i);
    }
    return Status();
  }

  bool reserve_heads() noexcept {
    const auto count = static_cast<std::size_t>(kv_heads());
    heads_.reset(new (std::nothrow) Head[count]);
    return heads_ != nullptr && importance_.resize(count * static_cast<std::size_t>(dim())) &&
           channels_.resize(count * static_cast<std::size_t>(label_size()));
  }

  // Room for `tokens` tokens in all; what there is stays. Twice as much as there was, so that
  // appending token by token copies each label a few times.
  bool reserve(TokenId tokens) noexcept {
    const auto grow = [&](auto& buffer, std::size_t each) {
      const std::size_t size = static_cast<std::size_t>(tokens) * each;
      const std::size_t twice = 2 * buffer.size();
      const std::size_t held = buffer.bytes() / sizeof *buffer.data();
      return (size <= held || buffer.reserve(size > twice ? size : twice, config_.memory_advice)) &&
             buffer.resize(size);
    };
    for (int h = 0; h < kv_heads(); ++h) {
      Head& head = heads_[static_cast<std::size_t>(h)];
      if (!grow(head.codes, static_cast<std::size_t>(row_bytes())) || !grow(head.scales, 2)) {
        return false;
      }
    }
    return true;
  }

  [[nodiscard]] int row_bytes() const { return (label_size() + 1) / 2; }
  [[nodiscard]] double* importance(int kv_head) {
    return importance_.data() + std::int64_t{kv_head} * dim();
  }

  // The sum of |k_j| over keys as the importance of channel j.
  template <KeyValueSource Source>
  void measure(KeyReader<Source>& keys, int kv_head, TokenRange tokens, int worker) {
    double* sums = importance(kv_head);
    for (int j = 0; j < dim(); ++j) sums[j] = 0.0;
    for (TokenId t = tokens.begin; t < tokens.end; ++t) {
      const auto* key = keys.row(kv_head, t, worker);
      for (int j = 0; j < dim(); ++j) sums[j] += std::fabs(static_cast<double>(scalar_at(key, j)));
    }
  }

  // The r channels of most importance, ties to the first; forgets the importance.
  void choose_channels(int kv_head) {
    double* left = importance(kv_head);
    for (int c = 0; c < label_size(); ++c) {
      int best = 0;
      for (int j = 1; j < dim(); ++j) best = left[j] > left[best] ? j : best;
      left[best] = -1.0;
    }
    std::int32_t* own = channels_.data() + std::int64_t{kv_head} * label_size();
    for (std::int32_t j = 0; j < dim(); ++j) {
      if (left[j] == -1.0) *own++ = j;
    }
  }

  template <class Scalar>
  void encode(const Scalar* key, int kv_head, TokenId i) {
    Head& head = heads_[static_cast<std::size_t>(kv_head)];
    const std::int32_t* own = channels(kv_head);
    float low = scalar_at(key, own[0]);
    float high = low;
    for (int c = 1; c < label_size(); ++c) {
      const float x = scalar_at(key, own[c]);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    // Half of what float has, so that neither 15 step nor its sum with least overflows.
    constexpr float kLargest = 0x1.Fp126F;
    low = low > -kLargest ? (low < kLargest ? low : kLargest) : -kLargest;
    high = high > -kLargest ? (high < kLargest ? high : kLargest) : -kLargest;
    const bf16 least = to_bf16(low);
    const auto width = static_cast<double>(high) - static_cast<double>(low);
    const bf16 step = to_bf16(static_cast<float>(width / 15.0));
    head.scales.data()[2 * std::int64_t{i}] = least;
    head.scales.data()[2 * std::int64_t{i} + 1] = step;
    std::uint8_t* codes = head.codes.data() + std::int64_t{i} * row_bytes();
    // In double and of the rounded numbers, so that codes are nearest to what they will stand for.
    const auto from = static_cast<double>(to_float(least));
    const auto unit = static_cast<double>(to_float(step));
    for (int c = 0; c < label_size(); ++c) {
      const double place =
          unit > 0.0 ? (static_cast<double>(scalar_at(key, own[c])) - from) / unit + 0.5 : 0.0;
      const int code = place < 1.0 ? 0 : place < 15.0 ? static_cast<int>(place) : 15;
      codes[c / 2] = static_cast<std::uint8_t>(c % 2 == 0 ? code : codes[c / 2] | (code << 4));
    }
  }

  LabelCacheConfig config_;
  bool calibrated_ = false;  // whether importance was given
  TokenRange range_;
  std::unique_ptr<Head[]> heads_;  // [kv_heads]
  Buffer<double> importance_;      // [kv_heads, dim]
  Buffer<std::int32_t> channels_;  // [kv_heads, r]
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// The bits of a learned hash, packed, one code per token: an index that is scanned.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/hash/learned_hash.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A code of LearnedHash for each token and KV head, in blocks of kBlock tokens.
///
/// Memory: 4 ceil(bits / 32) bytes per token and KV head, for whole blocks, and up to twice that
/// after append(). Threads: reads from any number of them; build, append and truncate one at a
/// time, with no reader. The hash must outlive the index.
class SignCodes {
 public:
  static constexpr TokenId kBlock = 256;

  /// An empty index, for the hash's KV heads. New memory is shown to `advice`, if there is one.
  explicit SignCodes(const LearnedHash& hash, MemoryAdvice advice = nullptr) noexcept
      : hash_(&hash), advice_(advice) {}
  explicit SignCodes(const LearnedHash&& hash, MemoryAdvice = nullptr) = delete;

  /// Replaces the content by the tokens of `range`. Errors: source and hash disagree, range outside
  /// the source, a key that is not finite, memory, a backend without workers; the index is then
  /// unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Status status = check_range(range);
    if (status.ok()) status = check_source(source, kv_heads(), dim(), range.end);
    if (!status.ok()) return status;
    SignCodes fresh(*hash_, advice_);
    fresh.range_ = {.begin = range.begin, .end = range.begin};
    status = fresh.append(backend, source, range.end);
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
    if (!status.ok()) return status;
    const int workers = backend.executor.workers();
    Buffer<float> scratch;
    KeyReader<Source> keys(source);
    if (!keys.reserve(workers, 1) ||
        !scratch.resize(static_cast<std::size_t>(workers) * scratch_floats()) ||
        !reserve(blocks_of(end - range_.begin))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens",
                           end - range_.end);
    }
    return encode(backend, keys, end, scratch.data());
  }

  /// Forgets tokens from `end` on. An `end` at or beyond indexed().end changes nothing; one at or
  /// below indexed().begin leaves an empty index. Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    return Status();
  }

  [[nodiscard]] const LearnedHash& hash() const { return *hash_; }
  [[nodiscard]] TokenRange indexed() const { return range_; }
  [[nodiscard]] int kv_heads() const { return hash_->kv_heads(); }
  [[nodiscard]] int dim() const { return hash_->dim(); }
  [[nodiscard]] int blocks() const { return blocks_of(range_.size()); }
  /// Tokens of a block; all but the last are full.
  [[nodiscard]] int block_tokens(int number) const {
    const TokenId rest = range_.size() - number * kBlock;
    return rest < kBlock ? rest : kBlock;
  }
  /// Codes [tokens of the block, words] as LearnedHash::pack() has them.
  [[nodiscard]] const std::uint32_t* codes(int number, int kv_head) const {
    return codes_.data() + at(number, kv_head);
  }

  /// Bytes of one KV head that scoring every token reads.
  [[nodiscard]] std::int64_t scan_bytes() const {
    return range_.size() * static_cast<std::int64_t>(sizeof(std::uint32_t)) * hash_->words();
  }

  /// Bytes held; the weights belong to the hash.
  [[nodiscard]] std::size_t bytes() const { return codes_.bytes(); }

 private:
  // Keys that go through a network together.
  static constexpr int kBatch = 32;
  static_assert(kBlock % kBatch == 0);

  [[nodiscard]] static int blocks_of(TokenId tokens) {
    return tokens / kBlock + (tokens % kBlock != 0 ? 1 : 0);
  }
  // Words of a block of one KV head.
  [[nodiscard]] std::size_t block_words() const {
    return static_cast<std::size_t>(kBlock) * static_cast<std::size_t>(hash_->words());
  }
  [[nodiscard]] std::size_t at(int number, int kv_head) const {
    return (static_cast<std::size_t>(number) * static_cast<std::size_t>(kv_heads()) +
            static_cast<std::size_t>(kv_head)) *
           block_words();
  }
  // Of one worker, whole cache lines: keys and what a network needs.
  [[nodiscard]] std::size_t scratch_floats() const {
    const std::size_t floats = static_cast<std::size_t>(kBatch) * static_cast<std::size_t>(dim()) +
                               hash_->scratch_floats(kBatch);
    return (floats + 15) / 16 * 16;
  }

  // Twice as much as there was, so that appending token by token copies each block a few times.
  bool reserve(int blocks) noexcept {
    const std::size_t size = at(blocks, 0);
    const std::size_t twice = 2 * codes_.size();
    const bool grows = size > codes_.bytes() / sizeof(std::uint32_t);
    if (grows && !codes_.reserve(size > twice ? size : twice, advice_)) return false;
    return size <= codes_.size() || codes_.resize(size);
  }

  template <class Backend, KeyValueSource Source>
  Status encode(const Backend& backend, KeyReader<Source>& keys, TokenId end,
                float* scratch) noexcept {
    const TokenId first = range_.end - range_.begin;
    const TokenId last = end - range_.begin;
    const int blocks = blocks_of(last) - first / kBlock;
    std::atomic<std::int64_t> bad{INT64_MAX};  // (token, head) of a key that is not finite
    backend.executor.parallel_for(blocks * kv_heads(), [&](int task, int worker) {
      const int h = task / blocks;
      const TokenId begin = (first / kBlock + task % blocks) * kBlock;
      float* own = scratch + static_cast<std::size_t>(worker) * scratch_floats();
      for (TokenId t = begin > first ? begin : first; t < last && t - begin < kBlock; t += kBatch) {
        const TokenId room = begin + kBlock < last ? begin + kBlock - t : last - t;
        const int count = room < kBatch ? room : kBatch;
        const auto key = [&](int i) { return keys.row(h, range_.begin + t + i, worker); };
        if (encode_batch<typename Backend::Ops>(key, h, t, count, own)) continue;
        const std::int64_t here = (std::int64_t{range_.begin + t} << 24) | h;
        for (std::int64_t seen = bad.load(); here < seen && !bad.compare_exchange_weak(seen, here);)
          ;
        return;
      }
    });
    if (bad.load() == INT64_MAX) {
      range_.end = end;
      return Status();
    }
    const auto head = static_cast<int>(bad.load() & ((1 << 24) - 1));
    const auto token = static_cast<TokenId>(bad.load() >> 24);
    return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                         first_not_finite(keys, head, {.begin = token, .end = end}, token), head);
  }

  // Tokens t to t + count of the index, in one block; false for keys that are not all finite.
  template <class Ops, class KeyOf>
  bool encode_batch(const KeyOf& key_of, int kv_head, TokenId t, int count, float* scratch) {
    bool finite = true;
    for (int i = 0; i < count; ++i) {
      const auto* key = key_of(i);
      float* x = scratch + std::int64_t{i} * dim();
      for (int j = 0; j < dim(); ++j) {
        x[j] = scalar_at(key, j);
        finite &= std::isfinite(x[j]);
      }
    }
    if (!finite) return false;
    const float* outputs = hash_->template key_outputs<Ops>(kv_head, scratch, count,
                                                            scratch + std::int64_t{kBatch} * dim());
    const std::size_t place =
        at(t / kBlock, kv_head) +
        static_cast<std::size_t>(t % kBlock) * static_cast<std::size_t>(hash_->words());
    hash_->pack(outputs, count, codes_.data() + place);
    return true;
  }

  const LearnedHash* hash_;
  MemoryAdvice advice_;
  TokenRange range_;
  Buffer<std::uint32_t> codes_;  // [blocks, kv_heads, kBlock, words]
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// One sealed run of tokens of one KV head in L bucket tables, in CSR form with 16-bit ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "magicpig/core/blob.hpp"
#include "magicpig/core/buffer.hpp"
#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/shared.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Tokens that one segment holds at most: local ids and all B + 1 offsets of a table fit 16 bits,
/// counters for one segment fit the second-level cache. A multiple of 64, for bit sets.
inline constexpr int kMaxSegmentTokens = 65472;

/// For each table the ids of the segment's tokens ordered by bucket, ascending within a bucket, and
/// the offsets of the buckets. Ids are local: token minus the segment's first token.
/// Memory: 2 L (tokens + buckets + 1) bytes, which several owners may share.
class Segment {
 public:
  [[nodiscard]] int tokens() const { return tokens_; }
  [[nodiscard]] std::size_t bytes() const { return ids_.bytes() + offsets_.bytes(); }
  [[nodiscard]] std::size_t shared_bytes() const {
    return ids_.shared_bytes() + offsets_.shared_bytes();
  }

  /// The same segment for another owner. What it holds must not be written while it is shared.
  [[nodiscard]] Segment share() const noexcept {
    Segment other;
    other.tables_ = tables_;
    other.buckets_ = buckets_;
    other.tokens_ = tokens_;
    other.ids_ = ids_.share();
    other.offsets_ = offsets_.share();
    return other;
  }
  /// Makes it its own, so that it may be written. False when memory is short; nothing has changed.
  [[nodiscard]] bool own(MemoryAdvice advice = nullptr) noexcept {
    return ids_.own(ids_.size(), advice) && offsets_.own(offsets_.size(), advice);
  }

  /// Ids in one bucket of one table.
  [[nodiscard]] std::span<const std::uint16_t> bucket(int table, int code) const {
    const std::uint16_t* offsets = offsets_.data() + std::int64_t{table} * (buckets_ + 1);
    const std::uint16_t* ids = ids_.data() + std::int64_t{table} * tokens_;
    return {ids + offsets[code], ids + offsets[code + 1]};
  }

  /// Asks for what bucket() reads.
  MAGICPIG_ALWAYS_INLINE void prefetch_offsets(int table, int code) const {
    prefetch(offsets_.data() + std::int64_t{table} * (buckets_ + 1) + code);
  }

  /// Room for `tables` tables of `tokens` tokens, contents undefined. False when memory is short.
  [[nodiscard]] bool allocate(int tables, int buckets, int tokens,
                              MemoryAdvice advice = nullptr) noexcept {
    tables_ = tables;
    buckets_ = buckets;
    tokens_ = tokens;
    const auto rows = static_cast<std::size_t>(tables);
    return ids_.resize(rows * static_cast<std::size_t>(tokens), advice) &&
           offsets_.resize(rows * static_cast<std::size_t>(buckets + 1), advice);
  }

  /// Fills one table with the first old.tokens() tokens of `old` and then the tokens whose codes
  /// are `codes` [tokens() - old.tokens()]; different tables may be filled from different threads.
  /// A stable counting sort.
  void fill_table(int table, const Segment& old, const Code* codes) noexcept {
    std::uint16_t* offsets = offsets_.writable() + std::int64_t{table} * (buckets_ + 1);
    std::uint16_t* ids = ids_.writable() + std::int64_t{table} * tokens_;
    const int fresh = tokens_ - old.tokens_;
    std::memset(offsets, 0, sizeof(std::uint16_t) * static_cast<std::size_t>(buckets_ + 1));
    for (int i = 0; i < fresh; ++i) ++offsets[codes[i]];
    int start = 0;  // counts become the places of the first fresh ids, behind the old ones
    for (int bucket = 0; bucket < buckets_; ++bucket) {
      const int count = offsets[bucket];
      if (old.tokens_ != 0) {
        const auto kept = old.bucket(table, bucket);
        if (!kept.empty()) std::memcpy(ids + start, kept.data(), kept.size_bytes());
        start += static_cast<int>(kept.size());
      }
      offsets[bucket] = static_cast<std::uint16_t>(start);
      start += count;
    }
    for (int i = 0; i < fresh; ++i) {
      ids[offsets[codes[i]]++] = static_cast<std::uint16_t>(old.tokens_ + i);
    }
    // Each offset now stands at its bucket's end, which is where the next one starts.
    std::memmove(offsets + 1, offsets, sizeof(std::uint16_t) * static_cast<std::size_t>(buckets_));
    offsets[0] = 0;
  }

  /// The codes of all tokens in one table, to `codes` [tokens()].
  void codes_of(int table, Code* codes) const noexcept {
    for (int code = 0; code < buckets_; ++code) {
      for (const std::uint16_t id : bucket(table, code)) codes[id] = static_cast<Code>(code);
    }
  }

  /// Drops the tokens from local id `tokens` on. Keeps its memory, which must be its own.
  void truncate(int tokens) noexcept {
    std::uint16_t* to = ids_.writable();
    for (int table = 0; table < tables_; ++table) {
      std::uint16_t* offsets = offsets_.writable() + std::int64_t{table} * (buckets_ + 1);
      const std::uint16_t* ids = ids_.data() + std::int64_t{table} * tokens_;
      int kept = 0;
      for (int bucket = 0; bucket < buckets_; ++bucket) {
        const int begin = offsets[bucket];
        const int end = offsets[bucket + 1];
        offsets[bucket] = static_cast<std::uint16_t>(kept);
        for (int i = begin; i < end && ids[i] < tokens; ++i) to[kept++] = ids[i];
      }
      offsets[buckets_] = static_cast<std::uint16_t>(kept);
      to += tokens;
    }
    tokens_ = tokens;
  }

  /// Ids and offsets, as take() has them.
  void put(BlobWriter& writer) const {
    writer.put_array(std::span(ids_.data(), size(tokens_)));
    writer.put_array(std::span(offsets_.data(), size(buckets_ + 1)));
  }
  /// What put() wrote of a segment of the same tables, buckets and tokens; needs allocate(). The
  /// reader refuses what no fill_table() makes. `seen` [tokens] is scratch.
  void take(BlobReader& reader, std::uint8_t* seen) noexcept {
    reader.take_array("ids", std::span(ids_.writable(), size(tokens_)));
    reader.take_array("offsets", std::span(offsets_.writable(), size(buckets_ + 1)));
    for (int table = 0; table < tables_ && reader.ok(); ++table) {
      reader.require(is_sorted(table, seen), "table", table);
    }
  }

 private:
  [[nodiscard]] std::size_t size(int per_table) const {
    return static_cast<std::size_t>(tables_) * static_cast<std::size_t>(per_table);
  }

  // Whether a table's buckets follow upon each other and hold each token once, in order.
  [[nodiscard]] bool is_sorted(int table, std::uint8_t* seen) const noexcept {
    const std::uint16_t* offsets = offsets_.data() + std::int64_t{table} * (buckets_ + 1);
    const std::uint16_t* ids = ids_.data() + std::int64_t{table} * tokens_;
    if (offsets[0] != 0 || offsets[buckets_] != tokens_) return false;
    std::memset(seen, 0, static_cast<std::size_t>(tokens_));
    for (int bucket = 0; bucket < buckets_; ++bucket) {
      if (offsets[bucket] > offsets[bucket + 1] || offsets[bucket + 1] > tokens_) return false;
      int last = -1;
      for (int i = offsets[bucket]; i < offsets[bucket + 1]; ++i) {
        if (ids[i] <= last || ids[i] >= tokens_ || seen[ids[i]] != 0) return false;
        last = ids[i];
        seen[last] = 1;
      }
    }
    return true;
  }

  int tables_ = 0;
  int buckets_ = 0;
  int tokens_ = 0;
  SharedArray<std::uint16_t> ids_;      // [tables, tokens]
  SharedArray<std::uint16_t> offsets_;  // [tables, buckets + 1]
};

}  // namespace magicpig::inline MAGICPIG_ABI

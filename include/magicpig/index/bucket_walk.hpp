// SPDX-License-Identifier: Apache-2.0
// The buckets that a group of queries visits, one after the other and fetched ahead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/index/segment.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Visits, segment by segment and in it query by query, bucket codes[table] ^ mask of each table
/// for each mask. A bucket is two dependent trips to memory, its offsets and its ids; both are
/// asked for several buckets ahead, across tables, queries and segments, so that many are under way
/// at any time.
template <class Tables>
class BucketWalk {
 public:
  struct Input {
    const Tables& index;
    int kv_head = 0;
    const Code* codes = nullptr;  ///< [queries, tables]
    int queries = 0;
    int tables = 0;
    std::span<const Code> masks;  ///< at least one
  };

  explicit BucketWalk(const Input& input) : in_(input) {
    for (std::size_t i = 0; i < kOffsetsAhead; ++i) step_offsets();
    for (std::size_t i = 0; i < kIdsAhead; ++i) step_ids();
  }

  /// Local ids of the next bucket. Not to be called more often than there are buckets.
  [[nodiscard]] MAGICPIG_ALWAYS_INLINE std::span<const std::uint16_t> next() {
    const std::span<const std::uint16_t> ids = ring_[at_ % kIdsAhead];
    step_offsets();
    step_ids();
    ++at_;
    return ids;
  }

 private:
  // Of 4 to 64 buckets these are the smallest near the best (bench: stage/retrieve).
  static constexpr std::size_t kIdsAhead = 16;
  static constexpr std::size_t kOffsetsAhead = 32;

  // A place in the order of visits.
  struct Place {
    const Segment* segment = nullptr;
    int number = -1;  // of the segment
    int query = 0;
    int table = 0;
    std::size_t mask = 0;
  };

  // Whether there is such a place; finds its segment.
  MAGICPIG_ALWAYS_INLINE bool find(Place& place) const {
    if (place.segment != nullptr) return true;
    if (place.number + 1 >= in_.index.segment_count()) return false;
    ++place.number;
    place.segment = &in_.index.segment(place.number, in_.kv_head);
    return true;
  }

  [[nodiscard]] MAGICPIG_ALWAYS_INLINE Code code(const Place& place) const {
    return static_cast<Code>(in_.codes[std::int64_t{place.query} * in_.tables + place.table] ^
                             in_.masks[place.mask]);
  }

  MAGICPIG_ALWAYS_INLINE void advance(Place& place) const {
    if (++place.mask < in_.masks.size()) return;
    place.mask = 0;
    if (++place.table < in_.tables) return;
    place.table = 0;
    if (++place.query < in_.queries) return;
    place.query = 0;
    place.segment = nullptr;
  }

  MAGICPIG_ALWAYS_INLINE void step_offsets() {
    if (!find(offsets_)) return;
    offsets_.segment->prefetch_offsets(offsets_.table, code(offsets_));
    advance(offsets_);
  }

  MAGICPIG_ALWAYS_INLINE void step_ids() {
    if (!find(ids_)) return;
    const auto ids = ids_.segment->bucket(ids_.table, code(ids_));
    ring_[found_++ % kIdsAhead] = ids;
    prefetch(ids.data(), ids.size_bytes());
    advance(ids_);
  }

  Input in_;
  Place offsets_;
  Place ids_;
  std::size_t found_ = 0;
  std::size_t at_ = 0;
  std::span<const std::uint16_t> ring_[kIdsAhead];
};

}  // namespace magicpig::inline MAGICPIG_ABI

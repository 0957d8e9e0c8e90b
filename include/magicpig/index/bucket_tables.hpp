// SPDX-License-Identifier: Apache-2.0
// (K, L) bucket tables over the keys of one layer: the index MagicPIG is published with.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/index/key_hasher.hpp"
#include "magicpig/index/segment.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What bucket tables are made from.
struct BucketTablesConfig {
  int kv_heads = 1;
  /// Tokens per segment, in [64, kMaxSegmentTokens]. Smaller ones cost 2 L (B + 1) bytes each.
  int segment_tokens = kMaxSegmentTokens;
  /// append() takes tokens in multiples of this, at least 1; up to seal_tokens - 1 newest tokens
  /// stay exact. Each append rewrites the last segment, so larger is cheaper.
  int seal_tokens = 1024;
  /// Shown every array of ids, offsets and norms before it is filled; null for none.
  MemoryAdvice memory_advice = nullptr;
};

/// For each KV head, L hash tables of the centred keys k - c of a range of tokens. c, the mean of
/// the keys when the index was empty last, stays as it is until build() or until the index is empty
/// again; it enters only the cosine, so any c is correct and a stale one only samples worse. Keys
/// are read while indexing and never kept.
///
/// Every token of a cache is either indexed or exact: tokens outside indexed() are attended to
/// exactly. The content depends on the range, the centre and the segment size alone, not on how
/// it was reached; segments start at indexed().begin and every segment_tokens from there.
///
/// Memory per token and KV head: 2 L bytes of ids, 4 of norm, and 2 L (2^K + 1) / segment_tokens of
/// offsets: 308.7 bytes at (10, 150) in full segments. While it is changed, the changed segments
/// exist twice, plus 2 L bytes per token of one segment.
/// Threads: any number may read (all const functions); changes need exclusive access.
/// Source: Chen et al. 2024, algorithm 1; segments and 16-bit ids are ours.
template <HashFamily Family>
class BucketTables {
 public:
  using Config = BucketTablesConfig;
  using HashFamilyType = Family;

  /// An empty index. `family` must outlive it and may be shared by any number of indexes.
  /// Errors: a config value outside its bounds.
  [[nodiscard]] static Result<BucketTables> create(const Family& family,
                                                   const BucketTablesConfig& config) noexcept {
    const Status status = check_kv_heads(config.kv_heads);
    if (!status.ok()) return status;
    if (config.segment_tokens < 64 || config.segment_tokens > kMaxSegmentTokens) {
      return Status::error(ErrorCode::kInvalidArgument, "segment_tokens %d must lie in [64, %d]",
                           config.segment_tokens, kMaxSegmentTokens);
    }
    if (config.seal_tokens < 1) {
      return Status::error(ErrorCode::kInvalidArgument, "seal_tokens %d must be at least 1",
                           config.seal_tokens);
    }
    BucketTables index(family, config);
    const auto heads = static_cast<std::size_t>(config.kv_heads);
    index.norms_.reset(new (std::nothrow) Buffer<float>[heads]);
    if (index.norms_ == nullptr ||
        !index.centres_.resize(heads * static_cast<std::size_t>(family.dim()))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", config.kv_heads);
    }
    return index;
  }
  static Result<BucketTables> create(const Family&& family, const BucketTablesConfig&) = delete;

  /// Replaces the content by the tokens of `range` (often Window::middle) and makes the centre
  /// anew. Errors: source and config disagree, range outside the source, a key that is not finite,
  /// memory, a backend without workers; the index is then unchanged. An empty range may begin
  /// beyond a short cache: it says where append() is to start.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Result<BucketTables> fresh = create(*family_, config_);
    if (!fresh.ok()) return fresh.status();
    Status status = check_range(range);
    if (status.ok()) {
      status = check_source(source, kv_heads(), dim(), range.empty() ? 0 : range.end);
    }
    if (!status.ok()) return status;
    fresh->range_ = {.begin = range.begin, .end = range.begin};
    status = fresh->extend(backend, source, range.end);
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  /// Takes over tokens [indexed().end, end) in multiples of seal_tokens; the rest stays exact until
  /// a later call. Where the first token lies is build()'s to say: before the first append, build
  /// with the middle of what there is, be it empty. An `end` at or below indexed().end changes
  /// nothing. Errors: as build().
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    const Status status = check_source(source, kv_heads(), dim(), end);
    if (!status.ok()) return status;
    const TokenId waiting = end - range_.end;
    return extend(backend, source, end - waiting % config_.seal_tokens);
  }

  /// Forgets tokens from `end` on. An `end` at or beyond indexed().end changes nothing; one at or
  /// below indexed().begin leaves an empty index, whose centre the next append makes anew. Cost: a
  /// pass over the ids of one segment. Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    const int kept = segments_for(range_.size());
    for (int s = kept; s < segment_count_; ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) segments_[place(s, h)] = Segment();
    }
    segment_count_ = kept;
    for (int h = 0; h < config_.kv_heads; ++h) {
      (void)norms_of(h).resize(static_cast<std::size_t>(range_.size()));
      if (kept > 0) segments_[place(kept - 1, h)].truncate(tokens_in(kept - 1));
    }
    return Status();
  }

  [[nodiscard]] const Family& family() const { return *family_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return family_->dim(); }
  /// Tokens the index covers.
  [[nodiscard]] TokenRange indexed() const { return range_; }

  [[nodiscard]] int segment_count() const { return segment_count_; }
  [[nodiscard]] const Segment& segment(int number, int kv_head) const {
    return segments_[place(number, kv_head)];
  }
  /// First token of a segment.
  [[nodiscard]] TokenId segment_begin(int number) const {
    return range_.begin + number * config_.segment_tokens;
  }
  /// |k - c|, one per indexed token, from indexed().begin on.
  [[nodiscard]] const float* norms(int kv_head) const { return norms_of(kv_head).data(); }
  /// c, [dim].
  [[nodiscard]] const float* centre(int kv_head) const {
    return centres_.data() + std::int64_t{kv_head} * dim();
  }

  /// Bytes held by all arrays; the planes belong to the family.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = centres_.bytes();
    for (int h = 0; h < config_.kv_heads; ++h) {
      sum += norms_of(h).bytes();
      for (int s = 0; s < segment_count_; ++s) sum += segment(s, h).bytes();
    }
    return sum;
  }

 private:
  BucketTables(const Family& family, const BucketTablesConfig& config)
      : family_(&family), config_(config) {}

  [[nodiscard]] std::size_t place(int number, int kv_head) const {
    return static_cast<std::size_t>(number) * static_cast<std::size_t>(config_.kv_heads) +
           static_cast<std::size_t>(kv_head);
  }
  [[nodiscard]] Buffer<float>& norms_of(int kv_head) const {
    return norms_[static_cast<std::size_t>(kv_head)];
  }
  [[nodiscard]] int segments_for(TokenId tokens) const {
    return tokens / config_.segment_tokens + (tokens % config_.segment_tokens != 0 ? 1 : 0);
  }
  [[nodiscard]] int tokens_in(int number) const {
    const TokenId rest = range_.end - segment_begin(number);
    return rest < config_.segment_tokens ? rest : config_.segment_tokens;
  }

  // Everything a change needs before it can be committed.
  struct Change {
    explicit Change(const Family& family) : hasher(family) {}

    TokenRange tokens;
    int first_segment = 0;
    int segments = 0;                     // rewritten or new
    std::unique_ptr<Segment[]> fresh;     // [segments, kv_heads]
    std::unique_ptr<Segment[]> combined;  // room for all segments, old and new
    KeyHasher<Family> hasher;
    Buffer<Code> codes;  // [tables, tokens], one segment of one head
  };

  // Indexes [range_.end, end): makes the new segments aside, then commits.
  template <class Backend, KeyValueSource Source>
  Status extend(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end == range_.end) return Status();
    if (const Status ready = check_workers(backend); !ready.ok()) return ready;
    const int workers = backend.executor.workers();
    Change change(*family_);
    KeyReader<Source> keys(source);
    change.tokens = {.begin = range_.end, .end = end};
    if (!prepare(change, workers) || !keys.reserve(workers, kMeanSlots)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens",
                           change.tokens.size());
    }
    if (range_.empty()) {
      change.hasher.make_centres(backend, keys, change.tokens, centres_.data());
    }
    for (int s = 0; s < change.segments; ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) {
        const Status status = make_segment(backend, keys, change, s, h);
        if (!status.ok()) return status;
      }
    }
    commit(change);
    return Status();
  }

  bool prepare(Change& change, int workers) noexcept {
    const auto heads = static_cast<std::size_t>(config_.kv_heads);
    const TokenId total = change.tokens.end - range_.begin;
    const int all_segments = segments_for(total);
    change.first_segment = range_.size() / config_.segment_tokens;
    change.segments = all_segments - change.first_segment;
    change.fresh.reset(new (std::nothrow)
                           Segment[static_cast<std::size_t>(change.segments) * heads]);
    change.combined.reset(new (std::nothrow)
                              Segment[static_cast<std::size_t>(all_segments) * heads]);
    if (change.fresh == nullptr || change.combined == nullptr) return false;
    const TokenId longest =
        total < config_.segment_tokens ? total : TokenId{config_.segment_tokens};
    if (!change.hasher.reserve(config_.kv_heads, workers) ||
        !change.codes.resize(static_cast<std::size_t>(family_->tables()) *
                             static_cast<std::size_t>(longest))) {
      return false;
    }
    const auto needed = static_cast<std::size_t>(total);
    for (int h = 0; h < config_.kv_heads; ++h) {
      // A first build takes what it needs, growth takes half as much again.
      const bool growing = norms_of(h).size() != 0 && needed * sizeof(float) > norms_of(h).bytes();
      const std::size_t room = growing ? needed + needed / 2 : needed;
      if (!norms_of(h).reserve(room, config_.memory_advice)) return false;
    }
    return true;
  }

  // Makes fresh segment `s` of the change for one head: old tokens of the segment, then new ones.
  template <class Backend, KeyValueSource Source>
  Status make_segment(const Backend& backend, KeyReader<Source>& keys, Change& change, int s,
                      int kv_head) noexcept {
    const int number = change.first_segment + s;
    const Segment none;
    const Segment& old = number < segment_count_ ? segment(number, kv_head) : none;
    const TokenId begin = segment_begin(number) + old.tokens();
    const TokenId room = config_.segment_tokens - old.tokens();
    const TokenId rest = change.tokens.end - begin;
    const TokenRange tokens{.begin = begin, .end = begin + (rest < room ? rest : room)};
    Segment& fresh =
        change.fresh[static_cast<std::size_t>(s) * static_cast<std::size_t>(config_.kv_heads) +
                     static_cast<std::size_t>(kv_head)];
    if (!fresh.allocate(family_->tables(), bucket_count(family_->bits()),
                        old.tokens() + tokens.size(), config_.memory_advice)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for a segment of %d tokens",
                           old.tokens() + tokens.size());
    }
    float* norms = norms_of(kv_head).data() + (tokens.begin - range_.begin);
    change.hasher.hash(backend, keys, kv_head, tokens, centre(kv_head), norms, change.codes.data());
    for (int i = 0; i < tokens.size(); ++i) {
      if (std::isfinite(norms[i])) continue;
      // The centre spreads one such key to the norms of all; without one this norm overflowed.
      const TokenId token = first_not_finite(keys, kv_head, change.tokens, tokens.begin + i);
      return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                           token, kv_head);
    }
    backend.executor.parallel_for(family_->tables(), [&](int table, int) {
      fresh.fill_table(table, old, change.codes.data() + std::int64_t{table} * tokens.size());
    });
    return Status();
  }

  void commit(Change& change) noexcept {
    for (int h = 0; h < config_.kv_heads; ++h) {
      for (int s = 0; s < change.first_segment; ++s) {
        change.combined[place(s, h)] = std::move(segments_[place(s, h)]);
      }
      for (int s = 0; s < change.segments; ++s) {
        change.combined[place(change.first_segment + s, h)] = std::move(change.fresh[place(s, h)]);
      }
      (void)norms_of(h).resize(static_cast<std::size_t>(change.tokens.end - range_.begin));
    }
    segments_ = std::move(change.combined);
    segment_count_ = change.first_segment + change.segments;
    range_.end = change.tokens.end;
  }

  const Family* family_;
  BucketTablesConfig config_;
  TokenRange range_;
  int segment_count_ = 0;
  std::unique_ptr<Segment[]> segments_;     // [segment_count, kv_heads]
  std::unique_ptr<Buffer<float>[]> norms_;  // [kv_heads] of [tokens]
  Buffer<float> centres_;                   // [kv_heads, dim]
};

}  // namespace magicpig::inline MAGICPIG_ABI

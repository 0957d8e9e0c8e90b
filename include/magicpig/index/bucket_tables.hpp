// SPDX-License-Identifier: Apache-2.0
// (K, L) bucket tables over the keys of one layer: the index MagicPIG is published with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>

#include "magicpig/core/blob.hpp"
#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/shared.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/index/hashed_keys.hpp"
#include "magicpig/index/key_hasher.hpp"
#include "magicpig/index/saved.hpp"
#include "magicpig/index/segment.hpp"
#include "magicpig/index/segment_table.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What bucket tables are made from.
struct BucketTablesConfig {
  int kv_heads = 1;
  /// Tokens per segment, in [64, kMaxSegmentTokens]. Smaller ones cost 2 L (B + 1) bytes each.
  int segment_tokens = kMaxSegmentTokens;
  /// append() takes tokens in multiples of this, at least 1; up to seal_tokens - 1 newest tokens
  /// stay exact. Each append rewrites the last segment, so larger is cheaper: per token and KV head
  /// up to 2 L (segment_tokens / seal_tokens + 1) / 2 bytes on average, besides its hashes.
  int seal_tokens = 1024;
  /// Calls of append() over which the work for such a block is spread, in [1, seal_tokens]; by 1
  /// the call that completes the block does all of it. Otherwise the block stays exact until the
  /// last of them: of calls that bring a token each, up to seal_tokens + seal_steps - 2 newest
  /// tokens are, and 2 seal_tokens - 1 at most. Meanwhile its keys must stay where and as they are:
  /// a host that takes some of them back or changes them calls truncate().
  int seal_steps = 1;
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
/// offsets: 308.7 bytes at (10, 150) in full segments; a bit per token once any was erased. While
/// it is changed, the changed segments exist twice, plus 2 L bytes per token of one segment and 4
/// per token that is new. Segments are shared by forks: a change copies those that it changes and
/// that another fork has, and the norms of all tokens. Threads: any number may read (all const
/// functions, fork() too); changes need exclusive access to this fork, whatever happens to others.
/// Where sealing takes too long for a decode step, a host spreads it (seal_steps), or appends to a
/// fork on another thread and then moves it here. Source: Chen et al. 2024, algorithm 1; segments
/// and 16-bit ids are ours.
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
    if (config.seal_steps < 1 || config.seal_steps > config.seal_tokens) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "seal_steps %d must lie in [1, seal_tokens %d]", config.seal_steps,
                           config.seal_tokens);
    }
    BucketTables index(family, config);
    const auto heads = static_cast<std::size_t>(config.kv_heads);
    index.norms_.reset(new (std::nothrow) SharedArray<float>[heads]);
    if (index.norms_ == nullptr ||
        !index.centres_.resize(heads * static_cast<std::size_t>(family.dim()))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", config.kv_heads);
    }
    for (float& x : index.centres_.span()) x = 0.0F;
    return index;
  }
  static Result<BucketTables> create(const Family&& family, const BucketTablesConfig&) = delete;

  /// Replaces the content by the tokens of `range` (often Window::middle) and makes the centre
  /// anew. Errors: source and config disagree, range outside the source, a key that is not finite,
  /// memory, a backend without workers; the index is then unchanged. An empty range may begin
  /// beyond a short cache: it says where append() is to start.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    return build_from(backend, source, range, nullptr);
  }

  /// The same with given centres, such as another index's centres(). Errors: also as
  /// check_centres(). An empty range forgets them: the next append makes its own.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range,
               const Centres& centres) noexcept {
    const Status status = check_centres(centres, centres_.size(), 0);
    return status.ok() ? build_from(backend, source, range, &centres) : status;
  }

  /// The same from hashes made elsewhere and the centres that they were made with: the very index
  /// that a build from the keys makes if it finds these codes and norms. Errors: as
  /// check_hashed_keys() and check_centres(), memory; the index is then unchanged. An empty range
  /// makes an empty index, whatever the rest.
  template <class Backend>
  Status build(const Backend& backend, const HashedKeys& keys) noexcept {
    Status status = check_hashed_keys(backend, keys, kv_heads(), *family_);
    const bool none = keys.tokens.empty();
    if (status.ok() && !none) status = check_centres(keys.centres, centres_.size(), 0);
    if (!status.ok()) return status;
    return build_aside(keys.tokens.begin, none ? nullptr : &keys.centres,
                       [&](BucketTables& fresh) { return fresh.extend(backend, keys); });
  }

  /// Takes over tokens [indexed().end, end) in multiples of seal_tokens; the rest stays exact until
  /// a later call. Where the first token lies is build()'s to say: before the first append, build
  /// with the middle of what there is, be it empty. An `end` at or below indexed().end changes
  /// nothing. With seal_steps above 1 a block is taken over by the last of as many calls, and at
  /// once where the index is empty or a second block is complete. Errors: as build(); a block that
  /// was under way is then begun anew by the next call.
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (sealing_ && end < sealing_->tokens.end) sealing_.reset();
    if (sealing_ && sealing_->tokens.end <= range_.end) give_back_one();
    if (end <= range_.end) return Status();
    const Status status = check_source(source, kv_heads(), dim(), end);
    if (!status.ok()) return status;
    const TokenId waiting = end - range_.end;
    end -= waiting % config_.seal_tokens;
    if (config_.seal_steps > 1 && end - range_.end == config_.seal_tokens && !range_.empty()) {
      return seal_some(backend, source, end);
    }
    if (end > range_.end) sealing_.reset();
    return extend(backend, source, end, range_.empty());
  }

  /// Takes over exactly these tokens, hashed elsewhere with centres(), at once: any number of them,
  /// from indexed().end of an index with tokens on. A block under way is then begun anew by the
  /// next call. An empty range changes nothing. Errors: as check_hashed_keys(), tokens that begin
  /// elsewhere, an index without tokens (it has no centre: build() it), memory; nothing is changed
  /// then.
  template <class Backend>
  Status append(const Backend& backend, const HashedKeys& keys) noexcept {
    Status status = check_hashed_keys(backend, keys, kv_heads(), *family_);
    if (!status.ok() || keys.tokens.empty()) return status;
    if (range_.empty() || keys.tokens.begin != range_.end) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "cannot append hashed keys [%d, %d) to an index of [%d, %d)",
                           keys.tokens.begin, keys.tokens.end, range_.begin, range_.end);
    }
    status = extend(backend, keys);
    if (status.ok()) sealing_.reset();
    return status;
  }

  /// Forgets tokens from `end` on. An `end` at or beyond indexed().end changes nothing, but that a
  /// block under way with tokens from there on is begun anew; one at or below indexed().begin
  /// leaves an empty index, whose centre the next append makes anew. Tokens that were erased there
  /// may be appended again. Cost: a pass over the ids of one segment. Errors: a negative `end`,
  /// memory where that segment is shared; nothing is changed then.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (status.ok() && sealing_ && end < sealing_->tokens.end) sealing_.reset();
    if (!status.ok() || end >= range_.end) return status;
    const TokenRange rest{.begin = range_.begin, .end = end > range_.begin ? end : range_.begin};
    const int kept = segments_for(rest.size());
    const bool cut = kept > 0 && rest.size() % config_.segment_tokens != 0;
    for (int h = 0; h < config_.kv_heads && cut; ++h) {
      if (segments_.at(kept - 1, h).own(config_.memory_advice)) continue;
      return Status::error(ErrorCode::kOutOfMemory, "no memory to truncate to %d tokens", end);
    }
    range_ = rest;
    erased_.truncate(range_.end);
    segments_.resize(kept);
    for (int h = 0; h < config_.kv_heads; ++h) {
      norms_of(h).shrink(static_cast<std::size_t>(range_.size()));
      if (cut) segments_.at(kept - 1, h).truncate(tokens_in(kept - 1));
    }
    return Status();
  }

  /// An index of the same tokens that shares all segments, without a block under way. Either may
  /// then be read, changed and destroyed on a thread of its own. Memory of its own: centres, bits
  /// of erased tokens, 64 bytes per segment and KV head. Error: memory.
  [[nodiscard]] Result<BucketTables> fork() const noexcept {
    Result<BucketTables> other = create(*family_, config_);
    if (!other.ok()) return other;
    if (!other->segments_.share(segments_) || !other->erased_.assign(erased_)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to fork an index of %d tokens",
                           range_.size());
    }
    for (int h = 0; h < config_.kv_heads; ++h) other->norms_of(h) = norms_of(h).share();
    std::copy_n(centres_.data(), centres_.size(), other->centres_.data());
    other->range_ = range_;
    return other;
  }

  /// Forgets `tokens`, in any order: they are neither drawn nor attended to any more, and indexed()
  /// stays as it is. Their rows are not read again. One that was erased before changes nothing.
  /// Errors: a token outside indexed(), memory; nothing is changed then.
  Status erase(std::span<const TokenId> tokens) noexcept {
    const Status status = check_erasure(tokens, range_);
    if (!status.ok() || tokens.empty() || erased_.add(tokens, range_.end)) return status;
    return Status::error(ErrorCode::kOutOfMemory, "no memory to erase %zu tokens", tokens.size());
  }

  /// Hashes tokens anew whose keys have changed in place, as after a shift of rotary positions: the
  /// index is then what it were if they had been so when they were appended, with the centre that
  /// it has. Erased tokens stay so. Cost: the hashes of these tokens, and sorting the segments that
  /// they lie in anew, which exist twice meanwhile. Errors: as build(), a range outside indexed();
  /// the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status rehash(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Status status = check_rehash(range, range_);
    if (status.ok()) status = check_source(source, kv_heads(), dim(), range.end);
    if (status.ok()) status = check_rows(source, range);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    while (!range.empty() && erased().has(range.begin)) ++range.begin;
    if (range.empty()) return Status();
    return hash_again(backend, PresentRows<Source>(source, erased(), range.begin), range);
  }

  /// How far the keys have left the centre, see drift_of_keys(): 0 for none, up to 1. Cost: up to
  /// 8,192 rows of each KV head. 0 for an index without tokens. Errors: as build().
  template <class Backend, KeyValueSource Source>
  [[nodiscard]] Result<double> drift(const Backend& backend, const Source& source) const noexcept {
    Status status = check_source(source, kv_heads(), dim(), range_.empty() ? 0 : range_.end);
    if (status.ok()) status = check_rows(source, range_);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    PresentTokens tokens;
    if (tokens.list(range_, erased())) {
      return drift_of_keys(backend, source, tokens, centres_.data());
    }
    return Status::error(ErrorCode::kOutOfMemory, "no memory to list %d tokens", range_.size());
  }

  /// Makes the centre anew, of the tokens that are there, and hashes all of them with it: the index
  /// is then the one that build() with this centre makes. For hosts whose drift() has passed a
  /// bound of theirs; without it the centre stays as it is. Cost and errors: as rehash() of
  /// everything, and reading 8,192 rows of each KV head.
  template <class Backend, KeyValueSource Source>
  Status recentre(const Backend& backend, const Source& source) noexcept {
    Status status = check_source(source, kv_heads(), dim(), range_.empty() ? 0 : range_.end);
    if (status.ok()) status = check_rows(source, range_);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    PresentTokens tokens;
    Buffer<float> centres;
    Buffer<double> sums;
    KeyReader<Source> keys(source);
    if (!tokens.list(range_, erased()) || !centres.resize(centres_.size()) ||
        !sums.resize(centres_.size()) || !keys.reserve(backend.executor.workers(), kMeanSlots)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to centre %d tokens", range_.size());
    }
    if (tokens.count() == 0) return Status();
    PresentReader present(keys, tokens);
    mean_of_rows(backend, kv_heads(), dim(), {.begin = 0, .end = tokens.count()}, present,
                 sums.data(), centres.data());
    std::swap(centres_, centres);
    status = rehash(backend, source, range_);
    if (!status.ok()) std::swap(centres_, centres);
    return status;
  }

  /// Forgets everything of a request: an empty index at token 0 with the same family and config.
  /// Gives back segments, norms and the bits of erased tokens; keeps the memory of the centres and
  /// of the list of segments.
  void clear() noexcept {
    range_ = {};
    sealing_.reset();
    segments_.resize(0);
    for (int h = 0; h < config_.kv_heads; ++h) norms_of(h) = SharedArray<float>();
    erased_ = TokenBits();
  }

  /// Bytes that save() writes: those of the index but for what segments have in reserve.
  [[nodiscard]] std::size_t saved_bytes() const { return saved_bytes_of(*this); }
  /// Writes the index to `to`, of at least saved_bytes(), but for its family, of which it has the
  /// fingerprint. Error: fewer bytes; nothing is written then.
  [[nodiscard]] Status save(std::span<std::byte> to) const noexcept {
    return save_blob(BlobKind::kBucketTables, *this, to);
  }
  /// Replaces the content by what save() wrote of an index with the same kv_heads and
  /// segment_tokens and an equal family. Errors: bytes that are not that (kBadBlob, see
  /// BlobReader), memory; the index is then unchanged. Twice the memory meanwhile.
  Status load(std::span<const std::byte> from) noexcept {
    Result<BucketTables> fresh = create(*family_, config_);
    if (!fresh.ok()) return fresh.status();
    const Status status = fresh->take(BlobReader(BlobKind::kBucketTables, from));
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  /// The fields that save() writes.
  void put(BlobWriter& writer) const {
    writer.put(config_.kv_heads);
    writer.put(config_.segment_tokens);
    writer.put(family_->fingerprint());
    SavedTokens::put(writer, range_, erased_, centres());
    for (int h = 0; h < config_.kv_heads; ++h) {
      writer.put_array(std::span(norms(h), static_cast<std::size_t>(range_.size())));
    }
    for (int s = 0; s < segment_count(); ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) segment(s, h).put(writer);
    }
  }

  /// bytes() of an index of `tokens` tokens that was just built.
  [[nodiscard]] static std::size_t estimate_bytes(const Family& family,
                                                  const BucketTablesConfig& config,
                                                  TokenId tokens) {
    const auto count = static_cast<std::size_t>(tokens);
    const std::size_t segments =
        count == 0 ? 0 : (count - 1) / static_cast<std::size_t>(config.segment_tokens) + 1;
    const auto offsets = static_cast<std::size_t>(bucket_count(family.bits()) + 1);
    return static_cast<std::size_t>(config.kv_heads) *
           (static_cast<std::size_t>(family.tables()) * sizeof(std::uint16_t) *
                (count + segments * offsets) +
            sizeof(float) * (count + static_cast<std::size_t>(family.dim())));
  }

  [[nodiscard]] const Family& family() const { return *family_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return family_->dim(); }
  /// Tokens the index covers, erased ones among them.
  [[nodiscard]] TokenRange indexed() const { return range_; }
  /// Those of them that were erased; until the next change.
  [[nodiscard]] TokenMask erased() const { return erased_.view(); }
  /// What is subtracted from keys; of an index without tokens it means nothing.
  [[nodiscard]] Centres centres() const { return {.keys = centres_.span()}; }

  [[nodiscard]] int segment_count() const { return segments_.count(); }
  [[nodiscard]] const Segment& segment(int number, int kv_head) const {
    return segments_.at(number, kv_head);
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

  /// Bytes held by all arrays, whoever shares them, those of a block under way too; the planes
  /// belong to the family.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = centres_.bytes() + erased_.bytes() + segments_.bytes();
    if (sealing_) sum += sealing_->bytes();
    for (int h = 0; h < config_.kv_heads; ++h) sum += norms_of(h).bytes();
    return sum;
  }
  /// How many of them other forks hold, too.
  [[nodiscard]] std::size_t shared_bytes() const {
    std::size_t sum = segments_.shared_bytes();
    for (int h = 0; h < config_.kv_heads; ++h) sum += norms_of(h).shared_bytes();
    return sum;
  }

 private:
  BucketTables(const Family& family, const BucketTablesConfig& config)
      : family_(&family), config_(config), segments_(config.kv_heads) {}

  [[nodiscard]] SharedArray<float>& norms_of(int kv_head) const {
    return norms_[static_cast<std::size_t>(kv_head)];
  }
  [[nodiscard]] int segments_for(TokenId tokens) const {
    return tokens / config_.segment_tokens + (tokens % config_.segment_tokens != 0 ? 1 : 0);
  }
  [[nodiscard]] int tokens_in(int number) const {
    const TokenId rest = range_.end - segment_begin(number);
    return rest < config_.segment_tokens ? rest : config_.segment_tokens;
  }

  // What put() wrote, to an empty index.
  Status take(BlobReader reader) noexcept {
    reader.expect("kv_heads", config_.kv_heads);
    reader.expect("segment_tokens", config_.segment_tokens);
    reader.expect("family", family_->fingerprint());
    SavedTokens tokens;
    const Status status = tokens.take(reader, INT32_MAX, centres_.size(), 0);
    if (!status.ok()) return status;
    const auto heads = static_cast<std::size_t>(config_.kv_heads);
    const auto count = static_cast<std::size_t>(tokens.range.size());
    const auto tables = static_cast<std::size_t>(family_->tables());
    reader.need("tables", count, heads * (sizeof(float) + tables * sizeof(std::uint16_t)));
    if (!reader.ok()) return reader.status();
    range_ = tokens.range;
    erased_ = std::move(tokens.erased);
    centres_ = std::move(tokens.keys);
    const Status no_memory =
        Status::error(ErrorCode::kOutOfMemory, "no memory to load %d tokens", range_.size());
    for (int h = 0; h < config_.kv_heads; ++h) {
      if (!norms_of(h).resize(count, config_.memory_advice)) return no_memory;
      reader.take_array("norms", std::span(norms_of(h).writable(), count));
      for (std::size_t i = 0; i < count && reader.ok(); ++i) {
        const float norm = norms_of(h).data()[i];
        reader.require(norm >= 0.0F && std::isfinite(norm), "norm", static_cast<long long>(i));
      }
    }
    Buffer<std::uint8_t> seen;
    const int segments = segments_for(range_.size());
    if (!segments_.reserve(segments) ||
        !seen.resize(static_cast<std::size_t>(segments > 0 ? tokens_in(0) : 0))) {
      return no_memory;
    }
    segments_.resize(segments);
    for (int s = 0; s < segments && reader.ok(); ++s) {
      for (int h = 0; h < config_.kv_heads && reader.ok(); ++h) {
        Segment& own = segments_.at(s, h);
        if (!own.allocate(family_->tables(), bucket_count(family_->bits()), tokens_in(s),
                          config_.memory_advice)) {
          return no_memory;
        }
        own.take(reader, seen.data());
      }
    }
    reader.end();
    return reader.status();
  }

  // Everything a change needs before it can be committed, and how far it has come.
  struct Change {
    Change(const Family& family, int kv_heads) : fresh(kv_heads), hasher(family) {}

    [[nodiscard]] std::size_t bytes() const {
      return fresh.bytes() + hasher.bytes() + codes.bytes() + norms.bytes();
    }

    TokenRange tokens;
    int first_segment = 0;
    SegmentTable<Segment> fresh;  // rewritten or new
    KeyHasher<Family> hasher;
    Buffer<Code> codes;   // [tables, tokens], one segment of one head
    Buffer<float> norms;  // [kv_heads, tokens]

    int made = 0;    // segments, in the order of `fresh`
    int hashed = 0;  // tokens of the next one
    int filled = 0;  // tables of it
  };

  // Tokens that are hashed for one unit of work, which takes about as long as to fill a table.
  static constexpr int kUnitTokens = 8;

  // build() with centres that are given, or with those of the tokens.
  template <class Backend, KeyValueSource Source>
  Status build_from(const Backend& backend, const Source& source, TokenRange range,
                    const Centres* centres) noexcept {
    Status status = check_range(range);
    if (status.ok()) {
      status = check_source(source, kv_heads(), dim(), range.empty() ? 0 : range.end);
    }
    if (!status.ok()) return status;
    return build_aside(range.begin, centres, [&](BucketTables& fresh) {
      return fresh.extend(backend, source, range.end, centres == nullptr);
    });
  }

  // Replaces the content by what `extend` makes of an empty index at token `begin` with `centres`,
  // null for none.
  template <class Extend>
  Status build_aside(TokenId begin, const Centres* centres, const Extend& extend) noexcept {
    Result<BucketTables> fresh = create(*family_, config_);
    if (!fresh.ok()) return fresh.status();
    fresh->range_ = {.begin = begin, .end = begin};
    if (centres != nullptr) {
      std::copy(centres->keys.begin(), centres->keys.end(), fresh->centres_.data());
    }
    const Status status = extend(*fresh);
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  // Indexes [range_.end, end): makes the new segments aside, then commits.
  template <class Backend, KeyValueSource Source>
  Status extend(const Backend& backend, const Source& source, TokenId end,
                bool make_centres) noexcept {
    if (end == range_.end) return Status();
    Status ready = check_rows(source, {.begin = range_.end, .end = end});
    if (ready.ok()) ready = check_workers(backend);
    if (!ready.ok()) return ready;
    const int workers = backend.executor.workers();
    Change change(*family_, config_.kv_heads);
    KeyReader<Source> keys(source);
    change.tokens = {.begin = range_.end, .end = end};
    if (!prepare(change, workers) || !keys.reserve(workers, kMeanSlots)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens",
                           change.tokens.size());
    }
    if (make_centres) {
      change.hasher.make_centres(backend, keys, change.tokens, centres_.data());
    }
    const Status made = advance(backend, keys, change, INT64_MAX / kUnitTokens);
    return made.ok() ? commit(change) : made;
  }

  // The same of keys that were hashed elsewhere, from range_.end on, and checked.
  template <class Backend>
  Status extend(const Backend& backend, const HashedKeys& keys) noexcept {
    if (keys.tokens.empty()) return Status();
    Change change(*family_, config_.kv_heads);
    change.tokens = keys.tokens;
    if (!prepare(change, backend.executor.workers())) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens",
                           keys.tokens.size());
    }
    const Status made = advance(backend, keys, change, INT64_MAX / kUnitTokens);
    return made.ok() ? commit(change) : made;
  }

  // The next part of the work for the block up to `end`, and all of it in seal_steps calls.
  template <class Backend, KeyValueSource Source>
  Status seal_some(const Backend& backend, const Source& source, TokenId end) noexcept {
    Status status = check_rows(source, {.begin = range_.end, .end = end});
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    const int workers = backend.executor.workers();
    const bool begins = !sealing_ || sealing_->tokens.end != end;
    if (begins) sealing_.emplace(*family_, config_.kv_heads).tokens = {range_.end, end};
    KeyReader<Source> keys(source);
    if (!(begins ? prepare(*sealing_, workers)
                 : sealing_->hasher.reserve(config_.kv_heads, workers)) ||
        !keys.reserve(workers, 1)) {
      sealing_.reset();
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens",
                           end - range_.end);
    }
    const int segments = sealing_->fresh.count() * config_.kv_heads;
    const std::int64_t units =
        std::int64_t{segments} * (family_->tables() + 1) +
        std::int64_t{config_.kv_heads} * (config_.seal_tokens / kUnitTokens + 1);
    status = advance(backend, keys, *sealing_, units / config_.seal_steps + 1);
    const bool made = sealing_->made == segments;
    if (status.ok() && made) status = commit(*sealing_);
    if (!status.ok()) sealing_.reset();
    return status;
  }

  // One of the segments that a block has replaced: to give back all of them at once takes the
  // system as long as several calls.
  void give_back_one() noexcept {
    const int last = --sealing_->made;
    sealing_->fresh.at(last / config_.kv_heads, last % config_.kv_heads) = Segment();
    if (last == 0) sealing_.reset();
  }

  bool prepare(Change& change, int workers) noexcept {
    const TokenId total = change.tokens.end - range_.begin;
    const int all_segments = segments_for(total);
    change.first_segment = range_.size() / config_.segment_tokens;
    const int segments = all_segments - change.first_segment;
    if (!change.fresh.reserve(segments) || !segments_.reserve(all_segments)) return false;
    change.fresh.resize(segments);
    const TokenId longest = (std::min)(change.tokens.size(), TokenId{config_.segment_tokens});
    if (!change.hasher.reserve(config_.kv_heads, workers) ||
        !change.codes.resize(static_cast<std::size_t>(family_->tables()) *
                             static_cast<std::size_t>(longest))) {
      return false;
    }
    return change.norms.resize(static_cast<std::size_t>(config_.kv_heads) *
                               static_cast<std::size_t>(change.tokens.size()));
  }

  // Room for the norms of `total` tokens of each head.
  bool reserve_norms(TokenId total) noexcept {
    const auto needed = static_cast<std::size_t>(total);
    for (int h = 0; h < config_.kv_heads; ++h) {
      // A first build takes what it needs, growth takes half as much again.
      const bool growing = norms_of(h).size() != 0 && needed * sizeof(float) > norms_of(h).bytes();
      const std::size_t room = growing ? needed + needed / 2 : needed;
      if (!norms_of(h).reserve(room, config_.memory_advice)) return false;
    }
    return true;
  }

  // Makes fresh segments of the change, of old tokens and then new ones, for up to `units` of work.
  // Keys: a KeyReader of keys that are to be hashed, or HashedKeys.
  template <class Backend, class Keys>
  Status advance(const Backend& backend, Keys& keys, Change& change, std::int64_t units) noexcept {
    const auto part_of = [&](int rest, std::int64_t most) {
      return most < rest ? static_cast<int>(most) : rest;
    };
    while (units > 0 && change.made < change.fresh.count() * config_.kv_heads) {
      const int kv_head = change.made % config_.kv_heads;
      const int number = change.first_segment + change.made / config_.kv_heads;
      const Segment none;
      const Segment& old = number < segment_count() ? segment(number, kv_head) : none;
      const TokenId begin = segment_begin(number) + old.tokens();
      const int count = part_of(change.tokens.end - begin, config_.segment_tokens - old.tokens());
      Segment& fresh = change.fresh.at(number - change.first_segment, kv_head);
      if (change.hashed == 0 && !fresh.allocate(family_->tables(), bucket_count(family_->bits()),
                                                old.tokens() + count, config_.memory_advice)) {
        return Status::error(ErrorCode::kOutOfMemory, "no memory for a segment of %d tokens",
                             old.tokens() + count);
      }
      if (change.hashed < count) {
        const int some = part_of(count - change.hashed, units * kUnitTokens);
        const TokenId first = begin + change.hashed;
        const Status status = hash(backend, keys, change, kv_head, {first, first + some},
                                   {.first = change.hashed, .stride = count});
        if (!status.ok()) return status;
        change.hashed += some;
        units -= (some - 1) / kUnitTokens + 1;
        continue;
      }
      const int some = part_of(family_->tables() - change.filled, units);
      backend.executor.parallel_for(some, [&](int i, int) {
        const int table = change.filled + i;
        fresh.fill_table(table, old, change.codes.data() + std::int64_t{table} * count);
      });
      change.filled += some;
      units -= some;
      if (change.filled < family_->tables()) continue;
      ++change.made;
      change.hashed = change.filled = 0;
    }
    return Status();
  }

  // Where codes of tokens go: to [tables, stride], from the first on.
  struct Place {
    int first = 0;
    int stride = 0;
  };

  // Norms of `tokens` and their codes, to the change's.
  template <class Backend, KeyValueSource Source>
  Status hash(const Backend& backend, KeyReader<Source>& keys, Change& change, int kv_head,
              TokenRange tokens, const Place& place) const noexcept {
    float* norms = norms_in(change, kv_head) + (tokens.begin - change.tokens.begin);
    change.hasher.hash(backend, keys, kv_head, tokens, centre(kv_head), norms,
                       change.codes.data() + place.first, place.stride);
    for (int i = 0; i < tokens.size(); ++i) {
      if (std::isfinite(norms[i])) continue;
      // The centre spreads one such key to the norms of all; without one this norm overflowed.
      const TokenId token = first_not_finite(keys, kv_head, change.tokens, tokens.begin + i);
      return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                           token, kv_head);
    }
    return Status();
  }

  // The same of keys that were hashed elsewhere: the tokens of the change.
  template <class Backend>
  Status hash(const Backend& backend, const HashedKeys& keys, Change& change, int kv_head,
              TokenRange tokens, const Place& place) const noexcept {
    const std::int64_t count = keys.tokens.size();
    const TokenId first = tokens.begin - keys.tokens.begin;
    std::copy_n(keys.norms + kv_head * count + first, tokens.size(),
                norms_in(change, kv_head) + first);
    const Code* codes = keys.codes + std::int64_t{kv_head} * family_->tables() * count + first;
    backend.executor.parallel_for(family_->tables(), [&](int table, int) {
      std::copy_n(codes + table * count, tokens.size(),
                  change.codes.data() + place.first + std::int64_t{table} * place.stride);
    });
    return Status();
  }

  static float* norms_in(Change& change, int kv_head) {
    return change.norms.data() + std::int64_t{kv_head} * change.tokens.size();
  }

  // Takes over what was made. Error: memory; nothing is changed then.
  Status commit(Change& change) noexcept {
    const TokenId total = change.tokens.end - range_.begin;
    if (!reserve_norms(total)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for the norms of %d tokens", total);
    }
    for (int h = 0; h < config_.kv_heads; ++h) {
      (void)norms_of(h).resize(static_cast<std::size_t>(total));
      std::copy_n(norms_in(change, h), change.tokens.size(),
                  norms_of(h).writable() + (change.tokens.begin - range_.begin));
    }
    segments_.exchange(change.first_segment, change.fresh);
    range_.end = change.tokens.end;
    return Status();
  }

  // Hashes indexed tokens anew: makes their segments aside, then commits.
  template <class Backend, KeyValueSource Source>
  Status hash_again(const Backend& backend, const Source& source, TokenRange tokens) noexcept {
    Change change(*family_, config_.kv_heads);
    Buffer<Code> rows;  // [workers, tokens of a segment], one table of one head
    change.tokens = tokens;
    change.first_segment = (tokens.begin - range_.begin) / config_.segment_tokens;
    KeyReader<Source> keys(source);
    const int workers = backend.executor.workers();
    if (!prepare(change, rows, workers) || !keys.reserve(workers, 1)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to rehash %d tokens", tokens.size());
    }
    for (int s = 0; s < change.fresh.count(); ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) {
        const Status status = make_again(backend, keys, change, rows, s, h);
        if (!status.ok()) return status;
      }
    }
    for (int h = 0; h < config_.kv_heads; ++h) {
      std::copy_n(norms_in(change, h), tokens.size(),
                  norms_of(h).writable() + (tokens.begin - range_.begin));
    }
    segments_.exchange(change.first_segment, change.fresh);
    sealing_.reset();  // its segments hold what was replaced
    return Status();
  }

  bool prepare(Change& change, Buffer<Code>& rows, int workers) noexcept {
    const int last = (change.tokens.end - 1 - range_.begin) / config_.segment_tokens;
    const int segments = last - change.first_segment + 1;
    if (!change.fresh.reserve(segments)) return false;
    change.fresh.resize(segments);
    const auto longest = static_cast<std::size_t>(tokens_in(change.first_segment));
    bool enough = change.hasher.reserve(config_.kv_heads, workers) &&
                  change.codes.resize(static_cast<std::size_t>(family_->tables()) * longest) &&
                  rows.resize(static_cast<std::size_t>(workers) * longest) &&
                  change.norms.resize(static_cast<std::size_t>(config_.kv_heads) *
                                      static_cast<std::size_t>(change.tokens.size()));
    for (int h = 0; h < config_.kv_heads && enough; ++h) {
      enough = norms_of(h).own(norms_of(h).size(), config_.memory_advice);
    }
    return enough;
  }

  // Segment `s` of the change for one head, with the present codes of those of its tokens that are
  // not to be hashed.
  template <class Backend, KeyValueSource Source>
  Status make_again(const Backend& backend, KeyReader<Source>& keys, Change& change,
                    Buffer<Code>& rows, int s, int kv_head) noexcept {
    const int number = change.first_segment + s;
    const Segment& old = segment(number, kv_head);
    const TokenId first = segment_begin(number);
    const TokenRange tokens{.begin = (std::max)(change.tokens.begin, first),
                            .end = (std::min)(change.tokens.end, first + old.tokens())};
    Segment& fresh = change.fresh.at(s, kv_head);
    if (!fresh.allocate(family_->tables(), bucket_count(family_->bits()), old.tokens(),
                        config_.memory_advice)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for a segment of %d tokens",
                           old.tokens());
    }
    const Status status =
        hash(backend, keys, change, kv_head, tokens, {.first = 0, .stride = tokens.size()});
    if (!status.ok()) return status;
    backend.executor.parallel_for(family_->tables(), [&](int table, int worker) {
      Code* codes = rows.data() + std::int64_t{worker} * tokens_in(change.first_segment);
      old.codes_of(table, codes);
      std::copy_n(change.codes.data() + std::int64_t{table} * tokens.size(), tokens.size(),
                  codes + (tokens.begin - first));
      fresh.fill_table(table, Segment(), codes);
    });
    return Status();
  }

  const Family* family_;
  BucketTablesConfig config_;
  TokenRange range_;
  SegmentTable<Segment> segments_;
  std::optional<Change> sealing_;  // of the tokens from range_.end on, or with what it replaced
  TokenBits erased_;
  std::unique_ptr<SharedArray<float>[]> norms_;  // [kv_heads] of [tokens]
  Buffer<float> centres_;                        // [kv_heads, dim]
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Signatures: the keys of one layer as packed codes of a few bits per dimension.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

#include "magicpig/core/blob.hpp"
#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/shared.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/fixed_point.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/index/saved.hpp"
#include "magicpig/index/segment_table.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Tokens per segment of an index, a number of whole blocks.
inline constexpr int kSignatureSegment = 4096;

/// What signatures are made from.
struct SignaturesConfig {
  int kv_heads = 1;
  /// Width of the values, whose norms then count in a token's score; 0 leaves them out.
  int value_dim = 0;
  /// Shown every array of codes and factors before it is filled; null for none.
  MemoryAdvice memory_advice = nullptr;
};

/// The codes and factors of up to kSignatureSegment tokens of one KV head.
///
/// A block of 128 tokens holds the rows of its code one after the other: 64 bytes with the four
/// bits of each token where CodePlace says. In the last block, what is behind the last token is 0,
/// or left from tokens that were cut off; blocks behind it have not been written.
struct SignatureSegment {
  SharedArray<std::uint8_t> codes;        // [blocks, rows, 64]
  SharedArray<bf16> factors;              // [tokens]
  SharedArray<std::int16_t> value_norms;  // [tokens] 16 log2 |v - mean|, or none
  float largest_factor = 0.0F;            // of the tokens that were not erased

  [[nodiscard]] std::size_t bytes() const {
    return codes.bytes() + factors.bytes() + value_norms.bytes();
  }
  [[nodiscard]] std::size_t shared_bytes() const {
    return codes.shared_bytes() + factors.shared_bytes() + value_norms.shared_bytes();
  }
  [[nodiscard]] SignatureSegment share() const noexcept {
    return {.codes = codes.share(),
            .factors = factors.share(),
            .value_norms = value_norms.share(),
            .largest_factor = largest_factor};
  }
  /// Makes the first blocks of its arrays its own, the others undefined. False when memory is
  /// short; what it holds has not changed then.
  [[nodiscard]] bool own(int blocks, int rows, MemoryAdvice advice) noexcept {
    const auto tokens = static_cast<std::size_t>(blocks * kSignatureBlock);
    const std::size_t bytes =
        static_cast<std::size_t>(blocks) * static_cast<std::size_t>(rows) * 64;
    return codes.own(bytes, advice) && factors.own(tokens, advice) &&
           value_norms.own(tokens, advice);
  }
};

/// For each token of a range and each KV head the code x of its centred key k - c and the factor f
/// that a Quantiser gives it: f <x, q> estimates <q, k - c>. c is the mean of the keys when the
/// index was empty last. Beside them, where asked for, |v - u| of the token's value in sixteenths
/// of a power of 2, u being the mean of the values then. Keys and values are read while indexing
/// and never kept.
///
/// Memory per token and KV head: bits * dim / 8 + 2 bytes, with dim rounded up to a multiple of 8,
/// and 2 for values, in segments of 4,096 tokens; a bit per token once any was erased. Segments are
/// shared by forks: a change copies those that it changes and that another fork has. Threads: any
/// number may read (all const functions, fork() too); changes need exclusive access to this fork,
/// whatever happens to others. Source: the layout Andre et al. 2015 (fast scan).
template <class Q>
class Signatures {
 public:
  /// Where its tokens end at the latest: numbers up to the end of their last segment, which may not
  /// be full, are below 2^31.
  static constexpr TokenId kMaxTokens = INT32_MAX - kSignatureSegment + 1;

  /// An empty index. `quantiser` must outlive it and may be shared by any number of indexes.
  /// Errors: a config value outside its bounds, a quantiser for other KV heads, memory.
  [[nodiscard]] static Result<Signatures> create(const Q& quantiser,
                                                 const SignaturesConfig& config) noexcept {
    const Status status = check_kv_heads(config.kv_heads);
    if (!status.ok()) return status;
    if (quantiser.kv_heads() != 0 && quantiser.kv_heads() != config.kv_heads) {
      return Status::error(ErrorCode::kShapeMismatch,
                           "the quantiser was made for %d KV heads, the index is for %d",
                           quantiser.kv_heads(), config.kv_heads);
    }
    if (config.value_dim < 0 || config.value_dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument, "value_dim %d must lie in [0, %d]",
                           config.value_dim, kMaxDim);
    }
    Signatures index(quantiser, config);
    const auto heads = static_cast<std::size_t>(config.kv_heads);
    if (!index.centres_.resize(heads * static_cast<std::size_t>(index.dim())) ||
        !index.value_means_.resize(heads * static_cast<std::size_t>(config.value_dim))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", config.kv_heads);
    }
    for (float& x : index.centres_.span()) x = 0.0F;
    for (float& x : index.value_means_.span()) x = 0.0F;
    return index;
  }
  static Result<Signatures> create(const Q&&, const SignaturesConfig&) = delete;

  /// Replaces the content by the tokens of `range` and makes the centre anew. Errors: source and
  /// config disagree, range outside the source or beyond kMaxTokens, a key that is not finite,
  /// memory, a backend without workers; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    return build_aside(backend, source, range, nullptr);
  }

  /// The same with given centres, such as another index's centres(). Errors: also as
  /// check_centres(). An empty range forgets them: the next append makes its own.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range,
               const Centres& centres) noexcept {
    const Status status = check_centres(centres, centres_.size(), value_means_.size());
    return status.ok() ? build_aside(backend, source, range, &centres) : status;
  }

  /// Takes over tokens [indexed().end, end), any number of them. An `end` at or below indexed().end
  /// changes nothing. Errors: as build().
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    return extend(backend, source, end, range_.empty());
  }

  /// Forgets tokens from `end` on. An `end` at or beyond indexed().end changes nothing; one at or
  /// below indexed().begin leaves an empty index, whose centre the next append makes anew. Tokens
  /// that were erased there may be appended again. Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    erased_.truncate(range_.end);
    segments_.resize(segment_count());
    if (segment_count() > 0) note_segment(segment_count() - 1);
    return Status();
  }

  /// An index of the same tokens that shares all segments. Either may then be read, changed and
  /// destroyed on a thread of its own. Memory of its own: centres, bits of erased tokens, 80 bytes
  /// per segment and KV head. Error: memory.
  [[nodiscard]] Result<Signatures> fork() const noexcept {
    Result<Signatures> other = create(*quantiser_, config_);
    if (!other.ok()) return other;
    if (!other->segments_.share(segments_) || !other->erased_.assign(erased_)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to fork an index of %d tokens",
                           range_.size());
    }
    other->set_centres(centres());
    other->range_ = range_;
    return other;
  }

  /// Forgets `tokens`, in any order: they are neither drawn nor attended to any more, and indexed()
  /// stays as it is. Their rows are not read again. One that was erased before changes nothing.
  /// Errors: a token outside indexed(), memory; nothing is changed then.
  Status erase(std::span<const TokenId> tokens) noexcept {
    const Status status = check_erasure(tokens, range_);
    if (!status.ok() || tokens.empty()) return status;
    if (!erased_.add(tokens, range_.end)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to erase %zu tokens", tokens.size());
    }
    for (const TokenId token : tokens) {
      const TokenId at = token - range_.begin;
      for (int h = 0; h < config_.kv_heads; ++h) {
        const SignatureSegment& own = segment(at / kSignatureSegment, h);
        if (to_float(own.factors.data()[at % kSignatureSegment]) < own.largest_factor) continue;
        note_factors(at / kSignatureSegment, h, 0, segment_tokens(at / kSignatureSegment));
      }
    }
    return Status();
  }

  /// Encodes tokens anew whose keys or values have changed in place, as after a shift of rotary
  /// positions: the index is then what it were if they had been so when they were appended, with
  /// the centres that it has. Erased tokens stay so. Cost: that of appending these tokens, and a
  /// copy of the segments that they lie in, which exist twice meanwhile. Errors: as build(), a
  /// range outside indexed(); the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status rehash(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Status status = check_rehash(range, range_);
    if (status.ok()) status = check(source, range.end);
    if (status.ok()) status = check_rows(source, range);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    while (!range.empty() && erased().has(range.begin)) ++range.begin;
    if (range.empty()) return Status();
    return encode_again(backend, PresentRows<Source>(source, erased(), range.begin), range);
  }

  /// How far the keys have left the centre, see drift_of_keys(): 0 for none, up to 1. Cost: up to
  /// 8,192 rows of each KV head. 0 for an index without tokens. Errors: as build().
  template <class Backend, KeyValueSource Source>
  [[nodiscard]] Result<double> drift(const Backend& backend, const Source& source) const noexcept {
    Status status = check(source, range_.end);
    if (status.ok()) status = check_rows(source, range_);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    PresentTokens tokens;
    if (tokens.list(range_, erased())) {
      return drift_of_keys(backend, source, tokens, centres_.data());
    }
    return Status::error(ErrorCode::kOutOfMemory, "no memory to list %d tokens", range_.size());
  }

  /// Makes the centres anew, of the tokens that are there, and encodes all of them with these: the
  /// index is then the one that build() with these centres makes. For hosts whose drift() has
  /// passed a bound of theirs; without it centres stay as they are. Cost and errors: as rehash() of
  /// everything, and reading 8,192 rows of each KV head.
  template <class Backend, KeyValueSource Source>
  Status recentre(const Backend& backend, const Source& source) noexcept {
    Status status = check(source, range_.end);
    if (status.ok()) status = check_rows(source, range_);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    PresentTokens tokens;
    Buffer<float> keys;
    Buffer<float> values;
    Buffer<double> sums;
    Readers<Source> read{KeyReader<Source>(source), ValueReader<Source>(source)};
    if (!tokens.list(range_, erased()) || !keys.resize(centres_.size()) ||
        !values.resize(value_means_.size()) || !sums.resize(sums_needed()) ||
        !reserve(read, backend.executor.workers())) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to centre %d tokens", range_.size());
    }
    if (tokens.count() == 0) return Status();
    const TokenRange ranks{.begin = 0, .end = tokens.count()};
    PresentReader present_keys(read.keys, tokens);
    PresentReader present_values(read.values, tokens);
    mean_of_rows(backend, kv_heads(), dim(), ranks, present_keys, sums.data(), keys.data());
    mean_of_rows(backend, kv_heads(), config_.value_dim, ranks, present_values, sums.data(),
                 values.data());
    std::swap(centres_, keys);
    std::swap(value_means_, values);
    status = rehash(backend, source, range_);
    if (status.ok()) return status;
    std::swap(centres_, keys);
    std::swap(value_means_, values);
    return status;
  }

  /// Forgets everything of a request: an empty index at token 0 with the same quantiser and config.
  /// Gives back the segments and the bits of erased tokens; keeps the memory of the centres and of
  /// the list of segments.
  void clear() noexcept {
    range_ = {};
    segments_.resize(0);
    erased_ = TokenBits();
  }

  /// Bytes that save() writes: those of the tokens, of whole blocks of 128, and of the centres.
  [[nodiscard]] std::size_t saved_bytes() const { return saved_bytes_of(*this); }
  /// Writes the index to `to`, of at least saved_bytes(), but for its quantiser, of which it has
  /// the fingerprint. Error: fewer bytes; nothing is written then.
  [[nodiscard]] Status save(std::span<std::byte> to) const noexcept {
    return save_blob(BlobKind::kSignatures, *this, to);
  }
  /// Replaces the content by what save() wrote of an index with the same config and an equal
  /// quantiser. Errors: bytes that are not that (kBadBlob, see BlobReader), memory; the index is
  /// then unchanged. Twice the memory meanwhile.
  Status load(std::span<const std::byte> from) noexcept {
    Result<Signatures> fresh = create(*quantiser_, config_);
    if (!fresh.ok()) return fresh.status();
    const Status status = fresh->take(BlobReader(BlobKind::kSignatures, from));
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  /// The fields that save() writes.
  void put(BlobWriter& writer) const {
    writer.put(config_.kv_heads);
    writer.put(config_.value_dim);
    writer.put(quantiser_->fingerprint());
    SavedTokens::put(writer, range_, erased_, centres());
    for (int s = 0; s < segment_count(); ++s) {
      const auto tokens = static_cast<std::size_t>(segment_tokens(s));
      for (int h = 0; h < config_.kv_heads; ++h) {
        const SignatureSegment& own = segment(s, h);
        writer.put_array(std::span(own.codes.data(), code_bytes(segment_tokens(s))));
        writer.put_array(std::span(own.factors.data(), tokens));
        if (config_.value_dim != 0) writer.put_array(std::span(own.value_norms.data(), tokens));
      }
    }
  }

  /// bytes() of an index of `tokens` tokens that was just built.
  [[nodiscard]] static constexpr std::size_t estimate_bytes(const QuantiserShape& shape,
                                                            const SignaturesConfig& config,
                                                            TokenId tokens) {
    const auto segments = static_cast<std::size_t>(tokens / kSignatureSegment) +
                          (tokens % kSignatureSegment != 0 ? 1 : 0);
    const auto dims =
        static_cast<std::size_t>(shape.dim) + static_cast<std::size_t>(config.value_dim);
    return static_cast<std::size_t>(config.kv_heads) *
           (segments * kSignatureSegment * bytes_per_token(shape, config.value_dim != 0) +
            dims * sizeof(float));
  }

  [[nodiscard]] const Q& quantiser() const { return *quantiser_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return shape_.dim; }
  /// Tokens the index covers, erased ones among them.
  [[nodiscard]] TokenRange indexed() const { return range_; }
  /// Those of them that were erased; until the next change.
  [[nodiscard]] TokenMask erased() const { return erased_.view(); }
  /// What is subtracted from keys and values; of an index without tokens they mean nothing.
  [[nodiscard]] Centres centres() const {
    return {.keys = centres_.span(), .values = value_means_.span()};
  }

  [[nodiscard]] int segment_count() const {
    return (range_.size() - 1 + kSignatureSegment) / kSignatureSegment;
  }
  [[nodiscard]] const SignatureSegment& segment(int number, int kv_head) const {
    return segments_.at(number, kv_head);
  }
  /// Tokens in a segment; all but the last are full.
  [[nodiscard]] int segment_tokens(int number) const {
    const TokenId rest = range_.size() - number * kSignatureSegment;
    return rest < kSignatureSegment ? rest : kSignatureSegment;
  }
  /// Blocks of tokens, the last of which may not be full.
  [[nodiscard]] int block_count() const {
    return (range_.size() - 1 + kSignatureBlock) / kSignatureBlock;
  }
  /// Blocks [first, first + count), of which no two are in different segments.
  [[nodiscard]] CodeBlocks blocks(int first, int count, int kv_head) const {
    constexpr int kBlocks = kSignatureSegment / kSignatureBlock;
    const SignatureSegment& from = segment(first / kBlocks, kv_head);
    const std::int64_t token = std::int64_t{first % kBlocks} * kSignatureBlock;
    const bool norms = config_.value_dim != 0;
    return {
        .codes = from.codes.data() + token / kSignatureBlock * rows_per_block() * 64,
        .factors = from.factors.data() + token,
        .norms = norms ? from.value_norms.data() + token : nullptr,
        .blocks = count,
        .rows = rows_per_block(),
        .factor_scale = from.largest_factor > 0x1p-100F ? 32767.0F / from.largest_factor : 0.0F};
  }
  [[nodiscard]] int rows_per_block() const { return shape_.rows; }
  /// c, [dim].
  [[nodiscard]] const float* centre(int kv_head) const {
    return centres_.data() + std::int64_t{kv_head} * dim();
  }

  /// Bytes held by all arrays, whoever shares them, the quantiser's not among them.
  [[nodiscard]] std::size_t bytes() const {
    return centres_.bytes() + value_means_.bytes() + erased_.bytes() + segments_.bytes();
  }
  /// How many of them other forks hold, too.
  [[nodiscard]] std::size_t shared_bytes() const { return segments_.shared_bytes(); }

  /// Bytes per token and KV head in full segments.
  [[nodiscard]] static constexpr std::size_t bytes_per_token(const QuantiserShape& shape,
                                                             bool value_norms) {
    return static_cast<std::size_t>(shape.rows) / 2 + sizeof(bf16) +
           (value_norms ? sizeof(std::int16_t) : 0);
  }
  /// Bytes of one KV head that scoring every token reads, with the norms of values, if there are
  /// any, or without.
  [[nodiscard]] std::int64_t scan_bytes(bool value_norms) const {
    const bool norms = value_norms && config_.value_dim != 0;
    return range_.size() * static_cast<std::int64_t>(bytes_per_token(shape_, norms));
  }

 private:
  template <KeyValueSource Source>
  struct Readers {
    KeyReader<Source> keys;
    ValueReader<Source> values;
  };
  // Memory for what `workers` workers read at once.
  template <KeyValueSource Source>
  [[nodiscard]] bool reserve(Readers<Source>& read, int workers) const noexcept {
    return read.keys.reserve(workers, kLanes) &&
           read.values.reserve(workers, config_.value_dim != 0 ? kMeanSlots : 0);
  }

  Signatures(const Q& quantiser, const SignaturesConfig& config)
      : quantiser_(&quantiser),
        shape_(quantiser.shape()),
        config_(config),
        segments_(config.kv_heads) {}

  // Of the blocks that `tokens` tokens of a segment take.
  [[nodiscard]] std::size_t code_bytes(int tokens) const {
    const int blocks = (tokens - 1) / kSignatureBlock + 1;
    return static_cast<std::size_t>(blocks) * static_cast<std::size_t>(rows_per_block()) * 64;
  }

  // What put() wrote, to an empty index.
  Status take(BlobReader reader) noexcept {
    reader.expect("kv_heads", config_.kv_heads);
    reader.expect("value_dim", config_.value_dim);
    reader.expect("quantiser", quantiser_->fingerprint());
    SavedTokens tokens;
    Status status = tokens.take(reader, kMaxTokens, centres_.size(), value_means_.size());
    if (!status.ok()) return status;
    reader.require(tokens.range.end <= kMaxTokens, "end", tokens.range.end);
    reader.need("codes", static_cast<std::size_t>(tokens.range.size()),
                bytes_per_token(shape_, config_.value_dim != 0) *
                    static_cast<std::size_t>(config_.kv_heads));
    if (!reader.ok()) return reader.status();
    range_ = {.begin = tokens.range.begin, .end = tokens.range.begin};
    if (!reserve(tokens.range.end)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to load %d tokens",
                           tokens.range.size());
    }
    range_ = tokens.range;
    erased_ = std::move(tokens.erased);
    centres_ = std::move(tokens.keys);
    value_means_ = std::move(tokens.values);
    for (int s = 0; s < segment_count() && reader.ok(); ++s) {
      for (int h = 0; h < config_.kv_heads && reader.ok(); ++h) take(reader, s, h);
    }
    reader.end();
    return reader.status();
  }

  void take(BlobReader& reader, int number, int kv_head) noexcept {
    SignatureSegment& own = segments_.at(number, kv_head);
    const int count = segment_tokens(number);
    const auto tokens = static_cast<std::size_t>(count);
    clear_block(own, (count - 1) / kSignatureBlock * kSignatureBlock);
    reader.take_array("codes", std::span(own.codes.writable(), code_bytes(count)));
    reader.take_array("factors", std::span(own.factors.writable(), tokens));
    for (int i = 0; i < count && reader.ok(); ++i) {
      reader.require(own.factors.data()[i].bits < (kInfinityBits >> 16), "factor", i);
    }
    if (config_.value_dim != 0) {
      reader.take_array("value norms", std::span(own.value_norms.writable(), tokens));
      for (int i = 0; i < count && reader.ok(); ++i) {
        const int norm = own.value_norms.data()[i];
        reader.require(norm >= -kLargestNorm && norm <= kLargestNorm, "value norm", norm);
      }
    }
    if (reader.ok()) note_factors(number, kv_head, 0, count);
  }

  void set_centres(const Centres& centres) noexcept {
    std::copy(centres.keys.begin(), centres.keys.end(), centres_.data());
    std::copy(centres.values.begin(), centres.values.end(), value_means_.data());
  }
  [[nodiscard]] std::size_t sums_needed() const {
    return centres_.size() > value_means_.size() ? centres_.size() : value_means_.size();
  }

  template <KeyValueSource Source>
  [[nodiscard]] Status check(const Source& source, TokenId end) const {
    const Status status = check_source(source, kv_heads(), dim(), end);
    if (!status.ok() || config_.value_dim == 0 || source.value_dim() == config_.value_dim) {
      return status;
    }
    return Status::error(ErrorCode::kShapeMismatch, "source has values of %d, the index of %d",
                         source.value_dim(), config_.value_dim);
  }

  // build() with centres that are given, or with those of the tokens.
  template <class Backend, KeyValueSource Source>
  Status build_aside(const Backend& backend, const Source& source, TokenRange range,
                     const Centres* centres) noexcept {
    Result<Signatures> fresh = create(*quantiser_, config_);
    if (!fresh.ok()) return fresh.status();
    Status status = check_range(range);
    if (status.ok()) status = check(source, range.end);
    if (!status.ok()) return status;
    fresh->range_ = {.begin = range.begin, .end = range.begin};
    if (centres != nullptr) fresh->set_centres(*centres);
    status = fresh->extend(backend, source, range.end, centres == nullptr);
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  // append(), which makes the centres or has them.
  template <class Backend, KeyValueSource Source>
  Status extend(const Backend& backend, const Source& source, TokenId end,
                bool make_centres) noexcept {
    if (end <= range_.end) return Status();
    Status status = check(source, end);
    if (status.ok()) status = check_rows(source, {.begin = range_.end, .end = end});
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    const TokenRange fresh{.begin = range_.end, .end = end};
    if (end > kMaxTokens) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "signatures end at token %d at the latest, not at %d", kMaxTokens, end);
    }
    Buffer<double> sums;
    Buffer<std::byte> scratch;
    Readers<Source> read{KeyReader<Source>(source), ValueReader<Source>(source)};
    if (!sums.resize(make_centres ? sums_needed() : 0) ||
        !reserve(read, backend.executor.workers()) || !scratch.resize(scratch_needed(backend)) ||
        !reserve(end)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens", fresh.size());
    }
    if (make_centres) {
      mean_of_rows(backend, kv_heads(), dim(), fresh, read.keys, sums.data(), centres_.data());
      mean_of_rows(backend, kv_heads(), config_.value_dim, fresh, read.values, sums.data(),
                   value_means_.data());
    }
    status = encode(backend, read, fresh, {.segments = &segments_, .fresh = true}, scratch);
    if (status.ok()) {
      range_.end = end;
      note_factors(fresh);
    } else {
      segments_.resize(segment_count());
    }
    return status;
  }

  // Segments for tokens up to `end`, of which those from here on may be written.
  bool reserve(TokenId end) noexcept {
    const TokenId total = end - range_.begin;
    const int needed = (total - 1 + kSignatureSegment) / kSignatureSegment;
    const int had = segment_count();
    if (!segments_.reserve(needed)) return false;
    const MemoryAdvice advice = config_.memory_advice;
    const int used = (range_.size() % kSignatureSegment - 1 + kSignatureBlock) / kSignatureBlock;
    for (int h = 0; h < config_.kv_heads && used > 0; ++h) {
      if (!segments_.at(had - 1, h).own(used, rows_per_block(), advice)) return false;
    }
    segments_.resize(needed);
    const std::size_t code_bytes = static_cast<std::size_t>(kSignatureSegment / kSignatureBlock) *
                                   static_cast<std::size_t>(rows_per_block()) * 64;
    for (int s = had; s < needed; ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) {
        SignatureSegment& fresh = segments_.at(s, h);
        if (fresh.codes.resize(code_bytes, advice) &&
            fresh.factors.resize(kSignatureSegment, advice) &&
            fresh.value_norms.resize(config_.value_dim != 0 ? kSignatureSegment : 0, advice)) {
          continue;
        }
        segments_.resize(had);
        return false;
      }
    }
    return true;
  }

  // Encodes indexed tokens aside, then commits them.
  template <class Backend, KeyValueSource Source>
  Status encode_again(const Backend& backend, const Source& source, TokenRange tokens) noexcept {
    const int first = (tokens.begin - range_.begin) / kSignatureSegment;
    const int last = (tokens.end - 1 - range_.begin) / kSignatureSegment;
    SegmentTable<SignatureSegment> fresh(config_.kv_heads);
    Buffer<std::byte> scratch;
    Readers<Source> read{KeyReader<Source>(source), ValueReader<Source>(source)};
    bool enough = fresh.reserve(last - first + 1) && scratch.resize(scratch_needed(backend)) &&
                  reserve(read, backend.executor.workers());
    if (enough) fresh.resize(last - first + 1);
    for (int s = first; s <= last && enough; ++s) {
      const int blocks = (segment_tokens(s) - 1) / kSignatureBlock + 1;
      for (int h = 0; h < config_.kv_heads && enough; ++h) {
        fresh.at(s - first, h) = segment(s, h).share();
        enough = fresh.at(s - first, h).own(blocks, rows_per_block(), config_.memory_advice);
      }
    }
    if (!enough) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to rehash %d tokens", tokens.size());
    }
    const Status status =
        encode(backend, read, tokens, {.segments = &fresh, .first = first}, scratch);
    if (!status.ok()) return status;
    segments_.exchange(first, fresh);
    for (int s = first; s <= last; ++s) note_segment(s);
    return status;
  }

  // Tokens that are encoded together: those of a block whose codes lie in consecutive words.
  static constexpr int kLanes = kRotationLanes;

  // Of one worker.
  struct Scratch {
    float* centred = nullptr;  // [dim, kLanes]
    typename Q::KeyScratch quantiser;
  };
  [[nodiscard]] Scratch carve(Arena& arena) const {
    return {.centred = arena.take<float>(static_cast<std::size_t>(dim()) * kLanes),
            .quantiser = quantiser_->carve(arena)};
  }
  template <class Backend>
  [[nodiscard]] std::size_t scratch_needed(const Backend& backend) const {
    return static_cast<std::size_t>(backend.executor.workers()) * scratch_per_worker();
  }
  [[nodiscard]] std::size_t scratch_per_worker() const {
    Arena arena;
    (void)carve(arena);
    return arena.bytes_needed();
  }

  // Tokens [begin, begin + kLanes) of a segment, of which [first, last) are to be encoded.
  struct Lanes {
    int kv_head = 0;
    TokenId begin = 0;
    int first = 0;
    int last = kLanes;
    TokenId end = 0;  // of all tokens that there are
    int worker = 0;
  };

  // Where codes go.
  struct Target {
    SegmentTable<SignatureSegment>* segments = nullptr;
    int first = 0;       // number of the first of them in the index
    bool fresh = false;  // whether blocks that begin with a token to be encoded hold nothing yet
  };

  template <class Backend, KeyValueSource Source>
  Status encode(const Backend& backend, Readers<Source>& read, TokenRange tokens,
                const Target& target, Buffer<std::byte>& memory) noexcept {
    // Tasks take whole blocks, so that no two write to the same byte.
    const TokenId begin = tokens.begin - range_.begin;
    const TokenId end = tokens.end - range_.begin;
    const TokenId first_block = begin / kTaskTokens;
    const int parts = (end - 1) / kTaskTokens - first_block + 1;
    std::atomic<std::int64_t> bad{INT64_MAX};  // (token, head) of a key that is not finite
    backend.executor.parallel_for(parts * config_.kv_heads, [&](int task, int worker) {
      const int kv_head = task / parts;
      const TokenId from = (first_block + task % parts) * kTaskTokens;
      const std::size_t size = scratch_per_worker();
      Arena arena({memory.data() + static_cast<std::size_t>(worker) * size, size});
      const Scratch scratch = carve(arena);
      for (TokenId t = from; t < end && t - from < kTaskTokens; t += kLanes) {
        const Lanes lanes{.kv_head = kv_head,
                          .begin = t,
                          .first = begin > t ? begin - t : 0,
                          .last = end - t < kLanes ? end - t : kLanes,
                          .end = end,
                          .worker = worker};
        if (lanes.first >= kLanes) continue;
        SignatureSegment& to = target.segments->at(t / kSignatureSegment - target.first, kv_head);
        if (target.fresh && t % kSignatureBlock == 0 && t >= begin) clear_block(to, t);
        if (encode_lanes<typename Backend::Ops>(read, lanes, scratch, to)) continue;
        const std::int64_t here = (std::int64_t{range_.begin + t} << 24) | kv_head;
        for (std::int64_t seen = bad.load(); here < seen && !bad.compare_exchange_weak(seen, here);)
          ;
        return;
      }
    });
    if (bad.load() == INT64_MAX) return Status();
    const auto kv_head = static_cast<int>(bad.load() & ((1 << 24) - 1));
    const auto token = static_cast<TokenId>(bad.load() >> 24);
    return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                         first_not_finite(read.keys, kv_head, tokens, token), kv_head);
  }

  // False for keys that are not all finite.
  template <class Ops, KeyValueSource Source>
  bool encode_lanes(Readers<Source>& read, const Lanes& lanes, const Scratch& scratch,
                    SignatureSegment& segment) {
    std::uint32_t largest[kLanes];
    prefetch_keys(read.keys, lanes, 0);
    if (!centre_lanes<Ops>(read.keys, lanes, scratch.centred, largest)) return false;
    prefetch_keys(read.keys, lanes, 4);
    const int at = lanes.begin % kSignatureSegment;
    std::uint8_t* block =
        segment.codes.writable() + std::int64_t{at / kSignatureBlock} * rows_per_block() * 64;
    const CodePlace place = CodePlace::of(at % kSignatureBlock);
    const int shift = 8 * (place.byte % 2) + 4 * place.upper;
    const auto four = static_cast<std::uint16_t>(15U << shift);
    std::uint16_t wanted[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      wanted[l] = l >= lanes.first && l < lanes.last ? four : std::uint16_t{0};
    }
    double factors[kLanes];
    prefetch_keys(read.keys, lanes, 8);
    quantiser_->template encode<Ops>(
        lanes.kv_head, scratch.centred, largest,
        {.words = block + place.byte / 2 * 2, .wanted = wanted, .shift = shift}, scratch.quantiser,
        factors);
    prefetch_keys(read.keys, lanes, 12);
    for (int l = lanes.first; l < lanes.last; ++l) {
      segment.factors.writable()[at + l] =
          to_bf16(static_cast<float>(factors[l] < kLargestFactor ? factors[l] : kLargestFactor));
    }
    if (config_.value_dim == 0) return true;
    const float* mean = value_means_.data() + std::int64_t{lanes.kv_head} * config_.value_dim;
    for (int l = lanes.first; l < lanes.last; ++l) {
      const TokenId token = range_.begin + lanes.begin + l;
      const auto* value = read.values.row(lanes.kv_head, token, lanes.worker);
      if (lanes.begin + l + kLanes < lanes.end) {
        read.values.prefetch(lanes.kv_head, token + kLanes);
      }
      segment.value_norms.writable()[at + l] =
          value_norm(Ops::squared_distance(value, mean, config_.value_dim));
    }
    return true;
  }

  // Zeros for the block that begins with token t of the index.
  void clear_block(SignatureSegment& segment, TokenId t) const {
    const int at = t % kSignatureSegment;
    const std::size_t bytes = static_cast<std::size_t>(rows_per_block()) * 64;
    std::memset(segment.codes.writable() + static_cast<std::size_t>(at / kSignatureBlock) * bytes,
                0, bytes);
    std::fill_n(segment.factors.writable() + at, kSignatureBlock, bf16());
    if (config_.value_dim == 0) return;
    std::fill_n(segment.value_norms.writable() + at, kSignatureBlock, std::int16_t{0});
  }

  // k - c, [dim, kLanes], and the bits of the largest magnitudes; false for keys that are not all
  // finite. Lanes that are not wanted have the key of one that is.
  template <class Ops, KeyValueSource Source>
  bool centre_lanes(KeyReader<Source>& read, const Lanes& lanes, float* centred,
                    std::uint32_t* largest) const {
    const typename Source::KeyScalar* keys[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int own = l < lanes.first || l >= lanes.last ? lanes.first : l;
      keys[l] = read.row(lanes.kv_head, range_.begin + lanes.begin + own, lanes.worker, l);
    }
    Ops::centre_lanes(keys, centre(lanes.kv_head), dim(), centred, largest);
    return *std::max_element(largest, largest + kLanes) < kInfinityBits;
  }

  // Asks for the keys of four of the next lanes: a few at a time, so that memory has answered
  // before the next are asked for.
  template <KeyValueSource Source>
  void prefetch_keys(const KeyReader<Source>& keys, const Lanes& lanes, int first) const {
    const TokenId begin = lanes.begin + kLanes + first;
    for (TokenId t = begin; t < begin + 4 && t < lanes.end; ++t) {
      keys.prefetch(lanes.kv_head, range_.begin + t);
    }
  }

  // 16 log2 |v - u| by its square, rounded; the largest there is where that is not finite, the
  // smallest for 0.
  static std::int16_t value_norm(double square) {
    if (!(square <= 0x1p256)) return kLargestNorm;
    if (square < 0x1p-256) return -kLargestNorm;
    // log2 of the square in eighths: its exponent and how many of 2^(1/16), 2^(3/16) ... it passes.
    const auto bits = std::bit_cast<std::uint64_t>(square);
    const double fraction = std::bit_cast<double>((bits & ((1ULL << 52) - 1)) | (1023ULL << 52));
    int eighths = 8 * (static_cast<int>(bits >> 52) - 1023);
    for (const double bound :
         {1.0442737824274138, 1.1387886347566916, 1.2418578120734840, 1.3542555469368927,
          1.4768261459394993, 1.6104903319492543, 1.7562521603732995, 1.9152065613971472}) {
      eighths += fraction >= bound ? 1 : 0;
    }
    return static_cast<std::int16_t>(eighths);
  }

  void note_factors(TokenRange tokens) {
    for (TokenId begin = tokens.begin - range_.begin; begin < tokens.end - range_.begin;) {
      const int number = begin / kSignatureSegment;
      const TokenId first = number * kSignatureSegment;
      const TokenId rest = tokens.end - range_.begin - first;
      const TokenId end = rest < kSignatureSegment ? rest : kSignatureSegment;
      for (int h = 0; h < config_.kv_heads; ++h) note_factors(number, h, begin - first, end);
      if (rest <= kSignatureSegment) break;
      begin = first + kSignatureSegment;
    }
  }

  void note_segment(int number) {
    for (int h = 0; h < config_.kv_heads; ++h) {
      note_factors(number, h, 0, segment_tokens(number));
    }
  }

  // Tokens [begin, end) of a segment are new in it; all behind them are not there.
  void note_factors(int number, int kv_head, TokenId begin, TokenId end) {
    SignatureSegment& segment = segments_.at(number, kv_head);
    const TokenMask gone = erased();
    const TokenId first = range_.begin + number * kSignatureSegment;
    float largest = begin > 0 ? segment.largest_factor : 0.0F;
    for (TokenId i = begin; i < end; ++i) {
      if (gone.any() && gone.has(first + i)) continue;
      const float factor = to_float(segment.factors.data()[i]);
      largest = factor > largest ? factor : largest;
    }
    segment.largest_factor = largest;
  }

  static constexpr TokenId kTaskTokens = 2 * kSignatureBlock;
  static constexpr double kLargestFactor = 0x1p127;
  static constexpr std::int16_t kLargestNorm = 2048;

  const Q* quantiser_;
  QuantiserShape shape_;
  SignaturesConfig config_;
  TokenRange range_;
  SegmentTable<SignatureSegment> segments_;
  TokenBits erased_;
  Buffer<float> centres_;      // [kv_heads, dim]
  Buffer<float> value_means_;  // [kv_heads, value_dim]
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Hash codes as they are, one per token and table: an index that is scanned, not looked up.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
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
#include "magicpig/index/segment_table.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What an index of hash codes is made of.
struct HashCodesConfig {
  int kv_heads = 1;
  int value_dim = 0;     ///< of the values whose norms are kept
  bool centred = false;  ///< whether the mean of the keys is subtracted before they are hashed
  MemoryAdvice memory_advice = nullptr;
};

/// Up to kTokens tokens of one KV head.
struct HashCodesSegment {
  static constexpr TokenId kTokens = 4096;

  Buffer<Code> codes;         // [tables, kTokens]
  Buffer<float> value_norms;  // [kTokens]

  [[nodiscard]] std::size_t bytes() const { return codes.bytes() + value_norms.bytes(); }
};

/// The codes of keys in the L tables of a family, table by table within segments of tokens, and the
/// norms of their values. Memory: 2 L + 4 bytes per token and KV head in full segments.
///
/// Threads: reads from any number of them; build, append and truncate one at a time, with no
/// reader. `family` must outlive the index.
template <HashFamily Family>
class HashCodes {
 public:
  using Config = HashCodesConfig;
  using Segment = HashCodesSegment;

  /// An empty index. Errors: kv_heads or value_dim out of range, memory.
  [[nodiscard]] static Result<HashCodes> create(const Family& family,
                                                const HashCodesConfig& config) noexcept {
    const Status status = check_kv_heads(config.kv_heads);
    if (!status.ok()) return status;
    if (config.value_dim < 1 || config.value_dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument, "value_dim %d must lie in [1, %d]",
                           config.value_dim, kMaxDim);
    }
    HashCodes index(family, config);
    if (!index.centres_.resize(static_cast<std::size_t>(config.kv_heads) *
                               static_cast<std::size_t>(family.dim()))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", config.kv_heads);
    }
    for (std::size_t i = 0; i < index.centres_.size(); ++i) index.centres_.data()[i] = 0.0F;
    return index;
  }
  static Result<HashCodes> create(const Family&& family, const HashCodesConfig&) = delete;

  /// Replaces the content by the tokens of `range`, and where keys are centred makes the centre
  /// anew. Errors: source and config disagree, range outside the source, a key or the norm of a
  /// value that is not finite, memory, a backend without workers; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Result<HashCodes> fresh = create(*family_, config_);
    if (!fresh.ok()) return fresh.status();
    Status status = check_range(range);
    if (status.ok()) status = check(source, range.end);
    if (!status.ok()) return status;
    fresh->range_ = {.begin = range.begin, .end = range.begin};
    status = fresh->append(backend, source, range.end);
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  /// Takes over tokens [indexed().end, end). An `end` at or below indexed().end changes nothing.
  /// Errors: as build().
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    Status status = check(source, end);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    const int workers = backend.executor.workers();
    KeyHasher<Family> hasher(*family_);
    Readers<Source> read{KeyReader<Source>(source), ValueReader<Source>(source)};
    Batch batch;
    constexpr auto kTokens = static_cast<std::size_t>(Segment::kTokens);
    if (!hasher.reserve(kv_heads(), workers) || !batch.norms.resize(kTokens) ||
        !batch.codes.resize(kTokens * static_cast<std::size_t>(family_->tables())) ||
        !read.keys.reserve(workers, kMeanSlots) || !read.values.reserve(workers, 1) ||
        !reserve(end)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens",
                           end - range_.end);
    }
    const TokenRange all{.begin = range_.end, .end = end};
    if (config_.centred && range_.empty()) {
      hasher.make_centres(backend, read.keys, all, centres_.data());
    }
    for (TokenId t = all.begin; t < end && status.ok();) {
      const TokenId at = t - range_.begin;
      const TokenId room = Segment::kTokens - at % Segment::kTokens;
      const TokenRange part{.begin = t, .end = end - t < room ? end : t + room};
      for (int h = 0; h < kv_heads() && status.ok(); ++h) {
        status = fill(backend, read, h, part, all, hasher, batch);
      }
      t = part.end;
    }
    if (status.ok()) range_.end = end;
    return status;
  }

  /// Forgets tokens from `end` on. An `end` at or beyond indexed().end changes nothing; one at or
  /// below indexed().begin leaves an empty index. Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    segments_.resize(segment_count());
    return Status();
  }

  [[nodiscard]] const Family& family() const { return *family_; }
  [[nodiscard]] TokenRange indexed() const { return range_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return family_->dim(); }
  [[nodiscard]] int segment_count() const { return segments_for(range_.size()); }
  [[nodiscard]] int segment_tokens(int number) const {
    const TokenId rest = range_.size() - number * Segment::kTokens;
    return rest < Segment::kTokens ? rest : Segment::kTokens;
  }
  /// Codes of table l of a segment, one per token.
  [[nodiscard]] const Code* codes(int number, int kv_head, int l) const {
    return segments_.at(number, kv_head).codes.data() + std::int64_t{l} * Segment::kTokens;
  }
  /// |v| of the tokens of a segment.
  [[nodiscard]] const float* value_norms(int number, int kv_head) const {
    return segments_.at(number, kv_head).value_norms.data();
  }

  /// Bytes of one KV head that scoring every token reads: its codes and the norm of its value.
  [[nodiscard]] std::int64_t scan_bytes() const {
    const auto codes = static_cast<std::int64_t>(sizeof(Code)) * family_->tables();
    return range_.size() * (codes + static_cast<std::int64_t>(sizeof(float)));
  }

  /// Bytes held by all arrays; the planes belong to the family.
  [[nodiscard]] std::size_t bytes() const { return centres_.bytes() + segments_.bytes(); }

 private:
  HashCodes(const Family& family, const HashCodesConfig& config)
      : family_(&family), config_(config), segments_(config.kv_heads) {}

  // What a part of a segment is hashed into.
  struct Batch {
    Buffer<Code> codes;  // [tables, tokens of the part]
    Buffer<float> norms;
  };

  template <KeyValueSource Source>
  struct Readers {
    KeyReader<Source> keys;
    ValueReader<Source> values;
  };

  [[nodiscard]] static int segments_for(TokenId tokens) {
    return tokens / Segment::kTokens + (tokens % Segment::kTokens != 0 ? 1 : 0);
  }

  template <KeyValueSource Source>
  [[nodiscard]] Status check(const Source& source, TokenId end) const {
    const Status status = check_source(source, kv_heads(), dim(), end);
    if (!status.ok() || source.value_dim() == config_.value_dim) return status;
    return Status::error(ErrorCode::kShapeMismatch, "source has values of %d, the index of %d",
                         source.value_dim(), config_.value_dim);
  }

  // Segments for tokens up to `end`; what exists is kept as it is.
  bool reserve(TokenId end) noexcept {
    const int needed = segments_for(end - range_.begin);
    const int had = segments_.count();
    if (needed <= had) return true;
    if (!segments_.reserve(needed)) return false;
    segments_.resize(needed);
    for (int s = had; s < needed; ++s) {
      for (int h = 0; h < kv_heads(); ++h) {
        Segment& fresh = segments_.at(s, h);
        constexpr auto kTokens = static_cast<std::size_t>(Segment::kTokens);
        if (fresh.codes.resize(kTokens * static_cast<std::size_t>(family_->tables()),
                               config_.memory_advice) &&
            fresh.value_norms.resize(kTokens, config_.memory_advice)) {
          continue;
        }
        segments_.resize(had);
        return false;
      }
    }
    return true;
  }

  // `part`, which lies in one segment, of one KV head; `all` that are appended.
  template <class Backend, KeyValueSource Source>
  Status fill(const Backend& backend, Readers<Source>& read, int kv_head, TokenRange part,
              TokenRange all, KeyHasher<Family>& hasher, Batch& batch) noexcept {
    const float* centre = centres_.data() + std::int64_t{kv_head} * dim();
    hasher.hash(backend, read.keys, kv_head, part, centre, batch.norms.data(), batch.codes.data(),
                part.size());
    const TokenId at = part.begin - range_.begin;
    Segment& segment = segments_.at(at / Segment::kTokens, kv_head);
    const TokenId first = at % Segment::kTokens;
    backend.executor.parallel_for(family_->tables(), [&](int l, int) {
      const Code* from = batch.codes.data() + std::int64_t{l} * part.size();
      Code* to = segment.codes.data() + std::int64_t{l} * Segment::kTokens + first;
      for (TokenId i = 0; i < part.size(); ++i) to[i] = from[i];
    });
    float* norms = segment.value_norms.data() + first;
    constexpr TokenId kTask = 256;
    backend.executor.parallel_for((part.size() + kTask - 1) / kTask, [&](int task, int worker) {
      for (TokenId i = task * kTask; i < part.size() && i < (task + 1) * kTask; ++i) {
        norms[i] = norm(read.values.row(kv_head, part.begin + i, worker));
      }
    });
    for (TokenId i = 0; i < part.size(); ++i) {
      if (!std::isfinite(batch.norms.data()[i])) {
        // The centre spreads one such key to the norms of all.
        const TokenId token = first_not_finite(read.keys, kv_head, all, part.begin + i);
        return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                             token, kv_head);
      }
      if (!std::isfinite(norms[i])) {
        return Status::error(ErrorCode::kNonFinite,
                             "the value of token %d, KV head %d is not finite", part.begin + i,
                             kv_head);
      }
    }
    return Status();
  }

  template <class Scalar>
  [[nodiscard]] float norm(const Scalar* value) const {
    double square = 0.0;
    for (int j = 0; j < config_.value_dim; ++j) {
      const auto x = static_cast<double>(scalar_at(value, j));
      square += x * x;
    }
    return static_cast<float>(::sqrt(square));
  }

  const Family* family_;
  HashCodesConfig config_;
  TokenRange range_;
  SegmentTable<Segment> segments_;
  Buffer<float> centres_;  // [kv_heads, dim]; 0 where keys are not centred
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Signatures: the keys of one layer as packed codes of a few bits per dimension.
#pragma once

#include <math.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/hash/levels.hpp"
#include "magicpig/hash/rotation.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Tokens whose codes lie together, so that one shuffle looks up partial sums for all of them.
inline constexpr int kSignatureBlock = 32;
/// Tokens per segment of an index, a number of whole blocks.
inline constexpr int kSignatureSegment = 4096;

/// What signatures are made from.
struct SignaturesConfig {
  int kv_heads = 1;
  int bits = 2;  ///< per dimension, 1 to 4
  /// Width of the values, whose norms then count in a token's score; 0 leaves them out.
  int value_dim = 0;
  /// Shown every array of codes and factors before it is filled; null for none.
  MemoryAdvice memory_advice = nullptr;
};

/// The codes and factors of up to kSignatureSegment tokens of one KV head.
///
/// A block of 32 tokens holds, bit plane by bit plane and in it four dimensions by four, 16 bytes:
/// byte t has the four bits of token t in its lower half and those of token t + 16 in its upper
/// half, the lowest bit being that of the first dimension. So the sign plane is read by itself as
/// the first part of a block.
struct SignatureSegment {
  Buffer<std::uint8_t> codes;        // [blocks, bits, padded / 4, 16]
  Buffer<bf16> factors;              // [tokens]
  Buffer<std::int16_t> value_norms;  // [tokens] 8 log2 |v - mean|, or none

  [[nodiscard]] std::size_t bytes() const {
    return codes.bytes() + factors.bytes() + value_norms.bytes();
  }
};

/// For each token of a range and each KV head the centred key k - c in a random rotation R, each
/// coordinate quantised to `bits` bits (Levels), and the factor f = |k - c|^2 / <x, R(k - c)> with
/// x the code's vector: then f <x, R q> estimates <q, k - c>, without bias over rotations. c is the
/// mean of the keys when the index was empty last. Beside them, where asked for, |v - u| of the
/// token's value in eighths of a power of 2, u being the mean of the values then. Keys and values
/// are read while indexing and never kept.
///
/// Memory per token and KV head: bits * padded / 8 + 2 bytes and 2 for values, padded being
/// head_dim rounded up to a multiple of 8, in segments of 4,096 tokens. Threads: any number may
/// read (all const functions); changes need exclusive access. Source: the factor Gao and Long 2024
/// (RaBitQ); the layout Andre et al. 2015 (fast scan).
template <class Rotation>
class Signatures {
 public:
  /// An empty index. `rotation` must outlive it and may be shared by any number of indexes.
  /// Errors: a config value outside its bounds, memory.
  [[nodiscard]] static Result<Signatures> create(const Rotation& rotation,
                                                 const SignaturesConfig& config) noexcept {
    if (config.kv_heads < 1 || config.kv_heads >= (1 << 24)) {
      return Status::error(ErrorCode::kInvalidArgument, "kv_heads %d must lie in [1, 2^24)",
                           config.kv_heads);
    }
    if (config.bits < 1 || config.bits > Levels::kMaxBits) {
      return Status::error(ErrorCode::kInvalidArgument, "bits %d must lie in [1, %d]", config.bits,
                           Levels::kMaxBits);
    }
    if (config.value_dim < 0 || config.value_dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument, "value_dim %d must lie in [0, %d]",
                           config.value_dim, kMaxDim);
    }
    Signatures index(rotation, config);
    const auto heads = static_cast<std::size_t>(config.kv_heads);
    if (!index.centres_.resize(heads * static_cast<std::size_t>(rotation.dim())) ||
        !index.value_means_.resize(heads * static_cast<std::size_t>(config.value_dim))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", config.kv_heads);
    }
    return index;
  }
  static Result<Signatures> create(const Rotation&& rotation, const SignaturesConfig&) = delete;

  /// Replaces the content by the tokens of `range` and makes the centre anew. Errors: source and
  /// config disagree, range outside the source, a key that is not finite, memory, a backend without
  /// workers; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Result<Signatures> fresh = create(*rotation_, config_);
    if (!fresh.ok()) return fresh.status();
    Status status = check_range(range);
    if (!status.ok()) return status;
    fresh->range_ = {.begin = range.begin, .end = range.begin};
    status = fresh->append(backend, source, range.end);
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  /// Takes over tokens [indexed().end, end), any number of them. An `end` at or below indexed().end
  /// changes nothing. Errors: as build().
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    Status status = check(source, end);
    if (!status.ok()) return status;
    const int workers = backend.executor.workers();
    if (workers < 1) {
      return Status::error(ErrorCode::kInvalidArgument, "workers %d must be at least 1", workers);
    }
    const TokenRange fresh{.begin = range_.end, .end = end};
    Buffer<double> sums;
    Buffer<std::int32_t> scratch;
    Buffer<float> centred;
    const std::size_t rows =
        centres_.size() > value_means_.size() ? centres_.size() : value_means_.size();
    if (!reserve(end) || !sums.resize(range_.empty() ? rows : 0) ||
        !scratch.resize(static_cast<std::size_t>(workers) * scratch_per_worker()) ||
        !centred.resize(scratch.size())) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens", fresh.size());
    }
    if (range_.empty()) {
      mean_of_rows(
          backend, kv_heads(), dim(), fresh, [&](int h, TokenId t) { return source.key(h, t); },
          sums.data(), centres_.data());
      mean_of_rows(
          backend, kv_heads(), config_.value_dim, fresh,
          [&](int h, TokenId t) { return source.value(h, t); }, sums.data(), value_means_.data());
    }
    status = encode(backend, source, fresh, centred.data(), scratch.data());
    if (status.ok()) range_.end = end;
    return status;
  }

  /// Forgets tokens from `end` on. An `end` at or beyond indexed().end changes nothing; one at or
  /// below indexed().begin leaves an empty index, whose centre the next append makes anew.
  /// Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    if (end < 0) {
      return Status::error(ErrorCode::kInvalidArgument, "cannot truncate to %d tokens", end);
    }
    if (end >= range_.end) return Status();
    range_.end = end > range_.begin ? end : range_.begin;
    for (int s = segment_count(); s < reserved_; ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) segments_[place(s, h)] = SignatureSegment();
    }
    reserved_ = segment_count();
    return Status();
  }

  [[nodiscard]] const Rotation& rotation() const { return *rotation_; }
  [[nodiscard]] const Levels& levels() const { return levels_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return rotation_->dim(); }
  /// Tokens the index covers.
  [[nodiscard]] TokenRange indexed() const { return range_; }

  [[nodiscard]] int segment_count() const {
    return (range_.size() + kSignatureSegment - 1) / kSignatureSegment;
  }
  [[nodiscard]] const SignatureSegment& segment(int number, int kv_head) const {
    return segments_[place(number, kv_head)];
  }
  /// Tokens in a segment; all but the last are full.
  [[nodiscard]] int segment_tokens(int number) const {
    const TokenId rest = range_.size() - number * kSignatureSegment;
    return rest < kSignatureSegment ? rest : kSignatureSegment;
  }
  /// Sixteen-byte rows per block: one for each bit plane and four dimensions.
  [[nodiscard]] int rows_per_block() const { return config_.bits * rotation_->padded() / 4; }
  /// c, [dim].
  [[nodiscard]] const float* centre(int kv_head) const {
    return centres_.data() + std::int64_t{kv_head} * dim();
  }

  /// Bytes held by all arrays; the signs of the rotation belong to it.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = centres_.bytes() + value_means_.bytes();
    for (int s = 0; s < reserved_; ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) sum += segment(s, h).bytes();
    }
    return sum;
  }

  /// Bytes per token and KV head in full segments.
  [[nodiscard]] static constexpr std::size_t bytes_per_token(int padded, int bits,
                                                             bool value_norms) {
    return static_cast<std::size_t>(padded) * static_cast<std::size_t>(bits) / 8 + sizeof(bf16) +
           (value_norms ? sizeof(std::int16_t) : 0);
  }

 private:
  Signatures(const Rotation& rotation, const SignaturesConfig& config)
      : rotation_(&rotation), config_(config), levels_(config.bits) {}

  [[nodiscard]] std::size_t place(int number, int kv_head) const {
    return static_cast<std::size_t>(number) * static_cast<std::size_t>(config_.kv_heads) +
           static_cast<std::size_t>(kv_head);
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

  // Segments for tokens up to `end`; what exists is kept as it is.
  bool reserve(TokenId end) noexcept {
    const TokenId total = end - range_.begin;
    const int needed =
        static_cast<int>((std::int64_t{total} + kSignatureSegment - 1) / kSignatureSegment);
    if (needed <= reserved_) return true;
    const auto heads = static_cast<std::size_t>(config_.kv_heads);
    std::unique_ptr<SignatureSegment[]> all(
        new (std::nothrow) SignatureSegment[static_cast<std::size_t>(needed) * heads]);
    if (all == nullptr) return false;
    const std::size_t code_bytes = static_cast<std::size_t>(kSignatureSegment / kSignatureBlock) *
                                   static_cast<std::size_t>(rows_per_block()) * 16;
    for (std::size_t i = static_cast<std::size_t>(reserved_) * heads;
         i < static_cast<std::size_t>(needed) * heads; ++i) {
      const MemoryAdvice advice = config_.memory_advice;
      if (!all[i].codes.resize(code_bytes, advice) ||
          !all[i].factors.resize(kSignatureSegment, advice) ||
          !all[i].value_norms.resize(config_.value_dim != 0 ? kSignatureSegment : 0, advice)) {
        return false;
      }
    }
    for (std::size_t i = 0; i < static_cast<std::size_t>(reserved_) * heads; ++i) {
      all[i] = std::move(segments_[i]);
    }
    segments_ = std::move(all);
    reserved_ = needed;
    return true;
  }

  // A centred key, or its rotation, in whole cache lines.
  [[nodiscard]] std::size_t scratch_per_worker() const {
    return (static_cast<std::size_t>(rotation_->padded()) + 15) / 16 * 16;
  }

  template <class Backend, KeyValueSource Source>
  Status encode(const Backend& backend, const Source& source, TokenRange tokens, float* centred,
                std::int32_t* rotated) noexcept {
    // Tasks take whole blocks, so that no two write to the same byte.
    const TokenId first_block = (tokens.begin - range_.begin) / kSignatureBlock;
    const TokenId blocks =
        (tokens.end - range_.begin + kSignatureBlock - 1) / kSignatureBlock - first_block;
    const int parts = (blocks + kTaskBlocks - 1) / kTaskBlocks;
    std::atomic<std::int64_t> bad{INT64_MAX};  // (token, head) of a key that is not finite
    backend.executor.parallel_for(parts * config_.kv_heads, [&](int task, int worker) {
      const int kv_head = task / parts;
      const TokenId block = first_block + task % parts * kTaskBlocks;
      const TokenId begin = range_.begin + block * kSignatureBlock;
      const TokenRange part{.begin = begin > tokens.begin ? begin : tokens.begin,
                            .end = tokens.end - begin < kTaskBlocks * kSignatureBlock
                                       ? tokens.end
                                       : begin + kTaskBlocks * kSignatureBlock};
      const std::size_t own = static_cast<std::size_t>(worker) * scratch_per_worker();
      for (TokenId t = part.begin; t < part.end; ++t) {
        if (encode_token(source, kv_head, t, centred + own, rotated + own)) continue;
        const std::int64_t here = (std::int64_t{t} << 24) | kv_head;
        for (std::int64_t seen = bad.load(); here < seen && !bad.compare_exchange_weak(seen, here);)
          ;
        return;
      }
    });
    if (bad.load() == INT64_MAX) return Status();
    const auto kv_head = static_cast<int>(bad.load() & ((1 << 24) - 1));
    const auto token = static_cast<TokenId>(bad.load() >> 24);
    return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                         first_not_finite(source, kv_head, tokens, token), kv_head);
  }

  // False for a key that is not finite.
  template <KeyValueSource Source>
  bool encode_token(const Source& source, int kv_head, TokenId token, float* centred,
                    std::int32_t* rotated) {
    const auto* key = source.key(kv_head, token);
    const float* c = centre(kv_head);
    bool finite = true;
    for (int j = 0; j < dim(); ++j) {
      centred[j] = scalar_at(key, j) - c[j];
      finite = finite && std::isfinite(centred[j]);
    }
    if (!finite) return false;
    const Rotated result = rotation_->rotate(centred, rotated);
    const TokenId local = token - range_.begin;
    SignatureSegment& segment = segments_[place(local / kSignatureSegment, kv_head)];
    const int at = local % kSignatureSegment;
    std::uint8_t* block =
        segment.codes.data() + std::int64_t{at / kSignatureBlock} * rows_per_block() * 16;
    const std::int64_t dot = pack(rotated, result.square, block, at % kSignatureBlock);
    const double factor =
        dot > 0 ? result.unit * static_cast<double>(result.square) / static_cast<double>(dot) : 0.0;
    segment.factors.data()[at] = to_bf16(static_cast<float>(factor));
    if (config_.value_dim != 0) {
      segment.value_norms.data()[at] = value_norm(source.value(kv_head, token), kv_head);
    }
    return true;
  }

  // 8 log2 |v - u|, rounded; the largest there is where that is not finite, the smallest for 0. The
  // squares of floats are exact in double, so that it makes no difference who contracts the sum.
  template <class T>
  std::int16_t value_norm(const T* value, int kv_head) const {
    const float* mean = value_means_.data() + std::int64_t{kv_head} * config_.value_dim;
    double square = 0.0;
    for (int j = 0; j < config_.value_dim; ++j) {
      const auto v = static_cast<double>(scalar_at(value, j) - mean[j]);
      square += v * v;
    }
    if (!(square <= 0x1p256)) return 1024;
    if (square < 0x1p-256) return -1024;
    // log2 of the square in quarters: its exponent and how many of 2^(1/8), 2^(3/8) ... it passes.
    const auto bits = std::bit_cast<std::uint64_t>(square);
    const double fraction = std::bit_cast<double>((bits & ((1ULL << 52) - 1)) | (1023ULL << 52));
    int quarters = 4 * (static_cast<int>(bits >> 52) - 1023);
    for (const double bound :
         {1.0905077326652577, 1.2968395546510096, 1.5422108254079407, 1.8340080864093424}) {
      quarters += fraction >= bound ? 1 : 0;
    }
    return static_cast<std::int16_t>(quarters);
  }

  // Quantises a rotated key into token `lane` of a block; returns <x, key>.
  std::int64_t pack(const std::int32_t* rotated, std::int64_t square, std::uint8_t* block,
                    int lane) const {
    const int padded = rotation_->padded();
    const double sigma = ::sqrt(static_cast<double>(square) / padded);
    std::int32_t bounds[Levels::kMaxLevels];
    for (int i = 0; i + 1 < levels_.count(); ++i) {
      bounds[i] = static_cast<std::int32_t>(sigma * levels_.bound(i) / (1 << Levels::kFraction));
    }
    const int shift = lane < 16 ? 0 : 4;
    std::int64_t dot = 0;
    for (int j = 0; j < padded; j += 4) {
      std::uint8_t planes[Levels::kMaxBits] = {};
      for (int i = 0; i < 4; ++i) {
        int level = 0;
        for (int b = 0; b + 1 < levels_.count(); ++b) level += rotated[j + i] >= bounds[b] ? 1 : 0;
        const int code = levels_.code(level);
        dot += std::int64_t{levels_.value(code)} * rotated[j + i];
        for (int p = 0; p < config_.bits; ++p) {
          planes[p] = static_cast<std::uint8_t>(planes[p] | (((code >> p) & 1) << i));
        }
      }
      for (int p = 0; p < config_.bits; ++p) {
        std::uint8_t& byte = block[(std::int64_t{p} * padded / 4 + j / 4) * 16 + lane % 16];
        byte = static_cast<std::uint8_t>((byte & (0xf0 >> shift)) | (planes[p] << shift));
      }
    }
    return dot;
  }

  static constexpr int kTaskBlocks = 8;

  const Rotation* rotation_;
  SignaturesConfig config_;
  Levels levels_;
  TokenRange range_;
  int reserved_ = 0;                              // segments
  std::unique_ptr<SignatureSegment[]> segments_;  // [reserved, kv_heads]
  Buffer<float> centres_;                         // [kv_heads, dim]
  Buffer<float> value_means_;                     // [kv_heads, value_dim]
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Signatures: the keys of one layer as packed codes of a few bits per dimension.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/fixed_point.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/index/checks.hpp"
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
/// bits of each token where CodePlace says. Behind the last token all is 0, or left from tokens
/// that were cut off.
struct SignatureSegment {
  Buffer<std::uint8_t> codes;        // [blocks, rows, 64]
  Buffer<bf16> factors;              // [tokens]
  Buffer<std::int16_t> value_norms;  // [tokens] 16 log2 |v - mean|, or none
  float largest_factor = 0.0F;

  [[nodiscard]] std::size_t bytes() const {
    return codes.bytes() + factors.bytes() + value_norms.bytes();
  }
};

/// For each token of a range and each KV head the code x of its centred key k - c and the factor f
/// that a Quantiser gives it: f <x, q> estimates <q, k - c>. c is the mean of the keys when the
/// index was empty last. Beside them, where asked for, |v - u| of the token's value in sixteenths
/// of a power of 2, u being the mean of the values then. Keys and values are read while indexing
/// and never kept.
///
/// Memory per token and KV head: bits * dim / 8 + 2 bytes, with dim rounded up to a multiple of 8,
/// and 2 for values, in segments of 4,096 tokens. Threads: any number may read (all const
/// functions); changes need exclusive access. Source: the layout Andre et al. 2015 (fast scan).
template <class Q>
class Signatures {
 public:
  /// Tokens that an index can hold: whole segments of less than 2^31.
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
    return index;
  }
  static Result<Signatures> create(const Q&&, const SignaturesConfig&) = delete;

  /// Replaces the content by the tokens of `range` and makes the centre anew. Errors: source and
  /// config disagree, range outside the source, a key that is not finite, memory, a backend without
  /// workers; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Result<Signatures> fresh = create(*quantiser_, config_);
    if (!fresh.ok()) return fresh.status();
    Status status = check_range(range);
    if (status.ok()) status = check(source, range.end);
    if (!status.ok()) return status;
    fresh->range_ = {.begin = range.begin, .end = range.begin};
    status = fresh->append(backend, source, range.end);
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  /// Takes over tokens [indexed().end, end), any number of them. An `end` at or below indexed().end
  /// changes nothing. Errors: as build(), and more than kMaxTokens in all.
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    Status status = check(source, end);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    const int workers = backend.executor.workers();
    const TokenRange fresh{.begin = range_.end, .end = end};
    if (end - range_.begin > kMaxTokens) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "signatures hold up to %d tokens, not the %d of [%d, %d)", kMaxTokens,
                           end - range_.begin, range_.begin, end);
    }
    Buffer<double> sums;
    Buffer<std::byte> scratch;
    Readers<Source> read{KeyReader<Source>(source), ValueReader<Source>(source)};
    const std::size_t rows =
        centres_.size() > value_means_.size() ? centres_.size() : value_means_.size();
    if (!reserve(end) || !read.keys.reserve(workers, kLanes) ||
        !read.values.reserve(workers, config_.value_dim != 0 ? kMeanSlots : 0) ||
        !sums.resize(range_.empty() ? rows : 0) ||
        !scratch.resize(static_cast<std::size_t>(workers) * scratch_per_worker())) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens", fresh.size());
    }
    if (range_.empty()) {
      mean_of_rows(backend, kv_heads(), dim(), fresh, read.keys, sums.data(), centres_.data());
      mean_of_rows(backend, kv_heads(), config_.value_dim, fresh, read.values, sums.data(),
                   value_means_.data());
    }
    status = encode(backend, read, fresh, scratch.data());
    if (status.ok()) range_.end = end;
    return status;
  }

  /// Forgets tokens from `end` on. An `end` at or beyond indexed().end changes nothing; one at or
  /// below indexed().begin leaves an empty index, whose centre the next append makes anew.
  /// Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    for (int s = segment_count(); s < reserved_; ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) segments_[place(s, h)] = SignatureSegment();
    }
    reserved_ = segment_count();
    if (reserved_ > 0) {
      const int last = reserved_ - 1;
      for (int h = 0; h < config_.kv_heads; ++h) note_factors(last, h, 0, segment_tokens(last));
    }
    return Status();
  }

  [[nodiscard]] const Q& quantiser() const { return *quantiser_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return shape_.dim; }
  /// Tokens the index covers.
  [[nodiscard]] TokenRange indexed() const { return range_; }

  [[nodiscard]] int segment_count() const {
    return (range_.size() - 1 + kSignatureSegment) / kSignatureSegment;
  }
  [[nodiscard]] const SignatureSegment& segment(int number, int kv_head) const {
    return segments_[place(number, kv_head)];
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

  /// Bytes held by all arrays, the quantiser's not among them.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = centres_.bytes() + value_means_.bytes();
    for (int s = 0; s < reserved_; ++s) {
      for (int h = 0; h < config_.kv_heads; ++h) sum += segment(s, h).bytes();
    }
    return sum;
  }

  /// Bytes per token and KV head in full segments.
  [[nodiscard]] static constexpr std::size_t bytes_per_token(const QuantiserShape& shape,
                                                             bool value_norms) {
    return static_cast<std::size_t>(shape.rows) / 2 + sizeof(bf16) +
           (value_norms ? sizeof(std::int16_t) : 0);
  }

 private:
  Signatures(const Q& quantiser, const SignaturesConfig& config)
      : quantiser_(&quantiser), shape_(quantiser.shape()), config_(config) {}

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
    const int needed = (total - 1 + kSignatureSegment) / kSignatureSegment;
    if (needed <= reserved_) return true;
    const auto heads = static_cast<std::size_t>(config_.kv_heads);
    std::unique_ptr<SignatureSegment[]> all(
        new (std::nothrow) SignatureSegment[static_cast<std::size_t>(needed) * heads]);
    if (all == nullptr) return false;
    const std::size_t code_bytes = static_cast<std::size_t>(kSignatureSegment / kSignatureBlock) *
                                   static_cast<std::size_t>(rows_per_block()) * 64;
    for (std::size_t i = static_cast<std::size_t>(reserved_) * heads;
         i < static_cast<std::size_t>(needed) * heads; ++i) {
      const MemoryAdvice advice = config_.memory_advice;
      if (!all[i].codes.resize(code_bytes, advice) ||
          !all[i].factors.resize(kSignatureSegment, advice) ||
          !all[i].value_norms.resize(config_.value_dim != 0 ? kSignatureSegment : 0, advice)) {
        return false;
      }
      const auto clear = [](auto& buffer) {
        std::fill_n(buffer.data(), buffer.size(), std::remove_pointer_t<decltype(buffer.data())>());
      };
      clear(all[i].codes);
      clear(all[i].factors);
      clear(all[i].value_norms);
    }
    for (std::size_t i = 0; i < static_cast<std::size_t>(reserved_) * heads; ++i) {
      all[i] = std::move(segments_[i]);
    }
    segments_ = std::move(all);
    reserved_ = needed;
    return true;
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
  [[nodiscard]] std::size_t scratch_per_worker() const {
    Arena arena;
    (void)carve(arena);
    return arena.bytes_needed();
  }

  template <KeyValueSource Source>
  struct Readers {
    KeyReader<Source> keys;
    ValueReader<Source> values;
  };

  // Tokens [begin, begin + kLanes) of a segment, of which [first, last) are to be encoded.
  struct Lanes {
    int kv_head = 0;
    TokenId begin = 0;
    int first = 0;
    int last = kLanes;
    TokenId end = 0;  // of all tokens that there are
    int worker = 0;
  };

  template <class Backend, KeyValueSource Source>
  Status encode(const Backend& backend, Readers<Source>& read, TokenRange tokens,
                std::byte* memory) noexcept {
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
      Arena arena({memory + static_cast<std::size_t>(worker) * size, size});
      const Scratch scratch = carve(arena);
      for (TokenId t = from; t < end && t - from < kTaskTokens; t += kLanes) {
        const Lanes lanes{.kv_head = kv_head,
                          .begin = t,
                          .first = begin > t ? begin - t : 0,
                          .last = end - t < kLanes ? end - t : kLanes,
                          .end = end,
                          .worker = worker};
        if (lanes.first >= kLanes) continue;
        if (encode_lanes<typename Backend::Ops>(read, lanes, scratch)) continue;
        const std::int64_t here = (std::int64_t{range_.begin + t} << 24) | kv_head;
        for (std::int64_t seen = bad.load(); here < seen && !bad.compare_exchange_weak(seen, here);)
          ;
        return;
      }
    });
    if (bad.load() == INT64_MAX) {
      note_factors(tokens);
      return Status();
    }
    const auto kv_head = static_cast<int>(bad.load() & ((1 << 24) - 1));
    const auto token = static_cast<TokenId>(bad.load() >> 24);
    return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                         first_not_finite(read.keys, kv_head, tokens, token), kv_head);
  }

  // False for keys that are not all finite.
  template <class Ops, KeyValueSource Source>
  bool encode_lanes(Readers<Source>& read, const Lanes& lanes, const Scratch& scratch) {
    std::uint32_t largest[kLanes];
    prefetch_keys(read.keys, lanes, 0);
    if (!centre_lanes<Ops>(read.keys, lanes, scratch.centred, largest)) return false;
    prefetch_keys(read.keys, lanes, 4);
    SignatureSegment& segment = segments_[place(lanes.begin / kSignatureSegment, lanes.kv_head)];
    const int at = lanes.begin % kSignatureSegment;
    std::uint8_t* block =
        segment.codes.data() + std::int64_t{at / kSignatureBlock} * rows_per_block() * 64;
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
      segment.factors.data()[at + l] =
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
      segment.value_norms.data()[at + l] =
          value_norm(Ops::squared_distance(value, mean, config_.value_dim));
    }
    return true;
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
    if (!(square <= 0x1p256)) return 2048;
    if (square < 0x1p-256) return -2048;
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

  // Tokens [begin, end) of a segment are new in it; all behind them are not there.
  void note_factors(int number, int kv_head, TokenId begin, TokenId end) {
    SignatureSegment& segment = segments_[place(number, kv_head)];
    float largest = begin > 0 ? segment.largest_factor : 0.0F;
    for (TokenId i = begin; i < end; ++i) {
      const float factor = to_float(segment.factors.data()[i]);
      largest = factor > largest ? factor : largest;
    }
    segment.largest_factor = largest;
  }

  static constexpr TokenId kTaskTokens = 2 * kSignatureBlock;
  static constexpr double kLargestFactor = 0x1p127;

  const Q* quantiser_;
  QuantiserShape shape_;
  SignaturesConfig config_;
  TokenRange range_;
  int reserved_ = 0;                              // segments
  std::unique_ptr<SignatureSegment[]> segments_;  // [reserved, kv_heads]
  Buffer<float> centres_;                         // [kv_heads, dim]
  Buffer<float> value_means_;                     // [kv_heads, value_dim]
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Signatures on the device: the codes of the keys of one layer's requests, in the host's memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/key_mean.cuh"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/cuda/rotation.cuh"
#include "magicpig/hash/levels.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/hash/scalar_quantiser.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

inline constexpr int kSegmentBlocks = kSignatureSegment / kSignatureBlock;

/// What kernels see of signatures. Token `first` + i of a request is place i % kSignatureBlock of
/// its block i / kSignatureBlock; a block is laid out as on the host (CodePlace).
struct SignatureView {
  std::uint32_t* codes = nullptr;    // [requests, kv_heads, blocks, rows, 16] words
  bf16* factors = nullptr;           // [requests, kv_heads, blocks * kSignatureBlock]
  std::uint32_t* largest = nullptr;  // [requests, kv_heads, segments] bits of the largest factor
  float* centres = nullptr;          // [requests, kv_heads, dim]
  std::int32_t* counts = nullptr;    // [requests] tokens
  int requests = 0;
  int kv_heads = 0;
  int dim = 0;
  int rows = 0;
  int blocks = 0;  // of each request at most
  TokenId first = 0;

  [[nodiscard]] __host__ __device__ int segments() const {
    return (blocks + kSegmentBlocks - 1) / kSegmentBlocks;
  }
  /// KV heads of all requests.
  [[nodiscard]] std::size_t heads() const {
    return static_cast<std::size_t>(requests) * static_cast<std::size_t>(kv_heads);
  }
  __device__ std::int64_t head(int request, int kv_head) const {
    return std::int64_t{request} * kv_heads + kv_head;
  }
  __device__ std::uint32_t* block_codes(int request, int kv_head, int block) const {
    return codes + ((head(request, kv_head) * blocks + block) * rows) * 16;
  }
  __device__ bf16* block_factors(int request, int kv_head, int block) const {
    return factors + (head(request, kv_head) * blocks + block) * kSignatureBlock;
  }
  __device__ std::uint32_t* largest_factor(int request, int kv_head, int block) const {
    return largest + head(request, kv_head) * segments() + block / kSegmentBlocks;
  }
  /// As Signatures::blocks() has it.
  __device__ float factor_scale(int request, int kv_head, int block) const {
    const float factor = __uint_as_float(*largest_factor(request, kv_head, block));
    return factor > 0x1p-100F ? __fdiv_rn(32767.0F, factor) : 0.0F;
  }
  /// Tokens of a request if they end with token `end`.
  __device__ int count_at(TokenId end) const {
    const int most = blocks * kSignatureBlock;
    return max(0, min(end - first, most));
  }
};

/// Bits of the 32-bit word `word` of a row that belong to tokens [first, last) of a block.
[[nodiscard]] __host__ __device__ inline std::uint32_t code_bits(int word, int first, int last) {
  std::uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    const int byte = 4 * word + i / 2;
    const int token = byte / 2 + 32 * (byte % 2) + 64 * (i % 2);
    if (token >= first && token < last) bits |= 15U << (4 * i);
  }
  return bits;
}

/// Centres of requests from their first tokens on: the means of the keys. A block per KV head and
/// request, a thread per dimension.
template <class T>
__global__ void mean_kernel(SignatureView to, KeyValues<T> from, const std::int32_t* ends) {
  const int kv_head = static_cast<int>(blockIdx.x);
  const int request = static_cast<int>(blockIdx.y);
  const int j = static_cast<int>(threadIdx.x);
  const int count = to.count_at(ends[request]);
  if (count == 0 || j >= to.dim) return;
  to.centres[to.head(request, kv_head) * to.dim + j] =
      mean_of_keys(from, request, kv_head, {.begin = to.first, .end = to.first + count}, j);
}

inline constexpr int kEncodeThreads = 256;

/// The code of one rotated key by one warp, into a block in shared memory; returns <x, key> with
/// the code's vector x, in units of 2^-Levels::kFraction, in all lanes. As ScalarQuantiser.
template <int kBits>
__device__ std::int64_t quantise(const std::int32_t* rotated, int padded, std::int64_t square,
                                 int token, std::uint32_t* block) {
  constexpr Levels kLevels(kBits);
  constexpr int kHalf = (1 << kBits) / 2;
  std::int32_t bounds[kHalf];  // kHalf - 1 of them
  const double sigma = __dsqrt_rn(__ddiv_rn(static_cast<double>(square), padded));
#pragma unroll
  for (int b = 0; b + 1 < kHalf; ++b) {
    const double bound = __dmul_rn(sigma, kLevels.bound(kHalf + b)) / (1 << Levels::kFraction);
    bounds[b] = static_cast<std::int32_t>(bound) - 1;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const CodePlace place = CodePlace::of(token);
  const int word = place.byte / 4;
  const int shift = place.byte % 4 * 8 + 4 * place.upper;
  std::uint32_t sums[kBits] = {};
  for (int four = lane; four < padded / 4; four += kWarp) {
    std::uint32_t bits[kBits] = {};
    for (int i = 0; i < 4; ++i) {
      const std::int32_t own = rotated[4 * four + i];
      const std::int32_t sign = own >> 31;
      int level = kHalf;
#pragma unroll
      for (int b = 0; b + 1 < kHalf; ++b) level += (own ^ sign) > bounds[b] ? 1 : 0;
      const auto code = static_cast<std::uint32_t>(kLevels.code(level) ^ sign);
#pragma unroll
      for (int p = 0; p < kBits; ++p) {
        const std::uint32_t bit = (code >> p) & 1U;
        bits[p] |= bit << i;
        sums[p] += static_cast<std::uint32_t>(bit != 0 ? own : -own);
      }
    }
#pragma unroll
    for (int p = 0; p < kBits; ++p) {
      atomicOr(block + (p * (padded / 4) + four) * 16 + word, bits[p] << shift);
    }
  }
  std::int64_t dot = 0;
#pragma unroll
  for (int p = 0; p < kBits; ++p) {
    const auto sum = static_cast<std::int32_t>(__reduce_add_sync(kAllLanes, sums[p]));
    dot += std::int64_t{kLevels.amplitude(p)} * sum;
  }
  return dot;
}

/// Codes of tokens behind those that there are, up to `ends`: one block of threads per block of
/// tokens, KV head and request, a token per warp at a time. Shared memory: the block's codes, and
/// the rotated key of each warp.
template <int kBits, class T>
__global__ void __launch_bounds__(kEncodeThreads)
    encode_kernel(SignatureView to, RotationParameters rotation, KeyValues<T> from,
                  const std::int32_t* ends) {
  extern __shared__ __align__(16) unsigned char encode_shared[];
  const int kv_head = static_cast<int>(blockIdx.y);
  const int request = static_cast<int>(blockIdx.z);
  const int had = to.counts[request];
  const int number = had / kSignatureBlock + static_cast<int>(blockIdx.x);
  const int begin = number * kSignatureBlock;
  const int first = max(had - begin, 0);
  const int last = min(to.count_at(ends[request]) - begin, kSignatureBlock);
  if (last <= first) return;

  const int padded = rotation.input.padded();
  const int words = to.rows * 16;
  const int thread = static_cast<int>(threadIdx.x);
  auto* block = reinterpret_cast<std::uint32_t*>(encode_shared);
  auto* rotated = reinterpret_cast<std::int32_t*>(block + words) + thread / kWarp * padded;
  std::uint32_t* codes = to.block_codes(request, kv_head, number);
  const std::uint32_t kept = ~code_bits(thread % 16, first, last);  // kEncodeThreads % 16 == 0
  for (int i = thread; i < words; i += kEncodeThreads) block[i] = first > 0 ? codes[i] & kept : 0;
  __syncthreads();

  bf16* factors = to.block_factors(request, kv_head, number);
  const float* centre = to.centres + to.head(request, kv_head) * to.dim;
  float largest = 0.0F;
  for (int t = first + thread / kWarp; t < last; t += kEncodeThreads / kWarp) {
    const T* key = from.row(request, kv_head, to.first + begin + t).key;
    const WarpRotated result = rotate(
        rotation, [&](int j) { return __fsub_rn(widen(key[j]), centre[j]); }, rotated);
    const std::int64_t dot = quantise<kBits>(rotated, padded, result.square, t, block);
    __syncwarp();  // before the next rotation
    const double square = __dmul_rn(result.unit, static_cast<double>(result.square));
    const double factor =
        dot > 0 ? __ddiv_rn(square * (1 << Levels::kFraction), static_cast<double>(dot)) : 0.0;
    const bf16 rounded = to_bf16(static_cast<float>(factor < 0x1p127 ? factor : 0x1p127));
    if (thread % kWarp == 0) factors[t] = rounded;
    largest = fmaxf(largest, widen(rounded));
  }
  if (thread % kWarp == 0) {
    atomicMax(to.largest_factor(request, kv_head, number), __float_as_uint(largest));
  }
  __syncthreads();
  for (int i = thread; i < words; i += kEncodeThreads) codes[i] = block[i];
}

/// Takes note of what encode_kernel() has added.
static __global__ void commit_kernel(SignatureView to, const std::int32_t* ends) {
  const int request = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (request >= to.requests) return;
  to.counts[request] = max(to.counts[request], to.count_at(ends[request]));
}

/// Forgets tokens from `ends` on, and what the largest factor of their segment was: one warp per
/// KV head and request.
static __global__ void truncate_kernel(SignatureView to, const std::int32_t* ends) {
  const int kv_head = static_cast<int>(blockIdx.x);
  const int request = static_cast<int>(blockIdx.y);
  const int count = to.count_at(ends[request]);
  if (count >= to.counts[request]) return;
  const int segment = count / kSignatureSegment;
  std::uint32_t largest = 0;
  for (int i = segment * kSignatureSegment + static_cast<int>(threadIdx.x); i < count; i += kWarp) {
    const bf16* factors = to.block_factors(request, kv_head, i / kSignatureBlock);
    largest = max(largest, __float_as_uint(widen(factors[i % kSignatureBlock])));
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  std::uint32_t* own = to.largest_factor(request, kv_head, 0);
  for (int s = segment + static_cast<int>(threadIdx.x); s < to.segments(); s += kWarp) {
    own[s] = s == segment ? largest : 0;
  }
}

/// The other half of truncate_kernel(), which reads the counts.
static __global__ void cut_kernel(SignatureView to, const std::int32_t* ends) {
  const int request = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (request >= to.requests) return;
  to.counts[request] = min(to.counts[request], to.count_at(ends[request]));
}

/// What signatures on the device are made for.
struct SignaturesConfig {
  int requests = 1;
  int kv_heads = 1;
  TokenId capacity = 0;  ///< tokens of each request that can be indexed
  TokenId first = 4;     ///< the first token that is; those before it are attention sinks
};

/// The codes of one layer's requests, in memory of the host's on the device; a view, which owns
/// nothing and may be copied. The codes, factors and centres are the very bits that
/// magicpig::Signatures makes of the same keys with the same quantiser.
///
/// Each request has a slot of `capacity` tokens. Memory: bits * dim / 8 + 2 bytes per token of
/// capacity and KV head, capacity rounded up to 128, and centres. All functions but create() work
/// in the order of a stream, start one to four kernels, neither wait nor allocate, and may be
/// captured in a graph. A key that is not finite gets a factor of 0, a score like that of a key in
/// the centre; attention to it is not finite.
class Signatures {
 public:
  /// Bytes of device memory, of any alignment. `shape` of the quantiser.
  [[nodiscard]] static std::size_t bytes(const QuantiserShape& shape,
                                         const SignaturesConfig& config) {
    Arena arena;
    (void)carve(arena, shape, config);
    return arena.bytes_needed();
  }

  /// `memory` on the device, of at least bytes(); clear() it before anything else. Errors: a
  /// quantiser of more than 256 dimensions, sizes out of bounds, memory that is too small.
  [[nodiscard]] static Result<Signatures> create(const HadamardQuantiser& quantiser,
                                                 const SignaturesConfig& config,
                                                 std::span<std::byte> memory) noexcept {
    Status status = check_heads(config.requests, config.kv_heads);
    if (!status.ok()) return status;
    status = check_capacity(config.capacity, config.first, INT32_MAX - kSignatureSegment);
    if (!status.ok()) return status;
    const Result<RotationParameters> rotation = RotationParameters::create(quantiser.rotation());
    if (!rotation.ok()) return rotation.status();
    status = check_memory(memory.size(), bytes(quantiser.shape(), config), "the signatures");
    if (!status.ok()) return status;
    Arena arena(memory);
    return Signatures(quantiser, *rotation, carve(arena, quantiser.shape(), config));
  }

  /// Forgets all tokens of all requests.
  [[nodiscard]] Status clear(cudaStream_t stream) const noexcept {
    const auto requests = static_cast<std::size_t>(view_.requests);
    const Status status = status_of(
        cudaMemsetAsync(view_.counts, 0, requests * sizeof(std::int32_t), stream), "clear counts");
    if (!status.ok()) return status;
    const std::size_t largest =
        view_.heads() * static_cast<std::size_t>(view_.segments()) * sizeof(std::uint32_t);
    return status_of(cudaMemsetAsync(view_.largest, 0, largest, stream), "clear factors");
  }

  /// Forgets all tokens of all requests, and takes over tokens [first, ends[r]) of each request r,
  /// with the means of their keys as centres. `ends` [requests] on the device, none above
  /// `most_tokens`; tokens beyond the capacity stay exact. Errors: keys of other heads, dimensions
  /// or requests; those of the runtime.
  template <class T>
  [[nodiscard]] Status build(const KeyValues<T>& from, const std::int32_t* ends,
                             TokenId most_tokens, cudaStream_t stream) const noexcept {
    Status status = check(from);
    if (status.ok()) status = clear(stream);
    if (!status.ok()) return status;
    const Grid grid{.blocks = dim3(static_cast<unsigned>(view_.kv_heads),
                                   static_cast<unsigned>(view_.requests)),
                    .threads = static_cast<unsigned>(view_.dim)};
    status = launch("mean_kernel", mean_kernel<T>, grid, stream, view_, from, ends);
    return status.ok() ? append(from, ends, most_tokens, stream) : status;
  }

  /// Takes over tokens of each request r up to ends[r], of which at most `most_tokens` are new. An
  /// end at or below that of the tokens that it has changes nothing. The centres stay as build()
  /// made them. Errors: as build().
  template <class T>
  [[nodiscard]] Status append(const KeyValues<T>& from, const std::int32_t* ends,
                              TokenId most_tokens, cudaStream_t stream) const noexcept {
    Status status = check(from);
    if (!status.ok() || most_tokens < 1) return status;
    // The first of them may lie anywhere in its block.
    const int blocks = (std::min)(view_.blocks, (most_tokens - 1) / kSignatureBlock + 2);
    const auto words = static_cast<std::size_t>(view_.rows) * 16 +
                       kEncodeThreads / kWarp * static_cast<std::size_t>(rotation_.input.padded());
    const Grid grid{
        .blocks = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(view_.kv_heads),
                       static_cast<unsigned>(view_.requests)),
        .threads = kEncodeThreads,
        .shared_bytes = words * sizeof(std::uint32_t)};
    status = launch("encode_kernel", encode_of<T>(), grid, stream, view_, rotation_, from, ends);
    return status.ok() ? launch("commit_kernel", commit_kernel, per_request(), stream, view_, ends)
                       : status;
  }

  /// Forgets tokens of each request r from ends[r] on. An end beyond those that it has changes
  /// nothing.
  [[nodiscard]] Status truncate(const std::int32_t* ends, cudaStream_t stream) const noexcept {
    const Grid grid{.blocks = dim3(static_cast<unsigned>(view_.kv_heads),
                                   static_cast<unsigned>(view_.requests)),
                    .threads = kWarp};
    const Status status = launch("truncate_kernel", truncate_kernel, grid, stream, view_, ends);
    return status.ok() ? launch("cut_kernel", cut_kernel, per_request(), stream, view_, ends)
                       : status;
  }

  /// Errors: as KeyValues::check(), other requests, heads or dimensions than these are for.
  template <class T>
  [[nodiscard]] Status check(const KeyValues<T>& from) const noexcept {
    return from.check_for(view_, "signatures");
  }

  [[nodiscard]] const SignatureView& view() const { return view_; }
  [[nodiscard]] const RotationParameters& rotation() const { return rotation_; }
  [[nodiscard]] const QuantiserShape& shape() const { return shape_; }

 private:
  Signatures(const HadamardQuantiser& quantiser, const RotationParameters& rotation,
             const SignatureView& view)
      : rotation_(rotation), shape_(quantiser.shape()), view_(view) {}

  static SignatureView carve(Arena& arena, const QuantiserShape& shape,
                             const SignaturesConfig& config) {
    const int blocks = (config.capacity - 1) / kSignatureBlock + 1;
    SignatureView view{.requests = config.requests,
                       .kv_heads = config.kv_heads,
                       .dim = shape.dim,
                       .rows = shape.rows,
                       .blocks = blocks,
                       .first = config.first};
    const std::size_t heads = view.heads();
    const std::size_t all_blocks = heads * static_cast<std::size_t>(blocks);
    view.codes = arena.take<std::uint32_t>(all_blocks * static_cast<std::size_t>(shape.rows) * 16);
    view.factors = arena.take<bf16>(all_blocks * kSignatureBlock);
    view.largest = arena.take<std::uint32_t>(heads * static_cast<std::size_t>(view.segments()));
    view.centres = arena.take<float>(heads * static_cast<std::size_t>(shape.dim));
    view.counts = arena.take<std::int32_t>(static_cast<std::size_t>(config.requests));
    return view;
  }

  [[nodiscard]] Grid per_request() const {
    constexpr unsigned kThreads = 128;
    return {.blocks = dim3((static_cast<unsigned>(view_.requests) + kThreads - 1) / kThreads),
            .threads = kThreads};
  }

  template <class T>
  [[nodiscard]] auto encode_of() const {
    if (shape_.bits == 1) return encode_kernel<1, T>;
    if (shape_.bits == 2) return encode_kernel<2, T>;
    if (shape_.bits == 3) return encode_kernel<3, T>;
    return encode_kernel<4, T>;
  }

  RotationParameters rotation_;
  QuantiserShape shape_;
  SignatureView view_;
};

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

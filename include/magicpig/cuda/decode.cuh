// SPDX-License-Identifier: Apache-2.0
// One decode step on the device, whatever draws its tokens: plan, requests, and the merging of
// parts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/group_attention.cuh"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/request.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// What all requests of a decode step share. The sampler is read during the call.
template <class SamplerType>
struct DecodePlan {
  using Sampler = SamplerType;

  int query_heads = 1;
  const Sampler* sampler = nullptr;
  float scale = 0.0F;  ///< logit = scale * q.k; 0 means 1 / sqrt(dim)
  std::uint32_t layer = 0;
  TokenId exact_below = kExactBelow;  ///< fewer indexed tokens are not drawn from
  /// Blocks of threads that share the tokens of one KV head of one request: see splits_for(). The
  /// output's last bits depend on it, the draw does not.
  int splits = 1;

  [[nodiscard]] float logit_scale(int dim) const {
    return scale != 0.0F ? scale : 1.0F / ::sqrtf(static_cast<float>(dim));
  }
};

/// Splits for which `multiprocessors` have two blocks of threads each, but none for less than
/// kLeastSplit of `most_tokens` tokens. At least 1.
inline constexpr TokenId kLeastSplit = 1024;
[[nodiscard]] constexpr int splits_for(int requests, int kv_heads, TokenId most_tokens,
                                       int multiprocessors) {
  const std::int64_t heads = std::int64_t{requests} * kv_heads;
  const std::int64_t wanted = heads > 0 ? (2 * std::int64_t{multiprocessors} - 1) / heads + 1 : 1;
  const std::int64_t most = (std::int64_t{most_tokens} - 1) / kLeastSplit + 1;
  const std::int64_t splits = wanted < most ? wanted : most;
  return splits > 1 ? static_cast<int>(splits) : 1;
}

/// The requests of one step. All pointers are the device's, so that a captured graph sees what they
/// point at when it runs. T is float, fp16 or bf16, Out too.
template <class T, class Out = float>
struct DecodeBatch {
  KeyValues<T> key_values;
  const T* queries = nullptr;            ///< [requests, query_heads, dim], unscaled
  const std::uint64_t* seeds = nullptr;  ///< [requests]; with `steps` they name the random draws
  const std::uint32_t* steps = nullptr;  ///< [requests], a new number for every token generated
  Out* out = nullptr;                    ///< [requests, query_heads, dim], normalised; written
  /// [requests, query_heads], natural log; null for none. Written; -inf for an empty cache.
  float* lse = nullptr;
  /// Null for none. Written where tokens were drawn from: bit i % 32 of word i / 32 says whether
  /// token first + i was drawn. By signatures [requests, kv_heads, blocks of the index, 4]; by
  /// tables [requests, query_heads, words of the index].
  std::uint32_t* drawn = nullptr;
};

/// What the splits of one KV head of a request leave for merge_kernel().
struct SplitSums {
  HeadSums* heads = nullptr;  // [requests, kv_heads, splits, group]
  float* values = nullptr;    // [requests, kv_heads, splits, group, dim]

  [[nodiscard]] static SplitSums carve(Arena& arena, std::size_t heads, int splits, int group,
                                       int dim) {
    const std::size_t outputs =
        heads * static_cast<std::size_t>(splits) * static_cast<std::size_t>(group);
    return {.heads = arena.take<HeadSums>(outputs),
            .values = arena.take<float>(outputs * static_cast<std::size_t>(dim))};
  }
};

/// One softmax of the splits' sums: a block per query head and request, a thread per dimension.
template <class Out>
__global__ void merge_kernel(SplitSums from, int kv_heads, int group, int splits, Out* out,
                             float* lse) {
  const int dim = static_cast<int>(blockDim.x);
  const int query_head = static_cast<int>(blockIdx.x);
  const int request = static_cast<int>(blockIdx.y);
  const int j = static_cast<int>(threadIdx.x);
  const std::int64_t head = std::int64_t{request} * kv_heads + query_head / group;
  const std::int64_t first = head * splits * group + query_head % group;
  float largest = -INFINITY;
  for (int s = 0; s < splits; ++s) {
    const float of_split = from.heads[first + std::int64_t{s} * group].largest;
    largest = of_split > largest ? of_split : largest;
  }
  float weight = 0.0F;
  float value = 0.0F;
  for (int s = 0; s < splits; ++s) {
    const std::int64_t at = first + std::int64_t{s} * group;
    const HeadSums sums = from.heads[at];
    const float by = sums.largest == largest ? 1.0F : exp2f(sums.largest - largest);
    weight += by * sums.weight;
    value += by * from.values[at * dim + j];
  }
  const bool empty = weight == 0.0F;
  const std::int64_t to = std::int64_t{request} * gridDim.x + query_head;
  out[to * dim + j] = narrow<Out>(empty ? 0.0F : value / weight);
  constexpr float kLog2 = 0.6931471805599453F;
  if (lse != nullptr && j == 0) lse[to] = empty ? -INFINITY : (largest + log2f(weight)) * kLog2;
}

/// What a kernel that attends is told beside pointers.
struct AttendInput {
  int group;
  float scale;
  std::uint32_t layer;
  TokenId exact_below;
};

/// How many tokens of a request are drawn from: those that are indexed and in the cache, none if
/// they are fewer than `exact_below`. All others are exact.
template <class View>
[[nodiscard]] __device__ int sampled_count(const View& index, int request, TokenId tokens,
                                           TokenId exact_below) {
  const int count = min(index.counts[request], index.count_at(tokens));
  return count < exact_below ? 0 : count;
}

/// Things [begin, end) of some.
struct SplitPart {
  int begin;
  int end;
  [[nodiscard]] __device__ int size() const { return end - begin; }
};

/// What a block of threads attends to: one of the splits of a KV head of a request.
struct SplitPlace {
  int split;
  int splits;
  int kv_head;
  int request;
  std::int64_t head;  // of all requests'

  __device__ explicit SplitPlace(int kv_heads)
      : split(static_cast<int>(blockIdx.x)),
        splits(static_cast<int>(gridDim.x)),
        kv_head(static_cast<int>(blockIdx.y)),
        request(static_cast<int>(blockIdx.z)),
        head(std::int64_t{request} * kv_heads + kv_head) {}
  /// Its part of `n` things.
  [[nodiscard]] __device__ SplitPart part(std::int64_t n) const {
    return {.begin = static_cast<int>(n * split / splits),
            .end = static_cast<int>(n * (split + 1) / splits)};
  }
  /// Writes what the block's threads have added up, `shared` being free for all of them.
  template <class Attention>
  __device__ void write(Attention& attention, int group, void* shared,
                        const SplitSums& sums) const {
    const std::int64_t to = (head * splits + split) * group;
    attention.write(static_cast<float*>(shared), sums.heads + to,
                    sums.values + to * Attention::kSize);
  }
};

/// A split's exact tokens: those before the `sampled` ones, which begin with token `first`, and
/// those behind them. For GroupAttention::add().
struct ExactRows {
  static constexpr bool kForAllHeads = true;
  struct Row {
    float log2_factor = -INFINITY;
  };
  int begin;
  TokenId first;
  int sampled;

  __device__ TokenId token(int i, Row& row) const {
    row.log2_factor = 0.0F;
    const TokenId token = begin + i;
    return token < first ? token : token + sampled;
  }
  __device__ static float log2_factor(const Row& row, int, float) { return row.log2_factor; }
};

/// What any step asks for. Errors: heads that do not divide, more than kMaxGroup query heads per KV
/// head, a dimension other than 64, 96, 128 and 256, splits or requests or KV heads above 65,535,
/// no splits, a scale that is not finite; null pointers; what KeyValues::check() says.
template <class Sampler, class T, class Out>
[[nodiscard]] Status check_step(const DecodePlan<Sampler>& plan,
                                const DecodeBatch<T, Out>& batch) noexcept {
  const KeyValues<T>& from = batch.key_values;
  const Status status = from.check();
  if (!status.ok()) return status;
  if (plan.query_heads < 1 || plan.query_heads % from.kv_heads != 0 ||
      plan.query_heads / from.kv_heads > kMaxGroup) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "query_heads %d must be 1 to %d times kv_heads %d", plan.query_heads,
                         kMaxGroup, from.kv_heads);
  }
  if (from.dim != 64 && from.dim != 96 && from.dim != 128 && from.dim != 256) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "head_dim %d must be 64, 96, 128 or 256 on the device", from.dim);
  }
  if (!(plan.scale >= -std::numeric_limits<float>::max() &&
        plan.scale <= std::numeric_limits<float>::max())) {
    return Status::error(ErrorCode::kNonFinite, "scale %g is not finite",
                         static_cast<double>(plan.scale));
  }
  if (plan.splits < 1 || plan.splits > kMostOfGrid || from.requests > kMostOfGrid ||
      from.kv_heads > kMostOfGrid) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "splits %d must lie in [1, %d], requests %d and kv_heads %d not above it",
                         plan.splits, kMostOfGrid, from.requests, from.kv_heads);
  }
  if (batch.queries == nullptr || batch.out == nullptr) {
    return Status::error(ErrorCode::kInvalidArgument, "queries or out are null");
  }
  if (reinterpret_cast<std::uintptr_t>(batch.queries) % kRowAlignment != 0) {
    return Status::error(ErrorCode::kInvalidArgument, "queries must be aligned to %d bytes",
                         kRowAlignment);
  }
  return Status();
}

/// What a step that draws asks for beside. Errors: no sampler, and what the index's check() says of
/// the keys and values.
template <class Sampler, class Index, class T, class Out>
[[nodiscard]] Status check_step(const DecodePlan<Sampler>& plan, const Index& index,
                                const DecodeBatch<T, Out>& batch) noexcept {
  const Status status = index.check(batch.key_values);
  if (!status.ok()) return status;
  if (plan.sampler == nullptr) {
    return Status::error(ErrorCode::kInvalidArgument, "the plan has no sampler");
  }
  return check_step(plan, batch);
}

/// Calls chosen.operator()<kDim, kHeads>() for a head_dim that check_step() lets pass and the least
/// number of heads, a power of 2, that has room for the group.
template <int kDim, class Choose>
[[nodiscard]] Status with_heads(int group, const Choose& chosen) noexcept {
  if (group <= 1) return chosen.template operator()<kDim, 1>();
  if (group <= 2) return chosen.template operator()<kDim, 2>();
  if (group <= 4) return chosen.template operator()<kDim, 4>();
  if (group <= 8) return chosen.template operator()<kDim, 8>();
  return chosen.template operator()<kDim, 16>();
}
template <class Choose>
[[nodiscard]] Status with_shape(int dim, int group, const Choose& chosen) noexcept {
  if (dim == 64) return with_heads<64>(group, chosen);
  if (dim == 96) return with_heads<96>(group, chosen);
  if (dim == 128) return with_heads<128>(group, chosen);
  return with_heads<256>(group, chosen);
}

/// The grid of a kernel that attends with GroupAttention<T, kDim, kHeads> and needs `shared_bytes`
/// for what it does before it writes.
template <class Attention, class Plan, class T>
[[nodiscard]] Grid attend_grid(const Plan& plan, const KeyValues<T>& from,
                               std::size_t shared_bytes) {
  return {.blocks = dim3(static_cast<unsigned>(plan.splits), static_cast<unsigned>(from.kv_heads),
                         static_cast<unsigned>(from.requests)),
          .threads = kAttendThreads,
          .shared_bytes = (std::max)(shared_bytes, Attention::kSharedFloats * sizeof(float))};
}
/// What that kernel is told.
template <class Plan, class T>
[[nodiscard]] AttendInput attend_input(const Plan& plan, const KeyValues<T>& from) {
  return {.group = plan.query_heads / from.kv_heads,
          .scale = plan.logit_scale(from.dim),
          .layer = plan.layer,
          .exact_below = plan.exact_below};
}

/// The last kernel of a step.
template <class Plan, class T, class Out>
[[nodiscard]] Status merge(const Plan& plan, const DecodeBatch<T, Out>& batch,
                           const SplitSums& splits, cudaStream_t stream) noexcept {
  const KeyValues<T>& from = batch.key_values;
  const Grid grid{
      .blocks = dim3(static_cast<unsigned>(plan.query_heads), static_cast<unsigned>(from.requests)),
      .threads = static_cast<unsigned>(from.dim)};
  return launch("merge_kernel", merge_kernel<Out>, grid, stream, splits, from.kv_heads,
                plan.query_heads / from.kv_heads, plan.splits, batch.out, batch.lse);
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Sampling by hash collisions on the device: tokens that share a bucket with a query in at least t
// of L tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/bucket_tables.cuh"
#include "magicpig/cuda/decode.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/sample/collision.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// What kernels see of a collision rule.
struct CollisionView {
  const float* nodes = nullptr;  // of log u(cosine), see CurveView
  const Code* masks = nullptr;   // of the buckets that are visited beside the query's own
  int segments = 0;              // of the curve
  int mask_count = 0;
  int min_collisions = 0;

  /// log u(cosine). As VectorOps::interpolate().
  __device__ float log_probability(float cosine) const {
    const float above = cosine > -1.0F ? cosine : -1.0F;  // NaN too becomes -1
    const float place = sqrtf(0.5F - 0.5F * fminf(above, 1.0F)) * static_cast<float>(segments);
    const int node = min(static_cast<int>(place), segments - 1);
    const float low = __ldg(nodes + node);
    return low + (place - static_cast<float>(node)) * (__ldg(nodes + node + 1) - low);
  }
};

/// A magicpig::Collisions on the device, in memory of the host's there; a view, which owns nothing
/// and may be copied.
class Collisions {
 public:
  /// Bytes of device memory, of any alignment.
  [[nodiscard]] static std::size_t bytes(const magicpig::Collisions& from) {
    Arena arena;
    (void)carve(arena, from);
    return arena.bytes_needed();
  }

  /// Copies a rule to `memory` on the device, of at least bytes(), in the order of `stream`;
  /// returns when it has been read and may go away. Errors: memory that is too small, those of the
  /// runtime.
  [[nodiscard]] static Result<Collisions> create(const magicpig::Collisions& from,
                                                 std::span<std::byte> memory,
                                                 cudaStream_t stream) noexcept {
    Status status = check_memory(memory.size(), bytes(from), "the rule");
    if (!status.ok()) return status;
    Arena arena(memory);
    const Collisions rule = carve(arena, from);
    const CollisionView& view = rule.view_;
    const auto copy = [&](const void* to, std::span<const std::byte> bytes) {
      return status_of(cudaMemcpyAsync(const_cast<void*>(to), bytes.data(), bytes.size(),
                                       cudaMemcpyHostToDevice, stream),
                       "copy rule");
    };
    const std::span nodes(from.curve().nodes, static_cast<std::size_t>(view.segments) + 1);
    status = copy(view.nodes, std::as_bytes(nodes));
    if (status.ok()) status = copy(view.masks, std::as_bytes(from.masks()));
    if (status.ok()) status = status_of(cudaStreamSynchronize(stream), "copy rule");
    if (!status.ok()) return status;
    return rule;
  }

  /// Error: an index whose codes have other K or L than the family that the rule was made for.
  [[nodiscard]] Status supports(const BucketTables& index) const noexcept {
    const PlanesView& planes = index.planes().view();
    if (planes.bits == bits_ && planes.tables == tables_) return Status();
    return Status::error(ErrorCode::kShapeMismatch,
                         "the sampler is made for (K, L) = (%d, %d), the index has (%d, %d)", bits_,
                         tables_, planes.bits, planes.tables);
  }

  [[nodiscard]] const CollisionView& view() const { return view_; }

 private:
  static Collisions carve(Arena& arena, const magicpig::Collisions& from) {
    Collisions rule;
    const CurveView curve = from.curve();
    rule.bits_ = from.bits();
    rule.tables_ = from.tables();
    rule.view_ = {.nodes = arena.take<float>(static_cast<std::size_t>(curve.segments) + 1),
                  .masks = arena.take<Code>(from.masks().size()),
                  .segments = curve.segments,
                  .mask_count = static_cast<int>(from.masks().size()),
                  .min_collisions = from.config().min_collisions};
    return rule;
  }

  CollisionView view_;
  int bits_ = 0;
  int tables_ = 0;
};

inline constexpr int kCollideThreads = 256;
/// Lanes that read one bucket, of a few ids on average.
inline constexpr int kBucketLanes = 8;

/// The tokens of each segment that collide with a query: bit i % 32 of word i / 32 of `drawn`
/// [requests, query_heads, words] for token first + i. A block of threads per segment, query head
/// and request; in shared memory a bit set for each number of collisions up to t.
static __global__ void __launch_bounds__(kCollideThreads)
    collide_kernel(TableView index, CollisionView rule, const Code* codes,
                   const std::int32_t* tokens, TokenId exact_below, std::uint32_t* drawn,
                   std::uint32_t* copy) {
  extern __shared__ __align__(16) unsigned char collide_shared[];
  auto* sets = reinterpret_cast<std::uint32_t*>(collide_shared);  // [t, words]
  const int segment = static_cast<int>(blockIdx.x);
  const int query_head = static_cast<int>(blockIdx.y);
  const int query_heads = static_cast<int>(gridDim.y);
  const int request = static_cast<int>(blockIdx.z);
  const int thread = static_cast<int>(threadIdx.x);
  const int count = sampled_count(index, request, tokens[request], exact_below);
  if (segment * index.segment_tokens >= count) return;

  const int words = index.segment_tokens / 32;
  for (int i = thread; i < rule.min_collisions * words; i += kCollideThreads) sets[i] = 0;
  __syncthreads();
  const std::int64_t head = index.head(request, query_head / (query_heads / index.kv_heads));
  const std::uint16_t* ids = index.segment_ids(head, segment);
  const std::uint16_t* offsets = index.segment_offsets(head, segment);
  const std::int64_t query = std::int64_t{request} * query_heads + query_head;
  const Code* own = codes + query * index.tables;
  const int visits = index.tables * rule.mask_count;
  for (int v = thread / kBucketLanes; v < visits; v += kCollideThreads / kBucketLanes) {
    const int table = v / rule.mask_count;
    const int bucket = own[table] ^ rule.masks[v % rule.mask_count];
    const std::uint16_t* edges = offsets + std::int64_t{table} * (index.buckets + 1) + bucket;
    const std::uint16_t* bucket_ids = ids + std::int64_t{table} * index.segment_tokens;
    const int end = edges[1];
    for (int i = edges[0] + thread % kBucketLanes; i < end; i += kBucketLanes) {
      const int id = bucket_ids[i];
      const std::uint32_t bit = 1U << (id % 32);
      // A token that is in a set already goes on to the next.
      for (int s = 0; s < rule.min_collisions; ++s) {
        if ((atomicOr(sets + s * words + id / 32, bit) & bit) == 0) break;
      }
    }
  }
  __syncthreads();
  const std::uint32_t* often = sets + (rule.min_collisions - 1) * words;
  const std::int64_t to = query * index.words() + std::int64_t{segment} * words;
  for (int w = thread; w < words; w += kCollideThreads) {
    const int there = count - segment * index.segment_tokens - w * 32;  // tokens from this word on
    const std::uint32_t word = there >= 32 ? often[w]
                               : there > 0 ? often[w] & ((1U << there) - 1)
                                           : 0;
    drawn[to + w] = word;
    if (copy != nullptr) copy[to + w] = word;
  }
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

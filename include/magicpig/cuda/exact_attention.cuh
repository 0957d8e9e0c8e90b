// SPDX-License-Identifier: Apache-2.0
// A decode step on the device that reads every token: of a short cache, or of the tokens that a
// host keeps on the device beside others elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/decode.cuh"
#include "magicpig/cuda/group_attention.cuh"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// The share of one split in one KV head of one request.
template <class T, int kDim, int kHeads>
__global__ void __launch_bounds__(kAttendThreads, kHeads <= 4 ? 2 : 1)
    attend_exact_kernel(KeyValues<T> from, const T* queries, AttendInput input, SplitSums sums) {
  extern __shared__ __align__(16) unsigned char exact_shared[];
  const SplitPlace place(from.kv_heads);
  GroupAttention<T, kDim, kHeads> attention(queries + place.head * input.group * kDim, input.group,
                                            input.scale);
  const SplitPart exact = place.part(from.tokens[place.request]);
  attention.add(from, place.request, place.kv_head, exact.size(),
                ExactRows{.begin = exact.begin, .first = 0, .sampled = 0});
  place.write(attention, input.group, exact_shared, sums);
}

/// Bytes of device memory that decode() needs, of any alignment, for a cache of these requests. The
/// plan must be valid.
[[nodiscard]] inline std::size_t workspace_bytes(const DecodePlan<Exact>& plan, int requests,
                                                 int dim) {
  Arena arena;
  const auto heads =
      static_cast<std::size_t>(requests) * static_cast<std::size_t>(plan.query_heads);
  (void)SplitSums::carve(arena, heads, plan.splits, 1, dim);
  return arena.bytes_needed();
}

/// One decode step of one layer without an index: every token of each request's cache is attended
/// to. Two kernels in the order of `stream`; neither waits nor allocates, may be captured in a
/// graph. The plan's sampler, layer and exact_below and the batch's seeds, steps and drawn are not
/// looked at. Its out and lse merge with those of other tokens. Errors: as check_step(), a
/// workspace that is too small, those of the runtime.
template <class T, class Out>
[[nodiscard]] Status decode(const DecodePlan<Exact>& plan, const DecodeBatch<T, Out>& batch,
                            std::span<std::byte> workspace, cudaStream_t stream) noexcept {
  const KeyValues<T>& from = batch.key_values;
  Status status = check_step(plan, batch);
  if (status.ok()) {
    const std::size_t needed = workspace_bytes(plan, from.requests, from.dim);
    status = check_memory(workspace.size(), needed, "the step");
  }
  if (!status.ok()) return status;
  const int group = plan.query_heads / from.kv_heads;
  const auto heads =
      static_cast<std::size_t>(from.requests) * static_cast<std::size_t>(from.kv_heads);
  Arena arena(workspace);
  const SplitSums sums = SplitSums::carve(arena, heads, plan.splits, group, from.dim);
  status = with_shape(from.dim, group, [&]<int kDim, int kHeads>() {
    const Grid grid = attend_grid<GroupAttention<T, kDim, kHeads>>(plan, from, 0);
    return launch("attend_exact_kernel", attend_exact_kernel<T, kDim, kHeads>, grid, stream, from,
                  batch.queries, attend_input(plan, from), sums);
  });
  return status.ok() ? merge(plan, batch, sums, stream) : status;
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

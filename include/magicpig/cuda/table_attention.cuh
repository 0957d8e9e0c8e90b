// SPDX-License-Identifier: Apache-2.0
// A decode step by hash tables on the device: hash the queries, look them up, attend to what
// collides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/bucket_tables.cuh"
#include "magicpig/cuda/collisions.cuh"
#include "magicpig/cuda/decode.cuh"
#include "magicpig/cuda/drawn_list.cuh"
#include "magicpig/cuda/group_attention.cuh"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/cuda/sign_planes.cuh"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// The workspace of a step.
struct TableScratch {
  Code* codes = nullptr;           // [requests, query_heads, tables]
  std::uint32_t* drawn = nullptr;  // [requests, query_heads, words]
  SplitSums splits;

  [[nodiscard]] static TableScratch carve(Arena& arena, const DecodePlan<Collisions>& plan,
                                          const TableView& index) {
    const std::size_t queries =
        static_cast<std::size_t>(index.requests) * static_cast<std::size_t>(plan.query_heads);
    return {.codes = arena.take<Code>(queries * static_cast<std::size_t>(index.tables)),
            .drawn = arena.take<std::uint32_t>(queries * static_cast<std::size_t>(index.words())),
            .splits = SplitSums::carve(arena, index.heads(), plan.splits,
                                       plan.query_heads / index.kv_heads, index.dim)};
  }
};

/// Of a block of threads: the draws of a round, and what makes a query's cosines.
struct TableRound {
  std::uint32_t drawn[kMaxGroup][kRoundWords];  // bit i % 32 of word i / 32: of place i
  DrawnList list;                               // of tokens that any head drew
  float factors[kMaxGroup];                     // cosine = (logit log2(e) factor - shift) / |k - c|
  float shifts[kMaxGroup];
};

/// Factor and shift of head g by one warp. The query and the centre are [dim].
template <class T>
__device__ void measure_query(const T* query, const float* centre, int dim, float log2_scale, int g,
                              TableRound& round) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  double dot = 0.0;
  double square = 0.0;
  for (int j = lane; j < dim; j += kWarp) {
    const double q = widen(query[j]);
    dot += q * centre[j];
    square += q * q;
  }
  dot = warp_sum(dot);
  square = warp_sum(square);
  if (lane != 0) return;
  // A query too short for its inverse norm to be a float counts as zero. As magicpig::Collisions.
  const double inverse = square > 1e-70 ? 1.0 / sqrt(square) : 0.0;
  round.factors[g] = static_cast<float>(inverse / log2_scale);
  round.shifts[g] = static_cast<float>(dot * inverse);
}

/// Tokens of a round that some head drew, for GroupAttention::add(). Each head weighs its own by
/// one over their inclusion probability, which their cosine says; see CosineInclusion.
struct CollisionRows {
  static constexpr bool kForAllHeads = false;
  struct Row {
    float norm = 0.0F;
    std::uint32_t members = 0;  // bit g: head g drew it
  };
  const TableRound& round;
  const CollisionView& rule;
  const float* norms;  // of the round's tokens
  TokenId first;
  int group;

  __device__ TokenId token(int i, Row& row) const {
    const int place = round.list.places[i];
    row.norm = __ldg(norms + place);
    for (int g = 0; g < group; ++g) {
      row.members |= ((round.drawn[g][place / 32] >> (place % 32)) & 1U) << g;
    }
    return first + place;
  }
  __device__ float log2_factor(const Row& row, int g, float dot) const {
    if (((row.members >> g) & 1U) == 0) return -INFINITY;
    const float cosine =
        row.norm > 0.0F ? (dot * round.factors[g] - round.shifts[g]) / row.norm : 0.0F;
    return -kLog2E * rule.log_probability(cosine);
  }
};

/// The share of one split in one KV head of one request: attends to its part of the exact tokens,
/// and to its part of the indexed ones in rounds.
template <class T, int kDim, int kHeads>
__global__ void __launch_bounds__(kAttendThreads, kHeads <= 4 ? 2 : 1)
    attend_tables_kernel(TableView index, CollisionView rule, KeyValues<T> from, const T* queries,
                         AttendInput input, TableScratch scratch) {
  using Attention = GroupAttention<T, kDim, kHeads>;
  extern __shared__ __align__(16) unsigned char tables_shared[];
  auto& round = *reinterpret_cast<TableRound*>(tables_shared);
  const SplitPlace place(index.kv_heads);
  const std::int64_t head = place.head;
  const int thread = static_cast<int>(threadIdx.x);
  const TokenId tokens = from.tokens[place.request];
  const int count = sampled_count(index, place.request, tokens, input.exact_below);
  const T* own = queries + head * input.group * kDim;
  // Nothing that was drawn by codes of a key that is not finite can be trusted: it must be seen.
  const bool spoiled = count > 0 && index.spoiled[head] != 0;

  Attention attention(own, input.group, spoiled ? NAN : input.scale);
  const SplitPart exact = place.part(tokens - count);
  attention.add(from, place.request, place.kv_head, exact.size(),
                ExactRows{.begin = exact.begin, .first = index.first, .sampled = count});

  for (int g = thread / kWarp; g < input.group; g += kAttendWarps) {
    measure_query(own + g * kDim, index.centres + head * kDim, kDim, input.scale * kLog2E, g,
                  round);
  }
  const SplitPart words = place.part((count + 31) / 32);
  const std::uint32_t* drawn = scratch.drawn + head * input.group * index.words();
  for (int at = words.begin; at < words.end; at += kRoundWords) {
    std::uint32_t any = 0;
    if (thread < kRoundWords) {
      for (int g = 0; g < input.group; ++g) {
        const std::uint32_t word =
            at + thread < words.end ? drawn[std::int64_t{g} * index.words() + at + thread] : 0;
        round.drawn[g][thread] = word;
        any |= word;
      }
    }
    const int listed = round.list.fill(any);
    attention.add(from, place.request, place.kv_head, listed,
                  CollisionRows{.round = round,
                                .rule = rule,
                                .norms = index.head_norms(head) + at * 32,
                                .first = index.first + at * 32,
                                .group = input.group});
    __syncthreads();  // the round's draws and list have been read
  }
  __syncthreads();  // as shared memory is reused, be there no round
  place.write(attention, input.group, tables_shared, scratch.splits);
}

/// Bytes of device memory that decode() needs, of any alignment, for this plan and index. The plan
/// must be valid.
[[nodiscard]] inline std::size_t workspace_bytes(const DecodePlan<Collisions>& plan,
                                                 const BucketTables& index) {
  Arena arena;
  (void)TableScratch::carve(arena, plan, index.view());
  return arena.bytes_needed();
}

/// Errors: as check_step(), a sampler of other K or L than the index, more query heads than a grid
/// has, or than an int counts in all requests.
template <class T, class Out>
[[nodiscard]] Status validate(const DecodePlan<Collisions>& plan, const BucketTables& index,
                              const DecodeBatch<T, Out>& batch) noexcept {
  const Status status = check_step(plan, index, batch);
  if (!status.ok()) return status;
  const std::int64_t queries = std::int64_t{index.view().requests} * plan.query_heads;
  if (plan.query_heads > kMostOfGrid || queries > INT32_MAX) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "query_heads %d must not be above %d, nor %lld in all requests above 2^31",
                         plan.query_heads, kMostOfGrid, static_cast<long long>(queries));
  }
  return plan.sampler->supports(index);
}

/// One decode step of one layer by hash tables, as the one by signatures but for what is drawn:
/// each query head draws for itself the tokens that collide with it in at least t tables, the same
/// at every step of a query; `seeds` and `steps` are not used, and may be null. Sums over draws are
/// unbiased over the randomness of the planes. Four kernels in the order of `stream`; neither waits
/// nor allocates, may be captured in a graph. Errors: as validate(), a workspace that is too small,
/// those of the runtime.
template <class T, class Out>
[[nodiscard]] Status decode(const DecodePlan<Collisions>& plan, const BucketTables& index,
                            const DecodeBatch<T, Out>& batch, std::span<std::byte> workspace,
                            cudaStream_t stream) noexcept {
  Status status = validate(plan, index, batch);
  if (status.ok()) {
    status = check_memory(workspace.size(), workspace_bytes(plan, index), "the step");
  }
  if (!status.ok()) return status;
  Arena arena(workspace);
  const TableView& view = index.view();
  const TableScratch scratch = TableScratch::carve(arena, plan, view);
  const CollisionView& rule = plan.sampler->view();
  status = hash_queries(index.planes(), batch.queries, view.requests * plan.query_heads,
                        scratch.codes, stream);
  if (!status.ok()) return status;
  const Grid collide{
      .blocks = dim3(static_cast<unsigned>(view.segments), static_cast<unsigned>(plan.query_heads),
                     static_cast<unsigned>(view.requests)),
      .threads = kCollideThreads,
      .shared_bytes = static_cast<std::size_t>(rule.min_collisions) *
                      static_cast<std::size_t>(view.segment_tokens / 8)};
  status = launch("collide_kernel", collide_kernel, collide, stream, view, rule, scratch.codes,
                  batch.key_values.tokens, plan.exact_below, scratch.drawn, batch.drawn);
  if (!status.ok()) return status;
  const KeyValues<T>& from = batch.key_values;
  status = with_shape(view.dim, plan.query_heads / view.kv_heads, [&]<int kDim, int kHeads>() {
    const Grid grid = attend_grid<GroupAttention<T, kDim, kHeads>>(plan, from, sizeof(TableRound));
    return launch("attend_tables_kernel", attend_tables_kernel<T, kDim, kHeads>, grid, stream, view,
                  rule, from, batch.queries, attend_input(plan, from), scratch);
  });
  return status.ok() ? merge(plan, batch, scratch.splits, stream) : status;
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

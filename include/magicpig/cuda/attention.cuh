// SPDX-License-Identifier: Apache-2.0
// Sampled attention for one decode step on the device: hash the query, draw candidates, attend.
#pragma once

// The map, a step being four kernels in the order of the host's stream:
//
//   hash        signature_scores.cuh   partial sums of the queries, scores of codes
//               rotation.cuh
//   rule        pilot.cuh              from some blocks' scores the probabilities of all
//   candidates  attend_kernel() below  a scan that draws, and at once reads what it drew
//   attend      group_attention.cuh    one softmax over drawn and exact tokens
//   state       merge_kernel() below   outputs and lse of the parts' sums
//   index       signatures.cuh         codes of the keys, made and kept on the device
//   cache       key_values.cuh         the host's keys and values, at strides or on pages
//
// Which tokens are drawn, and with which probabilities, is settled in integers: they are those that
// magicpig::decode() draws with Poisson by signatures, for the same keys, queries and seeds.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/group_attention.cuh"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/cuda/pilot.cuh"
#include "magicpig/cuda/rotation.cuh"
#include "magicpig/cuda/signature_scores.cuh"
#include "magicpig/cuda/signatures.cuh"
#include "magicpig/request.hpp"
#include "magicpig/sample/poisson.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// What all requests of a decode step share. The sampler is the host's and is copied.
struct DecodePlan {
  int query_heads = 1;
  const Poisson* sampler = nullptr;
  float scale = 0.0F;  ///< logit = scale * q.k; 0 means 1 / sqrt(dim)
  std::uint32_t layer = 0;
  TokenId exact_below = kExactBelow;  ///< fewer indexed tokens are not drawn from
  /// Blocks of threads that share the tokens of one KV head of one request: see splits_for(). The
  /// output's last bits depend on it, the draw does not.
  int splits = 1;
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
  /// [requests, kv_heads, blocks of the index, 4], null for none. Written where tokens were drawn
  /// from: bit i % 32 of word i / 32 of a head says whether token first + i was drawn.
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

/// The workspace of a step.
struct DecodeScratch {
  QueryCodes codes;
  Pilot pilot;
  SplitSums splits;

  [[nodiscard]] static DecodeScratch carve(Arena& arena, const DecodePlan& plan,
                                           const SignatureView& index) {
    const int group = plan.query_heads / index.kv_heads;
    return {.codes = QueryCodes::carve(arena, index, group),
            .pilot = Pilot::carve(arena, index, group),
            .splits = SplitSums::carve(arena, index.heads(), plan.splits, group, index.dim)};
  }
};

/// What attend_kernel() is told beside pointers.
struct AttendInput {
  int group;
  float scale;
  std::uint32_t layer;
  TokenId exact_below;
};

/// Of a block of threads: the scores of a round, which of its tokens were drawn, and their list.
struct RoundShared {
  std::int16_t scores[kSignatureSegment];
  std::uint16_t drawn[kSignatureSegment];     // places in the round, ascending
  std::uint32_t masks[kSegmentBlocks * 4];    // bit i % 32 of word i / 32: place i is drawn
  std::uint32_t noise[kAttendWarps][4 * 17];  // of the tokens of a block
  std::int16_t multipliers[kMaxGroup];
  int sums_of_warps[kSegmentBlocks * 4 / kWarp];  // how many each warp lists
  GroupScales scales;
  DrawRule rule;
};

/// The 16 random bits of each token of a block: numbers first / 8 and following of its stream, as
/// PoissonSelection has them.
__device__ inline void make_noise(const RandomStream& stream, TokenId first, std::uint32_t* noise) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane <= kSignatureBlock / 8) {
    const auto four = stream.block(static_cast<std::uint32_t>(first / 8 + lane));
#pragma unroll
    for (int i = 0; i < 4; ++i) noise[4 * lane + i] = four[static_cast<std::size_t>(i)];
  }
  __syncwarp();
}
__device__ inline std::uint32_t noise_of(const std::uint32_t* noise, TokenId first, TokenId token) {
  const std::uint32_t pair = noise[(token / 8 - first / 8) * 4 + token % 8 / 2];
  return token % 2 != 0 ? pair >> 16 : pair & 0xffffU;
}

/// Scores block `at` and draws from it, by one warp: scores and masks of the round at its place.
template <int kWords>
__device__ void draw_block(const BlockToScore& block, RoundShared& round, int place, int there,
                           TokenId first, const RandomStream& stream) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  std::uint32_t* noise = round.noise[threadIdx.x / kWarp];
  make_noise(stream, first, noise);
  const TokenSums<kWords> sums = sum_codes<kWords>(block);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int summed = summed_token(lane, k);
    const int share = summed < there ? share_of(block, summed) : 0;
    int score = 0;
#pragma unroll
    for (int g = 0; g < 4 * kWords; ++g) {
      if (g >= block.group) break;
      const int of_head = score_of(block, g, sums.of(k, g), share) - round.rule.offsets[g];
      score = g == 0 ? of_head : combine(score, of_head);
    }
    // From the order of sum_codes() to that of tokens.
    score = static_cast<std::int16_t>(__shfl_sync(kAllLanes, score, summing_lane(lane)));
    const int own = lane + 32 * k;
    const std::uint32_t units =
        ScoreRule::units(round.rule.rule.gap(static_cast<std::int16_t>(score)));
    const bool is_drawn = own < there && noise_of(noise, first, first + own) < units;
    const std::uint32_t mask = __ballot_sync(kAllLanes, is_drawn);
    round.scores[place * kSignatureBlock + own] = static_cast<std::int16_t>(score);
    if (lane == 0) round.masks[place * 4 + k] = mask;
  }
  __syncwarp();  // before the next block's noise
}

/// Lists the tokens of a round whose bits are set, ascending; returns how many. All threads of the
/// block, between barriers.
__device__ inline int list_drawn(RoundShared& round, int blocks) {
  constexpr int kListWarps = kSegmentBlocks * 4 / kWarp;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  std::uint32_t mask = 0;
  int count = 0;
  int before = 0;
  if (thread < kListWarps * kWarp) {
    mask = thread < blocks * 4 ? round.masks[thread] : 0;
    count = __popc(mask);
    before = count;
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int more = __shfl_up_sync(kAllLanes, before, lanes);
      before += lane >= lanes ? more : 0;
    }
    if (lane == kWarp - 1) round.sums_of_warps[thread / kWarp] = before;
    before -= count;
  }
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kListWarps; ++w) {
    before += w < thread / kWarp ? round.sums_of_warps[w] : 0;
    sum += round.sums_of_warps[w];
  }
  for (; mask != 0; mask &= mask - 1) {
    round.drawn[before++] =
        static_cast<std::uint16_t>(thread * 32 + __ffs(static_cast<int>(mask)) - 1);
  }
  __syncthreads();
  return sum;
}

/// The share of one split in one KV head of one request: scores its part of the indexed tokens in
/// rounds of a segment at most, attends to what it draws, and to its part of the exact tokens. Up
/// to four heads two blocks fit on a multiprocessor, one of which scans while the other waits for
/// rows; nvcc then spills 8 bytes.
template <class T, int kDim, int kHeads>
__global__ void __launch_bounds__(kAttendThreads, kHeads <= 4 ? 2 : 1)
    attend_kernel(SignatureView index, KeyValues<T> from, const T* queries, AttendInput input,
                  const std::uint64_t* seeds, const std::uint32_t* steps, DecodeScratch scratch,
                  std::uint32_t* drawn) {
  using Attention = GroupAttention<T, kDim, kHeads>;
  constexpr int kWords = words_of(kHeads);
  extern __shared__ __align__(16) unsigned char attend_shared[];
  auto& round = *reinterpret_cast<RoundShared*>(attend_shared);
  auto* table = reinterpret_cast<std::uint32_t*>(attend_shared + sizeof(RoundShared));

  const int split = static_cast<int>(blockIdx.x);
  const int splits = static_cast<int>(gridDim.x);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int request = static_cast<int>(blockIdx.z);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t head = index.head(request, kv_head);
  const TokenId tokens = from.tokens[request];
  const int count = sampled_count(index, request, tokens, input.exact_below);
  const auto part = [=](std::int64_t n, int of) { return static_cast<int>(n * of / splits); };

  Attention attention(queries + head * input.group * kDim, input.group, input.scale);
  // Exact tokens: those before the sampled ones, and those behind them.
  const int exact = part(tokens - count, split);
  attention.add(from, request, kv_head, part(tokens - count, split + 1) - exact,
                [=](int i, float& log2_weight) {
                  log2_weight = 0.0F;
                  const TokenId token = exact + i;
                  return token < index.first ? token : token + count;
                });

  const int blocks = blocks_of(count);
  const int last = part(blocks, split + 1);
  int at = part(blocks, split);
  if (at < last) {
    const int table_words = index.rows * 16 * kWords;
    for (int i = thread; i < table_words; i += kAttendThreads) {
      table[i] = scratch.codes.tables[head * table_words + i];
    }
    if (thread == 0) {
      round.scales = scratch.codes.scales[head];
      round.rule = scratch.pilot.rules[head];
    }
    __syncthreads();
  }
  const RandomStream stream({.seed = seeds[request],
                             .layer = input.layer,
                             .head = static_cast<std::uint32_t>(kv_head),
                             .stream = steps[request],
                             .purpose = Purpose::kPoisson});
  while (at < last) {
    const int end = min(last, (at / kSegmentBlocks + 1) * kSegmentBlocks);
    const float factor_scale = index.factor_scale(request, kv_head, at);
    if (thread < input.group) {
      round.multipliers[thread] =
          static_cast<std::int16_t>(score_multiplier(round.scales, thread, factor_scale));
    }
    __syncthreads();
    for (int b = at + thread / kWarp; b < end; b += kAttendWarps) {
      const BlockToScore block{.codes = index.block_codes(request, kv_head, b),
                               .factors = index.block_factors(request, kv_head, b),
                               .table = table,
                               .scales = &round.scales,
                               .multipliers = round.multipliers,
                               .factor_scale = factor_scale,
                               .rows = index.rows,
                               .group = input.group};
      draw_block<kWords>(block, round, b - at, count - b * kSignatureBlock,
                         index.first + b * kSignatureBlock, stream);
    }
    __syncthreads();
    if (drawn != nullptr && thread < (end - at) * 4) {
      drawn[(head * index.blocks + at) * 4 + thread] = round.masks[thread];
    }
    const int listed = list_drawn(round, end - at);
    const TokenId first = index.first + at * kSignatureBlock;
    attention.add(from, request, kv_head, listed, [&](int i, float& log2_weight) {
      const int place = round.drawn[i];
      const std::uint32_t units = ScoreRule::units(round.rule.rule.gap(round.scores[place]));
      log2_weight = 16.0F - log2f(static_cast<float>(units));
      return first + place;
    });
    __syncthreads();  // the round's scores and list have been read
    at = end;
  }

  const std::int64_t to = (head * splits + split) * input.group;
  attention.write(reinterpret_cast<float*>(attend_shared), scratch.splits.heads + to,
                  scratch.splits.values + to * kDim);
}

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

/// Bytes of device memory that decode() needs, of any alignment, for this plan and index. The plan
/// must be valid.
[[nodiscard]] inline std::size_t workspace_bytes(const DecodePlan& plan, const Signatures& index) {
  Arena arena;
  (void)DecodeScratch::carve(arena, plan, index.view());
  return arena.bytes_needed();
}

/// Errors: heads that do not divide, more than kMaxGroup query heads per KV head, a dimension other
/// than 64, 96, 128 and 256, no sampler or one of other signatures, splits outside [1, 65,535], a
/// scale that is not finite; null pointers; what Signatures::check() says.
template <class T, class Out>
[[nodiscard]] Status validate(const DecodePlan& plan, const Signatures& index,
                              const DecodeBatch<T, Out>& batch) noexcept {
  const SignatureView& view = index.view();
  const Status status = index.check(batch.key_values);
  if (!status.ok()) return status;
  if (plan.query_heads < 1 || plan.query_heads % view.kv_heads != 0 ||
      plan.query_heads / view.kv_heads > kMaxGroup) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "query_heads %d must be 1 to %d times kv_heads %d", plan.query_heads,
                         kMaxGroup, view.kv_heads);
  }
  if (view.dim != 64 && view.dim != 96 && view.dim != 128 && view.dim != 256) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "head_dim %d must be 64, 96, 128 or 256 on the device", view.dim);
  }
  if (plan.sampler == nullptr) {
    return Status::error(ErrorCode::kInvalidArgument, "the plan has no sampler");
  }
  if (!(plan.scale >= -std::numeric_limits<float>::max() &&
        plan.scale <= std::numeric_limits<float>::max())) {
    return Status::error(ErrorCode::kNonFinite, "scale %g is not finite",
                         static_cast<double>(plan.scale));
  }
  constexpr int kMostSplits = 65535;
  if (plan.splits < 1 || plan.splits > kMostSplits) {
    return Status::error(ErrorCode::kInvalidArgument, "splits %d must lie in [1, %d]", plan.splits,
                         kMostSplits);
  }
  if (batch.queries == nullptr || batch.seeds == nullptr || batch.steps == nullptr ||
      batch.out == nullptr) {
    return Status::error(ErrorCode::kInvalidArgument, "queries, seeds, steps or out are null");
  }
  if (reinterpret_cast<std::uintptr_t>(batch.queries) % kRowAlignment != 0) {
    return Status::error(ErrorCode::kInvalidArgument, "queries must be aligned to %d bytes",
                         kRowAlignment);
  }
  return check_signatures(plan.sampler->shape(), index.shape());
}

/// The kernels of one step whose template arguments are chosen at run time.
template <class T, class Out>
class DecodeLaunch {
 public:
  DecodeLaunch(const DecodePlan& plan, const Signatures& index, const DecodeBatch<T, Out>& batch,
               const DecodeScratch& scratch, cudaStream_t stream)
      : plan_(plan),
        index_(index),
        view_(index.view()),
        batch_(batch),
        scratch_(scratch),
        stream_(stream),
        group_(plan.query_heads / index.view().kv_heads),
        scale_(plan.scale != 0.0F ? plan.scale
                                  : 1.0F / ::sqrtf(static_cast<float>(index.view().dim))) {}

  [[nodiscard]] Status run() const noexcept {
    Status status = score_pilot();
    if (status.ok()) status = make_rules();
    if (status.ok()) status = attend();
    return status.ok() ? merge() : status;
  }

 private:
  [[nodiscard]] unsigned requests() const { return static_cast<unsigned>(view_.requests); }
  [[nodiscard]] unsigned kv_heads() const { return static_cast<unsigned>(view_.kv_heads); }
  [[nodiscard]] std::size_t table_bytes() const {
    return QueryCodes::table_words(view_.rows, group_) * sizeof(std::uint32_t);
  }

  [[nodiscard]] Status score_pilot() const noexcept {
    const auto padded = static_cast<std::size_t>(index_.rotation().input.padded());
    const int pilots = (std::min)(view_.blocks, kPilotBlocks);
    const Grid grid{.blocks = dim3(static_cast<unsigned>((pilots - 1) / kPilotWarps + 1),
                                   kv_heads(), requests()),
                    .threads = kPilotThreads,
                    .shared_bytes = table_bytes() + kPilotWarps * padded * sizeof(std::int32_t)};
    const QueryInput input{
        .group = group_,
        .bits = index_.shape().bits,
        .worth = static_cast<double>(scale_) * plan_.sampler->config().temperature};
    const auto kernel = words_of(group_) == 1   ? pilot_kernel<1, T>
                        : words_of(group_) == 2 ? pilot_kernel<2, T>
                                                : pilot_kernel<4, T>;
    return launch("pilot_kernel", kernel, grid, stream_, view_, index_.rotation(), batch_.queries,
                  input, batch_.key_values.tokens, plan_.exact_below, scratch_.codes,
                  scratch_.pilot);
  }

  [[nodiscard]] Status make_rules() const noexcept {
    const SignatureSamplerConfig& config = plan_.sampler->config();
    const SamplerParameters sampler{.fraction = config.budget.fraction,
                                    .tokens = config.budget.tokens,
                                    .certain = config.certain,
                                    .longest = plan_.sampler->longest(),
                                    .exact_below = plan_.exact_below};
    const Grid grid{.blocks = dim3(kv_heads(), requests()), .threads = kRuleThreads};
    return launch("rule_kernel", rule_kernel, grid, stream_, view_, sampler, group_,
                  batch_.key_values.tokens, scratch_.pilot);
  }

  [[nodiscard]] Status attend() const noexcept {
    if (view_.dim == 64) return attend<64>();
    if (view_.dim == 96) return attend<96>();
    if (view_.dim == 128) return attend<128>();
    return attend<256>();
  }
  template <int kDim>
  [[nodiscard]] Status attend() const noexcept {
    if (group_ <= 1) return attend<kDim, 1>();
    if (group_ <= 2) return attend<kDim, 2>();
    if (group_ <= 4) return attend<kDim, 4>();
    if (group_ <= 8) return attend<kDim, 8>();
    return attend<kDim, 16>();
  }
  template <int kDim, int kHeads>
  [[nodiscard]] Status attend() const noexcept {
    constexpr std::size_t kReduce = GroupAttention<T, kDim, kHeads>::kSharedFloats * sizeof(float);
    const Grid grid{.blocks = dim3(static_cast<unsigned>(plan_.splits), kv_heads(), requests()),
                    .threads = kAttendThreads,
                    .shared_bytes = (std::max)(sizeof(RoundShared) + table_bytes(), kReduce)};
    const AttendInput input{
        .group = group_, .scale = scale_, .layer = plan_.layer, .exact_below = plan_.exact_below};
    return launch("attend_kernel", attend_kernel<T, kDim, kHeads>, grid, stream_, view_,
                  batch_.key_values, batch_.queries, input, batch_.seeds, batch_.steps, scratch_,
                  batch_.drawn);
  }

  [[nodiscard]] Status merge() const noexcept {
    const Grid grid{.blocks = dim3(static_cast<unsigned>(plan_.query_heads), requests()),
                    .threads = static_cast<unsigned>(view_.dim)};
    return launch("merge_kernel", merge_kernel<Out>, grid, stream_, scratch_.splits, view_.kv_heads,
                  group_, plan_.splits, batch_.out, batch_.lse);
  }

  const DecodePlan& plan_;
  const Signatures& index_;
  const SignatureView& view_;
  const DecodeBatch<T, Out>& batch_;
  const DecodeScratch& scratch_;
  cudaStream_t stream_;
  int group_;
  float scale_;
};

/// One decode step of one layer: for every request the attention of its query over its keys and
/// values, written to `out` and `lse`. Four kernels in the order of `stream`; neither waits nor
/// allocates, may be captured in a graph. Tokens that `index` does not have are exact.
///
/// `workspace` on the device, at least workspace_bytes(), used by nothing else until the stream has
/// done this; it needs no initial content. Results are bit-identical from run to run. An empty
/// cache gives zeros and lse -inf. Attention to keys or values that are not finite is not finite,
/// which the host may look for; what is wrong with the host's arguments is an error, and nothing is
/// started then. Errors: as validate(), a workspace that is too small, those of the runtime.
template <class T, class Out>
[[nodiscard]] Status decode(const DecodePlan& plan, const Signatures& index,
                            const DecodeBatch<T, Out>& batch, std::span<std::byte> workspace,
                            cudaStream_t stream) noexcept {
  const Status status = validate(plan, index, batch);
  if (!status.ok()) return status;
  const std::size_t needed = workspace_bytes(plan, index);
  if (workspace.size() < needed) {
    return Status::error(ErrorCode::kWorkspaceTooSmall,
                         "the workspace has %zu bytes, the step needs %zu", workspace.size(),
                         needed);
  }
  Arena arena(workspace);
  const DecodeScratch scratch = DecodeScratch::carve(arena, plan, index.view());
  return DecodeLaunch<T, Out>(plan, index, batch, scratch, stream).run();
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

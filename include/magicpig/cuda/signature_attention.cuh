// SPDX-License-Identifier: Apache-2.0
// A decode step by signatures on the device: score the codes, draw, and read what was drawn.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/decode.cuh"
#include "magicpig/cuda/drawn_list.cuh"
#include "magicpig/cuda/group_attention.cuh"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/cuda/pilot.cuh"
#include "magicpig/cuda/rotation.cuh"
#include "magicpig/cuda/signature_scores.cuh"
#include "magicpig/cuda/signatures.cuh"
#include "magicpig/sample/poisson.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// The workspace of a step.
struct SignatureScratch {
  QueryCodes codes;
  Pilot pilot;
  SplitSums splits;

  [[nodiscard]] static SignatureScratch carve(Arena& arena, const DecodePlan<Poisson>& plan,
                                              const SignatureView& index) {
    const int group = plan.query_heads / index.kv_heads;
    return {.codes = QueryCodes::carve(arena, index, group),
            .pilot = Pilot::carve(arena, index, group),
            .splits = SplitSums::carve(arena, index.heads(), plan.splits, group, index.dim)};
  }
};

/// Of a block of threads: the scores of a round, which of its tokens were drawn, and their list.
struct RoundShared {
  std::int16_t scores[kRoundTokens];
  DrawnList drawn;
  std::uint32_t masks[kRoundWords];           // bit i % 32 of word i / 32: place i is drawn
  std::uint32_t noise[kAttendWarps][4 * 17];  // of the tokens of a block
  std::int16_t multipliers[kMaxGroup];
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

/// Drawn tokens of a round, for GroupAttention::add(): all heads of a group weigh them alike, by
/// one over the probability of the group's draw.
struct RoundRows {
  static constexpr bool kForAllHeads = true;
  using Row = ExactRows::Row;
  const RoundShared& round;
  TokenId first;

  __device__ TokenId token(int i, Row& row) const {
    const int place = round.drawn.places[i];
    const std::uint32_t units = ScoreRule::units(round.rule.rule.gap(round.scores[place]));
    row.log2_factor = 16.0F - log2f(static_cast<float>(units));
    return first + place;
  }
  __device__ static float log2_factor(const Row& row, int, float) { return row.log2_factor; }
};

/// The share of one split in one KV head of one request: scores its part of the indexed tokens in
/// rounds of a segment at most, attends to what it draws, and to its part of the exact tokens. Up
/// to four heads two blocks fit on a multiprocessor, one of which scans while the other waits for
/// rows; nvcc 13.0 then spills 4 to 8 bytes.
template <class T, int kDim, int kHeads>
__global__ void __launch_bounds__(kAttendThreads, kHeads <= 4 ? 2 : 1)
    attend_kernel(SignatureView index, KeyValues<T> from, const T* queries, AttendInput input,
                  const std::uint64_t* seeds, const std::uint32_t* steps, SignatureScratch scratch,
                  std::uint32_t* drawn) {
  using Attention = GroupAttention<T, kDim, kHeads>;
  constexpr int kWords = words_of(kHeads);
  extern __shared__ __align__(16) unsigned char attend_shared[];
  auto& round = *reinterpret_cast<RoundShared*>(attend_shared);
  auto* table = reinterpret_cast<std::uint32_t*>(attend_shared + sizeof(RoundShared));

  const SplitPlace place(index.kv_heads);
  const int kv_head = place.kv_head;
  const int request = place.request;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t head = place.head;
  const TokenId tokens = from.tokens[request];
  const int count = sampled_count(index, request, tokens, input.exact_below);

  Attention attention(queries + head * input.group * kDim, input.group, input.scale);
  const SplitPart exact = place.part(tokens - count);
  attention.add(from, request, kv_head, exact.size(),
                ExactRows{.begin = exact.begin, .first = index.first, .sampled = count});

  const SplitPart blocks = place.part(blocks_of(count));
  const int last = blocks.end;
  int at = blocks.begin;
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
    const int listed = round.drawn.fill(thread < (end - at) * 4 ? round.masks[thread] : 0);
    attention.add(from, request, kv_head, listed,
                  RoundRows{.round = round, .first = index.first + at * kSignatureBlock});
    __syncthreads();  // the round's scores and list have been read
    at = end;
  }
  place.write(attention, input.group, attend_shared, scratch.splits);
}

/// Bytes of device memory that decode() needs, of any alignment, for this plan and index. The plan
/// must be valid.
[[nodiscard]] inline std::size_t workspace_bytes(const DecodePlan<Poisson>& plan,
                                                 const Signatures& index) {
  Arena arena;
  (void)SignatureScratch::carve(arena, plan, index.view());
  return arena.bytes_needed();
}

/// Errors: as check_step(), seeds or steps that are null, a sampler of other signatures.
template <class T, class Out>
[[nodiscard]] Status validate(const DecodePlan<Poisson>& plan, const Signatures& index,
                              const DecodeBatch<T, Out>& batch) noexcept {
  const Status status = check_step(plan, index, batch);
  if (!status.ok()) return status;
  if (batch.seeds == nullptr || batch.steps == nullptr) {
    return Status::error(ErrorCode::kInvalidArgument, "seeds or steps are null");
  }
  return check_signatures(plan.sampler->shape(), index.shape());
}

/// The kernels of one step.
template <class T, class Out>
class SignatureLaunch {
 public:
  SignatureLaunch(const DecodePlan<Poisson>& plan, const Signatures& index,
                  const DecodeBatch<T, Out>& batch, const SignatureScratch& scratch,
                  cudaStream_t stream)
      : plan_(plan),
        index_(index),
        view_(index.view()),
        batch_(batch),
        scratch_(scratch),
        stream_(stream),
        group_(plan.query_heads / index.view().kv_heads) {}

  [[nodiscard]] Status run() const noexcept {
    Status status = score_pilot();
    if (status.ok()) status = make_rules();
    if (status.ok()) status = attend();
    return status.ok() ? merge(plan_, batch_, scratch_.splits, stream_) : status;
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
    const QueryInput input{.group = group_,
                           .bits = index_.shape().bits,
                           .worth = static_cast<double>(plan_.logit_scale(view_.dim)) *
                                    plan_.sampler->config().temperature};
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
    return with_shape(view_.dim, group_, [this]<int kDim, int kHeads>() {
      const KeyValues<T>& from = batch_.key_values;
      const Grid grid = attend_grid<GroupAttention<T, kDim, kHeads>>(
          plan_, from, sizeof(RoundShared) + table_bytes());
      return launch("attend_kernel", attend_kernel<T, kDim, kHeads>, grid, stream_, view_, from,
                    batch_.queries, attend_input(plan_, from), batch_.seeds, batch_.steps, scratch_,
                    batch_.drawn);
    });
  }

  const DecodePlan<Poisson>& plan_;
  const Signatures& index_;
  const SignatureView& view_;
  const DecodeBatch<T, Out>& batch_;
  const SignatureScratch& scratch_;
  cudaStream_t stream_;
  int group_;
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
[[nodiscard]] Status decode(const DecodePlan<Poisson>& plan, const Signatures& index,
                            const DecodeBatch<T, Out>& batch, std::span<std::byte> workspace,
                            cudaStream_t stream) noexcept {
  Status status = validate(plan, index, batch);
  if (status.ok())
    status = check_memory(workspace.size(), workspace_bytes(plan, index), "the step");
  if (!status.ok()) return status;
  Arena arena(workspace);
  const SignatureScratch scratch = SignatureScratch::carve(arena, plan, index.view());
  return SignatureLaunch<T, Out>(plan, index, batch, scratch, stream).run();
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI
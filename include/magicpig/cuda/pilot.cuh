// SPDX-License-Identifier: Apache-2.0
// What decides with which probability tokens are drawn, from a pilot of their scores: two kernels.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/decode.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/cuda/rotation.cuh"
#include "magicpig/cuda/signature_scores.cuh"
#include "magicpig/cuda/signatures.cuh"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/poisson.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

inline constexpr int kPilotBlocks = Poisson::kPilotBlocks;
inline constexpr int kPilotTokens = kPilotBlocks * kSignatureBlock;

[[nodiscard]] __host__ __device__ constexpr int blocks_of(int count) {
  return (count - 1 + kSignatureBlock) / kSignatureBlock;
}

/// Block i of a pilot, the middle one of its stratum. As Poisson.
[[nodiscard]] __host__ __device__ constexpr int pilot_block(int i, int blocks, int pilots) {
  const auto first = [=](int k) { return static_cast<int>(std::int64_t{blocks} * k / pilots); };
  return (first(i) + first(i + 1)) / 2;
}

/// How a sampler draws, for kernels.
struct SamplerParameters {
  double fraction;
  TokenId tokens;
  double certain;
  std::int16_t longest;
  TokenId exact_below;

  /// As Budget::of().
  __device__ TokenId budget(TokenId n) const {
    const double wanted = tokens > 0 ? tokens : ::ceil(__dmul_rn(fraction, n));
    return wanted >= n ? n : static_cast<TokenId>(wanted);
  }
};

/// What one KV head of a request draws with.
struct DrawRule {
  ScoreRule rule;
  std::int16_t offsets[kMaxGroup];  // of the heads' scores
};

/// What the two kernels leave behind, in the workspace.
struct Pilot {
  std::int16_t* scores = nullptr;  // [requests, kv_heads, group, kPilotTokens]
  DrawRule* rules = nullptr;       // [requests, kv_heads]

  [[nodiscard]] static Pilot carve(Arena& arena, const SignatureView& index, int group) {
    return {.scores = arena.take<std::int16_t>(index.heads() * static_cast<std::size_t>(group) *
                                               kPilotTokens),
            .rules = arena.take<DrawRule>(index.heads())};
  }
};

/// Of the first kernel: a warp per block of the pilot. Each block of threads makes the partial sums
/// for itself, which costs less than another launch.
inline constexpr int kPilotThreads = 128;
inline constexpr int kPilotWarps = kPilotThreads / kWarp;

struct QueryInput {
  int group;
  int bits;
  double worth;  // scale of a logit times the temperature
};

/// Scores of the pilot's blocks, for each query head; the queries are [requests, kv_heads, group,
/// dim].
template <int kWords, class T>
__global__ void __launch_bounds__(kPilotThreads)
    pilot_kernel(SignatureView index, RotationParameters rotation, const T* queries,
                 QueryInput input, const std::int32_t* tokens, TokenId exact_below,
                 QueryCodes codes, Pilot pilot) {
  extern __shared__ __align__(16) unsigned char pilot_shared[];
  __shared__ GroupScales scales;
  __shared__ std::int16_t multipliers[kPilotWarps][kMaxGroup];
  const int kv_head = static_cast<int>(blockIdx.y);
  const int request = static_cast<int>(blockIdx.z);
  const int count = sampled_count(index, request, tokens[request], exact_below);
  const int blocks = blocks_of(count);
  const int pilots = min(blocks, kPilotBlocks);
  const int first = static_cast<int>(blockIdx.x) * kPilotWarps;
  if (first >= pilots) return;

  const std::int64_t head = index.head(request, kv_head);
  const int table_words = index.rows * 16 * kWords;
  auto* table = reinterpret_cast<std::uint32_t*>(pilot_shared);
  tabulate_group(rotation, queries + head * input.group * index.dim, input.group, input.bits,
                 input.worth, reinterpret_cast<std::int32_t*>(table + table_words), table, &scales);
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < table_words; i += kPilotThreads) {
      codes.tables[head * table_words + i] = table[i];
    }
    if (threadIdx.x == 0) codes.scales[head] = scales;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int number = first + warp;
  if (number >= pilots) return;
  const int at = pilot_block(number, blocks, pilots);
  const float factor_scale = index.factor_scale(request, kv_head, at);
  if (lane < input.group) {
    multipliers[warp][lane] =
        static_cast<std::int16_t>(score_multiplier(scales, lane, factor_scale));
  }
  __syncwarp();
  const BlockToScore block{.codes = index.block_codes(request, kv_head, at),
                           .factors = index.block_factors(request, kv_head, at),
                           .table = table,
                           .scales = &scales,
                           .multipliers = multipliers[warp],
                           .factor_scale = factor_scale,
                           .rows = index.rows,
                           .group = input.group};
  const TokenSums<kWords> sums = sum_codes<kWords>(block);
  std::int16_t* to = pilot.scores + head * input.group * kPilotTokens + number * kSignatureBlock;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int token = summed_token(lane, k);
    const bool there = at * kSignatureBlock + token < count;
    const int share = there ? share_of(block, token) : 0;
#pragma unroll
    for (int g = 0; g < 4 * kWords; ++g) {
      if (g >= input.group) break;
      const int score = score_of(block, g, sums.of(k, g), share);
      to[std::int64_t{g} * kPilotTokens + token] =
          there ? static_cast<std::int16_t>(score) : ScoreRule::kNoScore;
    }
  }
}

inline constexpr int kRuleThreads = 1024;
inline constexpr int kScoresPerThread = kPilotTokens / kRuleThreads;

/// The same in all threads of a block of kRuleThreads.
template <class Combine>
__device__ int reduce_block(int x, const Combine& combine_two) {
  __shared__ int of_warps[kRuleThreads / kWarp];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = combine_two(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  __syncthreads();  // the last result has been read
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = of_warps[threadIdx.x % kWarp];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = combine_two(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}
static_assert(kRuleThreads / kWarp == kWarp);

/// The scores of a pilot, kScoresPerThread per thread of a block; `n` of them in all.
struct ScoresOfBlock {
  std::int16_t scores[kScoresPerThread];
  int n;

  __device__ int place(int i) const { return static_cast<int>(threadIdx.x) + i * kRuleThreads; }
  __device__ void load(const std::int16_t* from) {
#pragma unroll
    for (int i = 0; i < kScoresPerThread; ++i) {
      scores[i] = place(i) < n ? from[place(i)] : ScoreRule::kNoScore;
    }
  }
  __device__ int largest() const {
    int own = scores[0];
    for (int i = 1; i < kScoresPerThread; ++i) own = max(own, static_cast<int>(scores[i]));
    return reduce_block(own, [](int a, int b) { return max(a, b); });
  }
  /// As SignatureOps::expected(); at most 2^29.
  __device__ std::uint64_t expected(const ScoreRule& rule) const {
    int own = 0;
#pragma unroll
    for (int i = 0; i < kScoresPerThread; ++i) {
      if (place(i) < n) own += static_cast<int>(ScoreRule::units(rule.gap(scores[i])));
    }
    return static_cast<std::uint64_t>(reduce_block(own, [](int a, int b) { return a + b; }));
  }
};

/// The rule of each KV head and request, from the scores of its pilot; a block for each.
static __global__ void __launch_bounds__(kRuleThreads)
    rule_kernel(SignatureView index, SamplerParameters sampler, int group,
                const std::int32_t* tokens, Pilot pilot) {
  const int kv_head = static_cast<int>(blockIdx.x);
  const int request = static_cast<int>(blockIdx.y);
  const int count = sampled_count(index, request, tokens[request], sampler.exact_below);
  if (count == 0) return;
  const std::int64_t head = index.head(request, kv_head);
  DrawRule& to = pilot.rules[head];
  const TokenId budget = sampler.budget(count);
  if (budget == count || sampler.longest < 0) {
    if (threadIdx.x != 0) return;
    to.rule = {.tau = 0, .longest = -1};
    for (int g = 0; g < group; ++g) to.offsets[g] = 0;
    return;
  }
  const int blocks = blocks_of(count);
  const int pilots = min(blocks, kPilotBlocks);
  ScoresOfBlock combined{.scores = {}, .n = pilots * kSignatureBlock};
  ScoresOfBlock own = combined;
  for (int g = 0; g < group; ++g) {
    own.load(pilot.scores + (head * group + g) * kPilotTokens);
    const int largest = own.largest();
    const std::uint64_t sum =
        own.expected({.tau = static_cast<std::int16_t>(largest), .longest = 255});
    const auto offset = static_cast<std::int16_t>(largest + log2_of(sum) - ScoreRule::kLogCertain);
    if (threadIdx.x == 0) to.offsets[g] = offset;
    for (int i = 0; i < kScoresPerThread; ++i) {
      const int score = own.scores[i] - offset;
      combined.scores[i] =
          static_cast<std::int16_t>(g == 0 ? score : combine(combined.scores[i], score));
    }
  }
  // The last block of an index may not be full; it is the last of the pilot where that has all.
  const int last = pilot_block(pilots - 1, blocks, pilots);
  const int missing = last == blocks - 1 ? blocks * kSignatureBlock - count : 0;
  const std::uint64_t target = static_cast<std::uint64_t>(budget) *
                               static_cast<std::uint64_t>(combined.n - missing) *
                               ScoreRule::kCertain / static_cast<std::uint64_t>(count);
  const int largest = combined.largest();
  ScoreRule rule;
  if (sampler.certain > 0.0) {
    const auto first =
        static_cast<std::uint64_t>(__dmul_rn(sampler.certain, static_cast<double>(target)));
    rule.certain_from = score_threshold(largest, combined.n, first, [&](std::int16_t least) {
      return combined.expected({.tau = INT16_MAX, .certain_from = least}) / ScoreRule::kCertain *
             ScoreRule::kCertain;
    });
  }
  rule.tau = score_threshold(largest, combined.n, target, [&](std::int16_t tau) {
    return combined.expected({.tau = tau, .certain_from = rule.certain_from});
  });
  rule.longest = sampler.longest;
  if (threadIdx.x == 0) to.rule = rule;
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Scores of tokens from their signatures on the device, the very integers of the host's.
#pragma once

#include <cstdint>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/cuda/rotation.cuh"
#include "magicpig/cuda/signatures.cuh"
#include "magicpig/hash/levels.hpp"
#include "magicpig/sample/signature_scores.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// 32-bit words of the partial sums of a group, a byte per head.
[[nodiscard]] __host__ __device__ constexpr int words_of(int group) {
  return group <= 4 ? 1 : group <= 8 ? 2 : 4;
}

/// Where a table in shared memory has the partial sums of row r: neighbouring rows change places
/// in every other eight, so that two half warps, which read rows 8 apart, meet in no bank.
[[nodiscard]] __host__ __device__ constexpr int table_row(int r) { return r ^ ((r >> 3) & 1); }

/// What becomes of a sum of partial sums, per query head of a group.
struct GroupScales {
  double steps[kMaxGroup];  // what one of them is worth, see SignatureQueries
  std::int16_t middles[kMaxGroup];
  std::int16_t units[kMaxGroup];
};

/// The queries of a step, made ready to score codes.
struct QueryCodes {
  std::uint32_t* tables = nullptr;  // [requests, kv_heads, rows, 16, words], rows by table_row()
  GroupScales* scales = nullptr;    // [requests, kv_heads]

  [[nodiscard]] static QueryCodes carve(Arena& arena, const SignatureView& index, int group) {
    return {.tables = arena.take<std::uint32_t>(index.heads() * table_words(index.rows, group)),
            .scales = arena.take<GroupScales>(index.heads())};
  }
  [[nodiscard]] static std::size_t table_words(int rows, int group) {
    return static_cast<std::size_t>(rows) * 16 * static_cast<std::size_t>(words_of(group));
  }
};

/// The partial sums of one query head by one warp, from its rotation: bytes into `table`, those of
/// head g. As SignatureQueries::tabulate(). `worth` is scale * temperature. All sums of
/// ScalarQuantiser's four bits lie between minus and plus the sum of their magnitudes.
__device__ inline void tabulate(const std::int32_t* rotated, int padded, double unit, int bits,
                                double worth, int g, int words, std::uint8_t* table,
                                GroupScales* scales) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Levels levels(bits);
  const int quads = padded / 4;
  const int rows = bits * quads;
  const auto quarter = [&](int p, int j) {
    return static_cast<std::int32_t>((std::int64_t{rotated[j]} * levels.amplitude(p)) >>
                                     (Levels::kFraction + 2));
  };
  // Half the width of a row: the sum of its four magnitudes.
  const auto half_width = [&](int r) {
    std::int64_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += abs(quarter(r / quads, r % quads * 4 + i));
    return sum;
  };
  std::int64_t largest = 0;  // width of any eight rows
  std::int64_t lowest = 0;   // of all rows together, negative
  for (int eight = lane; eight * 8 < rows; eight += kWarp) {
    std::int64_t sum = 0;
    for (int r = eight * 8; r < min(eight * 8 + 8, rows); ++r) sum += half_width(r);
    largest = max(largest, 2 * sum);
    lowest -= sum;
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  }
  lowest = warp_sum(lowest);
  const std::int64_t by_eight = largest / 246 + 1;
  const std::int64_t by_all = -2 * lowest / (32000 - rows / 2) + 1;
  const std::int64_t step = max(by_eight, by_all);
  const float share = __fdiv_rn(2.0F, static_cast<float>(step));
  const auto steps = [&](std::int32_t x) {
    return (static_cast<int>(__fmul_rn(static_cast<float>(x), share)) + 1) / 2;
  };
  unsigned highest = 0;
  for (int r = lane; r < rows; r += kWarp) {
    std::int32_t four[4];
    for (int i = 0; i < 4; ++i) four[i] = quarter(r / quads, r % quads * 4 + i);
    const std::int32_t low = -(abs(four[0]) + abs(four[1]) + abs(four[2]) + abs(four[3]));
    for (int n = 0; n < 16; ++n) {
      std::int32_t sum = 0;
      for (int i = 0; i < 4; ++i) sum += ((n >> i) & 1) != 0 ? four[i] : -four[i];
      const int at = (table_row(r) * 16 + n) * words + g / 4;
      table[4 * at + g % 4] = static_cast<std::uint8_t>(steps(sum - low));
    }
    highest += static_cast<unsigned>(steps(-2 * low));
  }
  const auto top = static_cast<int>(__reduce_add_sync(kAllLanes, highest));
  const auto middle = static_cast<int>((step / 2 - lowest) / step);
  const int most = max(top - middle, middle);
  if (lane != 0) return;
  constexpr double kLog2E = 1.4426950408889634;
  const double one = __dmul_rn(__dmul_rn(__dmul_rn(4.0, unit), static_cast<double>(step)),
                               kLog2E * ScoreRule::kSteps);
  scales->middles[g] = static_cast<std::int16_t>(middle);
  scales->units[g] = static_cast<std::int16_t>(32767 / max(most, 1));
  scales->steps[g] = __dmul_rn(worth, one);
}

/// Partial sums of all heads of a group by a block of threads: `table` and `scales` in shared
/// memory, `rotated` [warps, padded] scratch there. The queries are [group, dim].
template <class T>
__device__ void tabulate_group(const RotationParameters& rotation, const T* queries, int group,
                               int bits, double worth, std::int32_t* rotated, std::uint32_t* table,
                               GroupScales* scales) {
  const int padded = rotation.input.padded();
  const int dim = rotation.input.dim();
  const int words = words_of(group);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int i = static_cast<int>(threadIdx.x); i < bits * (padded / 4) * 16 * words;
       i += static_cast<int>(blockDim.x)) {
    table[i] = 0;  // of heads that are not there
  }
  __syncthreads();
  std::int32_t* own = rotated + warp * padded;
  for (int g = warp; g < group; g += static_cast<int>(blockDim.x) / kWarp) {
    const T* query = queries + std::int64_t{g} * dim;
    const WarpRotated result = rotate(
        rotation, [&](int j) { return widen(query[j]); }, own);
    tabulate(own, padded, result.unit, bits, worth, g, words,
             reinterpret_cast<std::uint8_t*>(table), scales);
    __syncwarp();  // before the next rotation
  }
  __syncthreads();
}

/// What sums are multiplied by at last, for a segment's factor_scale.
__device__ inline int score_multiplier(const GroupScales& scales, int g, float factor_scale) {
  const double scale = __dmul_rn(static_cast<double>(factor_scale), scales.units[g]);
  const double wanted = scale > 0.0 ? __ddiv_rn(__dmul_rn(scales.steps[g], 0x1p30), scale) : 0.0;
  constexpr double kLimit = SignatureQueries::kLimit;
  const double most = wanted < kLimit ? wanted : kLimit;
  return static_cast<std::int16_t>(most > -kLimit ? most : -kLimit);
}

/// A block of codes and what is multiplied with them.
struct BlockToScore {
  const std::uint32_t* codes;       // [rows, 16]
  const bf16* factors;              // [kSignatureBlock]
  const std::uint32_t* table;       // shared
  const GroupScales* scales;        // shared
  const std::int16_t* multipliers;  // [group], shared
  float factor_scale;
  int rows;
  int group;
};

/// Four tokens' sums, the bytes of the table widened to 16 bits: heads 4 w and 4 w + 2 of word w in
/// one register, 4 w + 1 and 4 w + 3 in the other.
template <int kWords>
struct TokenSums {
  std::uint32_t pairs[4][kWords][2];

  __device__ __forceinline__ int of(int k, int g) const {
    return static_cast<int>((pairs[k][g / 4][g % 2] >> (g % 4 / 2 * 16)) & 0xffffU);
  }
};

/// Which tokens of a block a lane has after sum_codes().
[[nodiscard]] __device__ constexpr int summed_token(int lane, int k) {
  return 2 * (lane % 16) + lane / 16 + 32 * k;
}
/// The lane that has tokens `token` + 32 k, `token` in [0, 32).
[[nodiscard]] __device__ constexpr int summing_lane(int token) {
  return token / 2 + 16 * (token % 2);
}

/// Adds up partial sums of the tokens of a block, a warp to a block. Each half of the warp takes
/// every other eight rows, whose bytes cannot overflow, and each lane of it eight tokens; then the
/// halves exchange what each has for the other's tokens. Lane l ends with tokens summed_token(l,
/// k), k in [0, 4).
template <int kWords>
__device__ __forceinline__ TokenSums<kWords> sum_codes(const BlockToScore& block) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int half = lane / 16;
  const std::uint32_t* codes = block.codes + lane % 16;
  std::uint32_t wide[8][kWords][2] = {};
  for (int first = 8 * half; first < block.rows; first += 16) {
    std::uint32_t narrow[8][kWords] = {};
    const std::uint32_t* rows = block.table + first * 16 * kWords;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (first + i >= block.rows) break;
      const std::uint32_t word = __ldg(codes + (first + i) * 16);
      const std::uint32_t* row = rows + (i ^ half) * 16 * kWords;  // table_row(first + i)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const std::uint32_t bits = (word >> (4 * n)) & 15U;
#pragma unroll
        for (int w = 0; w < kWords; ++w) narrow[n][w] += row[bits * kWords + w];
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        wide[n][w][0] += narrow[n][w] & 0x00ff00ffU;
        wide[n][w][1] += (narrow[n][w] >> 8) & 0x00ff00ffU;
      }
    }
  }
  TokenSums<kWords> sums;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int k = m / 2 + 2 * (m % 2);  // bytes of even number hold tokens below 32, 64 on top
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const std::uint32_t given = half != 0 ? wide[m][w][p] : wide[4 + m][w][p];
        const std::uint32_t kept = half != 0 ? wide[4 + m][w][p] : wide[m][w][p];
        sums.pairs[k][w][p] = kept + __shfl_xor_sync(kAllLanes, given, 16);
      }
    }
  }
  return sums;
}

/// A sum's score. As SignatureOps::score_codes().
__device__ __forceinline__ int score_of(const BlockToScore& block, int g, int sum, int share) {
  const auto product = [](int a, int b) { return (a * b + (1 << 14)) >> 15; };
  const int scaled = (sum - block.scales->middles[g]) * block.scales->units[g];
  return product(product(scaled, share), block.multipliers[g]);
}

/// A token's factor as the number that score_of() takes.
__device__ __forceinline__ int share_of(const BlockToScore& block, int token) {
  const float factor = __fmul_rn(widen(block.factors[token]), block.factor_scale);
  return static_cast<int>(factor < 32767.0F ? factor : 32767.0F);
}

/// One step of SignatureOps::combine_scores().
__device__ __forceinline__ int combine(int sum, int score) {
  const int difference = abs(sum - score);
  const int more = difference < 59 ? (59 - difference) >> 2 : 0;
  return max(sum, score) + more;
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

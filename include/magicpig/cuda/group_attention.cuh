// SPDX-License-Identifier: Apache-2.0
// Attention of one group of query heads over some rows by a block of threads: one softmax, gathered
// rows.
#pragma once

#include <cstdint>

#include "magicpig/core/types.hpp"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// Weights are powers of 2 here: logits are multiplied by this.
inline constexpr float kLog2E = 1.4426950408889634F;

inline constexpr int kAttendThreads = 256;
inline constexpr int kAttendWarps = kAttendThreads / kWarp;

/// Sums of one query head over some tokens: weights are 2^(logit - largest). largest is -inf for no
/// token.
struct HeadSums {
  float largest;
  float weight;
};

/// What both parts are multiplied by when they become one.
struct JoinFactors {
  float largest;
  float a;
  float b;
};
__device__ __forceinline__ JoinFactors join(float a, float b) {
  const float largest = fmaxf(a, b);
  if (a == b) return {largest, 1.0F, 1.0F};  // -inf both, among others
  return {largest, exp2f(a - largest), exp2f(b - largest)};
}

/// Up to kHeads query heads over rows of kDim scalars. Rows are read by kLanes lanes each, some at
/// a time so that memory has several to fetch; each set of lanes keeps sums of its own, which are
/// added up at the end, in an order that depends on nothing else.
/// Source: online softmax, Milakov and Gimelshein 2018; split over tokens, Dao et al. 2023
/// (Flash-Decoding).
template <class T, int kDim, int kHeads>
class GroupAttention {
 public:
  static constexpr int kSize = kDim;  ///< of rows and of outputs
  /// Scalars per lane: as many as keep queries and sums in registers.
  static constexpr int kPart = kHeads > 8 && kDim <= 128 ? 4 : 8;
  static constexpr int kParts = kDim / kPart;
  static constexpr int kLanes = kParts <= 8 ? 8 : kParts <= 16 ? 16 : 32;
  static_assert(kDim % kPart == 0 && kParts <= 32);
  static constexpr int kRowsAtOnce = kAttendThreads / kLanes;
  static constexpr int kUnroll = 2;
  /// Floats of shared memory that write() needs.
  static constexpr int kSharedFloats = kAttendWarps * kHeads * (kDim + 2);

  /// The queries are [group, kDim]; logits are multiplied by `scale` log2(e).
  __device__ GroupAttention(const T* queries, int group, float scale) : group_(group) {
    lane_ = static_cast<int>(threadIdx.x) % kLanes;
    set_ = static_cast<int>(threadIdx.x) / kLanes;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      RowPart<T, kPart> row;
      if (g < group && lane_ < kParts) {
        row.load(queries + g * kDim + lane_ * kPart);
      } else {
        row.clear();
      }
      largest_[g] = -INFINITY;
      weight_[g] = 0.0F;
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        query_[g][j] = row[j] * (scale * kLog2E);
        sums_[g][j] = 0.0F;
      }
    }
  }

  /// `count` rows, the same for all threads of the block: row i is that of items.token(i, row),
  /// which notes in `row` what items.log2_factor(row, g, dot) needs to know: log2 of the factor of
  /// the row's weight for head g, whose scaled logit times log2(e) is `dot`; -inf for a row that
  /// the head does not have, and for a row of which nothing was noted.
  /// Items::kForAllHeads says that every head has every row of which something is noted.
  template <class Items>
  __device__ void add(const KeyValues<T>& from, int request, int kv_head, int count,
                      const Items& items) {
    for (int first = 0; first < count; first += kRowsAtOnce * kUnroll) {
      RowPart<T, kPart> keys[kUnroll];
      RowPart<T, kPart> values[kUnroll];
      typename Items::Row rows[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = first + u * kRowsAtOnce + set_;
        keys[u].clear();
        values[u].clear();
        if (i >= count) continue;
        const TokenId token = items.token(i, rows[u]);
        if (lane_ >= kParts) continue;
        const auto row = from.row(request, kv_head, token);
        keys[u].load(row.key + lane_ * kPart);
        values[u].load(row.value + lane_ * kPart);
      }
      add_rows(keys, values, rows, items);
    }
  }

  /// Adds up what all threads have and writes the sums of each head of the group: `heads` [group],
  /// `values` [group, kDim], values weighted as the weights are. `shared` is free for all threads.
  __device__ void write(float* shared, HeadSums* heads, float* values) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
#pragma unroll
      for (int lanes = kLanes; lanes < kWarp; lanes *= 2) {
        const JoinFactors by = join(largest_[g], __shfl_xor_sync(kAllLanes, largest_[g], lanes));
        weight_[g] = weight_[g] * by.a + __shfl_xor_sync(kAllLanes, weight_[g], lanes) * by.b;
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          sums_[g][j] = sums_[g][j] * by.a + __shfl_xor_sync(kAllLanes, sums_[g][j], lanes) * by.b;
        }
        largest_[g] = by.largest;
      }
      if (lane < kParts) {
        float* own = shared + (warp * kHeads + g) * (kDim + 2);
#pragma unroll
        for (int j = 0; j < kPart; ++j) own[2 + lane * kPart + j] = sums_[g][j];
        own[0] = largest_[g];  // from several lanes, the same
        own[1] = weight_[g];
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < group_ * kDim; i += kAttendThreads) {
      const int g = i / kDim;
      float largest = -INFINITY;
      float weight = 0.0F;
      float value = 0.0F;
      for (int w = 0; w < kAttendWarps; ++w) {
        const float* of = shared + (w * kHeads + g) * (kDim + 2);
        const JoinFactors by = join(largest, of[0]);
        weight = weight * by.a + of[1] * by.b;
        value = value * by.a + of[2 + i % kDim] * by.b;
        largest = by.largest;
      }
      values[i] = value;
      if (i % kDim == 0) heads[g] = {.largest = largest, .weight = weight};
    }
  }

 private:
  template <class Items>
  __device__ __forceinline__ void add_rows(const RowPart<T, kPart> (&keys)[kUnroll],
                                           const RowPart<T, kPart> (&values)[kUnroll],
                                           const typename Items::Row (&rows)[kUnroll],
                                           const Items& items) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      if (g >= group_) break;
      float logits[kUnroll];
      float factors[kUnroll];
      float largest = largest_[g];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float dot = 0.0F;
#pragma unroll
        for (int j = 0; j < kPart; ++j) dot += query_[g][j] * keys[u][j];
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
          dot += __shfl_xor_sync(kAllLanes, dot, lanes);
        }
        factors[u] = items.log2_factor(rows[u], g, dot);
        logits[u] = dot + factors[u];
        largest = fmaxf(largest, logits[u]);
      }
      const float before = largest_[g] == largest ? 1.0F : exp2f(largest_[g] - largest);
      largest_[g] = largest;
      weight_[g] *= before;
#pragma unroll
      for (int j = 0; j < kPart; ++j) sums_[g][j] *= before;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        // A row that a head does not have has no weight, nor may its value be seen; one of a NaN
        // keeps its weight. Where all heads have all rows, one more branch would spill registers.
        if constexpr (!Items::kForAllHeads) {
          if (factors[u] == -INFINITY) continue;
        }
        const float weight = factors[u] == -INFINITY ? 0.0F : exp2f(logits[u] - largest);
        weight_[g] += weight;
#pragma unroll
        for (int j = 0; j < kPart; ++j) sums_[g][j] += weight * values[u][j];
      }
    }
  }

  int group_;
  int lane_;
  int set_;
  float query_[kHeads][kPart];
  float largest_[kHeads];
  float weight_[kHeads];
  float sums_[kHeads][kPart];
};

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

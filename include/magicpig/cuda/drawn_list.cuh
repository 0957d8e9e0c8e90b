// SPDX-License-Identifier: Apache-2.0
// The tokens of a round whose bits are set, as a list that a block of threads shares.
#pragma once

#include <cstdint>

#include "magicpig/cuda/launch.cuh"
#include "magicpig/index/signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// Tokens that a block of threads draws from at once.
inline constexpr int kRoundTokens = kSignatureSegment;
inline constexpr int kRoundWords = kRoundTokens / 32;

/// In shared memory.
struct DrawnList {
  static constexpr int kWarps = kRoundWords / kWarp;  // that take part

  std::uint16_t places[kRoundTokens];  // ascending
  int sums[kWarps];                    // how many each warp lists

  /// Lists places 32 t + b for the bits b of thread t's word, 0 for t >= kRoundWords, and returns
  /// how many. All threads of the block, kRoundWords at least; the list may be read afterwards, and
  /// must have been read by all before the next call.
  __device__ int fill(std::uint32_t word) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp;
    const int count = __popc(word);
    int before = count;
    if (thread < kRoundWords) {
      for (int lanes = 1; lanes < kWarp; lanes *= 2) {
        const int more = __shfl_up_sync(kAllLanes, before, lanes);
        before += lane >= lanes ? more : 0;
      }
      if (lane == kWarp - 1) sums[thread / kWarp] = before;
    }
    before -= count;
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      before += w < thread / kWarp ? sums[w] : 0;
      sum += sums[w];
    }
    for (; word != 0; word &= word - 1) {
      places[before++] =
          static_cast<std::uint16_t>(thread * 32 + __ffs(static_cast<int>(word)) - 1);
    }
    __syncthreads();
    return sum;
  }
};

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

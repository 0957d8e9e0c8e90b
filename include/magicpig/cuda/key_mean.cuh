// SPDX-License-Identifier: Apache-2.0
// The mean of keys, which indexes subtract, as the host takes it.
#pragma once

#include <cstdint>

#include "magicpig/core/types.hpp"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/index/centres.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// Coordinate j of the mean of the keys of `tokens`, at least one, summed in the very order of
/// mean_of_rows().
template <class T>
__device__ float mean_of_keys(const KeyValues<T>& from, int request, int kv_head, TokenRange tokens,
                              int j) {
  const std::int64_t count = tokens.end - tokens.begin;
  const std::int64_t stride = 8 * ((count - 1) / kMeanRows + 1);
  const auto at = [&](std::int64_t i) {
    const auto row = from.row(request, kv_head, tokens.begin + static_cast<TokenId>(i));
    return static_cast<double>(widen(row.key[j]));
  };
  double sum = 0.0;
  std::int64_t i = 0;
  int rows = 0;
  for (; i + 8 <= count; i += stride, rows += 8) {
    double eight[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) eight[k] = at(i + k);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum = __dadd_rn(sum, eight[k]);
  }
  for (; i < count; ++i, ++rows) sum = __dadd_rn(sum, at(i));
  return static_cast<float>(__ddiv_rn(sum, rows));
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// HadamardRotation in a kernel: one vector by one warp, the same bits as on the host.
#pragma once

#include <cstdint>

#include "magicpig/core/error.hpp"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/hash/fixed_point.hpp"
#include "magicpig/hash/hadamard.hpp"
#include "magicpig/hash/rotation.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// The transforms of a HadamardRotation; passed to kernels by value, 460 bytes.
struct RotationParameters {
  static constexpr int kMaxDim = 256;
  static constexpr int kMostTransforms = 9;

  struct Window {
    int first = 0;
    int count = 0;
    int stride = 0;
    int shift = 0;
    std::uint32_t signs[kMaxDim / 32] = {};  // bit j % 32 of word j / 32: of coordinate j of all
  };

  RotationInput input{1};
  int transforms = 0;
  bool odd = false;
  double growth = 1.0;
  Window windows[kMostTransforms];

  /// Error: more than kMaxDim dimensions.
  [[nodiscard]] static Result<RotationParameters> create(
      const HadamardRotation& rotation) noexcept {
    if (rotation.padded() > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "head_dim %d must be at most %d on the device", rotation.dim(), kMaxDim);
    }
    RotationParameters parameters;
    parameters.input = rotation.input();
    parameters.transforms = rotation.transforms();
    parameters.odd = rotation.is_odd();
    parameters.growth = rotation.growth();
    for (int t = 0; t < parameters.transforms; ++t) {
      const HadamardRotation::Window from = rotation.window(t);
      Window& to = parameters.windows[t];
      to.first = from.first;
      to.count = from.transform.count;
      to.stride = from.transform.stride;
      to.shift = from.transform.shift;
      const std::int32_t* signs = from.transform.signs - from.first;
      for (int j = 0; j < rotation.padded(); ++j) {
        if (signs[j] != 0) to.signs[j / 32] |= 1U << (j % 32);
      }
    }
    return parameters;
  }
};

/// What a warp makes of a vector; the same in all lanes.
struct WarpRotated {
  bool finite = true;       ///< of the input; else all is 0
  double unit = 0.0;        ///< see Rotated
  std::int64_t square = 0;  ///< likewise
};

/// The transform of one window, in place.
__device__ inline void transform_window(const RotationParameters::Window& window, std::int32_t* x,
                                        int lane) {
  std::int32_t* own = x + window.first;
  for (int half = window.stride; half < window.count; half *= 2) {
    for (int k = lane; k < window.count / 2; k += kWarp) {
      const int i = k / half * 2 * half + k % half;
      const std::int32_t a = own[i];
      const std::int32_t b = own[i + half];
      own[i] = a + b;
      own[i + half] = a - b;
    }
    __syncwarp();
  }
  const std::int32_t rounding = (std::int32_t{1} << window.shift) / 2;
  for (int j = lane; j < window.count; j += kWarp) own[j] = (own[j] + rounding) >> window.shift;
  __syncwarp();
}

/// Rotates the vector whose coordinate j is at(j), asked for twice, to `x` [padded], the warp's own
/// in shared memory. All lanes of a warp call it. As HadamardRotation::rotate().
template <class At>
__device__ WarpRotated rotate(const RotationParameters& rotation, const At& at, std::int32_t* x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int padded = rotation.input.padded();
  unsigned largest = 0;
  for (int j = lane; j < rotation.input.dim(); j += kWarp) {
    largest = max(largest, __float_as_uint(at(j)) & 0x7fffffffU);
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  const bool finite = largest < kInfinityBits;
  const RotationInput::Scale scale =
      finite ? rotation.input.scale_of(largest) : RotationInput::Scale();
  for (int j = lane; j < padded; j += kWarp) {
    x[j] = finite && j < rotation.input.dim()
               ? static_cast<std::int32_t>(__fmul_rn(at(j), scale.power))
               : 0;
  }
  for (int t = 0; t < rotation.transforms; ++t) {
    const RotationParameters::Window& window = rotation.windows[t];
    for (int j = lane; j < padded; j += kWarp) {
      std::int32_t own = x[j];
      if (((window.signs[j / 32] >> (j % 32)) & 1U) != 0) own = -own;
      if (rotation.odd && (j < window.first || j >= window.first + window.count)) {
        own = static_cast<std::int32_t>(
            (std::int64_t{own} * HadamardRotation::kSqrtHalf + (1 << 29)) >> 30);
      }
      x[j] = own;
    }
    __syncwarp();
    transform_window(window, x, lane);
  }
  std::int64_t square = 0;
  for (int j = lane; j < padded; j += kWarp) square += std::int64_t{x[j]} * x[j];
  return {
      .finite = finite, .unit = __dmul_rn(scale.unit, rotation.growth), .square = warp_sum(square)};
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

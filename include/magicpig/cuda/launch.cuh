// SPDX-License-Identifier: Apache-2.0
// Launches on the host's stream, and errors of the CUDA runtime as Status.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "magicpig/core/error.hpp"
#include "magicpig/version.hpp"

#if defined(__NVCC__) && !defined(__CUDACC_RELAXED_CONSTEXPR__)
#error \
    "magicpig's kernels call constexpr functions of its core: nvcc needs --expt-relaxed-constexpr"
#endif

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffU;

/// `call` is named in the message.
[[nodiscard]] inline Status status_of(cudaError_t error, const char* call) noexcept {
  if (error == cudaSuccess) return Status();
  return Status::device(static_cast<int>(error), call, cudaGetErrorString(error));
}

struct Grid {
  dim3 blocks;
  unsigned threads = 1;
  std::size_t shared_bytes = 0;
};

/// Starts a kernel; may be captured in a graph. Does nothing where a dimension of the grid is 0.
/// Errors: what the runtime says of this launch.
template <class... Parameters, class... Arguments>
[[nodiscard]] Status launch(const char* name, void (*kernel)(Parameters...), const Grid& grid,
                            cudaStream_t stream, const Arguments&... arguments) noexcept {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return Status();
  constexpr std::size_t kUnasked = 48 * 1024;  // of shared memory
  if (grid.shared_bytes > kUnasked) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes));
    if (error != cudaSuccess) return status_of(error, name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  return status_of(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

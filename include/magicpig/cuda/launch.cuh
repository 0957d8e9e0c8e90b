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
/// Blocks in the second and the third dimension of a grid, at most.
inline constexpr int kMostOfGrid = 65535;

/// The sum over a warp, in all lanes. All of them call it.
template <class T>
__device__ T warp_sum(T x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

/// `call` is named in the message. The runtime forgets the error, where it can, so that whoever
/// asks next for the last one does not take it for its own.
[[nodiscard]] inline Status status_of(cudaError_t error, const char* call) noexcept {
  if (error == cudaSuccess) return Status();
  (void)cudaGetLastError();
  return Status::device(static_cast<int>(error), call, cudaGetErrorString(error));
}

/// Error: fewer bytes than `needed`; `whose` they are is named in the message.
[[nodiscard]] inline Status check_memory(std::size_t size, std::size_t needed,
                                         const char* whose) noexcept {
  if (size >= needed) return Status();
  return Status::error(ErrorCode::kWorkspaceTooSmall,
                       "the memory of %s has %zu bytes, it needs %zu", whose, size, needed);
}

struct Grid {
  dim3 blocks;
  unsigned threads = 1;
  std::size_t shared_bytes = 0;
};

/// Lets a kernel have so much dynamic shared memory: as much as the device has, if it may not yet,
/// so that nothing that is started meanwhile finds less than it asked for.
template <class... Parameters>
[[nodiscard]] Status allow_shared(const char* name, void (*kernel)(Parameters...),
                                  std::size_t bytes) noexcept {
  cudaFuncAttributes now = {};
  Status status = status_of(cudaFuncGetAttributes(&now, kernel), name);
  if (!status.ok() || static_cast<std::size_t>(now.maxDynamicSharedSizeBytes) >= bytes) {
    return status;
  }
  int device = 0;
  int most = 0;
  status = status_of(cudaGetDevice(&device), name);
  if (!status.ok()) return status;
  status = status_of(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                     name);
  if (!status.ok()) return status;
  most -= static_cast<int>(now.sharedSizeBytes);
  return status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
                   name);
}

/// Starts a kernel; may be captured in a graph. Does nothing where a dimension of the grid is 0.
/// Errors: what the runtime says of this launch.
template <class... Parameters, class... Arguments>
[[nodiscard]] Status launch(const char* name, void (*kernel)(Parameters...), const Grid& grid,
                            cudaStream_t stream, const Arguments&... arguments) noexcept {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return Status();
  constexpr std::size_t kUnasked = 48 * 1024;  // of shared memory
  if (grid.shared_bytes > kUnasked) {
    const Status status = allow_shared(name, kernel, grid.shared_bytes);
    if (!status.ok()) return status;
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

// SPDX-License-Identifier: Apache-2.0
// Codes and norms of keys on the device: a product of two matrices by cuBLAS, and its signs.
#pragma once

#include <cublas_v2.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/decode.cuh"
#include "magicpig/cuda/key_mean.cuh"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/cuda/sign_planes.cuh"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// `call` is named in the message; device_error() is cudaErrorUnknown, as cuBLAS does not say.
[[nodiscard]] inline Status status_of(cublasStatus_t error, const char* call) noexcept {
  if (error == CUBLAS_STATUS_SUCCESS) return Status();
  return Status::device(cudaErrorUnknown, call, cublasGetStatusString(error));
}

/// Means of the keys of `tokens` of each KV head, to `centres` [kv_heads, dim]. A block per KV
/// head, a thread per dimension.
template <class T>
__global__ void centre_kernel(KeyValues<T> from, int request, TokenRange tokens, float* centres) {
  const int kv_head = static_cast<int>(blockIdx.x);
  const int j = static_cast<int>(threadIdx.x);
  centres[kv_head * from.dim + j] = mean_of_keys(from, request, kv_head, tokens, j);
}

/// Tokens whose keys are multiplied with the planes at once.
inline constexpr int kHashedTokens = 2048;

inline constexpr int kSplitThreads = 256;
inline constexpr float kMostFloat = 0x1.fffffep127F;

/// The parts of k - c, [tokens, kFloatParts, dim]: high, low, high; and |k - c|. Sets `spoiled`,
/// where it is not null, if one of these is not finite. A warp per token.
template <class T>
__global__ void __launch_bounds__(kSplitThreads)
    split_kernel(KeyValues<T> from, int request, int kv_head, TokenRange tokens,
                 const float* centre, bf16* parts, float* norms, std::int32_t* spoiled) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int i = static_cast<int>(blockIdx.x) * (kSplitThreads / kWarp) +
                static_cast<int>(threadIdx.x) / kWarp;
  if (i >= tokens.end - tokens.begin) return;
  const T* key = from.row(request, kv_head, tokens.begin + i).key;
  bf16* own = parts + std::int64_t{i} * kFloatParts * from.dim;
  double square = 0.0;
  for (int j = lane; j < from.dim; j += kWarp) {
    const float x = __fsub_rn(widen(key[j]), centre[j]);
    const bf16 high = narrow<bf16>(x);
    own[j] = own[2 * from.dim + j] = high;
    own[from.dim + j] = narrow<bf16>(x - widen(high));
    square += static_cast<double>(x) * static_cast<double>(x);
  }
  square = warp_sum(square);
  if (lane != 0) return;
  const auto norm = static_cast<float>(__dsqrt_rn(square));
  norms[i] = norm;
  if (spoiled != nullptr && !(norm <= kMostFloat)) *spoiled = 1;
}

inline constexpr int kPackThreads = 256;

/// Codes of tokens from their projections [tokens, planes], to `codes` [tables, stride]. A block of
/// threads for a square of 32 tables and 32 tokens, which shared memory turns.
static __global__ void __launch_bounds__(kPackThreads)
    pack_kernel(PlanesView planes, const float* projections, int tokens, Code* codes, int stride) {
  __shared__ Code square[kWarp][kWarp + 1];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first_table = static_cast<int>(blockIdx.x) * kWarp;
  const int first_token = static_cast<int>(blockIdx.y) * kWarp;
  const int table = first_table + lane;
  for (int t = warp; t < kWarp; t += kPackThreads / kWarp) {
    const int token = first_token + t;
    unsigned code = 0;
    if (token < tokens && table < planes.tables) {
      const float* own = projections + std::int64_t{token} * planes.planes() + table;
      for (int b = 0; b < planes.bits; ++b) {
        code |= (own[b * planes.tables] > 0.0F ? 1U : 0U) << b;
      }
    }
    square[t][lane] = static_cast<Code>(code);
  }
  __syncthreads();
  for (int l = warp; l < kWarp; l += kPackThreads / kWarp) {
    if (first_table + l >= planes.tables || first_token + lane >= tokens) continue;
    codes[std::int64_t{first_table + l} * stride + first_token + lane] = square[lane][l];
  }
}

/// Where hashes of some tokens of one KV head go.
struct HashPlaces {
  Code* codes = nullptr;            ///< [tables, stride], the first of each row
  int stride = 0;                   ///< codes from a table to the next
  float* norms = nullptr;           ///< |k - c|
  std::int32_t* spoiled = nullptr;  ///< set to 1 if one of them is not finite; null for nobody
};

/// Hashes keys to tables' codes, as magicpig::KeyHasher does on the host. Projections are products
/// of numbers that bf16 holds in two parts, added up in float, so that codes are the host's but
/// where a projection is within 2^-15 of |k - c| |plane| of 0.
class KeyHasher {
 public:
  /// Takes its scratch from `arena`, of memory on the device. `blas` is the host's, of the device
  /// at hand, and used by nothing else meanwhile: its stream and its pointer mode are changed.
  KeyHasher(const SignPlanes& planes, Arena& arena, cublasHandle_t blas)
      : planes_(planes.view()), blas_(blas) {
    const auto tokens = static_cast<std::size_t>(kHashedTokens);
    parts_ = arena.take<bf16>(tokens * kFloatParts * static_cast<std::size_t>(planes_.dim));
    projections_ = arena.take<float>(tokens * static_cast<std::size_t>(planes_.planes()));
  }
  /// Bytes of that, of any alignment.
  [[nodiscard]] static std::size_t workspace_bytes(const SignPlanes& planes) {
    Arena arena;
    (void)KeyHasher(planes, arena, nullptr);
    return arena.bytes_needed();
  }

  /// Means of the keys of `tokens` of a request, to `centres` [kv_heads, dim]. No tokens: nothing.
  template <class T>
  [[nodiscard]] Status make_centres(const KeyValues<T>& from, int request, TokenRange tokens,
                                    float* centres, cudaStream_t stream) const noexcept {
    const Grid grid{.blocks = dim3(tokens.empty() ? 0U : static_cast<unsigned>(from.kv_heads)),
                    .threads = static_cast<unsigned>(from.dim)};
    return launch("centre_kernel", centre_kernel<T>, grid, stream, from, request, tokens, centres);
  }

  /// Codes and norms of the keys of `tokens` of one KV head of a request, less `centre` [dim].
  /// Errors: keys of another dimension than the planes, what cuBLAS and the runtime say. A key that
  /// is not finite has codes without meaning.
  template <class T>
  [[nodiscard]] Status hash(const KeyValues<T>& from, int request, int kv_head, TokenRange tokens,
                            const float* centre, const HashPlaces& to,
                            cudaStream_t stream) const noexcept {
    if (from.dim != planes_.dim) {
      return Status::error(ErrorCode::kShapeMismatch, "keys of %d dimensions, planes of %d",
                           from.dim, planes_.dim);
    }
    cublasPointerMode_t mode = CUBLAS_POINTER_MODE_HOST;
    Status status = take_handle(stream, mode);
    for (TokenId t = tokens.begin; t < tokens.end && status.ok(); t += kHashedTokens) {
      const int count = (std::min)(tokens.end - t, kHashedTokens);
      const HashPlaces own{.codes = to.codes + (t - tokens.begin),
                           .stride = to.stride,
                           .norms = to.norms + (t - tokens.begin),
                           .spoiled = to.spoiled};
      status = split(from, request, kv_head, {.begin = t, .end = t + count}, centre, own, stream);
      if (status.ok()) status = project(count);
      if (status.ok()) status = pack(count, own, stream);
    }
    if (mode != CUBLAS_POINTER_MODE_HOST) (void)cublasSetPointerMode(blas_, mode);
    return status;
  }

 private:
  // Has the handle work on `stream` with scalars of the host's; `mode` is what it had before. A
  // stream that it has already is not set, as that would take a workspace of the host's from it.
  [[nodiscard]] Status take_handle(cudaStream_t stream, cublasPointerMode_t& mode) const noexcept {
    cudaStream_t present = nullptr;
    Status status = status_of(cublasGetStream(blas_, &present), "cublasGetStream");
    if (status.ok() && present != stream) {
      status = status_of(cublasSetStream(blas_, stream), "cublasSetStream");
    }
    if (status.ok()) status = status_of(cublasGetPointerMode(blas_, &mode), "cublasGetPointerMode");
    if (status.ok() && mode != CUBLAS_POINTER_MODE_HOST) {
      status =
          status_of(cublasSetPointerMode(blas_, CUBLAS_POINTER_MODE_HOST), "cublasSetPointerMode");
    }
    return status;
  }

  template <class T>
  [[nodiscard]] Status split(const KeyValues<T>& from, int request, int kv_head, TokenRange tokens,
                             const float* centre, const HashPlaces& to,
                             cudaStream_t stream) const noexcept {
    constexpr int kWarps = kSplitThreads / kWarp;
    const Grid grid{.blocks = dim3(static_cast<unsigned>((tokens.size() - 1) / kWarps + 1)),
                    .threads = kSplitThreads};
    return launch("split_kernel", split_kernel<T>, grid, stream, from, request, kv_head, tokens,
                  centre, parts_, to.norms, to.spoiled);
  }

  // Both matrices have rows of kFloatParts * dim, which are columns to cuBLAS.
  [[nodiscard]] Status project(int count) const noexcept {
    const int width = kFloatParts * planes_.dim;
    const float one = 1.0F;
    const float zero = 0.0F;
    return status_of(cublasGemmEx(blas_, CUBLAS_OP_T, CUBLAS_OP_N, planes_.planes(), count, width,
                                  &one, planes_.parts, CUDA_R_16BF, width, parts_, CUDA_R_16BF,
                                  width, &zero, projections_, CUDA_R_32F, planes_.planes(),
                                  CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                     "cublasGemmEx");
  }

  [[nodiscard]] Status pack(int count, const HashPlaces& to, cudaStream_t stream) const noexcept {
    const auto squares = [](int n) { return static_cast<unsigned>((n - 1) / kWarp + 1); };
    const Grid grid{.blocks = dim3(squares(planes_.tables), squares(count)),
                    .threads = kPackThreads};
    return launch("pack_kernel", pack_kernel, grid, stream, planes_, projections_, count, to.codes,
                  to.stride);
  }

  PlanesView planes_;
  bf16* parts_ = nullptr;         // [kHashedTokens, kFloatParts, dim]
  float* projections_ = nullptr;  // [kHashedTokens, planes]
  cublasHandle_t blas_;
};

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

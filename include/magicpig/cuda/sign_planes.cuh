// SPDX-License-Identifier: Apache-2.0
// The planes of a SignProjection on the device, and the codes of queries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/hash/sign_projection.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// Numbers of bf16 in which cuBLAS has a float x: its high part h, x rounded, and its low part l,
/// x - h rounded; x = h + l to 2^-17 of it. The product of two floats is then h h' + l h' + h l',
/// to 2^-15 at worst: three products of bf16 by tensor cores, added up in float.
inline constexpr int kFloatParts = 3;

/// What kernels see of planes. Plane b * tables + l gives bit b of the code in table l.
struct PlanesView {
  const float* columns = nullptr;  // [dim, planes]
  const bf16* parts = nullptr;     // [planes, kFloatParts, dim]: high, high, low
  int dim = 0;
  int bits = 0;
  int tables = 0;

  [[nodiscard]] __host__ __device__ int planes() const { return bits * tables; }
};

/// The planes of one layer's tables, in memory of the host's on the device; a view, which owns
/// nothing and may be copied. Memory: 10 K L dim bytes, 1.9 MB for (10, 150) tables of 128
/// dimensions; layers may share them.
class SignPlanes {
 public:
  /// Bytes of device memory, of any alignment.
  template <class Planes>
  [[nodiscard]] static std::size_t bytes(const SignProjection<Planes>& family) {
    Arena arena;
    (void)carve(arena, family);
    return arena.bytes_needed();
  }

  /// Copies the planes to `memory` on the device, of at least bytes(), in the order of `stream`;
  /// returns when the family has been read and may go away. Errors: more than 1,024 dimensions,
  /// memory that is too small, memory of the host, those of the runtime.
  template <class Planes>
  [[nodiscard]] static Result<SignPlanes> create(const SignProjection<Planes>& family,
                                                 std::span<std::byte> memory,
                                                 cudaStream_t stream) noexcept {
    if (family.dim() > kMostDims) {
      return Status::error(ErrorCode::kInvalidArgument, "dim %d must be at most %d on the device",
                           family.dim(), kMostDims);
    }
    Status status = check_memory(memory.size(), bytes(family), "the planes");
    if (!status.ok()) return status;
    Arena arena(memory);
    const PlanesView view = carve(arena, family);
    const auto size = static_cast<std::size_t>(view.planes()) * static_cast<std::size_t>(view.dim);
    Buffer<float> columns;
    Buffer<bf16> parts;
    if (!columns.resize(size) || !parts.resize(size * kFloatParts)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to copy %d planes", view.planes());
    }
    for (int p = 0; p < view.planes(); ++p) {
      bf16* own = parts.data() + std::int64_t{p} * kFloatParts * view.dim;
      for (int j = 0; j < view.dim; ++j) {
        const float x = family.plane(p, j);
        const bf16 high = to_bf16(x);
        columns.data()[std::int64_t{j} * view.planes() + p] = x;
        own[j] = own[view.dim + j] = high;
        own[2 * view.dim + j] = to_bf16(x - to_float(high));
      }
    }
    const auto copy = [&](const void* to, const void* from, std::size_t size_in_bytes) {
      return status_of(cudaMemcpyAsync(const_cast<void*>(to), from, size_in_bytes,
                                       cudaMemcpyHostToDevice, stream),
                       "copy planes");
    };
    status = copy(view.columns, columns.data(), size * sizeof(float));
    if (status.ok()) status = copy(view.parts, parts.data(), size * kFloatParts * sizeof(bf16));
    // Pageable memory may be read until then.
    if (status.ok()) status = status_of(cudaStreamSynchronize(stream), "copy planes");
    if (!status.ok()) return status;
    return SignPlanes(view);
  }

  [[nodiscard]] const PlanesView& view() const { return view_; }

 private:
  static constexpr int kMostDims = 1024;

  explicit SignPlanes(const PlanesView& view) : view_(view) {}

  template <class Planes>
  static PlanesView carve(Arena& arena, const SignProjection<Planes>& family) {
    PlanesView view{.dim = family.dim(), .bits = family.bits(), .tables = family.tables()};
    const auto size = static_cast<std::size_t>(view.planes()) * static_cast<std::size_t>(view.dim);
    view.columns = arena.take<float>(size);
    view.parts = arena.take<bf16>(size * kFloatParts);
    return view;
  }

  PlanesView view_;
};

/// Query heads that a block of threads of hash_queries_kernel() hashes: each plane is read once for
/// all of them.
inline constexpr int kHashedHeads = 4;

/// Codes of queries [vectors, dim] in each table, to `codes` [vectors, tables]. A block of threads
/// for 32 tables and kHashedHeads queries, a thread per plane, a warp per bit.
template <class T>
__global__ void hash_queries_kernel(PlanesView planes, const T* queries, int vectors, Code* codes) {
  extern __shared__ __align__(16) unsigned char hash_shared[];
  __shared__ unsigned own[kHashedHeads][kWarp];
  auto* rows = reinterpret_cast<float*>(hash_shared);  // [dim, kHashedHeads]
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int bit = static_cast<int>(threadIdx.x) / kWarp;
  const int table = static_cast<int>(blockIdx.y) * kWarp + lane;
  const int first = static_cast<int>(blockIdx.x) * kHashedHeads;
  for (int i = static_cast<int>(threadIdx.x); i < planes.dim * kHashedHeads;
       i += static_cast<int>(blockDim.x)) {
    const int vector = first + i % kHashedHeads;
    rows[i] = vector < vectors
                  ? widen(queries[std::int64_t{vector} * planes.dim + i / kHashedHeads])
                  : 0.0F;
  }
  if (bit == 0) {
    for (int v = 0; v < kHashedHeads; ++v) own[v][lane] = 0;
  }
  __syncthreads();
  if (table < planes.tables) {
    const float* column = planes.columns + bit * planes.tables + table;
    float sums[kHashedHeads] = {};
#pragma unroll 8
    for (int j = 0; j < planes.dim; ++j) {
      const float x = __ldg(column + std::int64_t{j} * planes.planes());
#pragma unroll
      for (int v = 0; v < kHashedHeads; ++v) sums[v] += x * rows[j * kHashedHeads + v];
    }
#pragma unroll
    for (int v = 0; v < kHashedHeads; ++v) {
      if (sums[v] > 0.0F) atomicOr(&own[v][lane], 1U << bit);
    }
  }
  __syncthreads();
  for (int v = bit; v < kHashedHeads && table < planes.tables; v += planes.bits) {
    if (first + v >= vectors) break;
    codes[std::int64_t{first + v} * planes.tables + table] = static_cast<Code>(own[v][lane]);
  }
}

/// Hashes queries [vectors, dim] in the order of `stream` to `codes` [vectors, tables], those of
/// SignProjection::hash() but for projections within rounding of 0. May be captured in a graph.
/// Error: what the runtime says.
template <class T>
[[nodiscard]] Status hash_queries(const SignPlanes& planes, const T* queries, int vectors,
                                  Code* codes, cudaStream_t stream) noexcept {
  const PlanesView& view = planes.view();
  const Grid grid{
      .blocks = dim3(static_cast<unsigned>((vectors + kHashedHeads - 1) / kHashedHeads),
                     static_cast<unsigned>((view.tables - 1) / kWarp + 1)),
      .threads = static_cast<unsigned>(view.bits * kWarp),
      .shared_bytes = static_cast<std::size_t>(view.dim) * kHashedHeads * sizeof(float)};
  return launch("hash_queries_kernel", hash_queries_kernel<T>, grid, stream, view, queries, vectors,
                codes);
}

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

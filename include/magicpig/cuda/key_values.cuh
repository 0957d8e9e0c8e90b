// SPDX-License-Identifier: Apache-2.0
// Keys and values of several requests on the device, at fixed strides or on pages.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "magicpig/core/block_table.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/paged_key_values.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// Query heads per KV head at most, on the device.
inline constexpr int kMaxGroup = 16;

/// Bytes to whose multiples every row is aligned: rows are read so many bytes at a time.
inline constexpr int kRowAlignment = 16;

/// Error: requests or KV heads that are not at least 1, or too many for a grid.
[[nodiscard]] inline Status check_heads(int requests, int kv_heads) noexcept {
  if (requests >= 1 && requests <= kMostOfGrid && kv_heads >= 1 && kv_heads <= kMostOfGrid) {
    return Status();
  }
  return Status::error(ErrorCode::kInvalidArgument,
                       "requests %d and kv_heads %d must lie in [1, %d]", requests, kv_heads,
                       kMostOfGrid);
}

/// Error: a capacity below 1, a negative first token, or both together above `most`.
[[nodiscard]] inline Status check_capacity(TokenId capacity, TokenId first, TokenId most) noexcept {
  if (capacity >= 1 && first >= 0 && capacity <= most - first) return Status();
  return Status::error(ErrorCode::kInvalidArgument,
                       "capacity %d must be at least 1, first %d at least 0, their sum at most %d",
                       capacity, first, most);
}

/// The caches of one layer's requests. The row of KV head h in slot s of page p begins at
/// p * page + h * head + s * token bytes, for keys and for values. With a block table token t of
/// request r is in slot t % page_tokens of page block_table[r, t / page_tokens]; without one it is
/// in slot t of page r, so that `page` is the stride between requests. All pointers are the
/// device's, and the numbers of tokens too, so that a captured graph sees what they are when it
/// runs. T is float, fp16 or bf16. Copied to kernels by value.
template <class T>
struct KeyValues {
  using Scalar = T;

  const T* keys = nullptr;    ///< row of page 0, KV head 0, slot 0
  const T* values = nullptr;  ///< likewise
  PageStrides key_strides = {};
  PageStrides value_strides = {};
  const std::int32_t* block_table = nullptr;  ///< [requests, table_stride], or null
  std::int64_t table_stride = 0;
  int page_tokens = 1;                   ///< of a block table, a power of 2
  const std::int32_t* tokens = nullptr;  ///< [requests] in each cache, the newest one included
  int requests = 0;
  int kv_heads = 0;
  int dim = 0;  ///< of keys and of values

  /// Errors: null pointers, sizes below 1, page_tokens as BlockTable::check_page(), rows that are
  /// not aligned to kRowAlignment. What lies on the device is not looked at: entries of a block
  /// table, and more tokens than there is memory for, are the host's to check.
  [[nodiscard]] Status check() const noexcept {
    if (requests < 0 || kv_heads < 1 || dim < 1) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "requests %d must be at least 0, kv_heads %d and dim %d at least 1",
                           requests, kv_heads, dim);
    }
    if (keys == nullptr || values == nullptr || tokens == nullptr) {
      return Status::error(ErrorCode::kInvalidArgument, "keys, values or tokens are null");
    }
    const Status page = BlockTable::check_page(page_tokens);
    if (!page.ok()) return page;
    const auto places =
        reinterpret_cast<std::uintptr_t>(keys) | reinterpret_cast<std::uintptr_t>(values);
    const auto strides =
        static_cast<std::uint64_t>(key_strides.page | key_strides.head | key_strides.token |
                                   value_strides.page | value_strides.head | value_strides.token);
    if ((places | strides) % kRowAlignment != 0) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "keys, values and their strides must be multiples of %d bytes",
                           kRowAlignment);
    }
    return Status();
  }

  /// Errors: as check(), other requests, heads or dimensions than an index of `kind` is for.
  template <class View>
  [[nodiscard]] Status check_for(const View& index, const char* kind) const noexcept {
    const Status status = check();
    if (!status.ok()) return status;
    if (requests == index.requests && kv_heads == index.kv_heads && dim == index.dim) {
      return Status();
    }
    return Status::error(ErrorCode::kShapeMismatch,
                         "keys of %d requests, %d KV heads, %d dimensions; the %s are for %d, %d "
                         "and %d",
                         requests, kv_heads, dim, kind, index.requests, index.kv_heads, index.dim);
  }

  /// Rows without a block table, [requests, kv_heads, capacity, dim].
  [[nodiscard]] static KeyValues head_major(const T* keys, const T* values, int requests,
                                            int kv_heads, TokenId capacity, int dim,
                                            const std::int32_t* tokens) {
    const std::int64_t row = std::int64_t{dim} * static_cast<std::int64_t>(sizeof(T));
    const PageStrides strides{
        .page = row * capacity * kv_heads, .head = row * capacity, .token = row};
    return {.keys = keys,
            .values = values,
            .key_strides = strides,
            .value_strides = strides,
            .tokens = tokens,
            .requests = requests,
            .kv_heads = kv_heads,
            .dim = dim};
  }

  /// The rows of one token of one KV head.
  struct Place {
    const T* key;
    const T* value;
  };
  __device__ Place row(int request, int kv_head, TokenId token) const {
    std::int64_t page = request;
    std::int64_t slot = token;
    if (block_table != nullptr) {
      const int shift = 31 - __clz(page_tokens);
      page = block_table[request * table_stride + (token >> shift)];
      slot = token & (page_tokens - 1);
    }
    return {.key = at_row(keys, key_strides, page, kv_head, slot),
            .value = at_row(values, value_strides, page, kv_head, slot)};
  }

 private:
  __device__ static const T* at_row(const T* base, const PageStrides& strides, std::int64_t page,
                                    int kv_head, std::int64_t slot) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + page * strides.page +
                                      kv_head * strides.head + slot * strides.token);
  }
};

/// Exactly; as to_float() on the host.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float widen(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

/// Rounded to nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ fp16 narrow<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

/// kCount consecutive scalars of a row, loaded at once and widened later, so that several may be on
/// their way.
template <class T, int kCount>
struct RowPart {
  static_assert(kCount * sizeof(T) % 8 == 0);
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static constexpr int kWords = kBytes / 4;
  unsigned words[kWords];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        const uint4 x = __ldg(reinterpret_cast<const uint4*>(from) + i);
        words[4 * i] = x.x;
        words[4 * i + 1] = x.y;
        words[4 * i + 2] = x.z;
        words[4 * i + 3] = x.w;
      }
    } else {
      const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
      words[0] = x.x;
      words[1] = x.y;
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      const unsigned pair = words[i / 2];
      return widen(T{static_cast<std::uint16_t>(i % 2 != 0 ? pair >> 16 : pair & 0xffffU)});
    }
  }
};

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// The words everything else is written in: tokens, ranges of tokens, attention shapes, and 16-bit
// floats.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Position of a token in the key/value cache of its request, counted from 0. A request holds at
/// most 2^31 - 1 tokens; products with strides and dimensions are computed in 64 bits.
using TokenId = std::int32_t;

/// Hash code of a vector in one table: a bucket number below HashFamily::buckets().
using Code = std::uint16_t;

/// Query heads that may share one KV head; a set of them fits one 32-bit member mask.
inline constexpr int kMaxGroup = 32;
/// Largest head_dim and value_dim.
inline constexpr int kMaxDim = 1 << 14;

/// Half-open range of tokens [begin, end).
struct TokenRange {
  TokenId begin = 0;
  TokenId end = 0;

  [[nodiscard]] constexpr TokenId size() const { return end > begin ? end - begin : 0; }
  [[nodiscard]] constexpr bool empty() const { return size() == 0; }
  [[nodiscard]] constexpr bool contains(TokenId token) const {
    return token >= begin && token < end;
  }
  friend constexpr bool operator==(const TokenRange&, const TokenRange&) = default;
};

/// Heads and dimensions of one attention layer.
struct Shape {
  int query_heads = 1;
  int kv_heads = 1;
  int head_dim = 0;   ///< of queries and keys
  int value_dim = 0;  ///< of values and outputs; may differ from head_dim

  /// Query heads per KV head. Query head h belongs to KV head h / group().
  [[nodiscard]] constexpr int group() const { return query_heads / kv_heads; }
  friend constexpr bool operator==(const Shape&, const Shape&) = default;
};

/// Tokens that stay exact at both ends of a cache: the first `sink` (attention sinks) and the
/// newest `local`. What lies between them is the middle, the part an index covers.
struct Window {
  TokenId sink = 4;
  TokenId local = 64;

  /// The middle of a cache of `tokens` tokens: [sink, tokens - local), empty if they overlap.
  [[nodiscard]] constexpr TokenRange middle(TokenId tokens) const {
    const TokenId end = tokens > local ? tokens - local : 0;
    return {.begin = sink, .end = end > sink ? end : sink};
  }
};

/// Brain float: the upper 16 bits of a float32.
struct bf16 {
  std::uint16_t bits = 0;
  friend constexpr bool operator==(const bf16&, const bf16&) = default;
};

/// IEEE 754 half precision.
struct fp16 {
  std::uint16_t bits = 0;
  friend constexpr bool operator==(const fp16&, const fp16&) = default;
};

/// Scalars per block of q8_0.
inline constexpr int kQ8Block = 32;

/// 32 scalars as signed bytes and a scale: scalar j is scale * values[j]. 34 bytes, the Q8_0 block
/// of GGUF files and of quantised caches.
struct q8_0 {
  fp16 scale;
  std::int8_t values[kQ8Block] = {};
};
static_assert(sizeof(q8_0) == 34 && alignof(q8_0) == 2);

/// Scalars per block of q4_0.
inline constexpr int kQ4Block = 32;

/// 32 scalars of 4 bits and a scale: scalar j is scale * (n - 8), n being the lower half of byte j
/// for j < 16 and the upper half of byte j - 16 for the others. 18 bytes, the Q4_0 block of GGUF
/// files and of quantised caches.
struct q4_0 {
  fp16 scale;
  std::uint8_t nibbles[kQ4Block / 2] = {};
};
static_assert(sizeof(q4_0) == 18 && alignof(q4_0) == 2);

/// Scalars in one element of a row's array. Rows of blocks hold whole blocks.
template <class T>
inline constexpr int kScalarsPerElement = 1;
template <>
inline constexpr int kScalarsPerElement<q8_0> = kQ8Block;
template <>
inline constexpr int kScalarsPerElement<q4_0> = kQ4Block;

/// Bytes of `dim` scalars.
template <class T>
[[nodiscard]] constexpr std::size_t row_bytes(std::size_t dim) {
  return dim / kScalarsPerElement<T> * sizeof(T);
}

[[nodiscard]] constexpr float to_float(float x) { return x; }

[[nodiscard]] constexpr float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

/// Exact, subnormals, infinities and NaN included.
[[nodiscard]] constexpr float to_float(fp16 x) {
  const std::uint32_t sign = (x.bits & 0x8000U) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffU;
  if (magnitude >= 0x7c00U) {  // infinity or NaN: widen the exponent
    return std::bit_cast<float>(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13));
  }
  // Placing the bits in a float's exponent field and rescaling by 2^112 treats subnormals and
  // normals alike.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112F;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
}

/// Scalar j of a row, exactly.
template <class T>
[[nodiscard]] constexpr float scalar_at(const T* row, int j) {
  return to_float(row[j]);
}
[[nodiscard]] constexpr float scalar_at(const q8_0* row, int j) {
  const q8_0& block = row[j / kQ8Block];
  return to_float(block.scale) * static_cast<float>(block.values[j % kQ8Block]);
}
[[nodiscard]] constexpr float scalar_at(const q4_0* row, int j) {
  const q4_0& block = row[j / kQ4Block];
  const int at = j % kQ4Block;
  const int nibble = (block.nibbles[at % 16] >> (at / 16 * 4)) & 15;
  return to_float(block.scale) * static_cast<float>(nibble - 8);
}

/// Rounds to nearest, ties to even; NaN stays NaN.
[[nodiscard]] constexpr bf16 to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffU) > 0x7f800000U) {
    return {static_cast<std::uint16_t>((bits >> 16) | 0x40U)};
  }
  return {static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
}

/// Rounds to nearest, ties to even; values beyond 65,519.99 become infinity, NaN stays NaN.
[[nodiscard]] constexpr fp16 to_fp16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return {static_cast<std::uint16_t>(sign | 0x7e00U)};
  if (magnitude >= 0x477ff000U) return {static_cast<std::uint16_t>(sign | 0x7c00U)};
  if (magnitude < 0x38800000U) {  // below 2^-14: adding 0.5 rounds to the half's subnormal grid
    const float aligned = std::bit_cast<float>(magnitude) + 0.5F;
    return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) & 0x7ffU))};
  }
  const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13))};
}

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Floats as integers after one multiplication by a power of 2.
#pragma once

#include <bit>
#include <cstdint>

#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Bits of infinity: magnitudes that are not finite have these or more.
inline constexpr std::uint32_t kInfinityBits = 0x7f800000U;

/// The bits of the largest magnitude of row - centre [dim], of `row` itself where `centre` is null;
/// 0 where dim is.
template <class T>
[[nodiscard]] std::uint32_t largest_magnitude(const T* row, const float* centre, int dim) {
  std::uint32_t largest = 0;
  for (int j = 0; j < dim; ++j) {
    const float x = scalar_at(row, j) - (centre != nullptr ? centre[j] : 0.0F);
    const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x) & 0x7fffffffU;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

/// The least e for which a magnitude of these bits is below 2^e, finite and not denormal.
[[nodiscard]] constexpr int exponent_above(std::uint32_t magnitude) {
  return static_cast<int>(magnitude >> 23) - 126;
}

/// 2^exponent, in [-1022, 1023].
[[nodiscard]] constexpr double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<std::uint64_t>(1023 + exponent) << 52);
}

}  // namespace magicpig::inline MAGICPIG_ABI

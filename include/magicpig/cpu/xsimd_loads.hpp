// SPDX-License-Identifier: Apache-2.0
// Loads of scalars of any type through xsimd, for the instruction set that this file is compiled
// for.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <xsimd/xsimd.hpp>

#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Loads of kStep consecutive scalars of any type as two batches of float32, exactly. Where kPaired
/// is true, the scalars of a pair go to the same lane of either batch, so that 16 bits are widened
/// within their own 32-bit lane; otherwise the scalars fill one batch after the other.
class XsimdLoads {
 public:
  using Vector = xsimd::batch<float>;
  struct Pair {
    Vector a;
    Vector b;
  };
  static constexpr std::size_t kLanes = Vector::size;
  static constexpr std::size_t kStep = 2 * kLanes;
  static constexpr std::size_t kAlignment = sizeof(Vector);

#if XSIMD_WITH_AVX512F || (XSIMD_WITH_AVX && defined(__F16C__))
  static constexpr bool kWidensHalves = true;  ///< in one instruction
#else
  static constexpr bool kWidensHalves = false;
#endif
  template <class T>
  static constexpr bool kPaired = std::is_same_v<T, bf16> ||
                                  (std::is_same_v<T, fp16> && !kWidensHalves);

  /// Scalars [j, j + kStep) of a row.
  static Pair load(const float* row, std::size_t j) {
    return {Vector::load_unaligned(row + j), Vector::load_unaligned(row + j + kLanes)};
  }

  static Pair load(const bf16* row, std::size_t j) {
    const Bits pairs = load_pairs(row + j);
    return {std::bit_cast<Vector>(pairs << 16), std::bit_cast<Vector>(pairs & Bits(0xffff0000U))};
  }

  static Pair load(const fp16* row, std::size_t j) {
#if XSIMD_WITH_AVX512F
    const auto* from = reinterpret_cast<const __m256i*>(row + j);
    return {Vector(_mm512_cvtph_ps(_mm256_loadu_si256(from))),
            Vector(_mm512_cvtph_ps(_mm256_loadu_si256(from + 1)))};
#elif XSIMD_WITH_AVX && defined(__F16C__)
    const auto* from = reinterpret_cast<const __m128i*>(row + j);
    return {Vector(_mm256_cvtph_ps(_mm_loadu_si128(from))),
            Vector(_mm256_cvtph_ps(_mm_loadu_si128(from + 1)))};
#else
    const Bits pairs = load_pairs(row + j);
    return {widen_half(pairs & Bits(0xffffU)), widen_half(pairs >> 16)};
#endif
  }

  /// A product of 8 and 11 significant bits is exact.
  static Pair load(const q8_0* row, std::size_t j) {
    const q8_0& block = row[j / kQ8Block];
    const std::int8_t* values = block.values + j % kQ8Block;
    const Vector scale(to_float(block.scale));
    return {scale * widen_bytes(values), scale * widen_bytes(values + kLanes)};
  }

  /// A product of 4 and 11 significant bits is exact. Each batch has lower or upper halves only.
  static Pair load(const q4_0* row, std::size_t j) {
    const q4_0& block = row[j / kQ4Block];
    const Vector scale(to_float(block.scale));
    return {scale * widen_nibbles(block.nibbles, j % kQ4Block),
            scale * widen_nibbles(block.nibbles, j % kQ4Block + kLanes)};
  }

  /// The last dim modulo kStep scalars of row[dim], in a window of kStep scalars that ends with the
  /// row, zeros before them; a row shorter than the window is followed by zeros. Reads within the
  /// row only.
  template <class T>
  static Pair load_rest(const T* row, std::size_t dim) {
    if (dim < kStep) {
      alignas(kAlignment) T padded[kStep] = {};
      std::memcpy(padded, row, dim * sizeof(T));
      return load(padded, 0);
    }
    const Pair window = load(row, dim - kStep);
    const Pair places = load_like<T>(kPlaces);
    const Vector zeros(static_cast<float>(kStep - dim % kStep));
    return {xsimd::select(places.a < zeros, Vector(0.0F), window.a),
            xsimd::select(places.b < zeros, Vector(0.0F), window.b)};
  }
  /// Blocks hold whole steps.
  static Pair load_rest(const q8_0*, std::size_t) { return {Vector(0.0F), Vector(0.0F)}; }
  static Pair load_rest(const q4_0*, std::size_t) { return {Vector(0.0F), Vector(0.0F)}; }

  /// Floats [0, kStep) in the order in which scalars of type T are loaded, and back.
  template <class T>
  static Pair load_like(const float* from) {
    if constexpr (kPaired<T>) {
      alignas(kAlignment) float lanes[kStep];
      for (std::size_t i = 0; i < kLanes; ++i) {
        lanes[i] = from[2 * i];
        lanes[kLanes + i] = from[2 * i + 1];
      }
      return load(lanes, 0);
    } else {
      return load(from, 0);
    }
  }
  template <class T>
  static void store_like(const Pair& pair, float* to) {
    if constexpr (kPaired<T>) {
      alignas(kAlignment) float lanes[kStep];
      pair.a.store_aligned(lanes);
      pair.b.store_aligned(lanes + kLanes);
      for (std::size_t i = 0; i < kLanes; ++i) {
        to[2 * i] = lanes[i];
        to[2 * i + 1] = lanes[kLanes + i];
      }
    } else {
      pair.a.store_unaligned(to);
      pair.b.store_unaligned(to + kLanes);
    }
  }

 private:
  using Bits = xsimd::batch<std::uint32_t>;
  using Integers = xsimd::batch<std::int32_t>;
  static_assert(kStep <= 32 && kQ8Block % kStep == 0, "no step crosses a block's end");
  static_assert(kQ4Block % kStep == 0 && kQ4Block / 2 % kLanes == 0, "nor the middle of q4_0's");

  static constexpr float kPlaces[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                        11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                        22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

  // Little-endian: the first of a pair is the lower half of a 32-bit lane.
  template <class T>
  static Bits load_pairs(const T* from) {
    using Halves = xsimd::batch<std::uint16_t>;
    return std::bit_cast<Bits>(
        Halves::load_unaligned(reinterpret_cast<const std::uint16_t*>(from)));
  }

  // xsimd's own conversion of int8_t goes one by one.
  static Vector widen_bytes(const std::int8_t* values) {
#if XSIMD_WITH_AVX512F
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return Vector(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif XSIMD_WITH_AVX2
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    return Vector(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
    alignas(kAlignment) std::int32_t wide[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) wide[i] = values[i];
    return xsimd::to_float(Integers::load_aligned(wide));
#endif
  }

  // Numbers [at, at + kLanes) of a block, each less 8.
  static Vector widen_nibbles(const std::uint8_t* nibbles, std::size_t at) {
    constexpr std::size_t kHalf = kQ4Block / 2;
    const std::uint8_t* from = nibbles + at % kHalf;
#if XSIMD_WITH_AVX512F
    const Integers bytes(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif XSIMD_WITH_AVX2
    const Integers bytes(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    alignas(kAlignment) std::int32_t wide[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) wide[i] = from[i];
    const Integers bytes = Integers::load_aligned(wide);
#endif
    const Integers numbers = at < kHalf ? bytes & Integers(15) : bytes >> 4;
    return xsimd::to_float(numbers - Integers(8));
  }

  // The halves are in the lower 16 bits. Choices are made among floats; see XsimdOps::log().
  static Vector widen_half(const Bits& halves) {
    const auto bits = std::bit_cast<Integers>(halves);
    const Integers magnitude = bits & Integers(0x7fff);
    const Integers sign = (bits ^ magnitude) << 16;
    const Integers to_bias(112 << 23);
    const Integers rebiased = (magnitude << 13) + to_bias;
    const Vector number = xsimd::to_float(magnitude);
    // Infinity and NaN, above 0x7bff, have the largest exponent of a half: one more step takes it
    // to a float's.
    const Vector large =
        xsimd::select(number > Vector(31743.0F), std::bit_cast<Vector>(rebiased + to_bias),
                      std::bit_cast<Vector>(rebiased));
    const Vector widened =
        xsimd::select(number < Vector(1024.0F), number * Vector(0x1p-24F), large);
    return std::bit_cast<Vector>(std::bit_cast<Integers>(widened) | sign);
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

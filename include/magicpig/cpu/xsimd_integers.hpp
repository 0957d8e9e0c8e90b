// SPDX-License-Identifier: Apache-2.0
// Integers through xsimd, for the instruction set that this file is compiled for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <xsimd/xsimd.hpp>

#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/version.hpp"

// Where there are shuffles of bytes in vectors of xsimd's width.
#if XSIMD_WITH_AVX512BW || (XSIMD_WITH_AVX2 && !XSIMD_WITH_AVX512F) || \
    (XSIMD_WITH_SSSE3 && !XSIMD_WITH_AVX) || XSIMD_WITH_NEON64
#define MAGICPIG_XSIMD_INTEGERS
#endif

namespace magicpig::inline MAGICPIG_ABI {

#ifdef MAGICPIG_XSIMD_INTEGERS

/// Vectors of bytes and of 16-bit integers, and what xsimd 8.1.0 lacks for them.
struct XsimdIntegers {
  using Bytes = xsimd::batch<std::uint8_t>;
  using Words = xsimd::batch<std::uint16_t>;
  using Shorts = xsimd::batch<std::int16_t>;
  using Tracks = xsimd::make_sized_batch_t<std::uint16_t, kSystematicTracks>;
  static constexpr std::size_t kAlignment = sizeof(Bytes);

  // table_of() repeats 16 bytes; look_up() takes of each 16 bytes of a table those at `places`;
  // product() is (a b + 2^14) >> 15; upper_product() is a b >> 16.
#if XSIMD_WITH_AVX512BW
  static Bytes table_of(const std::uint8_t* from) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Bytes look_up(const Bytes& table, const Bytes& places) {
    return _mm512_shuffle_epi8(table, places);
  }
  static Shorts product(const Shorts& a, const Shorts& b) { return _mm512_mulhrs_epi16(a, b); }
  static Words upper_product(const Words& a, const Words& b) { return _mm512_mulhi_epu16(a, b); }
#elif XSIMD_WITH_AVX2
  static Bytes table_of(const std::uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Bytes look_up(const Bytes& table, const Bytes& places) {
    return _mm256_shuffle_epi8(table, places);
  }
  static Shorts product(const Shorts& a, const Shorts& b) { return _mm256_mulhrs_epi16(a, b); }
  static Words upper_product(const Words& a, const Words& b) { return _mm256_mulhi_epu16(a, b); }
#elif XSIMD_WITH_SSSE3
  static Bytes table_of(const std::uint8_t* from) { return Bytes::load_unaligned(from); }
  static Bytes look_up(const Bytes& table, const Bytes& places) {
    return _mm_shuffle_epi8(table, places);
  }
  static Shorts product(const Shorts& a, const Shorts& b) { return _mm_mulhrs_epi16(a, b); }
  static Words upper_product(const Words& a, const Words& b) { return _mm_mulhi_epu16(a, b); }
#else
  static Bytes table_of(const std::uint8_t* from) { return Bytes::load_unaligned(from); }
  static Bytes look_up(const Bytes& table, const Bytes& places) {
    return vqtbl1q_u8(table, places);
  }
  static Shorts product(const Shorts& a, const Shorts& b) { return vqrdmulhq_s16(a, b); }
  static Words upper_product(const Words& a, const Words& b) {
    const uint32x4_t lower = vmull_u16(vget_low_u16(a), vget_low_u16(b));
    const uint32x4_t upper = vmull_high_u16(a, b);
    return vuzp2q_u16(vreinterpretq_u16_u32(lower), vreinterpretq_u16_u32(upper));
  }
#endif

  /// Bit i: number i is at most limit i.
  static std::uint8_t within(const Tracks& numbers, const Tracks& limits) {
#if XSIMD_WITH_NEON64
    constexpr std::uint16_t kBits[] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint16x8_t bits = vandq_u16(vcleq_u16(numbers, limits), vld1q_u16(kBits));
    return static_cast<std::uint8_t>(vaddvq_u16(bits));
#elif XSIMD_WITH_AVX512BW && defined(__AVX512VL__)
    return _mm_cmple_epu16_mask(numbers, limits);
#else
    const __m128i mask = xsimd::ssub(numbers, limits) == Tracks(0);
    const int bits = _mm_movemask_epi8(_mm_packs_epi16(mask, _mm_setzero_si128()));
    return static_cast<std::uint8_t>(bits);
#endif
  }

  /// Calls function(0), function(1) ... function(kCount - 1) with constants, so that arrays of
  /// batches which they index may be registers.
  template <std::size_t kCount, class Function>
  MAGICPIG_ALWAYS_INLINE static void each(const Function& function) {
    call(function, std::make_index_sequence<kCount>());
  }

 private:
  template <class Function, std::size_t... i>
  MAGICPIG_ALWAYS_INLINE static void call(const Function& function, std::index_sequence<i...>) {
    (function(std::integral_constant<std::size_t, i>()), ...);
  }
};

#endif

}  // namespace magicpig::inline MAGICPIG_ABI

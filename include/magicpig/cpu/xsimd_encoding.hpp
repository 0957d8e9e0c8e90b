// SPDX-License-Identifier: Apache-2.0
// The operations that make codes, through xsimd, for the instruction set that this file is compiled
// for.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <xsimd/xsimd.hpp>

#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/cpu/xsimd_integers.hpp"
#include "magicpig/cpu/xsimd_loads.hpp"
#include "magicpig/cpu/xsimd_products.hpp"
#include "magicpig/hash/levels.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

#ifdef MAGICPIG_XSIMD_INTEGERS

/// What the encoding of lanes needs and xsimd 8.1.0 lacks.
struct XsimdLanes {
  using Floats = xsimd::batch<float>;
  using Doubles = xsimd::batch<double>;
  using Integers = xsimd::batch<std::int32_t>;
  using Wide = xsimd::batch<std::uint64_t>;

  // blocks() takes 16 bytes from each fourth of some rows; transpose() makes the first, second ...
  // float of each block of four vectors; widened() are consecutive numbers; even_squares() are
  // those of the lower halves of pairs; shift() is x >> bits.
#if XSIMD_WITH_AVX512BW
  static Floats blocks(const float* const* rows, std::size_t at) {
    const __m512 first = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + at));
    const __m512 two = _mm512_insertf32x4(first, _mm_loadu_ps(rows[4] + at), 1);
    const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(rows[8] + at), 2);
    return _mm512_insertf32x4(three, _mm_loadu_ps(rows[12] + at), 3);
  }
  static void transpose(Floats& a, Floats& b, Floats& c, Floats& e) {
    const __m512d lower_ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    const __m512d upper_ab = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d lower_ce = _mm512_castps_pd(_mm512_unpacklo_ps(c, e));
    const __m512d upper_ce = _mm512_castps_pd(_mm512_unpackhi_ps(c, e));
    a = _mm512_castpd_ps(_mm512_unpacklo_pd(lower_ab, lower_ce));
    b = _mm512_castpd_ps(_mm512_unpackhi_pd(lower_ab, lower_ce));
    c = _mm512_castpd_ps(_mm512_unpacklo_pd(upper_ab, upper_ce));
    e = _mm512_castpd_ps(_mm512_unpackhi_pd(upper_ab, upper_ce));
  }
  static Floats widened(const bf16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Doubles widened(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
  static Wide even_squares(const Integers& x) { return _mm512_mul_epi32(x, x); }
  static Integers shift(const Integers& x, int bits) {
    return _mm512_srav_epi32(x, _mm512_set1_epi32(bits));
  }
#elif XSIMD_WITH_AVX2
  static Floats blocks(const float* const* rows, std::size_t at) {
    const __m256 first = _mm256_castps128_ps256(_mm_loadu_ps(rows[0] + at));
    return _mm256_insertf128_ps(first, _mm_loadu_ps(rows[4] + at), 1);
  }
  static void transpose(Floats& a, Floats& b, Floats& c, Floats& e) {
    const __m256d lower_ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d upper_ab = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d lower_ce = _mm256_castps_pd(_mm256_unpacklo_ps(c, e));
    const __m256d upper_ce = _mm256_castps_pd(_mm256_unpackhi_ps(c, e));
    a = _mm256_castpd_ps(_mm256_unpacklo_pd(lower_ab, lower_ce));
    b = _mm256_castpd_ps(_mm256_unpackhi_pd(lower_ab, lower_ce));
    c = _mm256_castpd_ps(_mm256_unpacklo_pd(upper_ab, upper_ce));
    e = _mm256_castpd_ps(_mm256_unpackhi_pd(upper_ab, upper_ce));
  }
  static Floats widened(const bf16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Doubles widened(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
  static Wide even_squares(const Integers& x) { return _mm256_mul_epi32(x, x); }
  static Integers shift(const Integers& x, int bits) {
    return _mm256_srav_epi32(x, _mm256_set1_epi32(bits));
  }
#elif XSIMD_WITH_SSSE3
  static Floats blocks(const float* const* rows, std::size_t at) {
    return Floats::load_unaligned(rows[0] + at);
  }
  static void transpose(Floats& a, Floats& b, Floats& c, Floats& e) {
    const __m128d lower_ab = _mm_castps_pd(_mm_unpacklo_ps(a, b));
    const __m128d upper_ab = _mm_castps_pd(_mm_unpackhi_ps(a, b));
    const __m128d lower_ce = _mm_castps_pd(_mm_unpacklo_ps(c, e));
    const __m128d upper_ce = _mm_castps_pd(_mm_unpackhi_ps(c, e));
    a = _mm_castpd_ps(_mm_unpacklo_pd(lower_ab, lower_ce));
    b = _mm_castpd_ps(_mm_unpackhi_pd(lower_ab, lower_ce));
    c = _mm_castpd_ps(_mm_unpacklo_pd(upper_ab, upper_ce));
    e = _mm_castpd_ps(_mm_unpackhi_pd(upper_ab, upper_ce));
  }
  static Floats widened(const bf16* from) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
  }
  static Doubles widened(const float* from) {
    return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static Wide even_squares(const Integers& x) {
    const __m128i size = _mm_abs_epi32(x);
    return _mm_mul_epu32(size, size);
  }
  static Integers shift(const Integers& x, int bits) {
    return _mm_sra_epi32(x, _mm_cvtsi32_si128(bits));
  }
#else
  static Floats blocks(const float* const* rows, std::size_t at) {
    return Floats::load_unaligned(rows[0] + at);
  }
  static void transpose(Floats& a, Floats& b, Floats& c, Floats& e) {
    const float64x2_t lower_ab = vreinterpretq_f64_f32(vzip1q_f32(a, b));
    const float64x2_t upper_ab = vreinterpretq_f64_f32(vzip2q_f32(a, b));
    const float64x2_t lower_ce = vreinterpretq_f64_f32(vzip1q_f32(c, e));
    const float64x2_t upper_ce = vreinterpretq_f64_f32(vzip2q_f32(c, e));
    a = vreinterpretq_f32_f64(vzip1q_f64(lower_ab, lower_ce));
    b = vreinterpretq_f32_f64(vzip2q_f64(lower_ab, lower_ce));
    c = vreinterpretq_f32_f64(vzip1q_f64(upper_ab, upper_ce));
    e = vreinterpretq_f32_f64(vzip2q_f64(upper_ab, upper_ce));
  }
  static Floats widened(const bf16* from) {
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const std::uint16_t*>(from));
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }
  static Doubles widened(const float* from) { return vcvt_f64_f32(vld1_f32(from)); }
  static Wide even_squares(const Integers& x) {
    const int32x2_t even = vmovn_s64(vreinterpretq_s64_s32(x));
    return vreinterpretq_u64_s64(vmull_s32(even, even));
  }
  static Integers shift(const Integers& x, int bits) { return vshlq_s32(x, vdupq_n_s32(-bits)); }
#endif
};

/// What makes codes, of the instruction set that XsimdOps is for.
class XsimdEncodingOps : public XsimdProductOps, XsimdLanes, protected XsimdIntegers {
 public:
  template <class T>
  static void centre_lanes(const T* const* rows, const float* centre, int dim, float* to,
                           std::uint32_t* largest) {
    for (std::size_t l = 0; l < kRotationLanes; ++l) largest[l] = 0;
    const auto end = static_cast<std::size_t>(dim);
    std::size_t begin = 0;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
      constexpr std::size_t kScalars = 16 / sizeof(T);
      begin = end / kScalars * kScalars;
      centre_units(rows, centre, begin, to, largest);
    }
    for (; begin < end; begin += kChunk) {
      centre_widened(rows, centre, begin, end - begin < kChunk ? end : begin + kChunk, to, largest);
    }
  }

  template <class T>
  static double squared_distance(const T* row, const float* centre, int dim) {
    alignas(kAlignment) double sums[kSums] = {};
    const auto end = static_cast<std::size_t>(dim);
    for (std::size_t begin = 0; begin < end; begin += kChunk) {
      alignas(kAlignment) float x[kChunk];
      const std::size_t size = end - begin < kChunk ? end - begin : kChunk;
      const std::size_t whole = widen(row, begin, size, x);
      for (std::size_t j = 0; j < whole; j += kLanes) {
        (Floats::load_aligned(x + j) - Floats::load_unaligned(centre + begin + j))
            .store_aligned(x + j);
      }
      for (std::size_t j = whole; j < size; ++j) x[j] -= centre[begin + j];
      std::size_t filled = size;
      for (; filled % kSums != 0; ++filled) x[filled] = 0.0F;
      for (std::size_t i = 0; i < kSums; i += Doubles::size) {
        auto sum = Doubles::load_aligned(sums + i);
        for (std::size_t j = i; j < filled; j += kSums) {
          const Doubles v = widened(x + j);
          sum += v * v;  // exact
        }
        sum.store_aligned(sums + i);
      }
    }
    for (std::size_t half = kSums / 2; half > 0; half /= 2) {
      for (std::size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    return sums[0];
  }

  static void scale_lanes(const float* x, const float* powers, int n, std::int32_t* to) {
    for (std::size_t l = 0; l < kRotationLanes; l += kLanes) {
      const auto power = Floats::load_unaligned(powers + l);
      for (std::size_t i = l; i < end_of(n); i += kRotationLanes) {
        xsimd::to_int(Floats::load_unaligned(x + i) * power).store_unaligned(to + i);
      }
    }
  }

  static void transform_lanes(const LaneTransform& transform, std::int32_t* x) {
    Pass pass{.x = x,
              .signs = transform.signs,
              .count = static_cast<std::size_t>(transform.count),
              .stride = static_cast<std::size_t>(transform.stride),
              .shift = transform.shift};
    // As few passes of as many steps as there are registers for, the larger ones first.
    int steps = 0;
    while (pass.stride << steps < pass.count) ++steps;
    for (int passes = (steps + kMostSteps - 1) / kMostSteps; passes > 0; --passes) {
      pass.is_last = passes == 1;
      const int own = (steps + passes - 1) / passes;
      if (own == 1) run<1>(pass);
      if (own == 2) run<2>(pass);
      if (own == 3) run<3>(pass);
      if constexpr (kMostSteps > 3) {
        if (own == 4) run<4>(pass);
      }
      steps -= own;
      pass.stride <<= own;
      pass.signs = nullptr;
    }
  }

  static void square_lanes(const std::int32_t* x, int n, std::int64_t* squares) {
    for (std::size_t l = 0; l < kRotationLanes; l += kLanes) {
      Wide even(0);
      Wide odd(0);
      for (std::size_t i = l; i < end_of(n); i += kRotationLanes) {
        const auto v = Integers::load_unaligned(x + i);
        even += even_squares(v);
        odd += even_squares(std::bit_cast<Integers>(std::bit_cast<Wide>(v) >> 32));
      }
      alignas(kAlignment) std::uint64_t lanes[2][Wide::size];
      even.store_aligned(lanes[0]);
      odd.store_aligned(lanes[1]);
      for (std::size_t i = 0; i < kLanes; ++i) {
        squares[l + i] = static_cast<std::int64_t>(lanes[i % 2][i / 2]);
      }
    }
  }

  template <int kBits>
  static void quantise_lanes(const std::int32_t* x, int n, const std::int32_t* bounds,
                             const CodeLanes& lanes, std::int32_t* sums) {
    constexpr auto kPlanes = static_cast<std::size_t>(kBits);
    const auto rows = static_cast<std::size_t>(n) / 4;
    for (std::size_t l = 0; l < kRotationLanes; l += kLanes) {
      Integers total(0);
      Integers set[kPlanes];
      const std::int32_t* own = kBits > 1 ? bounds + l : nullptr;  // signs have none
      each<kPlanes>([&](auto p) { set[p] = Integers(0); });
      for (std::size_t row = 0; row < rows; ++row) {
        Integers bits[kPlanes];
        each<kPlanes>([&](auto p) { bits[p] = Integers(0); });
        each<4>([&](auto i) {
          const auto v = Integers::load_unaligned(x + (4 * row + i) * kRotationLanes + l);
          // That of negative numbers is -1 - v, whose code is the complement.
          const Integers size = v ^ (v >> 31);
          total += v;
          each<kPlanes>([&](auto p) {
            const Integers is_set = plane<kBits, p(), kLevels<kBits> / 2 - 1>(v, size, own);
            set[p] += v & is_set;
            bits[p] |= Integers(1 << i) & is_set;
          });
        });
        each<kPlanes>([&](auto p) { put(bits[p], lanes, p * rows + row, l); });
      }
      // Those whose bit is set, less all the others.
      each<kPlanes>([&](auto p) {
        (set[p] + set[p] - total).store_unaligned(sums + p * kRotationLanes + l);
      });
    }
  }

 private:
  using Bits = xsimd::batch<std::uint32_t>;
  static constexpr std::size_t kLanes = Floats::size;
  static_assert(kRotationLanes % kLanes == 0);
  // Rows are widened so many scalars at a time where they are not read as they are.
  static constexpr std::size_t kChunk = 64;
  static constexpr std::size_t kSums = 16;  // of squared_distance()
  template <int kBits>
  static constexpr int kLevels = 1 << kBits;

  // Sixteen vectors and what their sums need take more than 16 registers.
  static constexpr int kMostSteps = XSIMD_WITH_AVX512BW || XSIMD_WITH_NEON64 ? 4 : 3;

  static std::size_t end_of(int n) { return static_cast<std::size_t>(n) * kRotationLanes; }

  // Scalars [begin, begin + size) to `to`, aligned and of whole steps; returns how many of them are
  // in whole vectors.
  template <class T>
  static std::size_t widen(const T* row, std::size_t begin, std::size_t size, float* to) {
    std::size_t j = 0;
    if constexpr (std::is_same_v<T, bf16>) {  // loads of pairs would have to be put in order
      for (; j + kLanes <= size; j += kLanes) widened(row + begin + j).store_aligned(to + j);
    } else {
      for (; j + XsimdLoads::kStep <= size; j += XsimdLoads::kStep) {
        XsimdLoads::store_like<T>(XsimdLoads::load(row, begin + j), to + j);
      }
    }
    for (std::size_t i = j; i < size; ++i) to[i] = scalar_at(row, static_cast<int>(begin + i));
    return j;
  }

  // One coordinate of kLanes rows.
  static void centre_one(const Floats& x, float centre, float* to, Integers& largest) {
    const Floats centred = x - Floats(centre);
    centred.store_unaligned(to);
    largest = (xsimd::max)(largest, std::bit_cast<Integers>(centred) & Integers(0x7fffffff));
  }

  // The coordinates in 32 bits of kLanes rows: one float, or two bf16.
  static void centre_unit(float, const Floats& unit, const float* centre, float* to,
                          Integers& largest) {
    centre_one(unit, centre[0], to, largest);
  }
  // Little-endian: the first of a pair is the lower half.
  static void centre_unit(bf16, const Floats& unit, const float* centre, float* to,
                          Integers& largest) {
    const auto bits = std::bit_cast<Bits>(unit);
    centre_one(std::bit_cast<Floats>(bits << 16), centre[0], to, largest);
    centre_one(std::bit_cast<Floats>(bits & Bits(0xffff0000U)), centre[1], to + kRotationLanes,
               largest);
  }

  // Coordinates [0, end), a number of whole loads of 16 bytes.
  template <class T>
  static void centre_units(const T* const* rows, const float* centre, std::size_t end, float* to,
                           std::uint32_t* largest) {
    constexpr std::size_t kPerUnit = 4 / sizeof(T);
    const float* units[kRotationLanes];  // only copied, whatever they are
    for (std::size_t l = 0; l < kRotationLanes; ++l) {
      units[l] = reinterpret_cast<const float*>(rows[l]);
    }
    for (std::size_t l = 0; l < kRotationLanes; l += kLanes) {
      auto most = std::bit_cast<Integers>(Bits::load_unaligned(largest + l));
      for (std::size_t j = 0; j < end; j += 4 * kPerUnit) {
        // Vectors of blocks, each of another row.
        Floats v[4];
        each<4>([&](auto i) { v[i] = blocks(units + l + i, j / kPerUnit); });
        transpose(v[0], v[1], v[2], v[3]);
        each<4>([&](auto i) {
          const std::size_t at = j + i * kPerUnit;
          centre_unit(T(), v[i], centre + at, to + at * kRotationLanes + l, most);
        });
      }
      std::bit_cast<Bits>(most).store_unaligned(largest + l);
    }
  }

  // Coordinates [begin, end), kChunk at most.
  template <class T>
  static void centre_widened(const T* const* rows, const float* centre, std::size_t begin,
                             std::size_t end, float* to, std::uint32_t* largest) {
    alignas(kAlignment) float x[kRotationLanes * kChunk];
    const float* wide[kRotationLanes];
    const std::size_t size = end - begin;
    for (std::size_t l = 0; l < kRotationLanes; ++l) {
      wide[l] = x + l * kChunk;
      widen(rows[l], begin, size, x + l * kChunk);
    }
    const std::size_t whole = size / 4 * 4;
    centre_units(wide, centre + begin, whole, to + begin * kRotationLanes, largest);
    for (std::size_t j = whole; j < size; ++j) {
      alignas(kAlignment) float column[kRotationLanes];
      for (std::size_t l = 0; l < kRotationLanes; ++l) column[l] = wide[l][j];
      for (std::size_t l = 0; l < kRotationLanes; l += kLanes) {
        auto most = std::bit_cast<Integers>(Bits::load_unaligned(largest + l));
        centre_one(Floats::load_aligned(column + l), centre[begin + j],
                   to + (begin + j) * kRotationLanes + l, most);
        std::bit_cast<Bits>(most).store_unaligned(largest + l);
      }
    }
  }

  // Several steps of a transform: of coordinates `stride`, 2 stride ... apart.
  struct Pass {
    std::int32_t* x = nullptr;
    const std::int32_t* signs = nullptr;  // null behind the first
    std::size_t count = 0;
    std::size_t stride = 0;
    int shift = 0;
    bool is_last = false;
  };

  template <std::size_t kSteps>
  static void run(const Pass& pass) {
    if (pass.signs == nullptr) {
      return pass.is_last ? run<kSteps, false, true>(pass) : run<kSteps, false, false>(pass);
    }
    if (pass.is_last) return run<kSteps, true, true>(pass);
    // Most transforms begin so. The places of 16 coordinates are then constants.
    if (pass.stride == 1) return run<kSteps, true, false, 1>(pass);
    run<kSteps, true, false>(pass);
  }

  template <std::size_t kSteps, bool kIsFirst, bool kIsLast, std::size_t kStride = 0>
  static void run(const Pass pass) {
    const std::size_t stride = kStride != 0 ? kStride : pass.stride;
    for (std::size_t i = 0; i < pass.count; i += stride << kSteps) {
      for (std::size_t j = i; j < i + stride; ++j) {
        for (std::size_t l = 0; l < kRotationLanes; l += kLanes) {
          take_steps<kSteps, kIsFirst, kIsLast>(pass, stride, j, l);
        }
      }
    }
  }

  // Of coordinates j, j + stride ..., lanes from l on.
  template <std::size_t kSteps, bool kIsFirst, bool kIsLast>
  MAGICPIG_ALWAYS_INLINE static void take_steps(const Pass& pass, std::size_t stride, std::size_t j,
                                                std::size_t l) {
    constexpr std::size_t kCount = std::size_t{1} << kSteps;
    std::int32_t* x = pass.x + j * kRotationLanes + l;
    Integers v[kCount];
    each<kCount>([&](auto i) {
      v[i] = Integers::load_unaligned(x + i * stride * kRotationLanes);
      if constexpr (kIsFirst) {
        const Integers sign(pass.signs[j + i * stride]);
        v[i] = (v[i] ^ sign) - sign;
      }
    });
    // What is added to the first of them is in every sum.
    if constexpr (kIsLast) v[0] += Integers((std::int32_t{1} << pass.shift) / 2);
    each<kSteps>([&](auto step) {
      each<kCount / 2>([&](auto i) {
        constexpr std::size_t kHalf = std::size_t{1} << step();
        constexpr std::size_t kAt = i() / kHalf * 2 * kHalf + i() % kHalf;
        const Integers sum = v[kAt] + v[kAt + kHalf];
        v[kAt + kHalf] = v[kAt] - v[kAt + kHalf];
        v[kAt] = sum;
      });
    });
    each<kCount>([&](auto i) {
      if constexpr (kIsLast) v[i] = shift(v[i], pass.shift);
      v[i].store_unaligned(x + i * stride * kRotationLanes);
    });
  }

  // Bit p of codes, were there only the first `b` bounds, all ones where it is set: each bound that
  // is passed changes the bit if it differs between the codes above and below. Not as a batch_bool,
  // whose operations xsimd 8.1.0 has wrong (^ with AVX-512) or does not compile without
  // optimisation (select).
  template <int kBits, std::size_t p, int b>
  MAGICPIG_ALWAYS_INLINE static Integers plane(const Integers& x, const Integers& size,
                                               const std::int32_t* bounds) {
    constexpr Levels kOwn(kBits);
    constexpr int kCode = kOwn.code(kOwn.count() / 2 + b);
    if constexpr (b == 0) {
      if constexpr (((kCode >> p) & 1) != 0) return ~(x >> 31);
      return x >> 31;
    } else {
      const Integers others = plane<kBits, p, b - 1>(x, size, bounds);
      constexpr int kChanged = kCode ^ kOwn.code(kOwn.count() / 2 + b - 1);
      if constexpr (((kChanged >> p) & 1) == 0) return others;
      return others ^ ((Integers::load_unaligned(bounds + (b - 1) * kRotationLanes) - size) >> 31);
    }
  }
};

#endif

}  // namespace magicpig::inline MAGICPIG_ABI

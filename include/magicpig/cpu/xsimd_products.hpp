// SPDX-License-Identifier: Apache-2.0
// The operations of product quantisation, through xsimd, for the instruction set that this file is
// compiled for.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <xsimd/xsimd.hpp>

#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/cpu/xsimd_integers.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

#ifdef MAGICPIG_XSIMD_INTEGERS

/// Pairs of 16-bit integers, one in each lane of 32 bits, and sums of their products, which xsimd
/// 8.1.0 lacks.
struct XsimdPairs {
  using Integers = xsimd::batch<std::int32_t>;

  // load() takes the pairs of Integers::size tokens, repeat() one pair for all lanes; add() adds to
  // each sum its two products; narrow() stores numbers below 16.
#if XSIMD_WITH_NEON64
  using Coordinates = int16x4x2_t;  // first ones and second ones
  using Entries = int16x4_t;

  static Coordinates load(const std::int16_t* x) { return vld2_s16(x); }
  static Entries repeat(const std::int16_t* entries) {
    return vreinterpret_s16_s32(vdup_n_s32(both(entries)));
  }
  MAGICPIG_ALWAYS_INLINE static void add(const Entries& entries, const Coordinates& x,
                                         Integers& sums) {
    sums = vmlal_lane_s16(vmlal_lane_s16(sums, x.val[0], entries, 0), x.val[1], entries, 1);
  }
  static void narrow(const Integers& x, std::uint16_t* to) {
    vst1_u16(to, vreinterpret_u16_s16(vmovn_s32(x)));
  }
#else
  using Coordinates = Integers;
  using Entries = Integers;

#if XSIMD_WITH_AVX512BW
  MAGICPIG_ALWAYS_INLINE static Coordinates load(const std::int16_t* x) {
    return Integers(_mm512_loadu_si512(x));
  }
  MAGICPIG_ALWAYS_INLINE static void add(const Entries& entries, const Coordinates& x,
                                         Integers& sums) {
#if defined(__AVX512VNNI__)
    sums = _mm512_dpwssd_epi32(sums, x, entries);
#else
    sums += Integers(_mm512_madd_epi16(x, entries));
#endif
  }
  static void narrow(const Integers& x, std::uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x));
  }
#elif XSIMD_WITH_AVX2
  MAGICPIG_ALWAYS_INLINE static Coordinates load(const std::int16_t* x) {
    return Integers(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  MAGICPIG_ALWAYS_INLINE static void add(const Entries& entries, const Coordinates& x,
                                         Integers& sums) {
    sums += Integers(_mm256_madd_epi16(x, entries));
  }
  static void narrow(const Integers& x, std::uint16_t* to) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
  }
#else
  MAGICPIG_ALWAYS_INLINE static Coordinates load(const std::int16_t* x) {
    return Integers(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  MAGICPIG_ALWAYS_INLINE static void add(const Entries& entries, const Coordinates& x,
                                         Integers& sums) {
    sums += Integers(_mm_madd_epi16(x, entries));
  }
  static void narrow(const Integers& x, std::uint16_t* to) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi32(x, x));
  }
#endif
  MAGICPIG_ALWAYS_INLINE static Entries repeat(const std::int16_t* entries) {
    return Integers(both(entries));
  }
#endif

 private:
  static std::int32_t both(const std::int16_t* entries) {
    std::int32_t pair = 0;
    std::memcpy(&pair, entries, sizeof pair);
    return pair;
  }
};

/// ProductOps of the instruction set that XsimdOps is for.
class XsimdProductOps {
  using Vector = XsimdPairs::Integers;
  using Coordinates = XsimdPairs::Coordinates;
  static constexpr std::size_t kLanes = Vector::size;
  static_assert(kRotationLanes % kLanes == 0);
  static constexpr std::size_t kVectors = kRotationLanes / kLanes;
  using EachVector = std::make_index_sequence<kVectors>;

 public:
  static void pair_lanes(const std::int32_t* first, const std::int32_t* second, int count,
                         int stride, std::int16_t* to) {
    for (int i = 0; i < count; ++i) {
      const std::int64_t at = std::int64_t{i} * kRotationLanes;
      std::int16_t* row = to + std::int64_t{i} * stride;
      for (std::size_t l = 0; l < kRotationLanes; l += kLanes) {
        Vector pair = Vector::load_unaligned(first + at + l) & Vector(0xffff);
        if (second != nullptr) pair = pair | (Vector::load_unaligned(second + at + l) << 16);
        std::memcpy(row + 2 * l, &pair, sizeof pair);
      }
    }
  }

  static void project_lanes(const std::int16_t* matrix, int n, const std::int16_t* x, int shift,
                            std::int32_t* y) {
    const auto size = static_cast<std::size_t>(n);
    std::size_t j = 0;
    for (; j + kRows <= size; j += kRows) {
      project_rows(std::make_index_sequence<kRows>(), matrix + j * size, size, x, shift,
                   y + j * kRotationLanes);
    }
    for (; j < size; j += 2) {
      project_rows(std::make_index_sequence<2>(), matrix + j * size, size, x, shift,
                   y + j * kRotationLanes);
    }
  }

  static void nearest_lanes(const Centroids& centroids, const std::int16_t* y,
                            const CodeLanes& lanes, std::int32_t* dots) {
    if (centroids.pairs == 1) {
      find_nearest<1>(EachVector(), centroids, y, lanes, dots);
    } else {
      find_nearest<2>(EachVector(), centroids, y, lanes, dots);
    }
  }

 protected:
  // Four bits of lanes from l on to their words in a row, four words at a time.
  static void put(const Vector& bits, const CodeLanes& lanes, std::size_t row, std::size_t l) {
    std::uint16_t own[kLanes];
    XsimdPairs::narrow(bits, own);
    std::uint8_t* to = lanes.words + row * CodeLanes::kRowBytes + 2 * l;
    for (std::size_t i = 0; i < kLanes; i += 4) {
      std::uint64_t word = 0;
      std::uint64_t fresh = 0;
      std::uint64_t wanted = 0;
      std::memcpy(&word, to + 2 * i, sizeof word);
      std::memcpy(&fresh, own + i, sizeof fresh);
      std::memcpy(&wanted, lanes.wanted + l + i, sizeof wanted);
      word = (word & ~wanted) | ((fresh << lanes.shift) & wanted);
      std::memcpy(to + 2 * i, &word, sizeof word);
    }
  }

 private:
  // Of a matrix, so many at a time: their sums and what they need fill 16 registers, or 32 of which
  // each holds few lanes.
  static constexpr std::size_t kRows = XSIMD_WITH_AVX512BW                  ? 8
                                       : kVectors == 2 || XSIMD_WITH_NEON64 ? 4
                                                                            : 2;

  // Rows [0, sizeof...(r)) of a matrix.
  template <std::size_t... r>
  static void project_rows(std::index_sequence<r...> all, const std::int16_t* matrix, std::size_t n,
                           const std::int16_t* x, int shift, std::int32_t* y) {
    constexpr std::size_t kSums = sizeof...(r) * kVectors;
    // Where all lanes are in one vector, the sums of every second pair are apart: more of them are
    // then under way at the same time.
    constexpr std::size_t kOther = kVectors == 1 ? kSums : 0;
    const std::int16_t* rows[] = {matrix + r * n...};
    Vector sums[kSums + kOther];
    (set(EachVector(), (std::int32_t{1} << shift) / 2, sums + r * kVectors), ...);
    if constexpr (kOther > 0) (set(EachVector(), 0, sums + kOther + r * kVectors), ...);
    std::size_t i = 0;
    for (; i + 4 <= n; i += 4) {
      add_rows(all, rows, i, x, sums);
      add_rows(all, rows, i + 2, x, sums + kOther);
    }
    if (i < n) add_rows(all, rows, i, x, sums);
    if constexpr (kOther > 0) ((sums[r] += sums[kOther + r]), ...);
    (store(EachVector(), sums + r * kVectors, shift, y + r * kRotationLanes), ...);
  }

  // Adds the products of pair i / 2 to kVectors sums each.
  template <std::size_t... r>
  MAGICPIG_ALWAYS_INLINE static void add_rows(std::index_sequence<r...>,
                                              const std::int16_t* const* rows, std::size_t i,
                                              const std::int16_t* x, Vector* sums) {
    Coordinates own[kVectors];
    load(EachVector(), x + i * kRotationLanes, own);
    (add(EachVector(), rows[r] + i, own, sums + r * kVectors), ...);
  }

  template <std::size_t... v>
  MAGICPIG_ALWAYS_INLINE static void set(std::index_sequence<v...>, std::int32_t value,
                                         Vector* to) {
    ((to[v] = Vector(value)), ...);
  }
  template <std::size_t... v>
  MAGICPIG_ALWAYS_INLINE static void load(std::index_sequence<v...>, const std::int16_t* x,
                                          Coordinates* to) {
    ((to[v] = XsimdPairs::load(x + 2 * v * kLanes)), ...);
  }
  template <std::size_t... v>
  MAGICPIG_ALWAYS_INLINE static void add(std::index_sequence<v...>, const std::int16_t* entries,
                                         const Coordinates* x, Vector* sums) {
    const XsimdPairs::Entries both = XsimdPairs::repeat(entries);
    (XsimdPairs::add(both, x[v], sums[v]), ...);
  }
  template <std::size_t... v>
  MAGICPIG_ALWAYS_INLINE static void store(std::index_sequence<v...>, const Vector* sums, int shift,
                                           std::int32_t* y) {
    ((sums[v] >> shift).store_unaligned(y + v * kLanes), ...);
  }

  template <int kPairs, std::size_t... v>
  static void find_nearest(std::index_sequence<v...>, const Centroids& centroids,
                           const std::int16_t* y, const CodeLanes& lanes, std::int32_t* dots) {
    Vector totals[kVectors] = {((void)v, Vector(0))...};
    for (std::size_t row = 0; row < static_cast<std::size_t>(centroids.rows); ++row) {
      const std::int16_t* values = centroids.values + row * 16 * kPairs * 2;
      const std::int32_t* half_norms = centroids.half_norms + row * 16;
      Coordinates own[kPairs * kVectors];
      load(EachVector(), y, own);
      if constexpr (kPairs == 2) load(EachVector(), y + 2 * kRotationLanes, own + kVectors);
      y += kPairs * 2 * kRotationLanes;
      Vector scores[kVectors];  // of the nearest so far
      Vector products[kVectors];
      Vector nearest[kVectors];
      each_centroid<kPairs>(std::make_integer_sequence<int, 16>(), values, half_norms, own, scores,
                            products, nearest);
      ((totals[v] += products[v] >> Centroids::kDotShift), ...);
      (put(nearest[v], lanes, row, v * kLanes), ...);
    }
    (totals[v].store_unaligned(dots + v * kLanes), ...);
  }

  template <int kPairs, int... c>
  MAGICPIG_ALWAYS_INLINE static void each_centroid(std::integer_sequence<int, c...>,
                                                   const std::int16_t* values,
                                                   const std::int32_t* half_norms,
                                                   const Coordinates* own, Vector* scores,
                                                   Vector* products, Vector* nearest) {
    (compare<kPairs, c>(EachVector(), values + c * kPairs * 2, half_norms[c], own, scores, products,
                        nearest),
     ...);
  }

  template <int kPairs, int c, std::size_t... v>
  MAGICPIG_ALWAYS_INLINE static void compare(std::index_sequence<v...>, const std::int16_t* values,
                                             std::int32_t half_norm, const Coordinates* own,
                                             Vector* scores, Vector* products, Vector* nearest) {
    Vector fresh[kVectors] = {((void)v, Vector(0))...};
    add(EachVector(), values, own, fresh);
    if constexpr (kPairs == 2) add(EachVector(), values + 2, own + kVectors, fresh);
    const Vector half(half_norm);
    (take<c>(fresh[v], fresh[v] - half, scores[v], products[v], nearest[v]), ...);
  }

  // Centroid c, of score `own`, is the nearest where that is larger than those before.
  template <int c>
  MAGICPIG_ALWAYS_INLINE static void take(const Vector& fresh, const Vector& own, Vector& score,
                                          Vector& product, Vector& nearest) {
    if constexpr (c == 0) {
      score = own;
      product = fresh;
      nearest = Vector(0);
    } else {
      // By how much it is nearer, as a number without a sign; all ones where it is not. Not by
      // select(), which xsimd 8.1.0 does not compile for integers without optimisation.
      using Words = xsimd::batch<std::uint32_t>;
      const Vector larger = (xsimd::max)(score, own);
      const auto by = std::bit_cast<Words>(larger - score);
      const auto kept = std::bit_cast<Vector>((xsimd::min)(by, Words(1)) - Words(1));
      score = larger;
      product = fresh ^ ((fresh ^ product) & kept);
      nearest = Vector(c) ^ ((Vector(c) ^ nearest) & kept);
    }
  }
};

static_assert(ProductOps<XsimdProductOps>);

#endif

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// The operations of product quantisation in terms of Google Highway, for the target that is being
// compiled.

// In place of #pragma once, as in highway-inl.hpp.
#if defined(MAGICPIG_CPU_HIGHWAY_PRODUCTS_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef MAGICPIG_CPU_HIGHWAY_PRODUCTS_INL_HPP
#undef MAGICPIG_CPU_HIGHWAY_PRODUCTS_INL_HPP
#else
#define MAGICPIG_CPU_HIGHWAY_PRODUCTS_INL_HPP
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/version.hpp"

HWY_BEFORE_NAMESPACE();
namespace magicpig::inline MAGICPIG_ABI {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET != HWY_SCALAR

/// Pairs of 16-bit integers, one in each lane of 32 bits, and sums of their products: Highway 1.0.3
/// has none that keep to their lanes.
class HighwayPairs {
  using Integers = hn::CappedTag<std::int32_t, kRotationLanes>;
  using IntegerVector = hn::Vec<Integers>;

 public:
#if HWY_TARGET == HWY_NEON
  /// The pairs of Lanes() tokens: their first and their second coordinates.
  struct Coordinates {
    int16x4_t first;
    int16x4_t second;
  };
  /// One pair, for all lanes.
  using Entries = int16x4_t;

  HWY_INLINE static Coordinates load(const std::int16_t* x) {
    const int16x4x2_t both = vld2_s16(x);
    return {both.val[0], both.val[1]};
  }
  HWY_INLINE static Entries repeat(const std::int16_t* entries) {
    return vreinterpret_s16_s32(vdup_n_s32(both(entries)));
  }
  /// sums += the sum of the two products.
  HWY_INLINE static void add(Entries entries, const Coordinates& x, IntegerVector& sums) {
    const int32x4_t first = vmlal_lane_s16(sums.raw, x.first, entries, 0);
    sums = IntegerVector(vmlal_lane_s16(first, x.second, entries, 1));
  }
#else
  using Coordinates = IntegerVector;
  using Entries = IntegerVector;

  HWY_INLINE static Coordinates load(const std::int16_t* x) {
    const hn::Repartition<std::int16_t, Integers> d;
    return hn::BitCast(Integers(), hn::LoadU(d, x));
  }
  HWY_INLINE static Entries repeat(const std::int16_t* entries) {
    return hn::Set(Integers(), both(entries));
  }
  HWY_INLINE static void add(Entries entries, Coordinates x, IntegerVector& sums) {
#if HWY_TARGET <= HWY_AVX3 && defined(__AVX512VNNI__)
    sums = IntegerVector{_mm512_dpwssd_epi32(sums.raw, x.raw, entries.raw)};
#elif HWY_TARGET <= HWY_AVX3
    sums = hn::Add(sums, IntegerVector{_mm512_madd_epi16(x.raw, entries.raw)});
#elif HWY_TARGET == HWY_AVX2
    sums = hn::Add(sums, IntegerVector{_mm256_madd_epi16(x.raw, entries.raw)});
#elif HWY_TARGET <= HWY_SSSE3
    sums = hn::Add(sums, IntegerVector{_mm_madd_epi16(x.raw, entries.raw)});
#else
    sums = hn::Add(sums, hn::Mul(first_of(x), first_of(entries)));
    sums = hn::Add(sums, hn::Mul(hn::ShiftRight<16>(x), hn::ShiftRight<16>(entries)));
#endif
  }
#endif

 private:
  HWY_INLINE static std::int32_t both(const std::int16_t* entries) {
    std::int32_t pair = 0;
    std::memcpy(&pair, entries, sizeof pair);
    return pair;
  }
  // Little-endian: the first of a pair is the lower half.
  HWY_INLINE static IntegerVector first_of(IntegerVector pairs) {
    return hn::ShiftRight<16>(hn::ShiftLeft<16>(pairs));
  }
};

/// ProductOps of one Highway target.
class HighwayProductOps {
  using Integers = hn::CappedTag<std::int32_t, kRotationLanes>;
  using IntegerVector = hn::Vec<Integers>;
  using Coordinates = HighwayPairs::Coordinates;
  static constexpr std::size_t kVectors = kRotationLanes / hn::MaxLanes(Integers());
  using EachVector = std::make_index_sequence<kVectors>;

 public:
  static HWY_ATTR void pair_lanes(const std::int32_t* first, const std::int32_t* second, int count,
                                  int stride, std::int16_t* to) {
    const Integers d;
    const hn::Repartition<std::int16_t, Integers> d16;
    const IntegerVector lower = hn::Set(d, 0xffff);
    for (int i = 0; i < count; ++i) {
      const std::int64_t at = std::int64_t{i} * kRotationLanes;
      std::int16_t* row = to + std::int64_t{i} * stride;
      for (std::size_t l = 0; l < kRotationLanes; l += hn::Lanes(d)) {
        IntegerVector pair = hn::And(hn::LoadU(d, first + at + l), lower);
        if (second != nullptr) {
          pair = hn::Or(pair, hn::ShiftLeft<16>(hn::LoadU(d, second + at + l)));
        }
        hn::StoreU(hn::BitCast(d16, pair), d16, row + 2 * l);
      }
    }
  }

  static HWY_ATTR void project_lanes(const std::int16_t* matrix, int n, const std::int16_t* x,
                                     int shift, std::int32_t* y) {
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

  static HWY_ATTR void nearest_lanes(const Centroids& centroids, const std::int16_t* y,
                                     const CodeLanes& lanes, std::int32_t* dots) {
    if (centroids.pairs == 1) {
      find_nearest<1>(EachVector(), centroids, y, lanes, dots);
    } else {
      find_nearest<2>(EachVector(), centroids, y, lanes, dots);
    }
  }

 protected:
  // Four bits of lanes from l on to their words in a row.
  HWY_INLINE static void put(IntegerVector bits, const CodeLanes& lanes, std::size_t row,
                             std::size_t l) {
    const hn::Rebind<std::uint16_t, Integers> d;
    const hn::Repartition<std::uint8_t, decltype(d)> d8;
    std::uint8_t* to = lanes.words + row * CodeLanes::kRowBytes + 2 * l;
    const auto own = hn::DemoteTo(d, hn::ShiftLeftSame(bits, lanes.shift));
    const auto wanted = hn::LoadU(d, lanes.wanted + l);
    const auto old = hn::BitCast(d, hn::LoadU(d8, to));
    const auto word = hn::Or(hn::AndNot(wanted, old), hn::And(wanted, own));
    hn::StoreU(hn::BitCast(d8, word), d8, to);
  }

 private:
  // Of a matrix, so many at a time: their sums and what they need fill 16 registers, or 32 of which
  // each holds few lanes.
  static constexpr std::size_t kRows = HWY_TARGET <= HWY_AVX3              ? 8
                                       : kVectors == 2 || HWY_ARCH_ARM_A64 ? 4
                                                                           : 2;

  // Rows [0, sizeof...(r)) of a matrix.
  template <std::size_t... r>
  static HWY_ATTR HWY_NOINLINE void project_rows(std::index_sequence<r...> all,
                                                 const std::int16_t* matrix, std::size_t n,
                                                 const std::int16_t* x, int shift,
                                                 std::int32_t* y) {
    const Integers d;
    constexpr std::size_t kSums = sizeof...(r) * kVectors;
    // Where all lanes are in one vector, the sums of every second pair are apart: more of them are
    // then under way at the same time.
    constexpr std::size_t kOther = kVectors == 1 ? kSums : 0;
    const std::int16_t* rows[] = {matrix + r * n...};
    IntegerVector sums[kSums + kOther];
    (set(EachVector(), hn::Set(d, (std::int32_t{1} << shift) / 2), sums + r * kVectors), ...);
    if constexpr (kOther > 0) (set(EachVector(), hn::Zero(d), sums + kOther + r * kVectors), ...);
    std::size_t i = 0;
    for (; i + 4 <= n; i += 4) {
      add_rows(all, rows, i, x, sums);
      add_rows(all, rows, i + 2, x, sums + kOther);
    }
    if (i < n) add_rows(all, rows, i, x, sums);
    if constexpr (kOther > 0) {
      (add_sums(EachVector(), sums + kOther + r * kVectors, sums + r * kVectors), ...);
    }
    (store(EachVector(), sums + r * kVectors, shift, y + r * kRotationLanes), ...);
  }

  // Adds the products of pair i / 2 to kVectors sums each.
  template <std::size_t... r>
  HWY_INLINE static void add_rows(std::index_sequence<r...>, const std::int16_t* const* rows,
                                  std::size_t i, const std::int16_t* x, IntegerVector* sums) {
    Coordinates own[kVectors];
    load(EachVector(), x + i * kRotationLanes, own);
    (add(EachVector(), rows[r] + i, own, sums + r * kVectors), ...);
  }

  template <std::size_t... v>
  HWY_INLINE static void set(std::index_sequence<v...>, IntegerVector value, IntegerVector* to) {
    ((to[v] = value), ...);
  }
  template <std::size_t... v>
  HWY_INLINE static void load(std::index_sequence<v...>, const std::int16_t* x, Coordinates* to) {
    ((to[v] = HighwayPairs::load(x + 2 * v * hn::Lanes(Integers()))), ...);
  }
  template <std::size_t... v>
  HWY_INLINE static void add(std::index_sequence<v...>, const std::int16_t* entries,
                             const Coordinates* x, IntegerVector* sums) {
    const HighwayPairs::Entries both = HighwayPairs::repeat(entries);
    (HighwayPairs::add(both, x[v], sums[v]), ...);
  }
  template <std::size_t... v>
  HWY_INLINE static void add_sums(std::index_sequence<v...>, const IntegerVector* others,
                                  IntegerVector* sums) {
    ((sums[v] = hn::Add(sums[v], others[v])), ...);
  }
  template <std::size_t... v>
  HWY_INLINE static void store(std::index_sequence<v...>, const IntegerVector* sums, int shift,
                               std::int32_t* y) {
    const Integers d;
    (hn::StoreU(hn::ShiftRightSame(sums[v], shift), d, y + v * hn::Lanes(d)), ...);
  }

  template <int kPairs, std::size_t... v>
  HWY_INLINE static void find_nearest(std::index_sequence<v...>, const Centroids& centroids,
                                      const std::int16_t* y, const CodeLanes& lanes,
                                      std::int32_t* dots) {
    const Integers d;
    IntegerVector totals[kVectors] = {((void)v, hn::Zero(d))...};
    for (std::size_t row = 0; row < static_cast<std::size_t>(centroids.rows); ++row) {
      const std::int16_t* values = centroids.values + row * 16 * kPairs * 2;
      const std::int32_t* half_norms = centroids.half_norms + row * 16;
      Coordinates own[kPairs * kVectors];
      load(EachVector(), y, own);
      if constexpr (kPairs == 2) load(EachVector(), y + 2 * kRotationLanes, own + kVectors);
      y += kPairs * 2 * kRotationLanes;
      IntegerVector scores[kVectors];  // of the nearest so far
      IntegerVector nearest[kVectors];
      each_centroid<kPairs>(std::make_integer_sequence<int, 16>(), values, half_norms, own, scores,
                            nearest);
      ((totals[v] = hn::Add(totals[v], hn::ShiftRight<Centroids::kDotShift>(
                                           product(scores[v], nearest[v], half_norms)))),
       ...);
      (put(nearest[v], lanes, row, v * hn::Lanes(d)), ...);
    }
    (hn::StoreU(totals[v], d, dots + v * hn::Lanes(d)), ...);
  }

  template <int kPairs, int... c>
  HWY_INLINE static void each_centroid(std::integer_sequence<int, c...>, const std::int16_t* values,
                                       const std::int32_t* half_norms, const Coordinates* own,
                                       IntegerVector* scores, IntegerVector* nearest) {
    (compare<kPairs, c>(EachVector(), values + c * kPairs * 2, half_norms[c], own, scores, nearest),
     ...);
  }

  template <int kPairs, int c, std::size_t... v>
  HWY_INLINE static void compare(std::index_sequence<v...>, const std::int16_t* values,
                                 std::int32_t half_norm, const Coordinates* own,
                                 IntegerVector* scores, IntegerVector* nearest) {
    const Integers d;
    IntegerVector products[kVectors] = {((void)v, hn::Zero(d))...};
    add(EachVector(), values, own, products);
    if constexpr (kPairs == 2) add(EachVector(), values + 2, own + kVectors, products);
    const IntegerVector half = hn::Set(d, half_norm);
    (take<c>(hn::Sub(products[v], half), scores[v], nearest[v]), ...);
  }

  // Centroid c, of score `own`, is the nearest where that is larger than those before.
  template <int c>
  HWY_INLINE static void take(IntegerVector own, IntegerVector& score, IntegerVector& nearest) {
    const Integers d;
    if constexpr (c == 0) {
      score = own;
      nearest = hn::Zero(d);
    } else {
      const auto is_nearer = hn::Gt(own, score);
      const IntegerVector code = hn::Set(d, c);
#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
      // Codes ascend. Of 16 bits, as SSSE3 has no maximum of 32.
      const hn::Repartition<std::int16_t, Integers> d16;
      const IntegerVector later = hn::And(hn::VecFromMask(d, is_nearer), code);
      nearest = hn::BitCast(d, hn::Max(hn::BitCast(d16, nearest), hn::BitCast(d16, later)));
#else
      nearest = hn::IfThenElse(is_nearer, code, nearest);
#endif
      score = hn::Max(score, own);
    }
  }

  // The nearest centroids' products: their scores and half their norms.
  HWY_INLINE static IntegerVector product(IntegerVector score, IntegerVector nearest,
                                          const std::int32_t* half_norms) {
    const Integers d;
#if HWY_CAP_GE512
    const IntegerVector own =
        hn::TableLookupLanes(hn::LoadU(d, half_norms), hn::IndicesFromVec(d, nearest));
#elif HWY_CAP_GE256
    const IntegerVector last = hn::Set(d, 7);
    const auto places = hn::IndicesFromVec(d, hn::And(nearest, last));
    const IntegerVector lower = hn::TableLookupLanes(hn::LoadU(d, half_norms), places);
    const IntegerVector upper = hn::TableLookupLanes(hn::LoadU(d, half_norms + 8), places);
    const IntegerVector own = hn::IfThenElse(hn::Gt(nearest, last), upper, lower);
#else
    const IntegerVector own = hn::GatherIndex(d, half_norms, nearest);
#endif
    return hn::Add(score, own);
  }
};

static_assert(ProductOps<HighwayProductOps>);

#endif  // HWY_TARGET != HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace magicpig::inline MAGICPIG_ABI
HWY_AFTER_NAMESPACE();

#endif  // MAGICPIG_CPU_HIGHWAY_PRODUCTS_INL_HPP

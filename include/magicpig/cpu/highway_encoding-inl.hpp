// SPDX-License-Identifier: Apache-2.0
// The operations that make codes, in terms of Google Highway, for the target that is being
// compiled.

// In place of #pragma once, as in highway-inl.hpp.
#if defined(MAGICPIG_CPU_HIGHWAY_ENCODING_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef MAGICPIG_CPU_HIGHWAY_ENCODING_INL_HPP
#undef MAGICPIG_CPU_HIGHWAY_ENCODING_INL_HPP
#else
#define MAGICPIG_CPU_HIGHWAY_ENCODING_INL_HPP
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/cpu/highway_loads-inl.hpp"
#include "magicpig/cpu/highway_products-inl.hpp"
#include "magicpig/cpu/scalar_signatures.hpp"
#include "magicpig/hash/levels.hpp"
#include "magicpig/version.hpp"

HWY_BEFORE_NAMESPACE();
namespace magicpig::inline MAGICPIG_ABI {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET != HWY_SCALAR

/// Four consecutive units of 32 bits of many rows, transposed: unit by unit a vector of one row per
/// lane. A unit is one float or two bf16, whichever rows hold.
template <class T>
class HighwayUnits {
  using Tag = hn::CappedTag<std::uint32_t, kRotationLanes>;
  using Vector = hn::Vec<Tag>;

 public:
  static constexpr std::size_t kUnits = 4;
  static constexpr std::size_t kScalars = 4 * kUnits / sizeof(T);

  /// Of Lanes() rows, from scalar `j` on.
  HWY_INLINE static void load(const T* const* rows, std::size_t j, Vector& a, Vector& b, Vector& c,
                              Vector& e) {
    const Tag d;
    const hn::Repartition<std::uint64_t, Tag> d64;
    // Vectors of 128-bit blocks, each of another row: those of rows 0, 4, 8 and 12, and so on.
    const Vector r0 = load_blocks(d, rows, j);
    const Vector r1 = load_blocks(d, rows + 1, j);
    const Vector r2 = load_blocks(d, rows + 2, j);
    const Vector r3 = load_blocks(d, rows + 3, j);
    const auto lower01 = hn::BitCast(d64, hn::InterleaveLower(d, r0, r1));
    const auto upper01 = hn::BitCast(d64, hn::InterleaveUpper(d, r0, r1));
    const auto lower23 = hn::BitCast(d64, hn::InterleaveLower(d, r2, r3));
    const auto upper23 = hn::BitCast(d64, hn::InterleaveUpper(d, r2, r3));
    a = hn::BitCast(d, hn::InterleaveLower(d64, lower01, lower23));
    b = hn::BitCast(d, hn::InterleaveUpper(d64, lower01, lower23));
    c = hn::BitCast(d, hn::InterleaveLower(d64, upper01, upper23));
    e = hn::BitCast(d, hn::InterleaveUpper(d64, upper01, upper23));
  }

 private:
  template <class D>
  HWY_INLINE static hn::Vec<D> load_blocks(D d, const T* const* rows, std::size_t j) {
    if constexpr (hn::MaxLanes(D()) == kUnits) {
      const hn::Repartition<std::uint8_t, D> d8;
      return hn::BitCast(d, hn::LoadU(d8, reinterpret_cast<const std::uint8_t*>(*rows + j)));
    } else {
      const hn::Half<D> half;
      const auto lower = load_blocks(half, rows, j);
      return hn::Combine(d, load_blocks(half, rows + hn::MaxLanes(D()) / 2, j), lower);
    }
  }
};

/// What makes codes, of one Highway target.
class HighwayEncodingOps : public HighwayProductOps {
  using Tag = hn::CappedTag<float, kRotationLanes>;
  using Integers = hn::RebindToSigned<Tag>;
  using Bits = hn::RebindToUnsigned<Tag>;
  using Vector = hn::Vec<Tag>;
  using IntegerVector = hn::Vec<Integers>;
  using BitVector = hn::Vec<Bits>;

 public:
  template <class T>
  static HWY_ATTR void centre_lanes(const T* const* rows, const float* centre, int dim, float* to,
                                    std::uint32_t* largest) {
    for (std::size_t l = 0; l < kRotationLanes; ++l) largest[l] = 0;
    const auto end = static_cast<std::size_t>(dim);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
      const std::size_t whole = end / HighwayUnits<T>::kScalars * HighwayUnits<T>::kScalars;
      centre_units(rows, centre, whole, to, largest);
      if (whole < end) centre_widened(rows, centre, whole, end, to, largest);
    } else {
      for (std::size_t begin = 0; begin < end; begin += kChunk) {
        centre_widened(rows, centre, begin, end - begin < kChunk ? end : begin + kChunk, to,
                       largest);
      }
    }
  }

  template <class T>
  static HWY_ATTR double squared_distance(const T* row, const float* centre, int dim) {
    const Tag d;
    const hn::CappedTag<double, kSums / 2> dd;
    const hn::Rebind<float, decltype(dd)> df;
    HWY_ALIGN double sums[kSums] = {};
    const auto end = static_cast<std::size_t>(dim);
    for (std::size_t begin = 0; begin < end; begin += kChunk) {
      HWY_ALIGN float x[kChunk];
      const std::size_t size = end - begin < kChunk ? end - begin : kChunk;
      const std::size_t whole = widen(row, begin, size, x);
      for (std::size_t j = 0; j < whole; j += hn::Lanes(d)) {
        hn::Store(hn::Sub(hn::Load(d, x + j), hn::LoadU(d, centre + begin + j)), d, x + j);
      }
      for (std::size_t j = whole; j < size; ++j) x[j] -= centre[begin + j];
      std::size_t filled = size;
      for (; filled % kSums != 0; ++filled) x[filled] = 0.0F;
      for (std::size_t i = 0; i < kSums; i += hn::Lanes(dd)) {
        auto sum = hn::Load(dd, sums + i);
        for (std::size_t j = i; j < filled; j += kSums) {
          const auto v = hn::PromoteTo(dd, hn::Load(df, x + j));
          sum = hn::MulAdd(v, v, sum);
        }
        hn::Store(sum, dd, sums + i);
      }
    }
    for (std::size_t half = kSums / 2; half >= hn::Lanes(dd); half /= 2) {
      for (std::size_t j = 0; j < half; j += hn::Lanes(dd)) {
        hn::Store(hn::Add(hn::Load(dd, sums + j), hn::Load(dd, sums + half + j)), dd, sums + j);
      }
    }
    return add_halves(dd, hn::Load(dd, sums));
  }

  static HWY_ATTR void scale_lanes(const float* x, const float* powers, int n, std::int32_t* to) {
    const Tag d;
    const Integers di;
    for (std::size_t l = 0; l < kRotationLanes; l += hn::Lanes(d)) {
      const Vector power = hn::LoadU(d, powers + l);
      for (std::size_t i = l; i < end_of(n); i += kRotationLanes) {
        hn::StoreU(truncate(hn::Mul(hn::LoadU(d, x + i), power)), di, to + i);
      }
    }
  }

  static HWY_ATTR void transform_lanes(const LaneTransform& transform, std::int32_t* x) {
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

  static HWY_ATTR void square_lanes(const std::int32_t* x, int n, std::int64_t* squares) {
    const Integers d;
    const Bits du;
    const hn::Repartition<std::uint64_t, Integers> d64;
    for (std::size_t l = 0; l < kRotationLanes; l += hn::Lanes(d)) {
      auto even = hn::Zero(d64);
      auto odd = hn::Zero(d64);
      for (std::size_t i = l; i < end_of(n); i += kRotationLanes) {
        const BitVector size = hn::BitCast(du, hn::Abs(hn::LoadU(d, x + i)));
        const BitVector behind = hn::DupOdd(size);
        even = hn::Add(even, hn::MulEven(size, size));
        odd = hn::Add(odd, hn::MulEven(behind, behind));
      }
      HWY_ALIGN std::uint64_t lanes[kRotationLanes];
      hn::Store(even, d64, lanes);
      hn::Store(odd, d64, lanes + kRotationLanes / 2);
      for (std::size_t i = 0; i < hn::Lanes(d); ++i) {
        squares[l + i] = static_cast<std::int64_t>(lanes[i % 2 * (kRotationLanes / 2) + i / 2]);
      }
    }
  }

  template <int kBits>
  static HWY_ATTR void quantise_lanes(const std::int32_t* x, int n, const std::int32_t* bounds,
                                      const CodeLanes& lanes, std::int32_t* sums) {
    const Integers d;
    const auto rows = static_cast<std::size_t>(n) / 4;
    for (std::size_t l = 0; l < kRotationLanes; l += hn::Lanes(d)) {
      IntegerVector total = hn::Zero(d), s0 = total, s1 = total, s2 = total, s3 = total;
      const std::int32_t* own = kBits > 1 ? bounds + l : nullptr;  // signs have none
      for (std::size_t row = 0; row < rows; ++row) {
        IntegerVector b0 = hn::Zero(d), b1 = b0, b2 = b0, b3 = b0;
        for (std::size_t i = 0; i < 4; ++i) {
          const IntegerVector v = hn::LoadU(d, x + (4 * row + i) * kRotationLanes + l);
          const IntegerVector bit = hn::Set(d, std::int32_t{1} << i);
          const IntegerVector size = hn::Xor(v, hn::BroadcastSignBit(v));
          total = hn::Add(total, v);
          take_plane<kBits, 0>(v, size, bit, own, s0, b0);
          if constexpr (kBits > 1) take_plane<kBits, 1>(v, size, bit, own, s1, b1);
          if constexpr (kBits > 2) take_plane<kBits, 2>(v, size, bit, own, s2, b2);
          if constexpr (kBits > 3) take_plane<kBits, 3>(v, size, bit, own, s3, b3);
        }
        put(b0, lanes, row, l);
        if constexpr (kBits > 1) put(b1, lanes, rows + row, l);
        if constexpr (kBits > 2) put(b2, lanes, 2 * rows + row, l);
        if constexpr (kBits > 3) put(b3, lanes, 3 * rows + row, l);
      }
      // Those whose bit is set, less all the others.
      const auto store = [=](IntegerVector set, std::int32_t* to)
                             HWY_ATTR { hn::StoreU(hn::Sub(hn::Add(set, set), total), d, to); };
      store(s0, sums + l);
      if constexpr (kBits > 1) store(s1, sums + kRotationLanes + l);
      if constexpr (kBits > 2) store(s2, sums + 2 * kRotationLanes + l);
      if constexpr (kBits > 3) store(s3, sums + 3 * kRotationLanes + l);
    }
  }

 private:
  // Rows are widened so many scalars at a time where they are not read as they are.
  static constexpr std::size_t kChunk = 64;
  static constexpr std::size_t kSums = 16;  // of squared_distance()

  // Sixteen vectors and what their sums need take more than 16 registers.
  static constexpr int kMostSteps =
      HWY_TARGET <= HWY_AVX3 || (HWY_ARCH_ARM_A64 && HWY_TARGET != HWY_EMU128) ? 4 : 3;

  HWY_INLINE static std::size_t end_of(int n) {
    return static_cast<std::size_t>(n) * kRotationLanes;
  }

  // Scalars [begin, begin + size) to `to`, which takes whole vectors; those in whole vectors, of
  // which it returns the number, by vectors. `to` is aligned.
  template <class T>
  HWY_INLINE static std::size_t widen(const T* row, std::size_t begin, std::size_t size,
                                      float* to) {
    const Tag d;
    std::size_t j = 0;
    if constexpr (std::is_same_v<T, bf16>) {  // loads of pairs would have to be put in order
      const hn::Rebind<std::uint16_t, Tag> d16;
      const Bits du;
      const auto* bits = reinterpret_cast<const std::uint16_t*>(row) + begin;
      for (; j + hn::Lanes(d) <= size; j += hn::Lanes(d)) {
        const BitVector wide = hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, bits + j)));
        hn::Store(hn::BitCast(d, wide), d, to + j);
      }
    } else {
      for (; j + HighwayLoads::step() <= size; j += HighwayLoads::step()) {
        Vector a, b;  // load() writes them
        HighwayLoads::load(row, begin + j, a, b);
        hn::Store(a, d, to + j);
        hn::Store(b, d, to + j + hn::Lanes(d));
      }
    }
    for (std::size_t i = j; i < size; ++i) to[i] = scalar_at(row, static_cast<int>(begin + i));
    return j;
  }

  // Of numbers below 2^31: Highway's own conversion takes four operations more for larger ones.
  HWY_INLINE static IntegerVector truncate(Vector x) {
#if HWY_TARGET <= HWY_AVX3
    return IntegerVector{_mm512_cvttps_epi32(x.raw)};
#elif HWY_TARGET == HWY_AVX2
    return IntegerVector{_mm256_cvttps_epi32(x.raw)};
#elif HWY_TARGET <= HWY_SSSE3
    return IntegerVector{_mm_cvttps_epi32(x.raw)};
#else
    return hn::ConvertTo(Integers(), x);
#endif
  }

  // Each of the upper half of the lanes is added to that so far before it, until one is left.
  template <class D>
  HWY_INLINE static double add_halves(D, hn::Vec<D> v) {
    if constexpr (hn::MaxLanes(D()) == 1) {
      return hn::GetLane(v);
    } else {
      const hn::Half<D> half;
      return add_halves(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
    }
  }

  // The larger magnitudes.
  HWY_INLINE static IntegerVector larger(IntegerVector largest, Vector x) {
    const Integers d;
    return hn::Max(largest, hn::And(hn::BitCast(d, x), hn::Set(d, 0x7fffffff)));
  }

  // One coordinate of Lanes() rows.
  HWY_INLINE static void centre_one(Vector x, float centre, float* to, IntegerVector& largest) {
    const Tag d;
    x = hn::Sub(x, hn::Set(d, centre));
    hn::StoreU(x, d, to);
    largest = larger(largest, x);
  }

  HWY_INLINE static void centre_unit(float, BitVector unit, const float* centre, float* to,
                                     IntegerVector& largest) {
    centre_one(hn::BitCast(Tag(), unit), centre[0], to, largest);
  }
  // Little-endian: the first of a pair is the lower half.
  HWY_INLINE static void centre_unit(bf16, BitVector unit, const float* centre, float* to,
                                     IntegerVector& largest) {
    const Tag d;
    const BitVector behind = hn::And(unit, hn::Set(Bits(), 0xffff0000U));
    centre_one(hn::BitCast(d, hn::ShiftLeft<16>(unit)), centre[0], to, largest);
    centre_one(hn::BitCast(d, behind), centre[1], to + kRotationLanes, largest);
  }

  // Coordinates [0, end), a number of whole loads of four units.
  template <class T>
  HWY_INLINE static void centre_units(const T* const* rows, const float* centre, std::size_t end,
                                      float* to, std::uint32_t* largest) {
    constexpr std::size_t kStep = HighwayUnits<T>::kScalars / HighwayUnits<T>::kUnits;
    const Integers d;
    const Bits du;
    for (std::size_t l = 0; l < kRotationLanes; l += hn::Lanes(d)) {
      IntegerVector most = hn::BitCast(d, hn::LoadU(du, largest + l));
      for (std::size_t j = 0; j < end; j += HighwayUnits<T>::kScalars) {
        BitVector v0, v1, v2, v3;  // load() writes them
        HighwayUnits<T>::load(rows + l, j, v0, v1, v2, v3);
        const float* c = centre + j;
        float* at = to + j * kRotationLanes + l;
        centre_unit(T(), v0, c, at, most);
        centre_unit(T(), v1, c + kStep, at + kStep * kRotationLanes, most);
        centre_unit(T(), v2, c + 2 * kStep, at + 2 * kStep * kRotationLanes, most);
        centre_unit(T(), v3, c + 3 * kStep, at + 3 * kStep * kRotationLanes, most);
      }
      hn::StoreU(hn::BitCast(du, most), du, largest + l);
    }
  }

  // Coordinates [begin, end), kChunk at most.
  template <class T>
  HWY_INLINE static void centre_widened(const T* const* rows, const float* centre,
                                        std::size_t begin, std::size_t end, float* to,
                                        std::uint32_t* largest) {
    HWY_ALIGN float x[kRotationLanes * kChunk];
    const float* widened[kRotationLanes];
    const std::size_t size = end - begin;
    for (std::size_t l = 0; l < kRotationLanes; ++l) {
      widened[l] = x + l * kChunk;
      widen(rows[l], begin, size, x + l * kChunk);
    }
    const std::size_t whole = size / 4 * 4;
    centre_units(widened, centre + begin, whole, to + begin * kRotationLanes, largest);
    for (std::size_t j = whole; j < size; ++j) {
      HWY_ALIGN float column[kRotationLanes];
      for (std::size_t l = 0; l < kRotationLanes; ++l) column[l] = widened[l][j];
      const Integers d;
      for (std::size_t l = 0; l < kRotationLanes; l += hn::Lanes(d)) {
        IntegerVector most = hn::BitCast(d, hn::LoadU(Bits(), largest + l));
        centre_one(hn::Load(Tag(), column + l), centre[begin + j],
                   to + (begin + j) * kRotationLanes + l, most);
        hn::StoreU(hn::BitCast(Bits(), most), Bits(), largest + l);
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

  template <int kSteps>
  HWY_INLINE static void run(const Pass& pass) {
    if (pass.signs == nullptr) {
      return pass.is_last ? run<kSteps, false, true>(pass) : run<kSteps, false, false>(pass);
    }
    if (pass.is_last) return run<kSteps, true, true>(pass);
    // Most transforms begin so. The places of 16 coordinates are then constants.
    if (pass.stride == 1) return run<kSteps, true, false, 1>(pass);
    run<kSteps, true, false>(pass);
  }

  template <int kSteps, bool kIsFirst, bool kIsLast, std::size_t kStride = 0>
  static HWY_ATTR HWY_NOINLINE void run(const Pass pass) {
    const std::size_t stride = kStride != 0 ? kStride : pass.stride;
    for (std::size_t i = 0; i < pass.count; i += stride << kSteps) {
      for (std::size_t j = i; j < i + stride; ++j) {
        for (std::size_t l = 0; l < kRotationLanes; l += hn::Lanes(Integers())) {
          take_steps<kSteps, kIsFirst, kIsLast>(pass, stride, j, l);
        }
      }
    }
  }

  // Of coordinates j, j + stride ..., lanes from l on.
  template <int kSteps, bool kIsFirst, bool kIsLast>
  HWY_INLINE static void take_steps(const Pass& pass, std::size_t stride, std::size_t j,
                                    std::size_t l) {
    IntegerVector v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15;
    std::int32_t* x = pass.x + j * kRotationLanes + l;
    const auto load = [=](std::size_t i, IntegerVector& v) HWY_ATTR {
      const Integers d;
      v = hn::LoadU(d, x + i * stride * kRotationLanes);
      if constexpr (!kIsFirst) return;
      const IntegerVector sign = hn::Set(d, pass.signs[j + i * stride]);
      v = hn::Sub(hn::Xor(v, sign), sign);
    };
    const auto store = [=](std::size_t i, IntegerVector v) HWY_ATTR {
      if constexpr (kIsLast) v = shift_right(v, pass.shift);
      hn::StoreU(v, Integers(), x + i * stride * kRotationLanes);
    };
    load(0, v0), load(1, v1);
    // What is added to the first of them is in every sum.
    if constexpr (kIsLast) {
      v0 = hn::Add(v0, hn::Set(Integers(), (std::int32_t{1} << pass.shift) / 2));
    }
    if constexpr (kSteps > 1) load(2, v2), load(3, v3);
    if constexpr (kSteps > 2) load(4, v4), load(5, v5), load(6, v6), load(7, v7);
    if constexpr (kSteps > 3) {
      load(8, v8), load(9, v9), load(10, v10), load(11, v11);
      load(12, v12), load(13, v13), load(14, v14), load(15, v15);
    }
    add_four<kSteps>(v0, v1, v2, v3);
    if constexpr (kSteps > 2) {
      add_four<2>(v4, v5, v6, v7);
      add_four_times_two(v0, v1, v2, v3, v4, v5, v6, v7);
    }
    if constexpr (kSteps > 3) {
      add_four<2>(v8, v9, v10, v11);
      add_four<2>(v12, v13, v14, v15);
      add_four_times_two(v8, v9, v10, v11, v12, v13, v14, v15);
      add_four_times_two(v0, v1, v2, v3, v8, v9, v10, v11);
      add_four_times_two(v4, v5, v6, v7, v12, v13, v14, v15);
    }
    store(0, v0), store(1, v1);
    if constexpr (kSteps > 1) store(2, v2), store(3, v3);
    if constexpr (kSteps > 2) store(4, v4), store(5, v5), store(6, v6), store(7, v7);
    if constexpr (kSteps > 3) {
      store(8, v8), store(9, v9), store(10, v10), store(11, v11);
      store(12, v12), store(13, v13), store(14, v14), store(15, v15);
    }
  }

  // Two numbers become their sum and their difference.
  HWY_INLINE static void add_two(IntegerVector& a, IntegerVector& b) {
    const IntegerVector sum = hn::Add(a, b);
    b = hn::Sub(a, b);
    a = sum;
  }
  // One step, of the first two, or two.
  template <int kSteps>
  HWY_INLINE static void add_four(IntegerVector& a, IntegerVector& b, IntegerVector& c,
                                  IntegerVector& e) {
    add_two(a, b);
    if constexpr (kSteps == 1) return;
    add_two(c, e);
    add_two(a, c);
    add_two(b, e);
  }
  // One step, of the first four and the last four.
  HWY_INLINE static void add_four_times_two(IntegerVector& a0, IntegerVector& a1, IntegerVector& a2,
                                            IntegerVector& a3, IntegerVector& b0, IntegerVector& b1,
                                            IntegerVector& b2, IntegerVector& b3) {
    add_two(a0, b0);
    add_two(a1, b1);
    add_two(a2, b2);
    add_two(a3, b3);
  }

  HWY_INLINE static IntegerVector shift_right(IntegerVector v, int bits) {
#if HWY_TARGET <= HWY_AVX2  // half as many micro-operations as with one count for all
    return hn::Shr(v, hn::Set(Integers(), bits));
#else
    return hn::ShiftRightSame(v, bits);
#endif
  }

  // Adds plane p of the codes of x: x to `set` and `bit` to `bits` where it is set. `size` is x
  // where that is not negative, and -1 - x elsewhere, whose code is the complement.
  template <int kBits, int p>
  HWY_INLINE static void take_plane(IntegerVector x, IntegerVector size, IntegerVector bit,
                                    const std::int32_t* bounds, IntegerVector& set,
                                    IntegerVector& bits) {
    const auto is_set = plane<kBits, p, (1 << kBits) / 2 - 1>(x, size, bounds);
    set = hn::IfThenElse(is_set, hn::Add(set, x), set);
    bits = hn::IfThenElse(is_set, hn::Or(bits, bit), bits);
  }

  // The plane, were there only the first `b` bounds: each that is passed changes the bit if it
  // differs between the codes above and below.
  template <int kBits, int p, int b>
  HWY_INLINE static hn::Mask<Integers> plane(IntegerVector x, IntegerVector size,
                                             const std::int32_t* bounds) {
    const Integers d;
    constexpr Levels kLevels(kBits);
    constexpr int kCode = kLevels.code(kLevels.count() / 2 + b);
    if constexpr (b == 0) {
      const hn::Mask<Integers> is_negative = hn::Lt(x, hn::Zero(d));
      return ((kCode >> p) & 1) != 0 ? hn::Not(is_negative) : is_negative;
    } else {
      const auto others = plane<kBits, p, b - 1>(x, size, bounds);
      constexpr int kChanged = kCode ^ kLevels.code(kLevels.count() / 2 + b - 1);
      if constexpr (((kChanged >> p) & 1) == 0) return others;
      const std::int32_t* own = bounds + (b - 1) * kRotationLanes;
      return hn::Xor(others, hn::Gt(size, hn::LoadU(d, own)));
    }
  }
};

#endif  // HWY_TARGET != HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace magicpig::inline MAGICPIG_ABI
HWY_AFTER_NAMESPACE();

#endif  // MAGICPIG_CPU_HIGHWAY_ENCODING_INL_HPP

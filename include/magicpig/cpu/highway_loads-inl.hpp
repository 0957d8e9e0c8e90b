// SPDX-License-Identifier: Apache-2.0
// Loads of scalars of any type through Google Highway, for the target that is being compiled.

// In place of #pragma once, as in highway-inl.hpp.
#if defined(MAGICPIG_CPU_HIGHWAY_LOADS_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef MAGICPIG_CPU_HIGHWAY_LOADS_INL_HPP
#undef MAGICPIG_CPU_HIGHWAY_LOADS_INL_HPP
#else
#define MAGICPIG_CPU_HIGHWAY_LOADS_INL_HPP
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

HWY_BEFORE_NAMESPACE();
namespace magicpig::inline MAGICPIG_ABI {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

/// Loads of 2 * Lanes() consecutive scalars of any type as two vectors of float32, exactly. Their
/// order is the type's own: the scalars of a bf16 pair go to the same lane of either vector, which
/// takes one operation per vector; other types fill one vector after the other.
///
/// Vectors are named one by one and passed by reference throughout: on scalable targets they have
/// no size, so no array or struct may hold them.
struct HighwayLoads {
  using Tag = hn::CappedTag<float, 16>;
  using Vector = hn::Vec<Tag>;
  static constexpr std::size_t kMaxStep = 32;  // 2 * Lanes() at most

  HWY_INLINE static std::size_t step() { return 2 * hn::Lanes(Tag()); }

  /// Scalars [j, j + step()) of a row.
  HWY_INLINE static void load(const float* row, std::size_t j, Vector& a, Vector& b) {
    a = hn::LoadU(Tag(), row + j);
    b = hn::LoadU(Tag(), row + j + hn::Lanes(Tag()));
  }

  HWY_INLINE static void load(const bf16* row, std::size_t j, Vector& a, Vector& b) {
#if HWY_TARGET == HWY_SCALAR
    a = hn::Set(Tag(), to_float(row[j]));
    b = hn::Set(Tag(), to_float(row[j + 1]));
#else
    const hn::RebindToUnsigned<Tag> du;
    const hn::Repartition<std::uint16_t, Tag> du16;
    // Little-endian: the first of a pair is the lower half of a 32-bit lane.
    const auto pairs =
        hn::BitCast(du, hn::LoadU(du16, reinterpret_cast<const std::uint16_t*>(row + j)));
    a = hn::BitCast(Tag(), hn::ShiftLeft<16>(pairs));
    b = hn::BitCast(Tag(), hn::And(pairs, hn::Set(du, 0xffff0000U)));
#endif
  }

  HWY_INLINE static void load(const fp16* row, std::size_t j, Vector& a, Vector& b) {
    const hn::Rebind<std::uint16_t, Tag> du16;
    const auto* bits = reinterpret_cast<const std::uint16_t*>(row + j);
    a = widen_half(hn::LoadU(du16, bits));
    b = widen_half(hn::LoadU(du16, bits + hn::Lanes(Tag())));
  }

  /// A product of 8 and 11 significant bits is exact.
  HWY_INLINE static void load(const q8_0* row, std::size_t j, Vector& a, Vector& b) {
    const hn::Rebind<std::int8_t, Tag> d8;
    const hn::Rebind<std::int32_t, Tag> d32;
    const q8_0& block = row[j / kQ8Block];
    const std::int8_t* values = block.values + j % kQ8Block;
    // Widened in a vector: by hand it takes longer than the rest of the block.
    const hn::Rebind<std::uint16_t, Tag> du16;
    const Vector scale = widen_half(hn::Set(du16, block.scale.bits));
    a = hn::Mul(scale, hn::ConvertTo(Tag(), hn::PromoteTo(d32, hn::LoadU(d8, values))));
    b = hn::Mul(scale,
                hn::ConvertTo(Tag(), hn::PromoteTo(d32, hn::LoadU(d8, values + hn::Lanes(Tag())))));
  }

  /// A product of 4 and 11 significant bits is exact. Each vector has lower or upper halves only.
  HWY_INLINE static void load(const q4_0* row, std::size_t j, Vector& a, Vector& b) {
    const hn::Rebind<std::uint16_t, Tag> du16;
    const q4_0& block = row[j / kQ4Block];
    const Vector scale = widen_half(hn::Set(du16, block.scale.bits));
    a = hn::Mul(scale, widen_nibbles(block.nibbles, j % kQ4Block));
    b = hn::Mul(scale, widen_nibbles(block.nibbles, j % kQ4Block + hn::Lanes(Tag())));
  }

  /// The last dim modulo step() scalars of row[dim], if any, in a window of step() scalars that
  /// ends with the row, zeros before them; a row shorter than the window is followed by zeros.
  /// Reads within the row only.
  template <class T>
  HWY_INLINE static void load_rest(const T* row, std::size_t dim, Vector& a, Vector& b) {
    const Tag d;
    if (dim < step()) {
      HWY_ALIGN T padded[kMaxStep] = {};
      std::memcpy(padded, row, dim * sizeof(T));
      return load(padded, 0, a, b);
    }
    load(row, dim - step(), a, b);
    const std::size_t zeros = step() - dim % step();
    const std::size_t lanes = hn::Lanes(d);
    const std::size_t first = kPaired<T> ? (zeros + 1) / 2 : zeros < lanes ? zeros : lanes;
    a = hn::IfThenZeroElse(hn::FirstN(d, first), a);
    b = hn::IfThenZeroElse(hn::FirstN(d, zeros - first), b);
  }
  /// Blocks hold whole steps, so there is no rest; written all the same, or compilers warn of it.
  HWY_INLINE static void load_rest(const q8_0*, std::size_t, Vector& a, Vector& b) {
    a = b = hn::Zero(Tag());
  }

  HWY_INLINE static void load_rest(const q4_0*, std::size_t, Vector& a, Vector& b) {
    a = b = hn::Zero(Tag());
  }

  /// Floats [0, step()) in the order in which scalars of type T are loaded, and back.
  template <class T>
  HWY_INLINE static void load_like(const float* from, Vector& a, Vector& b) {
    if constexpr (kPaired<T>) {
      hn::LoadInterleaved2(Tag(), from, a, b);
    } else {
      load(from, 0, a, b);
    }
  }
  template <class T>
  HWY_INLINE static void store_like(Vector a, Vector b, float* to) {
    if constexpr (kPaired<T>) {
      hn::StoreInterleaved2(a, b, Tag(), to);
    } else {
      hn::StoreU(a, Tag(), to);
      hn::StoreU(b, Tag(), to + hn::Lanes(Tag()));
    }
  }

 private:
  template <class T>
  static constexpr bool kPaired = std::is_same_v<T, bf16>;

  // Numbers [at, at + Lanes()) of a block, each less 8.
  HWY_INLINE static Vector widen_nibbles(const std::uint8_t* nibbles, std::size_t at) {
    constexpr std::size_t kHalf = kQ4Block / 2;
    const hn::Rebind<std::uint8_t, Tag> d8;
    const hn::Rebind<std::int32_t, Tag> d32;
    const auto bytes = hn::PromoteTo(d32, hn::LoadU(d8, nibbles + at % kHalf));
    const auto numbers = at < kHalf ? hn::And(bytes, hn::Set(d32, 15)) : hn::ShiftRight<4>(bytes);
    return hn::ConvertTo(Tag(), hn::Sub(numbers, hn::Set(d32, 8)));
  }

  template <class Bits>
  HWY_INLINE static Vector widen_half(Bits bits) {
    const Tag d;
#if HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)
    return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, Tag>(), bits));
#else
    // Highway 1.0.3 takes infinities and NaN for finite numbers where it converts by hand.
    const hn::RebindToUnsigned<Tag> du;
    const hn::RebindToSigned<Tag> di;
    const auto wide = hn::PromoteTo(du, bits);
    const auto magnitude = hn::And(wide, hn::Set(du, 0x7fffU));
    const auto sign = hn::ShiftLeft<16>(hn::Xor(wide, magnitude));
    const auto signed_magnitude = hn::BitCast(di, magnitude);
    const auto rebiased = hn::Add(hn::ShiftLeft<13>(magnitude), hn::Set(du, 112U << 23));
    const auto special = hn::Or(hn::ShiftLeft<13>(magnitude), hn::Set(du, 0x7f800000U));
    const auto subnormal = hn::Mul(hn::ConvertTo(d, signed_magnitude), hn::Set(d, 0x1p-24F));
    const auto is_special = hn::RebindMask(d, hn::Gt(signed_magnitude, hn::Set(di, 0x7bff)));
    const auto is_subnormal = hn::RebindMask(d, hn::Lt(signed_magnitude, hn::Set(di, 0x0400)));
    const auto large =
        hn::IfThenElse(is_special, hn::BitCast(d, special), hn::BitCast(d, rebiased));
    return hn::Or(hn::IfThenElse(is_subnormal, subnormal, large), hn::BitCast(d, sign));
#endif
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace magicpig::inline MAGICPIG_ABI
HWY_AFTER_NAMESPACE();

#endif  // MAGICPIG_CPU_HIGHWAY_LOADS_INL_HPP

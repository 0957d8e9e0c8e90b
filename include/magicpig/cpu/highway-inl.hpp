// SPDX-License-Identifier: Apache-2.0
// The operations in terms of Google Highway, for whichever of its targets is being compiled.

// In place of #pragma once: Highway's foreach_target includes such a file once per target, and
// toggles the guard for it.
#if defined(MAGICPIG_CPU_HIGHWAY_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef MAGICPIG_CPU_HIGHWAY_INL_HPP
#undef MAGICPIG_CPU_HIGHWAY_INL_HPP
#else
#define MAGICPIG_CPU_HIGHWAY_INL_HPP
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/version.hpp"

HWY_BEFORE_NAMESPACE();
namespace magicpig::inline MAGICPIG_ABI {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

/// Loads of scalars of any type as vectors of float32, exactly.
///
/// Vectors are named one by one and passed by reference throughout: on scalable targets they have
/// no size, so no array or struct may hold them.
struct HighwayLoads {
  using Tag = hn::ScalableTag<float>;
  using Vector = hn::Vec<Tag>;
  static constexpr std::size_t kMaxLanes = HWY_LANES(float);

  /// Lanes(Tag()) scalars from `from`.
  HWY_INLINE static Vector load(const float* from) { return hn::LoadU(Tag(), from); }

  HWY_INLINE static Vector load(const bf16* from) {
    const hn::RebindToUnsigned<Tag> du;
    const hn::Rebind<std::uint16_t, Tag> du16;
    const auto bits = hn::LoadU(du16, reinterpret_cast<const std::uint16_t*>(from));
    return hn::BitCast(Tag(), hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
  }

  HWY_INLINE static Vector load(const fp16* from) {
    const hn::Rebind<std::uint16_t, Tag> du16;
    return widen_half(hn::LoadU(du16, reinterpret_cast<const std::uint16_t*>(from)));
  }

  /// The last `dim` modulo Lanes(Tag()) scalars of row[dim], if any, and zeros in the other lanes,
  /// always in the same places. Reads within the row only.
  template <class T>
  HWY_INLINE static Vector load_rest(const T* row, std::size_t dim) {
    const Tag d;
    const std::size_t lanes = hn::Lanes(d);
    if (dim < lanes) return load_first(row, dim);
    // The row's last vector; lanes that belong to the vector before become 0.
    const auto before = hn::FirstN(d, lanes - dim % lanes);
    return hn::IfThenZeroElse(before, load(row + (dim - lanes)));
  }

  /// The first `count` < Lanes(Tag()) scalars at `from`, and zeros.
  template <class T>
  HWY_INLINE static Vector load_first(const T* from, std::size_t count) {
    HWY_ALIGN T padded[kMaxLanes] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
  }

 private:
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

/// Inner products of four rows with one, two or four queries, in float32: each product of a row
/// and a query has one accumulator per lane, so its rounding error grows with dim / lanes.
template <class T>
class HighwayDots {
  using Loads = HighwayLoads;
  using Tag = Loads::Tag;
  using Vector = Loads::Vector;

 public:
  struct Block {
    const T* rows[4];
    std::size_t dim = 0;
    const float* queries = nullptr;  // [kQueries, dim]
    float* dots = nullptr;           // [kQueries] x 4, `stride` apart
    std::int64_t stride = 0;
  };

  /// kQueries is 1, 2 or 4.
  template <int kQueries>
  HWY_INLINE static void compute(const Block& block) {
    const Tag d;
    Vector a0 = hn::Zero(d), a1 = hn::Zero(d), a2 = hn::Zero(d), a3 = hn::Zero(d);
    Vector b0 = hn::Zero(d), b1 = hn::Zero(d), b2 = hn::Zero(d), b3 = hn::Zero(d);
    Vector c0 = hn::Zero(d), c1 = hn::Zero(d), c2 = hn::Zero(d), c3 = hn::Zero(d);
    Vector e0 = hn::Zero(d), e1 = hn::Zero(d), e2 = hn::Zero(d), e3 = hn::Zero(d);
    const float* query = block.queries;
    const std::size_t dim = block.dim;
    const std::size_t lanes = hn::Lanes(d);
    const auto add = [&](const auto& load) HWY_ATTR {
      const Vector r0 = load(block.rows[0]);
      const Vector r1 = load(block.rows[1]);
      const Vector r2 = load(block.rows[2]);
      const Vector r3 = load(block.rows[3]);
      multiply_add(load(query), r0, r1, r2, r3, a0, a1, a2, a3);
      if constexpr (kQueries > 1) multiply_add(load(query + dim), r0, r1, r2, r3, b0, b1, b2, b3);
      if constexpr (kQueries > 2) {
        multiply_add(load(query + 2 * dim), r0, r1, r2, r3, c0, c1, c2, c3);
        multiply_add(load(query + 3 * dim), r0, r1, r2, r3, e0, e1, e2, e3);
      }
    };
    for (std::size_t j = 0; j + lanes <= dim; j += lanes) {
      add([j](const auto* p) HWY_ATTR { return Loads::load(p + j); });
    }
    if (dim % lanes != 0) add([dim](const auto* p) HWY_ATTR { return Loads::load_rest(p, dim); });
    store_sums(a0, a1, a2, a3, block.dots);
    if constexpr (kQueries > 1) store_sums(b0, b1, b2, b3, block.dots + block.stride);
    if constexpr (kQueries > 2) {
      store_sums(c0, c1, c2, c3, block.dots + 2 * block.stride);
      store_sums(e0, e1, e2, e3, block.dots + 3 * block.stride);
    }
  }

 private:
  HWY_INLINE static void multiply_add(Vector query, Vector r0, Vector r1, Vector r2, Vector r3,
                                      Vector& s0, Vector& s1, Vector& s2, Vector& s3) {
    s0 = hn::MulAdd(query, r0, s0);
    s1 = hn::MulAdd(query, r1, s1);
    s2 = hn::MulAdd(query, r2, s2);
    s3 = hn::MulAdd(query, r3, s3);
  }

  // The four sums of lanes. Where 128-bit blocks exist, transposing while adding takes a third of
  // the shuffles that four separate sums take.
  HWY_INLINE static void store_sums(Vector v0, Vector v1, Vector v2, Vector v3, float* to) {
    const Tag d;
#if HWY_TARGET == HWY_SCALAR || HWY_HAVE_SCALABLE
    to[0] = hn::GetLane(hn::SumOfLanes(d, v0));
    to[1] = hn::GetLane(hn::SumOfLanes(d, v1));
    to[2] = hn::GetLane(hn::SumOfLanes(d, v2));
    to[3] = hn::GetLane(hn::SumOfLanes(d, v3));
#else
    const hn::Repartition<std::uint64_t, Tag> d64;
    const auto low = hn::Add(hn::InterleaveLower(d, v0, v1), hn::InterleaveUpper(d, v0, v1));
    const auto high = hn::Add(hn::InterleaveLower(d, v2, v3), hn::InterleaveUpper(d, v2, v3));
    const auto low64 = hn::BitCast(d64, low);
    const auto high64 = hn::BitCast(d64, high);
    store_block_sum(d,
                    hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, low64, high64)),
                            hn::BitCast(d, hn::InterleaveUpper(d64, low64, high64))),
                    to);
#endif
  }

#if HWY_TARGET != HWY_SCALAR && !HWY_HAVE_SCALABLE
  // The sum of the 128-bit blocks of v.
  template <class D, class V>
  HWY_INLINE static void store_block_sum(D d, V v, float* to) {
    if constexpr (hn::MaxLanes(D()) <= 4) {
      hn::StoreU(v, d, to);
    } else {
      const hn::Half<D> half;
      store_block_sum(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to);
    }
  }
#endif
};

/// Weighted rows added to the sums of one, two or four heads: one or four rows per pass over the
/// sums.
template <class T>
class HighwaySums {
  using Loads = HighwayLoads;
  using Tag = Loads::Tag;
  using Vector = Loads::Vector;

 public:
  struct Block {
    const T* const* rows = nullptr;  // [kRows]
    std::size_t dim = 0;
    const float* weights = nullptr;  // [kHeads] x kRows, `stride` apart
    std::int64_t stride = 0;
    float* sums = nullptr;  // [kHeads, dim]
  };

  /// kHeads is 1, 2 or 4, kRows 1 or 4.
  template <int kHeads, int kRows>
  HWY_INLINE static void add(const Block& block) {
    const Tag d;
    const std::size_t lanes = hn::Lanes(d);
    const std::size_t rest = block.dim % lanes;
    const std::size_t whole = block.dim - rest;
    for (std::size_t j = 0; j < whole; j += lanes) {
      add_column<kHeads, kRows>(
          block, [j](const auto* p) HWY_ATTR { return Loads::load(p + j); },
          [j, d](Vector v, float* p) HWY_ATTR { hn::StoreU(v, d, p + j); });
    }
    if (rest == 0) return;
    add_column<kHeads, kRows>(
        block, [=](const auto* p) HWY_ATTR { return Loads::load_first(p + whole, rest); },
        [=](Vector v, float* p) HWY_ATTR {
          HWY_ALIGN float padded[Loads::kMaxLanes];
          hn::Store(v, Tag(), padded);
          std::memcpy(p + whole, padded, rest * sizeof(float));
        });
  }

 private:
  template <int kHeads, int kRows, class Load, class Store>
  HWY_INLINE static void add_column(const Block& block, const Load& load, const Store& store) {
    const Vector r0 = load(block.rows[0]);
    Vector r1 = r0, r2 = r0, r3 = r0;
    if constexpr (kRows > 1) {
      r1 = load(block.rows[1]);
      r2 = load(block.rows[2]);
      r3 = load(block.rows[3]);
    }
    const auto add_head = [&](int head) HWY_ATTR {
      const Tag d;
      const float* weights = block.weights + head * block.stride;
      float* sums = block.sums + static_cast<std::size_t>(head) * block.dim;
      Vector sum = hn::MulAdd(hn::Set(d, weights[0]), r0, load(sums));
      if constexpr (kRows > 1) {
        sum = hn::MulAdd(hn::Set(d, weights[1]), r1, sum);
        sum = hn::MulAdd(hn::Set(d, weights[2]), r2, sum);
        sum = hn::MulAdd(hn::Set(d, weights[3]), r3, sum);
      }
      store(sum, sums);
    };
    add_head(0);
    if constexpr (kHeads > 1) add_head(1);
    if constexpr (kHeads > 2) {
      add_head(2);
      add_head(3);
    }
  }
};

/// VectorOps of one Highway target. Inner products and weighted sums accumulate in float32.
/// Exponentials and logarithms are Highway's, within 2 and 4 units in the last place where the
/// result is a normal number.
struct HighwayOps {
  template <class T>
  static HWY_ATTR void dot_rows(const Rows<T>& rows, const float* queries, int group, float* dots) {
    for (int i = 0; i < rows.count; i += 4) {
      const int count = rows.count - i < 4 ? rows.count - i : 4;
      typename HighwayDots<T>::Block block{
          .rows = {}, .dim = static_cast<std::size_t>(rows.dim), .stride = rows.count};
      // Short of rows, the last one is multiplied again and the product dropped.
      for (int r = 0; r < 4; ++r) block.rows[r] = rows.rows[i + (r < count ? r : count - 1)];
      for (int g = 0; g < group;) {
        block.queries = queries + std::int64_t{g} * rows.dim;
        block.dots = dots + std::int64_t{g} * rows.count + i;
        g += count == 4 ? dot_heads(block, group - g) : dot_few(block, group - g, count);
      }
    }
  }

  template <class T>
  static HWY_ATTR void add_rows(const Rows<T>& rows, const float* weights, int group, float* sums) {
    for (int i = 0; i < rows.count;) {
      const bool four = rows.count - i >= 4;
      typename HighwaySums<T>::Block block{
          .rows = rows.rows + i, .dim = static_cast<std::size_t>(rows.dim), .stride = rows.count};
      for (int g = 0; g < group;) {
        block.weights = weights + std::int64_t{g} * rows.count + i;
        block.sums = sums + std::int64_t{g} * rows.dim;
        g += four ? add_heads<T, 4>(block, group - g) : add_heads<T, 1>(block, group - g);
      }
      i += four ? 4 : 1;
    }
  }

  static HWY_ATTR float(max)(const float* x, int n) {
    const Tag d;
    const auto lanes = static_cast<int>(hn::Lanes(d));
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    Vector largest = hn::Set(d, kLowest);
    int i = 0;
    for (; i + lanes <= n; i += lanes) {
      const Vector v = hn::LoadU(d, x + i);
      // Max() of a target may return either argument if one is NaN; a comparison is false.
      largest = hn::IfThenElse(hn::Gt(v, largest), v, largest);
    }
    // Highway 1.0.3's emulated MaxOfLanes() starts from the lowest finite number.
    const bool none = hn::AllTrue(d, hn::Eq(largest, hn::Set(d, kLowest)));
    float result = none ? kLowest : hn::GetLane(hn::MaxOfLanes(d, largest));
    for (; i < n; ++i) result = x[i] > result ? x[i] : result;
    return result;
  }

  /// The sum is accumulated per lane in float32.
  static HWY_ATTR float exp_sum(float* x, int n, float shift) {
    const Tag d;
    const Vector by = hn::Set(d, shift);
    Vector sum = hn::Zero(d);
    transform(x, n, [&](Vector v, std::size_t count) HWY_ATTR {
      const Vector e = exp(hn::Sub(v, by));
      sum = hn::Add(sum, count == hn::Lanes(d) ? e : hn::IfThenElseZero(hn::FirstN(d, count), e));
      return e;
    });
    return hn::GetLane(hn::SumOfLanes(d, sum));
  }

  static HWY_ATTR void log_affine_exp(float* x, int n, float a, float b) {
    const Tag d;
    const Vector va = hn::Set(d, a);
    const Vector vb = hn::Set(d, b);
    if (a > 0.0F) {
      transform(x, n, [&](Vector v, std::size_t) HWY_ATTR {
        return hn::Log(d, hn::MulAdd(vb, exp(v), va));
      });
    } else {  // log b + x, where exp(x) may be 0
      const Vector log_b = hn::Log(d, vb);
      transform(x, n, [&](Vector v, std::size_t) HWY_ATTR { return hn::Add(log_b, v); });
    }
  }

  static HWY_ATTR void interpolate(const CurveView& curve, float* x, int n) {
    const Tag d;
    const hn::RebindToSigned<Tag> di;
    const Vector one = hn::Set(d, 1.0F);
    const Vector half = hn::Set(d, 0.5F);
    const Vector lowest = hn::Set(d, -1.0F);
    const Vector segments = hn::Set(d, static_cast<float>(curve.segments));
    const auto last = hn::Set(di, curve.segments - 1);
    transform(x, n, [&](Vector v, std::size_t) HWY_ATTR {
      const Vector above = hn::IfThenElse(hn::Gt(v, lowest), v, lowest);  // NaN too becomes -1
      const Vector cosine = hn::IfThenElse(hn::Lt(above, one), above, one);
      const Vector place = hn::Mul(hn::Sqrt(hn::NegMulAdd(half, cosine, half)), segments);
      const auto node = hn::Min(hn::ConvertTo(di, place), last);
      const Vector share = hn::Sub(place, hn::ConvertTo(d, node));
      const Vector left = hn::GatherIndex(d, curve.nodes, node);
      const Vector right = hn::GatherIndex(d, curve.nodes + 1, node);
      return hn::MulAdd(share, hn::Sub(right, left), left);
    });
  }

 private:
  using Tag = HighwayLoads::Tag;
  using Vector = HighwayLoads::Vector;

  // Four queries by four rows need some 22 registers, two by four 14.
  static constexpr bool kManyRegisters =
      HWY_TARGET <= HWY_AVX3 || (HWY_ARCH_ARM_A64 && HWY_TARGET != HWY_EMU128);

  // Each takes as many heads as it can and returns how many.
  template <class Block>
  static HWY_ATTR int dot_heads(const Block& block, int heads) {
    using T = std::remove_cv_t<std::remove_pointer_t<std::remove_extent_t<decltype(block.rows)>>>;
    if (kManyRegisters && heads >= 4) return HighwayDots<T>::template compute<4>(block), 4;
    if (heads >= 2) return HighwayDots<T>::template compute<2>(block), 2;
    return HighwayDots<T>::template compute<1>(block), 1;
  }

  // The same where only the first `count` of the four products are wanted.
  template <class Block>
  static HWY_ATTR int dot_few(Block block, int heads, int count) {
    float dots[4 * 4];
    float* to = block.dots;
    const std::int64_t stride = block.stride;
    block.dots = dots;
    block.stride = 4;
    const int done = dot_heads(block, heads);
    for (int g = 0; g < done; ++g) {
      for (int i = 0; i < count; ++i) to[g * stride + i] = dots[g * 4 + i];
    }
    return done;
  }

  template <class T, int kRows>
  static HWY_ATTR int add_heads(const typename HighwaySums<T>::Block& block, int heads) {
    if (kManyRegisters && heads >= 4) return HighwaySums<T>::template add<4, kRows>(block), 4;
    if (heads >= 2) return HighwaySums<T>::template add<2, kRows>(block), 2;
    return HighwaySums<T>::template add<1, kRows>(block), 1;
  }

  // x = function(x, lanes of x that count), vector by vector.
  template <class Function>
  HWY_INLINE static void transform(float* x, int n, const Function& function) {
    const Tag d;
    const std::size_t lanes = hn::Lanes(d);
    const std::size_t rest = static_cast<std::size_t>(n) % lanes;
    const std::size_t whole = static_cast<std::size_t>(n) - rest;
    for (std::size_t i = 0; i < whole; i += lanes) {
      hn::StoreU(function(hn::LoadU(d, x + i), lanes), d, x + i);
    }
    if (rest == 0) return;
    HWY_ALIGN float padded[HighwayLoads::kMaxLanes];
    hn::Store(function(HighwayLoads::load_first(x + whole, rest), rest), d, padded);
    std::memcpy(x + whole, padded, rest * sizeof(float));
  }

  // Highway's Exp returns 0 for NaN and is not defined for large arguments. Within the bounds taken
  // here it is, and is 0 and infinity at their ends.
  HWY_INLINE static Vector exp(Vector x) {
    const Tag d;
    const Vector lowest = hn::Set(d, -105.0F);
    const Vector highest = hn::Set(d, 100.0F);
    const Vector above = hn::IfThenElse(hn::Gt(x, lowest), x, lowest);
    const Vector bounded = hn::IfThenElse(hn::Lt(above, highest), above, highest);
    return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, bounded));
  }
};

static_assert(VectorOps<HighwayOps>);

}  // namespace HWY_NAMESPACE
}  // namespace magicpig::inline MAGICPIG_ABI
HWY_AFTER_NAMESPACE();

#endif  // MAGICPIG_CPU_HIGHWAY_INL_HPP

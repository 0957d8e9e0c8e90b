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
#include "magicpig/cpu/highway_loads-inl.hpp"
#include "magicpig/cpu/highway_signatures-inl.hpp"
#include "magicpig/version.hpp"

HWY_BEFORE_NAMESPACE();
namespace magicpig::inline MAGICPIG_ABI {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

/// Scalars [begin, begin + size) of up to four queries in whole steps, in the order in which rows
/// of type T are loaded, and filled up as load_rest() does where they end with the row.
template <class T>
class HighwayQueries {
  using Loads = HighwayLoads;
  using Vector = Loads::Vector;

 public:
  static constexpr std::size_t kChunk = 512;  // scalars at most: 8 KiB for four queries
  static constexpr std::size_t kStride = kChunk + Loads::kMaxStep;

  HWY_INLINE void arrange(const float* queries, int count, std::size_t dim, std::size_t first) {
    const std::size_t step = Loads::step();
    const std::size_t rest = dim - first <= kChunk ? dim % step : 0;
    begin = first;
    whole = dim - first <= kChunk ? dim - first - rest : kChunk;
    ends = rest != 0;
    for (int q = 0; q < count; ++q) {
      const float* from = queries + static_cast<std::size_t>(q) * dim + first;
      float* to = data + static_cast<std::size_t>(q) * kStride;
      for (std::size_t j = 0; j < whole; j += step) copy(from + j, to + j);
      if (rest == 0) continue;
      HWY_ALIGN float window[Loads::kMaxStep] = {};
      std::memcpy(window + (dim < step ? 0 : step - rest), from + whole, rest * sizeof(float));
      copy(window, to + whole);
    }
  }

  std::size_t begin = 0;
  std::size_t whole = 0;
  bool ends = false;  // with a rest behind the whole steps
  HWY_ALIGN float data[4 * kStride];

 private:
  HWY_INLINE static void copy(const float* from, float* to) {
    const hn::CappedTag<float, 16> d;
    Vector a, b;  // load_like() writes them
    Loads::load_like<T>(from, a, b);
    hn::StoreU(a, d, to);
    hn::StoreU(b, d, to + hn::Lanes(d));
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
    const float* queries = nullptr;  // [kQueries], HighwayQueries<T>::kStride apart
    std::size_t begin = 0;           // of the chunk
    std::size_t whole = 0;
    bool ends = false;
    float* dots = nullptr;  // [kQueries] x 4, `stride` apart
    std::int64_t stride = 0;
  };

  /// kQueries is 1, 2 or 4. Chunks behind the first one add to the inner products.
  template <int kQueries>
  HWY_INLINE static void compute(const Block& block) {
    const Tag d;
    Vector a0 = hn::Zero(d), a1 = hn::Zero(d), a2 = hn::Zero(d), a3 = hn::Zero(d);
    Vector b0 = hn::Zero(d), b1 = hn::Zero(d), b2 = hn::Zero(d), b3 = hn::Zero(d);
    Vector c0 = hn::Zero(d), c1 = hn::Zero(d), c2 = hn::Zero(d), c3 = hn::Zero(d);
    Vector e0 = hn::Zero(d), e1 = hn::Zero(d), e2 = hn::Zero(d), e3 = hn::Zero(d);
    constexpr std::size_t kStride = HighwayQueries<T>::kStride;
    const auto add = [&](const float* query, Vector r0, Vector r1, Vector r2, Vector r3) HWY_ATTR {
      multiply_add(hn::Load(d, query), r0, r1, r2, r3, a0, a1, a2, a3);
      if constexpr (kQueries > 1) {
        multiply_add(hn::Load(d, query + kStride), r0, r1, r2, r3, b0, b1, b2, b3);
      }
      if constexpr (kQueries > 2) {
        multiply_add(hn::Load(d, query + 2 * kStride), r0, r1, r2, r3, c0, c1, c2, c3);
        multiply_add(hn::Load(d, query + 3 * kStride), r0, r1, r2, r3, e0, e1, e2, e3);
      }
    };
    const auto add_step = [&](const float* query, const auto& load) HWY_ATTR {
      Vector r0, r1, r2, r3;  // load() writes them
      Vector s0, s1, s2, s3;
      load(block.rows[0], r0, s0);
      load(block.rows[1], r1, s1);
      load(block.rows[2], r2, s2);
      load(block.rows[3], r3, s3);
      add(query, r0, r1, r2, r3);
      add(query + hn::Lanes(d), s0, s1, s2, s3);
    };
    const std::size_t step = Loads::step();
    for (std::size_t j = 0; j < block.whole; j += step) {
      add_step(block.queries + j, [at = block.begin + j](const T* row, Vector& a, Vector& b)
                                      HWY_ATTR { Loads::load(row, at, a, b); });
    }
    if (block.ends) {
      add_step(block.queries + block.whole, [dim = block.dim](const T* row, Vector& a, Vector& b)
                                                HWY_ATTR { Loads::load_rest(row, dim, a, b); });
    }
    const bool more = block.begin != 0;
    store_sums(a0, a1, a2, a3, block.dots, more);
    if constexpr (kQueries > 1) store_sums(b0, b1, b2, b3, block.dots + block.stride, more);
    if constexpr (kQueries > 2) {
      store_sums(c0, c1, c2, c3, block.dots + 2 * block.stride, more);
      store_sums(e0, e1, e2, e3, block.dots + 3 * block.stride, more);
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

  // to = (more ? to : 0) + the four sums of lanes. Where 128-bit blocks exist, transposing while
  // adding takes a third of the shuffles that four separate sums take.
  HWY_INLINE static void store_sums(Vector v0, Vector v1, Vector v2, Vector v3, float* to,
                                    bool more) {
    const Tag d;
#if HWY_TARGET == HWY_SCALAR || HWY_HAVE_SCALABLE
    to[0] = (more ? to[0] : 0.0F) + hn::GetLane(hn::SumOfLanes(d, v0));
    to[1] = (more ? to[1] : 0.0F) + hn::GetLane(hn::SumOfLanes(d, v1));
    to[2] = (more ? to[2] : 0.0F) + hn::GetLane(hn::SumOfLanes(d, v2));
    to[3] = (more ? to[3] : 0.0F) + hn::GetLane(hn::SumOfLanes(d, v3));
#else
    const hn::Repartition<std::uint64_t, Tag> d64;
    const auto low = hn::Add(hn::InterleaveLower(d, v0, v1), hn::InterleaveUpper(d, v0, v1));
    const auto high = hn::Add(hn::InterleaveLower(d, v2, v3), hn::InterleaveUpper(d, v2, v3));
    const auto low64 = hn::BitCast(d64, low);
    const auto high64 = hn::BitCast(d64, high);
    store_block_sum(d,
                    hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, low64, high64)),
                            hn::BitCast(d, hn::InterleaveUpper(d64, low64, high64))),
                    to, more);
#endif
  }

#if HWY_TARGET != HWY_SCALAR && !HWY_HAVE_SCALABLE
  // to = (more ? to : 0) + the sum of the 128-bit blocks of v.
  template <class D, class V>
  HWY_INLINE static void store_block_sum(D d, V v, float* to, bool more) {
    if constexpr (hn::MaxLanes(D()) <= 4) {
      hn::StoreU(more ? hn::Add(v, hn::LoadU(d, to)) : v, d, to);
    } else {
      const hn::Half<D> half;
      store_block_sum(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to, more);
    }
  }
#endif
};

/// Weighted rows added to the sums of one, two or four heads, some columns at a time: the sums stay
/// in registers while all rows go by.
template <class T>
class HighwaySums {
  using Loads = HighwayLoads;
  using Tag = Loads::Tag;
  using Vector = Loads::Vector;

 public:
  struct Block {
    const Rows<T>& rows;
    const float* weights = nullptr;  // [kHeads, rows.count]
    float* sums = nullptr;           // [kHeads, rows.dim]
    bool first = true;               // of the groups of heads: prefetches
  };

  template <int kHeads>
  HWY_INLINE static void add(const Block& block) {
    constexpr int kMost = kSums / kHeads;
    const std::size_t dim = static_cast<std::size_t>(block.rows.dim);
    const std::size_t step = Loads::step();
    const std::size_t whole = dim / step * step;
    std::size_t j = 0;
    const auto add_steps = [&](auto steps) HWY_ATTR {
      for (; j + steps() * step <= whole; j += steps() * step) {
        add_columns<kHeads, static_cast<int>(steps())>(
            block, block.sums + j, dim, j,
            [j](const T* row, std::size_t at, Vector& a, Vector& b)
                HWY_ATTR { Loads::load(row, j + at, a, b); });
      }
    };
    add_steps(std::integral_constant<std::size_t, kMost>());
    if constexpr (kMost > 2) add_steps(std::integral_constant<std::size_t, 2>());
    if constexpr (kMost > 1) add_steps(std::integral_constant<std::size_t, 1>());
    if (dim == whole) return;
    // A window of columns that ends with the rows; a row's scalars there are 0 where they were
    // added already. Sums of a row shorter than that get a place of their own.
    HWY_ALIGN float padded[kHeads * Loads::kMaxStep] = {};
    const bool is_short = dim < step;
    float* window = is_short ? padded : block.sums + (dim - step);
    if (is_short) copy_columns<kHeads>(block.sums, dim, padded, step, dim);
    add_columns<kHeads, 1>(block, window, is_short ? step : dim, whole,
                           [dim](const T* row, std::size_t, Vector& a, Vector& b)
                               HWY_ATTR { Loads::load_rest(row, dim, a, b); });
    if (is_short) copy_columns<kHeads>(padded, step, block.sums, dim, dim);
  }

 private:
  // Pairs of accumulators, one per head and step of columns. Fewer would wait for each other:
  // multiply-adds take four cycles, and two start in each.
  static constexpr int kSums = 4;

  // kSteps steps of columns from `column` on, where head g's sums begin at sums[g * stride].
  template <int kHeads, int kSteps, class Load>
  HWY_INLINE static void add_columns(const Block& block, float* sums, std::size_t stride,
                                     std::size_t column, const Load& load) {
    const Tag d;
    const std::size_t step = Loads::step();
    const Vector none = hn::Undefined(d);
    Vector a0 = none, a1 = none, a2 = none, a3 = none;
    Vector b0 = none, b1 = none, b2 = none, b3 = none;
    const auto each_sum = [&](const auto& function) HWY_ATTR {
      const auto call = [&](auto sum, Vector& a, Vector& b) HWY_ATTR {
        if constexpr (sum() < kHeads * kSteps) function(sum() % kHeads, sum() / kHeads, a, b);
      };
      call(std::integral_constant<std::size_t, 0>(), a0, b0);
      call(std::integral_constant<std::size_t, 1>(), a1, b1);
      call(std::integral_constant<std::size_t, 2>(), a2, b2);
      call(std::integral_constant<std::size_t, 3>(), a3, b3);
    };
    each_sum([=](std::size_t head, std::size_t at, Vector& a, Vector& b)
                 HWY_ATTR { Loads::load_like<T>(sums + head * stride + at * step, a, b); });
    const auto count = static_cast<std::size_t>(block.rows.count);
    const float* weights = block.weights;
    for (std::size_t i = 0; i < count; ++i) {
      if (block.first) {
        prefetch_row(block.rows.next, static_cast<int>(i), row_bytes<T>(column),
                     row_bytes<T>(column + kSteps * step));
      }
      const T* row = block.rows.rows[i];
      Vector r, s;  // load() writes them
      each_sum([&](std::size_t head, std::size_t at, Vector& a, Vector& b) HWY_ATTR {
        if (head == 0) load(row, at * step, r, s);
        const Vector w = hn::Set(d, weights[count * head + i]);
        a = hn::MulAdd(w, r, a);
        b = hn::MulAdd(w, s, b);
      });
    }
    each_sum([=](std::size_t head, std::size_t at, Vector& a, Vector& b)
                 HWY_ATTR { Loads::store_like<T>(a, b, sums + head * stride + at * step); });
  }

  template <int kHeads>
  HWY_INLINE static void copy_columns(const float* from, std::size_t from_stride, float* to,
                                      std::size_t to_stride, std::size_t count) {
    for (std::size_t g = 0; g < kHeads; ++g) {
      std::memcpy(to + g * to_stride, from + g * from_stride, count * sizeof(float));
    }
  }
};

/// Products of up to eight vectors with a panel of rows, two registers of rows at a time.
class HighwayPanel {
  using Tag = HighwayLoads::Tag;
  using Vector = HighwayLoads::Vector;

 public:
  struct Block {
    const float* panel = nullptr;    // [dim, kPanel]
    const float* vectors = nullptr;  // [kVectors, dim]
    std::size_t dim = 0;
    float* out = nullptr;  // [kVectors] x kPanel, `stride` apart
    std::size_t stride = 0;
    std::size_t rows = 0;  // of the panel that there are
  };

  template <int kVectors>
  HWY_INLINE static void multiply(const Block& block) {
    const Tag d;
    const std::size_t lanes = hn::Lanes(d);
    for (std::size_t first = 0; first < block.rows; first += 2 * lanes) {
      multiply_two<kVectors>(block, first);
    }
  }

 private:
  template <int kVectors>
  HWY_INLINE static void multiply_two(const Block& block, std::size_t first) {
    const Tag d;
    const Vector zero = hn::Zero(d);
    Vector a0 = zero, a1 = zero, a2 = zero, a3 = zero, a4 = zero, a5 = zero, a6 = zero, a7 = zero;
    Vector b0 = zero, b1 = zero, b2 = zero, b3 = zero, b4 = zero, b5 = zero, b6 = zero, b7 = zero;
    const auto each_vector = [&](const auto& function) HWY_ATTR {
      function(0U, a0, b0);
      if constexpr (kVectors > 1) function(1U, a1, b1);
      if constexpr (kVectors > 2) {
        function(2U, a2, b2);
        function(3U, a3, b3);
      }
      if constexpr (kVectors > 4) {
        function(4U, a4, b4);
        function(5U, a5, b5);
      }
      if constexpr (kVectors > 6) {
        function(6U, a6, b6);
        function(7U, a7, b7);
      }
    };
    const float* panel = block.panel + first;
    for (std::size_t j = 0; j < block.dim; ++j) {
      const Vector r = hn::LoadU(d, panel + j * Panels::kPanel);
      const Vector s = hn::LoadU(d, panel + j * Panels::kPanel + hn::Lanes(d));
      each_vector([=, &block](std::size_t v, Vector& a, Vector& b) HWY_ATTR {
        const Vector x = hn::Set(d, block.vectors[v * block.dim + j]);
        a = hn::MulAdd(x, r, a);
        b = hn::MulAdd(x, s, b);
      });
    }
    each_vector([=, &block](std::size_t v, Vector& a, Vector& b) HWY_ATTR {
      store(block, first, a, block.out + v * block.stride);
      store(block, first + hn::Lanes(d), b, block.out + v * block.stride);
    });
  }

  // Products with rows [first, first + Lanes()), as far as there are such rows.
  HWY_INLINE static void store(const Block& block, std::size_t first, Vector products, float* out) {
    const Tag d;
    if (first + hn::Lanes(d) <= block.rows) return hn::StoreU(products, d, out + first);
    if (first >= block.rows) return;
    HWY_ALIGN float padded[HighwayLoads::kMaxStep];
    hn::Store(products, d, padded);
    std::memcpy(out + first, padded, (block.rows - first) * sizeof(float));
  }
};

/// VectorOps of one Highway target. Inner products and weighted sums accumulate in float32.
/// Exponentials and logarithms are Highway's, within 2 and 4 units in the last place where the
/// result is a normal number.
struct HighwayOps : HighwaySignatureOps {
  template <class T>
  static HWY_ATTR void dot_rows(const Rows<T>& rows, const float* queries, int group, float* dots) {
    HighwayQueries<T> arranged;
    const auto dim = static_cast<std::size_t>(rows.dim);
    for (int g = 0; g < group; g += 4) {
      const int heads = group - g < 4 ? group - g : 4;
      for (std::size_t begin = 0; begin < dim; begin += HighwayQueries<T>::kChunk) {
        arranged.arrange(queries + std::int64_t{g} * rows.dim, heads, dim, begin);
        dot_chunk(rows, arranged, heads, dots + std::int64_t{g} * rows.count,
                  g == 0 && begin == 0 ? rows.next : nullptr);
      }
    }
  }

  template <class T>
  static HWY_ATTR void add_rows(const Rows<T>& rows, const float* weights, int group, float* sums) {
    if (rows.count == 0) return;
    for (int g = 0; g < group;) {
      const typename HighwaySums<T>::Block block{.rows = rows,
                                                 .weights = weights + std::int64_t{g} * rows.count,
                                                 .sums = sums + std::int64_t{g} * rows.dim,
                                                 .first = g == 0};
      g += add_heads<T>(block, group - g);
    }
  }

  static HWY_ATTR void project(const Panels& panels, const float* vectors, int count, float* out) {
    const auto dim = static_cast<std::size_t>(panels.dim);
    for (int p = 0; p < panels.count; p += Panels::kPanel) {
      const int rows = panels.count - p < Panels::kPanel ? panels.count - p : Panels::kPanel;
      HighwayPanel::Block block{.panel = panels.data + Panels::place(p, 0, panels.dim),
                                .dim = dim,
                                .stride = static_cast<std::size_t>(panels.count),
                                .rows = static_cast<std::size_t>(rows)};
      for (int v = 0; v < count;) {
        block.vectors = vectors + std::int64_t{v} * panels.dim;
        block.out = out + std::int64_t{v} * panels.count + p;
        v += project_few(block, count - v);
      }
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
    transform(x, n, [&](Vector v, const auto& counts) HWY_ATTR {
      const Vector e = exp(hn::Sub(v, by));
      sum = hn::Add(sum, hn::IfThenElseZero(counts, e));
      return e;
    });
    return hn::GetLane(hn::SumOfLanes(d, sum));
  }

  static HWY_ATTR void log_affine_exp(float* x, int n, float a, float b) {
    const Tag d;
    const Vector va = hn::Set(d, a);
    const Vector vb = hn::Set(d, b);
    if (a > 0.0F) {
      transform(x, n, [&](Vector v, const auto&) HWY_ATTR {
        return hn::Log(d, hn::MulAdd(vb, exp(v), va));
      });
    } else {  // log b + x, where exp(x) may be 0
      const Vector log_b = hn::Log(d, vb);
      transform(x, n, [&](Vector v, const auto&) HWY_ATTR { return hn::Add(log_b, v); });
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
    transform(x, n, [&](Vector v, const auto&) HWY_ATTR {
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

  // Four queries by four rows need some 24 registers, two by four 14.
  static constexpr bool kManyRegisters =
      HWY_TARGET <= HWY_AVX3 || (HWY_ARCH_ARM_A64 && HWY_TARGET != HWY_EMU128);

  // Inner products of all rows with up to four queries over one chunk of dimensions.
  template <class T>
  HWY_INLINE static void dot_chunk(const Rows<T>& rows, const HighwayQueries<T>& queries, int heads,
                                   float* dots, const NextRows* next) {
    typename HighwayDots<T>::Block block{.rows = {},
                                         .dim = static_cast<std::size_t>(rows.dim),
                                         .begin = queries.begin,
                                         .whole = queries.whole,
                                         .ends = queries.ends};
    for (int i = 0; i < rows.count; i += 4) {
      const int count = rows.count - i < 4 ? rows.count - i : 4;
      // Short of rows, the last one is multiplied again and the product dropped.
      for (int r = 0; r < 4; ++r) block.rows[r] = rows.rows[i + (r < count ? r : count - 1)];
      for (int r = 0; r < count && next != nullptr; ++r) {
        prefetch_row(next, i + r, 0, next->bytes);
      }
      for (int g = 0; g < heads;) {
        block.queries = queries.data + static_cast<std::size_t>(g) * HighwayQueries<T>::kStride;
        block.dots = dots + std::int64_t{g} * rows.count + i;
        block.stride = rows.count;
        g += count == 4 ? dot_heads(block, heads - g) : dot_few(block, heads - g, count);
      }
    }
  }

  // Each takes as many heads as it can and returns how many.
  template <class Block>
  HWY_INLINE static int dot_heads(const Block& block, int heads) {
    using T = std::remove_cv_t<std::remove_pointer_t<std::remove_extent_t<decltype(block.rows)>>>;
    if (kManyRegisters && heads >= 4) return HighwayDots<T>::template compute<4>(block), 4;
    if (heads >= 2) return HighwayDots<T>::template compute<2>(block), 2;
    return HighwayDots<T>::template compute<1>(block), 1;
  }

  // The same where only the first `count` of the four products are wanted.
  template <class Block>
  HWY_INLINE static int dot_few(Block block, int heads, int count) {
    float dots[4 * 4] = {};
    float* to = block.dots;
    const std::int64_t stride = block.stride;
    block.dots = dots;
    block.stride = 4;
    const bool more = block.begin != 0;
    const int done = dot_heads(block, heads);
    for (int g = 0; g < done; ++g) {
      for (int i = 0; i < count; ++i) {
        float& dot = to[g * stride + i];
        dot = (more ? dot : 0.0F) + dots[g * 4 + i];
      }
    }
    return done;
  }

  HWY_INLINE static int project_few(const HighwayPanel::Block& block, int vectors) {
    if (kManyRegisters && vectors >= 8) return HighwayPanel::multiply<8>(block), 8;
    if (vectors >= 6) return HighwayPanel::multiply<6>(block), 6;
    if (vectors >= 4) return HighwayPanel::multiply<4>(block), 4;
    if (vectors >= 2) return HighwayPanel::multiply<2>(block), 2;
    return HighwayPanel::multiply<1>(block), 1;
  }

  template <class T>
  HWY_INLINE static int add_heads(const typename HighwaySums<T>::Block& block, int heads) {
    if (heads >= 4) return HighwaySums<T>::template add<4>(block), 4;
    if (heads >= 2) return HighwaySums<T>::template add<2>(block), 2;
    return HighwaySums<T>::template add<1>(block), 1;
  }

  // x = function(x, which lanes count), vector by vector. The last vector ends with x and overlaps
  // the one before, in lanes that do not count again; a shorter x is padded.
  template <class Function>
  HWY_INLINE static void transform(float* x, int n, const Function& function) {
    const Tag d;
    const std::size_t lanes = hn::Lanes(d);
    const std::size_t rest = static_cast<std::size_t>(n) % lanes;
    const std::size_t whole = static_cast<std::size_t>(n) - rest;
    const auto every_lane = hn::FirstN(d, lanes);
    if (rest == 0) return transform_whole(x, whole, every_lane, function);
    if (whole == 0) {
      HWY_ALIGN float padded[HighwayLoads::kMaxStep] = {};
      std::memcpy(padded, x, rest * sizeof(float));
      hn::Store(function(hn::Load(d, padded), hn::FirstN(d, rest)), d, padded);
      std::memcpy(x, padded, rest * sizeof(float));
      return;
    }
    float* end = x + n - lanes;
    const Vector last = function(hn::LoadU(d, end), hn::Not(hn::FirstN(d, lanes - rest)));
    transform_whole(x, whole, every_lane, function);
    hn::StoreU(last, d, end);
  }

  template <class Mask, class Function>
  HWY_INLINE static void transform_whole(float* x, std::size_t n, Mask every_lane,
                                         const Function& function) {
    const Tag d;
    for (std::size_t i = 0; i < n; i += hn::Lanes(d)) {
      hn::StoreU(function(hn::LoadU(d, x + i), every_lane), d, x + i);
    }
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

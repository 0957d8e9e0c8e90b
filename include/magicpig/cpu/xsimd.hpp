// SPDX-License-Identifier: Apache-2.0
// Operations through xsimd, for the instruction set that this file is compiled for.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <xsimd/xsimd.hpp>

#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/cpu/xsimd_loads.hpp"
#include "magicpig/cpu/xsimd_signatures.hpp"
#include "magicpig/version.hpp"

static_assert(!std::is_same_v<xsimd::default_arch, xsimd::unavailable>,
              "xsimd knows no SIMD instruction set among the compiler's flags: use ScalarOps");

namespace magicpig::inline MAGICPIG_ABI {

/// Calls function(0), function(1) ... function(kCount - 1) with constants, so that arrays of
/// batches which they index may be registers.
template <std::size_t kCount, class Function>
void xsimd_unroll(const Function& function) {
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    (function(std::integral_constant<std::size_t, i>()), ...);
  }
  (std::make_index_sequence<kCount>());
}

/// Scalars [begin, begin + size) of up to four queries in whole steps, in the order in which rows
/// of type T are loaded, and filled up as load_rest() does where they end with the row.
template <class T>
class XsimdQueries {
  using Loads = XsimdLoads;

 public:
  static constexpr std::size_t kChunk = 512;  ///< scalars at most: 8 KiB for four queries
  static constexpr std::size_t kStride = kChunk + Loads::kStep;

  void arrange(const float* queries, int count, std::size_t dim, std::size_t first) {
    constexpr std::size_t kStep = Loads::kStep;
    const std::size_t rest = dim - first <= kChunk ? dim % kStep : 0;
    begin = first;
    whole = dim - first <= kChunk ? dim - first - rest : kChunk;
    ends = rest != 0;
    for (int q = 0; q < count; ++q) {
      const float* from = queries + static_cast<std::size_t>(q) * dim + first;
      float* to = data + static_cast<std::size_t>(q) * kStride;
      for (std::size_t j = 0; j < whole; j += kStep) copy(from + j, to + j);
      if (rest == 0) continue;
      float window[kStep] = {};
      std::memcpy(window + (dim < kStep ? 0 : kStep - rest), from + whole, rest * sizeof(float));
      copy(window, to + whole);
    }
  }

  std::size_t begin = 0;
  std::size_t whole = 0;
  bool ends = false;  ///< with a rest behind the whole steps
  alignas(Loads::kAlignment) float data[4 * kStride];

 private:
  static void copy(const float* from, float* to) {
    const Loads::Pair pair = Loads::load_like<T>(from);
    pair.a.store_aligned(to);
    pair.b.store_aligned(to + Loads::kLanes);
  }
};

/// Inner products of four rows with one, two or four queries, in float32: each product of a row
/// and a query has one accumulator per lane, so its rounding error grows with dim / lanes.
template <class T>
class XsimdDots {
  using Loads = XsimdLoads;
  using Vector = Loads::Vector;

 public:
  struct Block {
    const T* rows[4];
    int count = 0;  ///< of rows whose products are wanted
    std::size_t dim = 0;
    const float* queries = nullptr;  ///< [kQueries], XsimdQueries<T>::kStride apart
    std::size_t begin = 0;           ///< of the chunk
    std::size_t whole = 0;
    bool ends = false;
    float* dots = nullptr;  ///< [kQueries] x count, `stride` apart
    std::int64_t stride = 0;
  };

  /// kQueries is 1, 2 or 4. Chunks behind the first one add to the inner products.
  template <std::size_t kQueries>
  static void compute(const Block& block) {
    Vector sums[kQueries][4];
    xsimd_unroll<4 * kQueries>([&](auto i) { sums[i / 4][i % 4] = Vector(0.0F); });
    const auto add = [&](const float* query, const Vector(&rows)[4]) {
      xsimd_unroll<kQueries>([&](auto q) {
        const Vector x = Vector::load_aligned(query + q * XsimdQueries<T>::kStride);
        xsimd_unroll<4>([&](auto r) { sums[q][r] = xsimd::fma(x, rows[r], sums[q][r]); });
      });
    };
    const auto add_step = [&](const float* query, const auto& load) {
      Vector a[4];
      Vector b[4];
      xsimd_unroll<4>([&](auto r) {
        const Loads::Pair pair = load(block.rows[r]);
        a[r] = pair.a;
        b[r] = pair.b;
      });
      add(query, a);
      add(query + Loads::kLanes, b);
    };
    for (std::size_t j = 0; j < block.whole; j += Loads::kStep) {
      add_step(block.queries + j,
               [at = block.begin + j](const T* row) { return Loads::load(row, at); });
    }
    if (block.ends) {
      add_step(block.queries + block.whole,
               [dim = block.dim](const T* row) { return Loads::load_rest(row, dim); });
    }
    xsimd_unroll<kQueries>([&](auto q) {
      store_sums(sums[q], block, block.dots + static_cast<std::int64_t>(q()) * block.stride);
    });
  }

 private:
  // The sums of pairs of lanes of u and v, which alternate in the result.
  static Vector fold(const Vector& u, const Vector& v) {
    return xsimd::zip_lo(u, v) + xsimd::zip_hi(u, v);
  }

  // to = (behind the first chunk ? to : 0) + the sums of lanes, as many as there are rows.
  static void store_sums(const Vector (&sums)[4], const Block& block, float* to) {
    using Four = xsimd::make_sized_batch_t<float, 4>;
    alignas(Loads::kAlignment) float lanes[Loads::kLanes];  // of row i: lanes i, i + 4, i + 8 ...
    fold(fold(sums[0], sums[2]), fold(sums[1], sums[3])).store_aligned(lanes);
    Four total = Four::load_aligned(lanes);
    for (std::size_t i = 4; i < Loads::kLanes; i += 4) total += Four::load_aligned(lanes + i);
    const bool more = block.begin != 0;
    if (block.count == 4) {
      (more ? total + Four::load_unaligned(to) : total).store_unaligned(to);
      return;
    }
    total.store_aligned(lanes);
    for (int i = 0; i < block.count; ++i) to[i] = (more ? to[i] : 0.0F) + lanes[i];
  }
};

/// Weighted rows added to the sums of one, two or four heads, some columns at a time: the sums stay
/// in registers while all rows go by.
template <class T>
class XsimdSums {
  using Loads = XsimdLoads;
  using Pair = Loads::Pair;

 public:
  struct Block {
    const Rows<T>& rows;
    const float* weights = nullptr;  ///< [kHeads, rows.count]
    float* sums = nullptr;           ///< [kHeads, rows.dim]
    bool first = true;               ///< of the groups of heads: prefetches
  };

  template <std::size_t kHeads>
  static void add(const Block& block) {
    const auto dim = static_cast<std::size_t>(block.rows.dim);
    constexpr std::size_t kStep = Loads::kStep;
    const std::size_t whole = dim / kStep * kStep;
    std::size_t j = 0;
    const auto add_steps = [&](auto steps) {
      for (; j + steps() * kStep <= whole; j += steps() * kStep) {
        add_columns<kHeads, steps()>(
            block, block.sums + j, dim, j,
            [j](const T* row, std::size_t at) { return Loads::load(row, j + at); });
      }
    };
    // The sums of one head in one step would wait for each other: multiply-adds take four cycles,
    // and two start in each. Two heads in two steps g++ 12 keeps in memory.
    if constexpr (kHeads == 1) {
      add_steps(std::integral_constant<std::size_t, 4>());
      add_steps(std::integral_constant<std::size_t, 2>());
    }
    add_steps(std::integral_constant<std::size_t, 1>());
    if (dim == whole) return;
    // A window of columns that ends with the rows; a row's scalars there are 0 where they were
    // added already. Sums of a row shorter than that get a place of their own.
    const auto load = [dim](const T* row, std::size_t) { return Loads::load_rest(row, dim); };
    if (dim >= kStep)
      return add_columns<kHeads, 1>(block, block.sums + (dim - kStep), dim, whole, load);
    float padded[kHeads * kStep] = {};
    copy_columns<kHeads>(block.sums, dim, padded, kStep, dim);
    add_columns<kHeads, 1>(block, padded, kStep, whole, load);
    copy_columns<kHeads>(padded, kStep, block.sums, dim, dim);
  }

 private:
  // kSteps steps of columns from `column` on, where head g's sums begin at sums[g * stride].
  template <std::size_t kHeads, std::size_t kSteps, class Load>
  static void add_columns(const Block& block, float* sums, std::size_t stride, std::size_t column,
                          const Load& load) {
    constexpr std::size_t kStep = Loads::kStep;
    Pair totals[kHeads * kSteps];
    const auto place = [=](std::size_t i) {
      return sums + i % kHeads * stride + i / kHeads * kStep;
    };
    xsimd_unroll<kHeads * kSteps>([&](auto i) { totals[i] = Loads::load_like<T>(place(i)); });
    const int count = block.rows.count;
    for (int i = 0; i < count; ++i) {
      if (block.first) {
        prefetch_row(block.rows.next, i, row_bytes<T>(column),
                     row_bytes<T>(column + kSteps * kStep));
      }
      xsimd_unroll<kSteps>([&](auto step) {
        const Pair row = load(block.rows.rows[i], step * kStep);
        xsimd_unroll<kHeads>([&](auto g) {
          const Loads::Vector w(block.weights[static_cast<std::int64_t>(g()) * count + i]);
          Pair& total = totals[step * kHeads + g];
          total.a = xsimd::fma(w, row.a, total.a);
          total.b = xsimd::fma(w, row.b, total.b);
        });
      });
    }
    xsimd_unroll<kHeads * kSteps>([&](auto i) { Loads::store_like<T>(totals[i], place(i)); });
  }

  template <std::size_t kHeads>
  static void copy_columns(const float* from, std::size_t from_stride, float* to,
                           std::size_t to_stride, std::size_t count) {
    for (std::size_t g = 0; g < kHeads; ++g) {
      std::memcpy(to + g * to_stride, from + g * from_stride, count * sizeof(float));
    }
  }
};

/// Products of up to eight vectors with a panel of rows, two batches of rows at a time.
class XsimdPanel {
  using Vector = XsimdLoads::Vector;
  static constexpr std::size_t kLanes = XsimdLoads::kLanes;

 public:
  struct Block {
    const float* panel = nullptr;    ///< [dim, kPanel]
    const float* vectors = nullptr;  ///< [kVectors, dim]
    std::size_t dim = 0;
    float* out = nullptr;  ///< [kVectors] x rows, `stride` apart
    std::size_t stride = 0;
    std::size_t rows = 0;  ///< of the panel that there are
  };

  template <std::size_t kVectors>
  static void multiply(const Block& block) {
    for (std::size_t first = 0; first < block.rows; first += 2 * kLanes) {
      multiply_two<kVectors>(block, first);
    }
  }

 private:
  template <std::size_t kVectors>
  static void multiply_two(const Block& block, std::size_t first) {
    XsimdLoads::Pair sums[kVectors];
    xsimd_unroll<kVectors>([&](auto v) { sums[v] = {Vector(0.0F), Vector(0.0F)}; });
    for (std::size_t j = 0; j < block.dim; ++j) {
      const auto rows = XsimdLoads::load(block.panel + j * Panels::kPanel, first);
      xsimd_unroll<kVectors>([&](auto v) {
        const Vector x(block.vectors[v * block.dim + j]);
        sums[v].a = xsimd::fma(x, rows.a, sums[v].a);
        sums[v].b = xsimd::fma(x, rows.b, sums[v].b);
      });
    }
    xsimd_unroll<kVectors>([&](auto v) {
      float* out = block.out + v * block.stride + first;
      if (first + 2 * kLanes <= block.rows) return XsimdLoads::store_like<float>(sums[v], out);
      float products[2 * kLanes];
      XsimdLoads::store_like<float>(sums[v], products);
      std::memcpy(out, products, (block.rows - first) * sizeof(float));
    });
  }
};

/// VectorOps of xsimd's best instruction set that the compiler flags allow (xsimd::default_arch,
/// chosen at compile time), tried with xsimd 8.1.0; nothing to link.
///
/// Inner products and weighted sums accumulate in float32. Where the result is a normal number,
/// exponentials are within 2 units in the last place and logarithms within 4.
///
/// What is slow about it: queries and sums of paired scalars (bf16; fp16 too without F16C) are put
/// in order and back through memory; without AVX2 bytes of q8_0 and q4_0 are widened and the
/// curve's nodes read one by one, and without F16C fp16 takes some ten operations; for AVX-512BW
/// without optimisation g++ cannot compile xsimd's logarithm, which is libm's then. The benchmark
/// `ops` says how much it is.
///
/// Most of xsimd's functions carry the name of xsimd's instruction set, not that of MAGICPIG_ABI,
/// and some carry none. With optimisation compilers inline all that are used here; without, units
/// compiled for several instruction sets and linked together may share one. Such programs take
/// HighwayOps.
struct XsimdOps : XsimdSignatureOps {
  template <class T>
  static void dot_rows(const Rows<T>& rows, const float* queries, int group, float* dots) {
    XsimdQueries<T> arranged;
    const auto dim = static_cast<std::size_t>(rows.dim);
    for (int g = 0; g < group; g += 4) {
      const int heads = group - g < 4 ? group - g : 4;
      for (std::size_t begin = 0; begin < dim; begin += XsimdQueries<T>::kChunk) {
        arranged.arrange(queries + std::int64_t{g} * rows.dim, heads, dim, begin);
        dot_chunk(rows, arranged, heads, dots + std::int64_t{g} * rows.count,
                  g == 0 && begin == 0 ? rows.next : nullptr);
      }
    }
  }

  template <class T>
  static void add_rows(const Rows<T>& rows, const float* weights, int group, float* sums) {
    if (rows.count == 0) return;
    for (int g = 0; g < group;) {
      const typename XsimdSums<T>::Block block{.rows = rows,
                                               .weights = weights + std::int64_t{g} * rows.count,
                                               .sums = sums + std::int64_t{g} * rows.dim,
                                               .first = g == 0};
      g += add_heads<T>(block, group - g);
    }
  }

  static void project(const Panels& panels, const float* vectors, int count, float* out) {
    for (int p = 0; p < panels.count; p += Panels::kPanel) {
      const int rows = panels.count - p < Panels::kPanel ? panels.count - p : Panels::kPanel;
      XsimdPanel::Block block{.panel = panels.data + Panels::place(p, 0, panels.dim),
                              .dim = static_cast<std::size_t>(panels.dim),
                              .stride = static_cast<std::size_t>(panels.count),
                              .rows = static_cast<std::size_t>(rows)};
      for (int v = 0; v < count;) {
        block.vectors = vectors + std::int64_t{v} * panels.dim;
        block.out = out + std::int64_t{v} * panels.count + p;
        v += project_few(block, count - v);
      }
    }
  }

  static float(max)(const float* x, int n) {
    alignas(XsimdLoads::kAlignment) float lanes[XsimdLoads::kLanes];
    Vector largest(-std::numeric_limits<float>::infinity());
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const auto v = Vector::load_unaligned(x + i);
      // xsimd::max may return either argument if one is NaN; a comparison is false.
      largest = xsimd::select(v > largest, v, largest);
    }
    largest.store_aligned(lanes);
    float result = lanes[0];
    for (const float lane : lanes) result = lane > result ? lane : result;
    for (; i < n; ++i) result = x[i] > result ? x[i] : result;
    return result;
  }

  /// The sum is accumulated per lane in float32.
  static float exp_sum(float* x, int n, float shift) {
    const Vector by(shift);
    Vector sum(0.0F);
    float rest = 0.0F;
    transform(x, n, [&](const Vector& v, int count) {
      const Vector e = exp(v - by);
      if (count == kLanes) {
        sum += e;
      } else {
        rest = add_lanes(e, count);
      }
      return e;
    });
    return add_lanes(sum, kLanes) + rest;
  }

  static void log_affine_exp(float* x, int n, float a, float b) {
    if (a > 0.0F) {
      const Vector va(a);
      const Vector vb(b);
      transform(x, n, [&](const Vector& v, int) { return log(xsimd::fma(vb, exp(v), va)); });
    } else {  // log b + x, where exp(x) may be 0
      const Vector log_b(::logf(b));
      transform(x, n, [&](const Vector& v, int) { return log_b + v; });
    }
  }

  static void interpolate(const CurveView& curve, float* x, int n) {
    const Vector lowest(-1.0F);
    const Vector one(1.0F);
    const Vector half(0.5F);
    const Vector segments(static_cast<float>(curve.segments));
    const Integers last(curve.segments - 1);
    transform(x, n, [&](const Vector& v, int) {
      const Vector above = xsimd::select(v > lowest, v, lowest);  // NaN too becomes -1
      const Vector cosine = xsimd::select(above < one, above, one);
      const Vector place = xsimd::sqrt(xsimd::fnma(half, cosine, half)) * segments;
      const Integers node = (xsimd::min)(xsimd::to_int(place), last);
      const Vector share = place - xsimd::to_float(node);
      const Vector left = look_up(curve.nodes, node);
      const Vector right = look_up(curve.nodes + 1, node);
      return xsimd::fma(share, right - left, left);
    });
  }

 private:
  using Vector = XsimdLoads::Vector;
  using Integers = xsimd::batch<std::int32_t>;
  static constexpr int kLanes = static_cast<int>(XsimdLoads::kLanes);

  // Four queries by four rows need some 24 registers, two by four 14.
  static constexpr bool kManyRegisters = XSIMD_WITH_AVX512F || XSIMD_WITH_NEON64;

  // Inner products of all rows with up to four queries over one chunk of dimensions.
  template <class T>
  static void dot_chunk(const Rows<T>& rows, const XsimdQueries<T>& queries, int heads, float* dots,
                        const NextRows* next) {
    typename XsimdDots<T>::Block block{.rows = {},
                                       .dim = static_cast<std::size_t>(rows.dim),
                                       .begin = queries.begin,
                                       .whole = queries.whole,
                                       .ends = queries.ends,
                                       .stride = rows.count};
    for (int i = 0; i < rows.count; i += 4) {
      block.count = rows.count - i < 4 ? rows.count - i : 4;
      for (int r = 0; r < 4; ++r) {
        // Short of rows, the last one is multiplied again and the product dropped.
        block.rows[r] = rows.rows[i + (r < block.count ? r : block.count - 1)];
        if (next == nullptr) continue;
        prefetch_row(next, i + r, 0, next->bytes);
      }
      for (int g = 0; g < heads;) {
        block.queries = queries.data + static_cast<std::size_t>(g) * XsimdQueries<T>::kStride;
        block.dots = dots + std::int64_t{g} * rows.count + i;
        g += dot_heads<T>(block, heads - g);
      }
    }
  }

  // Each takes as many heads or vectors as it can and returns how many.
  template <class T>
  static int dot_heads(const typename XsimdDots<T>::Block& block, int heads) {
    if (kManyRegisters && heads >= 4) return XsimdDots<T>::template compute<4>(block), 4;
    if (heads >= 2) return XsimdDots<T>::template compute<2>(block), 2;
    return XsimdDots<T>::template compute<1>(block), 1;
  }

  template <class T>
  static int add_heads(const typename XsimdSums<T>::Block& block, int heads) {
    if (heads >= 4) return XsimdSums<T>::template add<4>(block), 4;
    if (heads >= 2) return XsimdSums<T>::template add<2>(block), 2;
    return XsimdSums<T>::template add<1>(block), 1;
  }

  static int project_few(const XsimdPanel::Block& block, int vectors) {
    if (kManyRegisters && vectors >= 8) return XsimdPanel::multiply<8>(block), 8;
    if (vectors >= 6) return XsimdPanel::multiply<6>(block), 6;
    if (vectors >= 4) return XsimdPanel::multiply<4>(block), 4;
    if (vectors >= 2) return XsimdPanel::multiply<2>(block), 2;
    return XsimdPanel::multiply<1>(block), 1;
  }

  // x = function(x, lanes of x that count), batch by batch.
  template <class Function>
  static void transform(float* x, int n, const Function& function) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      function(Vector::load_unaligned(x + i), kLanes).store_unaligned(x + i);
    }
    if (i >= n) return;  // compilers that see no bound of n warn of what would follow
    const auto bytes = static_cast<std::size_t>(n - i) * sizeof(float);
    alignas(XsimdLoads::kAlignment) float padded[XsimdLoads::kLanes] = {};
    std::memcpy(padded, x + i, bytes);
    function(Vector::load_aligned(padded), n - i).store_aligned(padded);
    std::memcpy(x + i, padded, bytes);
  }

  static float add_lanes(const Vector& v, int count) {
    alignas(XsimdLoads::kAlignment) float lanes[XsimdLoads::kLanes];
    v.store_aligned(lanes);
    float sum = 0.0F;
    for (int i = 0; i < count; ++i) sum += lanes[i];
    return sum;
  }

  // xsimd 8.1.0 reads floats one by one here, and misses the instruction for it.
  static Vector look_up(const float* table, const Integers& places) {
#if XSIMD_WITH_AVX512F
    return Vector(_mm512_i32gather_ps(places, table, sizeof(float)));
#elif XSIMD_WITH_AVX2
    return Vector(_mm256_i32gather_ps(table, places, sizeof(float)));
#else
    return Vector::gather(table, places);
#endif
  }

  // xsimd's exp gives 0 below -87.68 and infinity above 88.38, where the result is subnormal or
  // just below the largest number. The two factors taken there have arguments of at most 60 and of
  // what is missing to x, which takes no rounding.
  static Vector exp(const Vector& x) {
    if (xsimd::all(xsimd::abs(x) < Vector(87.0F))) return xsimd::exp(x);
    const Vector lowest(-60.0F);
    const Vector highest(60.0F);
    const Vector above = xsimd::select(x < lowest, lowest, x);  // NaN stays
    const Vector bounded = xsimd::select(above > highest, highest, above);
    return xsimd::exp(bounded) * xsimd::exp(x - bounded);
  }

  // xsimd 8.1.0's log selects among integers, and what it does that with for AVX-512BW is a macro
  // of g++ without optimisation, which does not compile.
  static Vector log(const Vector& x) {
#if XSIMD_WITH_AVX512BW && defined(__GNUC__) && !defined(__clang__) && !defined(__OPTIMIZE__)
    alignas(XsimdLoads::kAlignment) float lanes[XsimdLoads::kLanes];
    x.store_aligned(lanes);
    for (float& lane : lanes) lane = ::logf(lane);
    return Vector::load_aligned(lanes);
#else
    return xsimd::log(x);
#endif
  }
};

static_assert(VectorOps<XsimdOps>);

}  // namespace magicpig::inline MAGICPIG_ABI

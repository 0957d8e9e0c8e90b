// SPDX-License-Identifier: Apache-2.0
// Operations through Eigen: its matrix products and array functions, for the flags in use.
#pragma once

#include <math.h>

#include <Eigen/Core>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/cpu/scalar_signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Up to kRows rows over up to kDims scalars of them, widened to float32 side by side: what Eigen
/// multiplies. 8 KiB at most, which stay in the first-level cache.
class EigenBlock {
 public:
  static constexpr int kRows = 8;
  static constexpr int kDims = 256;  ///< whole blocks of any scalar type

  /// [size, rows]
  using Matrix =
      Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor, kDims, kRows>;
  using View = Eigen::Map<const Matrix, Eigen::AlignedMax, Eigen::OuterStride<kDims>>;

  /// Takes scalars [begin, begin + kDims) of rows [first, first + kRows), as far as there are such.
  template <class T>
  EigenBlock(const Rows<T>& rows, int first, int begin)
      : rows_(rows.count - first < kRows ? rows.count - first : kRows),
        size_(rows.dim - begin < kDims ? rows.dim - begin : kDims) {
    for (int r = 0; r < rows_; ++r) {
      widen(rows.rows[first + r] + begin / kScalarsPerElement<T>, size_, data_ + r * kDims);
    }
  }

  [[nodiscard]] int rows() const { return rows_; }
  [[nodiscard]] int size() const { return size_; }
  [[nodiscard]] View view() const { return View(data_, size_, rows_); }

 private:
  // Runs of a constant length are vectorised at any level of optimisation that vectorises at all.
  static constexpr int kRun = 16;

  static void widen(const float* from, int size, float* to) {
    std::memcpy(to, from, static_cast<std::size_t>(size) * sizeof(float));
  }
  template <class T>
  static void widen(const T* from, int size, float* to) {
    int j = 0;
    for (; j + kRun <= size; j += kRun) widen_run(from + j, to + j);
    for (; j < size; ++j) to[j] = to_float(from[j]);
  }
  static void widen(const q8_0* from, int size, float* to) {
    for (int b = 0; b < size / kQ8Block; ++b) {
      const float scale = to_float(from[b].scale);
      for (int k = 0; k < kQ8Block; ++k) {
        to[b * kQ8Block + k] = scale * static_cast<float>(from[b].values[k]);
      }
    }
  }
  static void widen(const q4_0* from, int size, float* to) {
    constexpr int kHalf = kQ4Block / 2;
    for (int b = 0; b < size / kQ4Block; ++b, to += kQ4Block) {
      const float scale = to_float(from[b].scale);
      for (int k = 0; k < kHalf; ++k) {
        const int both = from[b].nibbles[k];
        to[k] = scale * static_cast<float>((both & 15) - 8);
        to[kHalf + k] = scale * static_cast<float>((both >> 4) - 8);
      }
    }
  }

  static void widen_run(const bf16* from, float* to) {
    for (int k = 0; k < kRun; ++k) to[k] = to_float(from[k]);
  }
  static void widen_run(const fp16* from, float* to) {
#if defined(__F16C__) && defined(EIGEN_VECTORIZE_AVX)
    for (int k = 0; k < kRun; k += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
      _mm256_storeu_ps(to + k, _mm256_cvtph_ps(halves));
    }
#else
    for (int k = 0; k < kRun; ++k) to[k] = widened(from[k]);
#endif
  }

  // to_float() by arithmetic alone, as branches and selections keep GCC from vectorising: a
  // subnormal is read as a normal number with a leading 1, which is subtracted then.
  static float widened(fp16 x) {
    constexpr std::uint32_t kToBias = 112U << 23;  // from a half's exponents to a float's
    const std::uint32_t magnitude = x.bits & 0x7fffU;
    const std::uint32_t is_special = magnitude > 0x7bffU ? 1U : 0U;
    const std::uint32_t is_subnormal = magnitude < 0x0400U ? 1U : 0U;
    const auto read = std::bit_cast<float>((magnitude << 13) + kToBias + is_special * kToBias +
                                           (is_subnormal << 23));
    const auto surplus = std::bit_cast<float>(is_subnormal * (113U << 23));
    const std::uint32_t sign = (x.bits & 0x8000U) << 16;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(read - surplus) | sign);
  }

  int rows_;
  int size_;
  alignas(EIGEN_MAX_ALIGN_BYTES > 0 ? EIGEN_MAX_ALIGN_BYTES : 16) float data_[kRows * kDims];
};

/// VectorOps through Eigen's products and array functions, for the instruction set that the
/// compiler flags allow, tried with Eigen 3.4.0; nothing to link. It takes no memory, starts no
/// threads, and asks Eigen for no general matrix product, which would do both.
///
/// Inner products and weighted sums accumulate in float32. Where the result is a normal number,
/// exponentials are within 2 units in the last place and logarithms within 4.
///
/// What is slow about it: rows are widened to float32 in a buffer first, batch by batch, where
/// other backends widen them in registers; the curve's nodes are read one by one; without SSE4.1
/// Eigen rounds one by one, which exponentials wait for. The benchmark `ops` says how much it is.
///
/// Eigen's functions have the same names for every instruction set. Where units compiled for
/// several are linked together, the linker keeps one of each, which another unit's processor may
/// not have, in this library as in the host's own use of Eigen. Such programs take HighwayOps.
struct EigenOps : ScalarSignatureOps {
  template <class T>
  static void dot_rows(const Rows<T>& rows, const float* queries, int group, float* dots) {
    for (int i = 0; i < rows.count; i += EigenBlock::kRows) {
      prefetch_next(rows, i);
      for (int begin = 0; begin < rows.dim; begin += EigenBlock::kDims) {
        const EigenBlock block(rows, i, begin);
        const Columns heads(queries + begin, block.size(), group, Stride(rows.dim));
        Outputs products(dots + i, block.rows(), group, Stride(rows.count));
        // Products of few rows and columns are inner products one by one; a general product would
        // pack both sides, and take memory for it.
        if (begin == 0) {
          products.noalias() = block.view().transpose().lazyProduct(heads);
        } else {
          products.noalias() += block.view().transpose().lazyProduct(heads);
        }
      }
    }
  }

  template <class T>
  static void add_rows(const Rows<T>& rows, const float* weights, int group, float* sums) {
    for (int i = 0; i < rows.count; i += EigenBlock::kRows) {
      prefetch_next(rows, i);
      for (int begin = 0; begin < rows.dim; begin += EigenBlock::kDims) {
        const EigenBlock block(rows, i, begin);
        const Columns heads(weights + i, block.rows(), group, Stride(rows.count));
        add_product(block.view(), heads,
                    Outputs(sums + begin, block.size(), group, Stride(rows.dim)));
      }
    }
  }

  static void project(const Panels& panels, const float* vectors, int count, float* out) {
    if (count == 0) return;  // `out` may be null
    const Columns columns(vectors, panels.dim, count, Stride(panels.dim));
    for (int p = 0; p < panels.count; p += Panels::kPanel) {
      const Panel panel(panels.data + Panels::place(p, 0, panels.dim), Panels::kPanel, panels.dim);
      const int rows = panels.count - p < Panels::kPanel ? panels.count - p : Panels::kPanel;
      const Outputs products(out + p, rows, count, Stride(panels.count));
      int v = 0;
      for (; v + kTileColumns <= count; v += kTileColumns) {
        project_few<kTileColumns>(panel, columns, v, products);
      }
      for (; v < count; ++v) project_few<1>(panel, columns, v, products);
    }
  }

  static float(max)(const float* x, int n) {
    Lanes largest = Lanes::Constant(-std::numeric_limits<float>::infinity());
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      // Eigen's own either takes a NaN or is slow.
      for (int k = 0; k < kLanes; ++k) largest[k] = x[i + k] > largest[k] ? x[i + k] : largest[k];
    }
    float result = largest.maxCoeff();
    for (; i < n; ++i) result = x[i] > result ? x[i] : result;
    return result;
  }

  static float exp_sum(float* x, int n, float shift) {
    Lanes sum = Lanes::Zero();
    float rest = 0.0F;
    transform(x, n, [&](Lanes& v, int count) {
      v = exp(v - shift);
      if (count == kLanes) {
        sum += v;
      } else {
        rest = v.head(count).sum();
      }
    });
    return sum.sum() + rest;
  }

  static void log_affine_exp(float* x, int n, float a, float b) {
    const float log_b = ::logf(b);
    transform(x, n, [=](Lanes& v, int) {
      // Without a, exp(x) may round to 0 while log b + x is still finite.
      if (a > 0.0F) {
        v = (a + b * exp(v)).log();
      } else {
        v += log_b;
      }
    });
  }

  static void interpolate(const CurveView& curve, float* x, int n) {
    const auto segments = static_cast<float>(curve.segments);
    transform(x, n, [&](Lanes& v, int) {
      for (float& lane : v) lane = lane > -1.0F ? lane : -1.0F;  // NaN too becomes -1
      const Lanes places = (0.5F - 0.5F * (v.min)(1.0F)).sqrt() * segments;
      for (int i = 0; i < kLanes; ++i) {
        const int below = static_cast<int>(places[i]);
        const int node = below < curve.segments ? below : curve.segments - 1;
        const float share = places[i] - static_cast<float>(node);
        v[i] = curve.nodes[node] + share * (curve.nodes[node + 1] - curve.nodes[node]);
      }
    });
  }

 private:
  using Stride = Eigen::OuterStride<>;
  using Columns = Eigen::Map<const Eigen::MatrixXf, Eigen::Unaligned, Stride>;
  using Outputs = Eigen::Map<Eigen::MatrixXf, Eigen::Unaligned, Stride>;
  using Panel = Eigen::Map<const Eigen::Matrix<float, Panels::kPanel, Eigen::Dynamic>>;

  static constexpr int kLanes = 32;
  using Lanes = Eigen::Array<float, kLanes, 1>;
  using ConstLanes = Eigen::Map<const Lanes>;

  // Products of a tile of rows with some vectors stay in registers: eight of 64 bytes, where there
  // are 32 of them, else eight of 32 or sixteen of 16.
  static constexpr int kTileRows = EIGEN_MAX_ALIGN_BYTES >= 64 ? 32 : 16;
  static constexpr int kTileColumns = 4;
  template <int kColumns>
  using Tile = Eigen::Matrix<float, kTileRows, kColumns>;

  template <class T>
  static void prefetch_next(const Rows<T>& rows, int first) {
    if (rows.next == nullptr) return;
    for (int r = 0; r < EigenBlock::kRows; ++r) {
      prefetch_row(rows.next, first + r, 0, rows.next->bytes);
    }
  }

  // tile += rows [first, first + kTileRows) of matrix * columns [c, c + kColumns), in the order of
  // the matrix's columns.
  template <int kColumns, class Matrix>
  static void multiply_add(const Matrix& matrix, Eigen::Index first, const Columns& columns,
                           Eigen::Index c, Tile<kColumns>& tile) {
    for (Eigen::Index j = 0; j < matrix.cols(); ++j) {
      tile.noalias() += matrix.template middleRows<kTileRows>(first).col(j).lazyProduct(
          columns.row(j).template segment<kColumns>(c));
    }
  }

  // out += matrix * columns. Eigen's general product would pack both sides into memory of its own;
  // what is left over from tiles are its products with a vector, which do not.
  template <class Matrix>
  static void add_product(const Matrix& matrix, const Columns& columns, Outputs out) {
    const auto whole = matrix.rows() / kTileRows * kTileRows;
    const auto rest = matrix.rows() - whole;
    Eigen::Index c = 0;
    for (; c + kTileColumns <= columns.cols(); c += kTileColumns) {
      for (Eigen::Index r = 0; r < whole; r += kTileRows) {
        auto block = out.block<kTileRows, kTileColumns>(r, c);
        Tile<kTileColumns> tile = block;
        multiply_add(matrix, r, columns, c, tile);
        block = tile;
      }
      for (int i = 0; i < kTileColumns && rest != 0; ++i) {
        out.col(c + i).tail(rest).noalias() += matrix.bottomRows(rest) * columns.col(c + i);
      }
    }
    for (; c < columns.cols(); ++c) out.col(c).noalias() += matrix * columns.col(c);
  }

  // Products of a panel with kColumns vectors. What is behind the last row is multiplied too and
  // dropped, so that a vector's products are the same bits whichever vectors are beside it.
  template <int kColumns>
  static void project_few(const Panel& panel, const Columns& columns, Eigen::Index c,
                          Outputs products) {
    for (Eigen::Index r = 0; r < products.rows(); r += kTileRows) {
      Tile<kColumns> tile = Tile<kColumns>::Zero();
      multiply_add(panel, r, columns, c, tile);
      const Eigen::Index left = products.rows() - r;
      const Eigen::Index rows = left < kTileRows ? left : kTileRows;
      products.block(r, c, rows, kColumns) = tile.topRows(rows);
    }
  }

  // function(lanes, lanes that count) changes x, lane by lane.
  template <class Function>
  static void transform(float* x, int n, const Function& function) {
    for (int i = 0; i < n; i += kLanes) {
      const int count = n - i < kLanes ? n - i : kLanes;
      Lanes lanes = Lanes::Zero();
      if (count == kLanes) {
        lanes = ConstLanes(x + i);
        function(lanes, count);
        Eigen::Map<Lanes>(x + i) = lanes;
      } else {
        std::memcpy(lanes.data(), x + i, static_cast<std::size_t>(count) * sizeof(float));
        function(lanes, count);
        std::memcpy(x + i, lanes.data(), static_cast<std::size_t>(count) * sizeof(float));
      }
    }
  }

  // exp(x) = 2^k exp(r) for whole k and |r| <= log(2) / 2, where Eigen's exp is right on every
  // instruction set: elsewhere Eigen 3.4's is off by 3 units in the last place with AVX-512, and
  // ends at -88.7. 2^k may be beyond a float, its two factors are not.
  static Lanes exp(const Lanes& x) {
    Lanes bounded;
    for (int i = 0; i < kLanes; ++i) {
      const float above = x[i] > -105.0F ? x[i] : -105.0F;
      bounded[i] = above < 90.0F ? above : 90.0F;
    }
    const Lanes powers = (bounded * 1.44269504F).round();
    // log(2) in two parts, of which the first has so few bits that its product is exact.
    const Lanes rest = (bounded - powers * 0.693359375F) + powers * 2.12194440e-4F;
    Lanes result = rest.exp();
    for (int i = 0; i < kLanes; ++i) {
      const int power = static_cast<int>(powers[i]);
      const int half = power >> 1;
      result[i] *= std::bit_cast<float>((half + 127) << 23);
      result[i] *= std::bit_cast<float>((power - half + 127) << 23);
    }
    for (int i = 0; i < kLanes; ++i) result[i] = x[i] == x[i] ? result[i] : x[i];  // NaN stays
    return result;
  }
};

static_assert(VectorOps<EigenOps>);

}  // namespace magicpig::inline MAGICPIG_ABI

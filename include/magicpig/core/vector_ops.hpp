// SPDX-License-Identifier: Apache-2.0
// The seam for a SIMD library: coarse functions over batches of rows, and those of signatures.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstring>

#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

struct NextRows;

/// A batch of rows that lie anywhere: rows[i] points at `dim` contiguous scalars of any alignment.
/// The same row may occur several times.
template <class T>
struct Rows {
  const T* const* rows = nullptr;
  int count = 0;
  int dim = 0;
  const NextRows* next = nullptr;  ///< rows wanted soon, or null: the i-th is asked for with row i
};

/// Rows of any type, to be asked for only.
struct NextRows {
  NextRows() = default;
  template <class T>
  explicit NextRows(const Rows<T>& wanted)
      : rows(wanted.rows),
        count(wanted.count),
        bytes(row_bytes<T>(static_cast<std::size_t>(wanted.dim))) {}

  const void* rows = nullptr;  ///< an array of pointers
  int count = 0;
  std::size_t bytes = 0;  ///< of each row

  [[nodiscard]] const char* row(int i) const {
    const char* address = nullptr;  // copied, as the pointers in the array are of another type
    std::memcpy(&address,
                static_cast<const char*>(rows) + static_cast<std::size_t>(i) * sizeof address,
                sizeof address);
    return address;
  }
};

/// Asks for bytes [begin, end) of row i, as far as there are such rows, such a row and such bytes.
MAGICPIG_ALWAYS_INLINE void prefetch_row(const NextRows* rows, int i, std::size_t begin,
                                         std::size_t end) {
  if (rows == nullptr || i >= rows->count || begin >= rows->bytes) return;
  prefetch_far(rows->row(i) + begin, (end < rows->bytes ? end : rows->bytes) - begin);
}

/// Vectors that many others are multiplied with: row p, scalar j at
/// data[(p / kPanel * dim + j) * kPanel + p % kPanel], so that a panel is read from end to end with
/// kPanel products in vector registers. What is behind the last row is 0.
struct Panels {
  static constexpr int kPanel = 32;

  const float* data = nullptr;
  int count = 0;  ///< rows
  int dim = 0;

  /// Floats that `count` rows take.
  [[nodiscard]] static constexpr std::size_t size(int count, int dim) {
    return static_cast<std::size_t>((count + kPanel - 1) / kPanel * kPanel) *
           static_cast<std::size_t>(dim);
  }
  [[nodiscard]] static constexpr std::size_t place(int row, int j, int dim) {
    return (static_cast<std::size_t>(row / kPanel) * static_cast<std::size_t>(dim) +
            static_cast<std::size_t>(j)) *
               kPanel +
           static_cast<std::size_t>(row % kPanel);
  }
};

/// A piecewise linear function of x = sqrt((1 - cosine) / 2), the sine of half the angle, on
/// `segments` equal parts of [0, 1]; nodes [segments + 1]. The square root straightens the curve
/// where the cosine nears 1 (see InclusionCurve).
struct CurveView {
  const float* nodes = nullptr;
  int segments = 0;
};

/// What a backend accelerates. Models are empty types with static functions: ScalarOps is the
/// oracle, the others agree with it to rounding. Counts of 0 are allowed everywhere. Arrays are
/// float32, of any alignment, and do not overlap unless they are the same argument.
template <class O>
concept VectorOps = SignatureOps<O> &&
    requires(Rows<float> f32, Rows<fp16> f16, Rows<bf16> b16, Rows<q8_0> q8, Rows<q4_0> q4,
             Panels panels, const float* in, float* inout, CurveView curve, int n) {
  // dots[g * rows.count + i] = <queries[g * rows.dim ...], row i>, float32 or wider accumulation
  O::dot_rows(f32, in, n, inout);
  O::dot_rows(f16, in, n, inout);
  O::dot_rows(b16, in, n, inout);
  O::dot_rows(q8, in, n, inout);
  O::dot_rows(q4, in, n, inout);
  // sums[g * rows.dim + j] += sum_i weights[g * rows.count + i] * row_i[j]
  O::add_rows(f32, in, n, inout);
  O::add_rows(f16, in, n, inout);
  O::add_rows(b16, in, n, inout);
  O::add_rows(q8, in, n, inout);
  O::add_rows(q4, in, n, inout);
  // out[v * panels.count + p] = <in[v * panels.dim ...], row p> for v in [0, n)
  O::project(panels, in, n, inout);
  // the largest of x[n]; -inf for n = 0; NaN is passed over
  { (O::max)(in, n) } -> std::same_as<float>;
  // x = exp(x - shift), returns the sum of the new x; exp(-inf) = 0, NaN stays and spreads
  { O::exp_sum(inout, n, 0.0F) } -> std::same_as<float>;
  // x = log(a + b * exp(x)) for finite x <= 0, a >= 0, b >= 0, a + b > 0
  O::log_affine_exp(inout, n, 0.0F, 1.0F);
  // x = curve(x) for cosines x, clamped to [-1, 1] first; NaN counts as -1
  O::interpolate(curve, inout, n);
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Scalar operations: plain loops without any library, the oracle of the other backends.
#pragma once

#include <math.h>

#include <cstdint>
#include <limits>

#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/cpu/scalar_signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Inner products accumulate in double, in order; exponentials are libm's.
struct ScalarOps : ScalarSignatureOps {
  template <class T>
  static void dot_rows(const Rows<T>& rows, const float* queries, int group, float* dots) {
    for (int g = 0; g < group; ++g) {
      const float* query = queries + std::int64_t{g} * rows.dim;
      for (int i = 0; i < rows.count; ++i) {
        const T* row = rows.rows[i];
        double sum = 0.0;
        for (int j = 0; j < rows.dim; ++j) {
          sum += static_cast<double>(query[j]) * static_cast<double>(scalar_at(row, j));
        }
        dots[std::int64_t{g} * rows.count + i] = static_cast<float>(sum);
      }
    }
  }

  template <class T>
  static void add_rows(const Rows<T>& rows, const float* weights, int group, float* sums) {
    for (int g = 0; g < group; ++g) {
      float* sum = sums + std::int64_t{g} * rows.dim;
      for (int i = 0; i < rows.count; ++i) {
        const T* row = rows.rows[i];
        const float weight = weights[std::int64_t{g} * rows.count + i];
        for (int j = 0; j < rows.dim; ++j) sum[j] += weight * scalar_at(row, j);
      }
    }
  }

  static void project(const Panels& panels, const float* vectors, int count, float* out) {
    for (int v = 0; v < count; ++v) {
      const float* vector = vectors + std::int64_t{v} * panels.dim;
      for (int p = 0; p < panels.count; ++p) {
        double sum = 0.0;
        for (int j = 0; j < panels.dim; ++j) {
          sum += static_cast<double>(vector[j]) *
                 static_cast<double>(panels.data[Panels::place(p, j, panels.dim)]);
        }
        out[std::int64_t{v} * panels.count + p] = static_cast<float>(sum);
      }
    }
  }

  static float(max)(const float* x, int n) {
    float largest = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
  }

  static float exp_sum(float* x, int n, float shift) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) {
      x[i] = ::expf(x[i] - shift);
      sum += static_cast<double>(x[i]);
    }
    return static_cast<float>(sum);
  }

  static void log_affine_exp(float* x, int n, float a, float b) {
    // Without a, exp(x) may round to 0 while log b + x is still finite.
    const float log_b = ::logf(b);
    for (int i = 0; i < n; ++i) x[i] = a > 0.0F ? ::logf(a + b * ::expf(x[i])) : log_b + x[i];
  }

  static void interpolate(const CurveView& curve, float* x, int n) {
    const auto segments = static_cast<float>(curve.segments);
    for (int i = 0; i < n; ++i) {
      const float above = x[i] > -1.0F ? x[i] : -1.0F;  // NaN too becomes -1
      const float cosine = above < 1.0F ? above : 1.0F;
      const float place = ::sqrtf(0.5F - 0.5F * cosine) * segments;
      const int node =
          static_cast<int>(place) < curve.segments ? static_cast<int>(place) : curve.segments - 1;
      const float share = place - static_cast<float>(node);
      x[i] = curve.nodes[node] + share * (curve.nodes[node + 1] - curve.nodes[node]);
    }
  }
};

static_assert(VectorOps<ScalarOps>);

}  // namespace magicpig::inline MAGICPIG_ABI

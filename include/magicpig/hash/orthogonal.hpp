// SPDX-License-Identifier: Apache-2.0
// Orthogonal hashing: signs of projections on the rows of random rotations.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/hash/sign_projection.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Planes in blocks of `dim`, each block the rows of a Haar-uniform rotation (Gram and Schmidt in
/// double on Gaussian rows). The blocks of different bits are independent, so the K bits of a table
/// never share one and P(table collides) is exactly the K-th power of the angle law. Tables whose
/// planes share blocks are negatively dependent: the count of colliding tables varies less than a
/// binomial, so the inclusion probability for at least t collisions is an approximation here. For
/// t = 2 it understates by 2.4 +- .8 % at cosine 0 and .8 +- .1 % at .5 for dim 32, (4, 24); for
/// dim 128, (10, 150), it is off by 1 +- 7 %, -2.5 +- 2.2 % and .3 +- .4 % at 0, .2 and .5: within
/// noise. Source: Ji et al. 2012 (super-bit locality-sensitive hashing).
struct OrthogonalPlanes {
  static bool draw(const HashConfig& config, float* planes) {
    const int dim = config.dim;
    Buffer<double> block;
    if (!block.resize(static_cast<std::size_t>(dim) * static_cast<std::size_t>(dim))) return false;
    for (int b = 0; b < config.bits; ++b) {
      for (int first = 0; first < config.tables; first += dim) {
        const int rows = config.tables - first < dim ? config.tables - first : dim;
        const int plane = b * config.tables + first;
        draw_rotation(config, plane, rows, block.data());
        float* out = planes + std::int64_t{plane} * dim;
        for (std::int64_t i = 0; i < std::int64_t{rows} * dim; ++i) {
          out[i] = static_cast<float>(block.data()[i]);
        }
      }
    }
    return true;
  }

 private:
  /// The first `rows` rows of a rotation, [rows, dim]; `plane` names its randomness.
  static void draw_rotation(const HashConfig& config, int plane, int rows, double* block) {
    for (int r = 0; r < rows; ++r) {
      const RandomStream stream = plane_stream(config, plane + r);
      double* row = block + std::int64_t{r} * config.dim;
      for (int i = 0; i < config.dim; ++i) {
        row[i] = stream.normals(static_cast<std::uint32_t>(i / 2))[static_cast<std::size_t>(i % 2)];
      }
      // Twice is enough: the second pass removes what rounding left of the first.
      for (int pass = 0; pass < 2; ++pass) {
        for (int e = 0; e < r; ++e)
          subtract_projection(row, block + std::int64_t{e} * config.dim, config.dim);
      }
      const double norm = ::sqrt(dot(row, row, config.dim));
      for (int i = 0; i < config.dim; ++i) row[i] /= norm;
    }
  }

  static double dot(const double* a, const double* b, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
  }

  static void subtract_projection(double* row, const double* unit, int n) {
    const double share = dot(row, unit, n);
    for (int i = 0; i < n; ++i) row[i] -= share * unit[i];
  }
};

using OrthogonalHash = SignProjection<OrthogonalPlanes>;

}  // namespace magicpig::inline MAGICPIG_ABI

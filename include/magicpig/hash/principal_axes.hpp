// SPDX-License-Identifier: Apache-2.0
// Eigenvectors of a symmetric matrix, with the same bits on every machine.
#pragma once

#include <math.h>

#include <cstdint>
#include <utility>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Jacobi's method: turns two coordinates at a time such that the entry between them becomes 0, in
/// sweeps over all pairs, until none is larger than 2^-20 of the geometric mean of its diagonal
/// entries or kMostSweeps are done (6 to 8 are usual). O(n^3) per sweep.
///
/// Numbers are floats, multiplied and added in double: products are exact there, so that it makes
/// no difference whether compilers contract them.
/// Source: Jacobi 1846; Golub and Van Loan, Matrix Computations, section 8.5.
class PrincipalAxes {
 public:
  static constexpr int kMostSweeps = 16;

  /// `matrix` [n, n], symmetric, positive semidefinite and finite, is used up; `axes` [n, n] are
  /// its eigenvectors, one per row, by falling eigenvalue.
  PrincipalAxes(float* matrix, float* axes, int n) : matrix_(matrix), axes_(axes), n_(n) {
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) axis(i)[j] = i == j ? 1.0F : 0.0F;
    }
    bool turned = true;
    for (int sweep = 0; turned && sweep < kMostSweeps; ++sweep) {
      turned = false;
      for (int p = 0; p < n; ++p) {
        for (int q = p + 1; q < n; ++q) turned |= turn(p, q);
      }
    }
    sort();
  }

 private:
  [[nodiscard]] float* row(int i) { return matrix_ + std::int64_t{i} * n_; }
  [[nodiscard]] float* axis(int i) { return axes_ + std::int64_t{i} * n_; }

  // Whether coordinates p and q had to be turned.
  bool turn(int p, int q) {
    const auto between = static_cast<double>(row(p)[q]);
    const auto first = static_cast<double>(row(p)[p]);
    const auto second = static_cast<double>(row(q)[q]);
    if (between * between <= 0x1p-40 * first * second || between == 0.0) return false;
    // The tangent of the angle is the smaller root of t^2 + 2 theta t = 1.
    const auto theta = static_cast<double>(static_cast<float>((second - first) / (2.0 * between)));
    const double size = ::sqrt(theta * theta + 1.0) + (theta < 0.0 ? -theta : theta);
    const auto tangent = static_cast<double>(static_cast<float>((theta < 0.0 ? -1.0 : 1.0) / size));
    const auto cosine =
        static_cast<double>(static_cast<float>(1.0 / ::sqrt(tangent * tangent + 1.0)));
    const auto sine = static_cast<double>(static_cast<float>(tangent * cosine));
    for (int k = 0; k < n_; ++k) {
      mix(row(p)[k], row(q)[k], cosine, sine);
      mix(axis(p)[k], axis(q)[k], cosine, sine);
    }
    row(p)[p] = static_cast<float>(first - tangent * between);
    row(q)[q] = static_cast<float>(second + tangent * between);
    row(p)[q] = row(q)[p] = 0.0F;
    for (int k = 0; k < n_; ++k) {
      row(k)[p] = row(p)[k];
      row(k)[q] = row(q)[k];
    }
    return true;
  }

  static void mix(float& a, float& b, double cosine, double sine) {
    const auto x = static_cast<double>(a);
    const auto y = static_cast<double>(b);
    a = static_cast<float>(cosine * x - sine * y);
    b = static_cast<float>(sine * x + cosine * y);
  }

  // Selection: the first of equals first.
  void sort() {
    for (int i = 0; i < n_; ++i) {
      int largest = i;
      for (int j = i + 1; j < n_; ++j) {
        if (row(j)[j] > row(largest)[largest]) largest = j;
      }
      if (largest == i) continue;
      std::swap(row(i)[i], row(largest)[largest]);
      for (int k = 0; k < n_; ++k) std::swap(axis(i)[k], axis(largest)[k]);
    }
  }

  float* matrix_;
  float* axes_;
  int n_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

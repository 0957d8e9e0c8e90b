// SPDX-License-Identifier: Apache-2.0
// Gauss and Legendre's quadrature, for probabilities that have no closed form.
#pragma once

#include <math.h>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Integrals by kNodes values of the integrand: exact for polynomials of degree 2 kNodes - 1.
template <int kNodes>
class GaussLegendre {
 public:
  /// Finds the roots of the Legendre polynomial by Newton's method.
  GaussLegendre() {
    constexpr double kPi = 3.14159265358979324;
    for (int i = 0; i < kNodes; ++i) {
      double x = ::cos(kPi * (i + 0.75) / (kNodes + 0.5));
      double slope = 1.0;
      for (int step = 0; step < 8; ++step) {
        double before = 1.0;
        double value = x;
        for (int n = 2; n <= kNodes; ++n) {
          const double next = ((2 * n - 1) * x * value - (n - 1) * before) / n;
          before = value;
          value = next;
        }
        slope = kNodes * (x * value - before) / (x * x - 1.0);
        x -= value / slope;
      }
      nodes_[i] = x;
      weights_[i] = 2.0 / ((1.0 - x * x) * slope * slope);
    }
  }

  /// use(x, weight) for each node of the integral from `begin` to `end`.
  template <class Use>
  void each(double begin, double end, const Use& use) const {
    const double half = 0.5 * (end - begin);
    const double middle = 0.5 * (end + begin);
    for (int i = 0; i < kNodes; ++i) use(middle + half * nodes_[i], half * weights_[i]);
  }

  /// The integral of f(x) from `begin` to `end`.
  template <class F>
  [[nodiscard]] double operator()(double begin, double end, const F& f) const {
    double sum = 0.0;
    each(begin, end, [&](double x, double weight) { sum += weight * f(x); });
    return sum;
  }

 private:
  static_assert(kNodes >= 2);

  double nodes_[kNodes];
  double weights_[kNodes];
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Quantiles of the normal distribution.
#pragma once

#include <math.h>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// z with P(N(0, 1) > z) = tail, tail in (0, 1): to 1e-12 by halving an interval, some
/// microseconds. For tails below 1e-300 and above 1 - 1e-16 it ends at 38 and -38.
[[nodiscard]] inline double normal_quantile(double tail) {
  double low = -38.0;
  double high = 38.0;
  for (int i = 0; i < 50; ++i) {
    const double middle = (low + high) / 2;
    const double beyond = ::erfc(middle * 0.70710678118654752) / 2;
    (beyond > tail ? low : high) = middle;
  }
  return (low + high) / 2;
}

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Collision rules: how likely a token is to collide in at least t of L tables, in log space and
// without cancellation.
#pragma once

#include <math.h>

#include <limits>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// log of n choose k, 0 <= k <= n.
[[nodiscard]] inline double log_choose(int n, int k) {
  double sum = 0.0;
  for (int i = 0; i < k; ++i) sum += ::log(static_cast<double>(n - i) / (k - i));
  return sum;
}

/// Natural log of P(Bin(tables, collision) >= at_least), collision in [0, 1], tables >= at_least
/// >= 0; -inf when impossible, 0 when certain. Sums the shorter tail from its largest term
/// outwards in positive terms only: relative error below 1e-12 at both ends, where
/// 1 - (1-a)^L - L a (1-a)^(L-1) in float is negative already at a = 0.3^10, L = 150.
/// Source: Chen et al. 2024, the inclusion probability u of eq. 11, for t = 2.
[[nodiscard]] inline double log_at_least(int at_least, int tables, double collision) {
  if (at_least <= 0 || (collision >= 1.0 && at_least <= tables)) return 0.0;
  if (collision <= 0.0 || at_least > tables) return -std::numeric_limits<double>::infinity();
  const bool upper = at_least > tables * collision;  // is the tail "at least t" the short one?
  const int start = upper ? at_least : at_least - 1;
  const double odds = collision / (1.0 - collision);
  double sum = 0.0;
  double term = 1.0;  // relative to the term at `start`
  for (int j = start; j >= 0 && j <= tables && term > sum * 1e-18; j += upper ? 1 : -1) {
    sum += term;
    term *= upper ? (tables - j) * odds / (j + 1) : j / ((tables - j + 1) * odds);
  }
  const double log_tail = log_choose(tables, start) + start * ::log(collision) +
                          (tables - start) * ::log1p(-collision) + ::log(sum);
  return upper ? log_tail : ::log1p(-::exp(log_tail));
}

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// The softmax of one head's scores, for oracles and for selections by mass.
#pragma once

#include <math.h>

#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// probabilities[i] = exp(scale * dots[i]) / sum, in double. Nothing for n = 0.
inline void softmax(const float* dots, TokenId n, float scale, double* probabilities) {
  float largest = n > 0 ? dots[0] * scale : 0.0F;
  for (TokenId i = 1; i < n; ++i) largest = dots[i] * scale > largest ? dots[i] * scale : largest;
  double sum = 0.0;
  for (TokenId i = 0; i < n; ++i) {
    probabilities[i] = ::exp(static_cast<double>(dots[i] * scale - largest));
    sum += probabilities[i];
  }
  for (TokenId i = 0; i < n; ++i) probabilities[i] /= sum;
}

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// The softmax of one head's scores, for oracles and for selections by mass.
#pragma once

#include <math.h>

#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// probabilities[i] = exp(scale * dots[i]) / sum, in double. Nothing for n = 0. Tokens that `gone`
/// has, dots[i] being that of token first + i, have probability 0 and no part in the sum; some
/// token must be there.
inline void softmax(const float* dots, TokenId n, float scale, double* probabilities,
                    const TokenMask& gone = {}, TokenId first = 0) {
  TokenId start = 0;
  while (start + 1 < n && gone.has(first + start)) ++start;
  float largest = n > 0 ? dots[start] * scale : 0.0F;
  for (TokenId i = start + 1; i < n; ++i) {
    const bool larger = dots[i] * scale > largest && !(gone.any() && gone.has(first + i));
    largest = larger ? dots[i] * scale : largest;
  }
  double sum = 0.0;
  for (TokenId i = 0; i < n; ++i) {
    const bool there = !(gone.any() && gone.has(first + i));
    probabilities[i] = there ? ::exp(static_cast<double>(dots[i] * scale - largest)) : 0.0;
    sum += probabilities[i];
  }
  for (TokenId i = 0; i < n; ++i) probabilities[i] /= sum;
}

}  // namespace magicpig::inline MAGICPIG_ABI

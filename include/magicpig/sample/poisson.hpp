// SPDX-License-Identifier: Apache-2.0
// Poisson sampling by signatures: each token by itself, with a probability that its score decides.
#pragma once

#include <array>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/sample/signature_sampler.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Draws each token independently of all others: its own 16 random bits, number `token` of the
/// draw's stream, against its probability. The number of rows varies like a sum of such draws, by
/// the root of the budget or less.
/// Source: Horvitz and Thompson 1952; pi proportional to size, Hajek 1964.
class PoissonSelection : public UnbiasedSelection {
 public:
  static constexpr bool kIndependent = true;

  template <class Input>
  explicit PoissonSelection(const Input& input) : stream_(input.noise_for(Purpose::kPoisson)) {}

  template <class Ops>
  void draw(const std::int16_t* scores, int n, const ScoreRule& rule, TokenId first,
            std::uint64_t* drawn) {
    for (int i = 0; i < n; i += kSignatureBlock) {
      std::uint16_t noise[kSignatureBlock];
      for (int j = 0; j < kSignatureBlock; ++j) noise[j] = number(first + i + j);
      Ops::draw_poisson(scores + i, kSignatureBlock, rule, noise, drawn + i / 64);
    }
  }

 private:
  std::uint16_t number(TokenId token) {
    if (token / 8 != block_) {
      block_ = token / 8;
      numbers_ = stream_.block(static_cast<std::uint32_t>(block_));
    }
    const std::uint32_t pair = numbers_[static_cast<std::size_t>(token % 8 / 2)];
    return static_cast<std::uint16_t>(token % 2 != 0 ? pair >> 16 : pair);
  }

  RandomStream stream_;
  TokenId block_ = -1;
  std::array<std::uint32_t, 4> numbers_{};
};

using Poisson = SignatureSampler<PoissonSelection>;

}  // namespace magicpig::inline MAGICPIG_ABI

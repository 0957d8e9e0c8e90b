// SPDX-License-Identifier: Apache-2.0
// TopK by signatures: the tokens of the largest scores, whatever they leave out.
#pragma once

#include <array>
#include <cstdint>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/sample/signature_sampler.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Reads the tokens whose scores reach tau, and no others: as methods do that learn their hashes.
/// Biased, and nothing says by how much. Tokens with the score nearest tau come all or not at all,
/// so that their number is the budget but for ties within a sixteenth of a power of 2; beyond 8,192
/// tokens it is that of the pilot. `least` and `certain` of the config have
/// no effect.
class TopScoresSelection {
 public:
  static constexpr bool kUnbiased = false;
  static constexpr bool kIndependent = false;

  template <class Input>
  explicit TopScoresSelection(const Input&) {}

  template <class Ops>
  void draw(const std::int16_t* scores, int n, const ScoreRule& rule, TokenId,
            std::uint64_t* drawn) const {
    // No probability but certainty exceeds the largest noise.
    std::array<std::uint16_t, kSignatureBlock> noise;
    noise.fill(UINT16_MAX);
    for (int i = 0; i < n; i += kSignatureBlock) {
      Ops::draw_poisson(scores + i, kSignatureBlock, rule, noise.data(), drawn + i / 64);
    }
  }

  /// Scores that reach tau, in units of 2^-16.
  template <class Ops>
  [[nodiscard]] static std::uint64_t expected(const std::int16_t* scores, int n,
                                              const ScoreRule& rule) {
    return count_from<Ops>(scores, n, rule.first_certain());
  }
};

using TopScores = SignatureSampler<TopScoresSelection>;

}  // namespace magicpig::inline MAGICPIG_ABI

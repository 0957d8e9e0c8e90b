// SPDX-License-Identifier: Apache-2.0
// Poisson sampling by signatures: each token by itself, with a probability that its score decides.
#pragma once

#include <math.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/signature_scores.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// How tokens are drawn by their signatures.
struct PoissonConfig {
  Budget budget;             ///< expected rows read per KV head
  double temperature = 0.9;  ///< pi is as exp(temperature * estimated logit); in (0, 4]
  /// No token's probability is below this: no weight exceeds its inverse. In [0, 1]; its rows come
  /// on top of the budget.
  double least = 0.0;
};

/// One draw for the whole group, fresh for every noise key: each indexed token by itself with pi =
/// min(1, s / tau), s the sum over the group of its estimated softmax probabilities in the indexed
/// range, tau such that the expected number of tokens is the budget. All heads use every drawn
/// token.
///
/// Unbiased given the codes, however bad the scores: pi is the number that a uniform 32-bit number
/// is compared with, never below 2^-32, and tau depends on codes and queries only. Tokens and
/// probabilities are computed in integers and are the same on every machine.
/// Source: Horvitz and Thompson 1952; pi proportional to size, Hajek 1964.
class Poisson {
 public:
  static constexpr bool kUnbiased = true;

  /// For indexes over `rotation` of `bits` bits per dimension. Errors: as Budget::check(); a
  /// temperature or `least` outside its bounds; bits outside [1, 4].
  template <class Rotation>
  [[nodiscard]] static Result<Poisson> create(const Rotation& rotation, int bits,
                                              const PoissonConfig& config) noexcept {
    const Status status = config.budget.check();
    if (!status.ok()) return status;
    if (!(config.temperature > 0.0 && config.temperature <= 4.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "temperature %g must lie in (0, 4]",
                           config.temperature);
    }
    if (!(config.least >= 0.0 && config.least <= 1.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "least %g must lie in [0, 1]",
                           config.least);
    }
    if (bits < 1 || bits > Levels::kMaxBits) {
      return Status::error(ErrorCode::kInvalidArgument, "bits %d must lie in [1, %d]", bits,
                           Levels::kMaxBits);
    }
    return Poisson(config, rotation.padded(), bits);
  }

  /// Error: an index of other signatures than this was made for.
  template <class Rotation>
  [[nodiscard]] Status supports(const Signatures<Rotation>& index) const noexcept {
    if (index.rotation().padded() == padded_ && index.levels().bits() == bits_) return Status();
    return Status::error(ErrorCode::kShapeMismatch,
                         "the sampler is made for %d bits of %d dimensions, the index has %d of %d",
                         bits_, padded_, index.levels().bits(), index.rotation().padded());
  }

  struct Scratch {
    SignatureScores::Scratch scores;
    std::uint32_t* sizes = nullptr;  // [tokens] s in units of 2^-26
    TokenId* tokens = nullptr;       // [tokens]
    float* log_pi = nullptr;         // [tokens]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto tokens = static_cast<std::size_t>(limits.tokens);
    return {.scores = SignatureScores::carve(arena, limits, padded_, bits_),
            .sizes = arena.take<std::uint32_t>(tokens),
            .tokens = arena.take<TokenId>(tokens),
            .log_pi = arena.take<float>(tokens)};
  }

  template <class Ops, class Source, class Rotation>
  [[nodiscard]] Candidates<KnownInclusion> draw(
      const DrawInput<Source, Signatures<Rotation>>& input, Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const TokenId n = range.size();
    if (n == 0) return {};
    const std::int16_t* scores =
        SignatureScores::compute(input, config_.temperature, scratch.scores);
    // One unit for everyone: where rows are left over, those without weight share them.
    for (TokenId i = 0; i < n; ++i) scratch.sizes[i] = 1;
    for (int g = 0; g < input.queries.count; ++g) {
      add_sizes(scores + std::int64_t{g} * n, n, scratch.sizes);
    }
    const Threshold threshold(scratch.sizes, n, config_.budget.of(n));
    const RandomStream stream = input.noise_for(Purpose::kPoisson);
    std::size_t count = 0;
    std::array<std::uint32_t, 4> noise{};
    for (TokenId i = 0; i < n; ++i) {
      const TokenId token = range.begin + i;
      if (i == 0 || token % 4 == 0) noise = stream.block(static_cast<std::uint32_t>(token / 4));
      const std::uint64_t scaled = threshold.probability(scratch.sizes[i]);
      const std::uint64_t pi = scaled > least_ ? scaled : least_;
      if (noise[static_cast<std::size_t>(token % 4)] >= pi) continue;
      scratch.tokens[count] = token;
      scratch.log_pi[count++] = static_cast<float>(::log(static_cast<double>(pi) * 0x1p-32));
    }
    return {
        .tokens = {scratch.tokens, count}, .members = {}, .inclusion = {.log_pi = scratch.log_pi}};
  }

 private:
  Poisson(const PoissonConfig& config, int padded, int bits)
      : config_(config), padded_(padded), bits_(bits) {
    const double least = config.least * 0x1p32;
    least_ = least > 1.0 ? static_cast<std::uint64_t>(least) : 1;
  }

  // 2^(32 - gap / 8), a gap of 256 or more being 0.
  static std::uint64_t power(int gap) {
    constexpr std::array<std::uint64_t, SignatureScores::kSteps> kPowers = {
        4294967296, 3938502376, 3611622603, 3311872529,
        3037000500, 2784941738, 2553802834, 2341847524};
    return gap < 256 ? kPowers[static_cast<std::size_t>(gap % 8)] >> (gap / 8) : 0;
  }

  // sizes += estimated softmax probability of one head, in units of 2^-26.
  static void add_sizes(const std::int16_t* scores, TokenId n, std::uint32_t* sizes) {
    int largest = scores[0];
    for (TokenId i = 1; i < n; ++i) largest = scores[i] > largest ? scores[i] : largest;
    std::uint64_t sum = 0;  // at least 2^32, that of the largest, and below 2^63
    for (TokenId i = 0; i < n; ++i) sum += power(largest - scores[i]);
    const std::uint64_t inverse = ((std::uint64_t{1} << 63) - 1) / sum;
    for (TokenId i = 0; i < n; ++i) {
      // power <= 2^32 and inverse < 2^31.
      sizes[i] += static_cast<std::uint32_t>((power(largest - scores[i]) * inverse) >> 37);
    }
  }

  // pi = min(1, size / tau) with an expected number of `rows` tokens.
  class Threshold {
   public:
    Threshold(const std::uint32_t* sizes, TokenId n, TokenId rows) {
      if (rows >= n) {
        tau_ = 0;
        return;
      }
      // Tokens at or above tau are certain; without them tau is lower, until there are no more.
      for (;;) {
        TokenId certain = 0;
        std::uint64_t rest = 0;
        for (TokenId i = 0; i < n; ++i) {
          certain += sizes[i] >= tau_ ? 1 : 0;
          rest += sizes[i] >= tau_ ? 0 : sizes[i];
        }
        if (certain >= rows) break;
        const std::uint64_t lower = rest / static_cast<std::uint64_t>(rows - certain);
        if (lower >= tau_) break;
        tau_ = lower;
      }
      if (tau_ != 0) factor_ = (std::uint64_t{1} << 63) / tau_;
    }

    // In units of 2^-32.
    [[nodiscard]] std::uint64_t probability(std::uint32_t size) const {
      if (size >= tau_) return std::uint64_t{1} << 32;
      return (size * factor_) >> 31;  // size < tau: below 2^32
    }

   private:
    std::uint64_t tau_ = std::uint64_t{1} << 32;
    std::uint64_t factor_ = 0;
  };

  PoissonConfig config_;
  std::uint64_t least_ = 1;
  int padded_;
  int bits_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

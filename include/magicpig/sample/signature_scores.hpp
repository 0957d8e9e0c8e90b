// SPDX-License-Identifier: Apache-2.0
// Scores of tokens from their signatures, in integers: estimated logits in sixteenths of a power
// of 2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Error: what scores signatures of shape `own` is given others.
[[nodiscard]] inline Status check_signatures(const QuantiserShape& own,
                                             const QuantiserShape& other) noexcept {
  if (other == own) return Status();
  return Status::error(ErrorCode::kShapeMismatch,
                       "the sampler is made for %d bits of %d dimensions, the index has %d of %d",
                       own.bits, own.dim, other.bits, other.dim);
}

/// The queries of a group, made ready to score codes: `temperature` times the logit of a token,
/// less what all tokens share, and where the index has it the log of its value's norm, in steps of
/// log 2 / 16: score = f <x, R q> + log |v - u| with the code's vector x and the token's factor f.
///
/// The query keeps its precision but for one rounding: each four bits of a code select one of 16
/// numbers, which are rounded to a common step such that those of any eight rows add up to 255 at
/// most, some 60 steps from smallest to largest. With 255 steps for each row errors were 0 to 2 %
/// smaller, with 15 of them 6 to 8 % larger at 2 bits.
///
/// Normative, so that every machine and backend has the same scores: integers, and multiplications
/// of floats by themselves, truncated.
class SignatureQueries {
 public:
  static constexpr int kLimit = 8192;  ///< of a score without the norm, either way

  struct Scratch {
    std::int32_t* quantiser = nullptr;    // [query_scratch]
    std::int32_t* numbers = nullptr;      // [rows, 16] of one head
    std::uint8_t* sums = nullptr;         // [rows, group, 16]
    std::int16_t* middles = nullptr;      // [group]
    std::int16_t* units = nullptr;        // [group]
    std::int16_t* multipliers = nullptr;  // [group]
    double* steps = nullptr;              // [group]
  };

  [[nodiscard]] static Scratch carve(Arena& arena, int group, const QuantiserShape& shape) {
    const auto heads = static_cast<std::size_t>(group);
    const auto rows = static_cast<std::size_t>(shape.rows);
    return {.quantiser = arena.take<std::int32_t>(static_cast<std::size_t>(shape.query_scratch)),
            .numbers = arena.take<std::int32_t>(rows * 16),
            .sums = arena.take<std::uint8_t>(rows * heads * 16),
            .middles = arena.take<std::int16_t>(heads),
            .units = arena.take<std::int16_t>(heads),
            .multipliers = arena.take<std::int16_t>(heads),
            .steps = arena.take<double>(heads)};
  }

  template <class Source, class Index>
  SignatureQueries(const DrawInput<Source, Index>& input, double temperature,
                   const Scratch& scratch)
      : scratch_(scratch), group_(input.queries.count) {
    for (int g = 0; g < group_; ++g) {
      scratch_.steps[g] = input.scale * temperature * tabulate(input, g);
    }
  }

  /// Scores of blocks of an index, [group, blocks * kSignatureBlock].
  template <class Ops>
  void score(const CodeBlocks& blocks, const ScoreRows& scores) {
    for (int g = 0; g < group_ && blocks.factor_scale != factor_scale_; ++g) {
      // score_codes() makes unit * sum / 2^15 * factor * factor_scale / 2^15 * multiplier of a sum.
      const double scale = static_cast<double>(blocks.factor_scale) * scratch_.units[g];
      const double wanted = scale > 0.0 ? scratch_.steps[g] * 0x1p30 / scale : 0.0;
      const double most = wanted < kLimit ? wanted : kLimit;
      scratch_.multipliers[g] = static_cast<std::int16_t>(most > -kLimit ? most : -kLimit);
    }
    factor_scale_ = blocks.factor_scale;
    Ops::score_codes(blocks,
                     {.sums = scratch_.sums,
                      .middles = scratch_.middles,
                      .units = scratch_.units,
                      .multipliers = scratch_.multipliers,
                      .group = group_},
                     scores);
  }

 private:
  // Partial sums of query g; returns what one of their steps is worth in scores, for a factor,
  // scale and temperature of 1.
  template <class Source, class Index>
  double tabulate(const DrawInput<Source, Index>& input, int g) {
    const int rows = input.index.rows_per_block();
    const double unit = input.index.quantiser().tabulate(input.kv_head, input.queries[g],
                                                         scratch_.quantiser, scratch_.numbers);
    const std::int64_t step = step_of(rows);
    const float share = 2.0F / static_cast<float>(step);
    std::int64_t lowest = 0;  // of all rows together
    int highest = 0;          // in steps above it
    for (int r = 0; r < rows; ++r) {
      const Extremes own = extremes(r);
      lowest += own.low;
      std::uint8_t* sums = scratch_.sums + (std::int64_t{r} * group_ + g) * 16;
      for (int n = 0; n < 16; ++n) {
        sums[n] = static_cast<std::uint8_t>(steps(scratch_.numbers[r * 16 + n] - own.low, share));
      }
      highest += steps(own.high - own.low, share);
    }
    const auto middle = static_cast<int>((step / 2 - lowest) / step);
    const int most = highest - middle > middle ? highest - middle : middle;
    scratch_.middles[g] = static_cast<std::int16_t>(middle);
    scratch_.units[g] = static_cast<std::int16_t>(32767 / (most > 0 ? most : 1));
    constexpr double kLog2E = 1.4426950408889634;
    return unit * static_cast<double>(step) * (kLog2E * ScoreRule::kSteps);
  }

  // A step's worth in the quantiser's numbers. What lies between the smallest and largest of any
  // eight rows comes to 246 steps at most, rounded one by one to 250; sums of all rows, and what
  // they are for a score of 0, stay below 2^15.
  [[nodiscard]] std::int64_t step_of(int rows) const {
    std::int64_t eight = 0;
    std::int64_t largest = 0;
    std::int64_t all = 0;
    for (int r = 0; r < rows; ++r) {
      const Extremes own = extremes(r);
      const std::int64_t width = std::int64_t{own.high} - own.low;
      eight = r % 8 == 0 ? width : eight + width;
      largest = eight > largest ? eight : largest;
      all += 2 * std::int64_t{-own.low > own.high ? -own.low : own.high};
    }
    const std::int64_t by_eight = largest / 246 + 1;
    const std::int64_t by_all = all / (32000 - rows / 2) + 1;
    return by_eight > by_all ? by_eight : by_all;
  }

  struct Extremes {
    std::int32_t low = 0;
    std::int32_t high = 0;
  };
  // Of row r, and 0.
  [[nodiscard]] Extremes extremes(int r) const {
    Extremes found;
    for (int n = 0; n < 16; ++n) {
      const std::int32_t x = scratch_.numbers[r * 16 + n];
      found.low = x < found.low ? x : found.low;
      found.high = x > found.high ? x : found.high;
    }
    return found;
  }

  // x in steps of 2 / share, to the nearest, halves up.
  static int steps(std::int32_t x, float share) {
    return (static_cast<int>(static_cast<float>(x) * share) + 1) / 2;
  }

  Scratch scratch_;
  int group_;
  float factor_scale_ = -1.0F;  // that the multipliers are for
};

}  // namespace magicpig::inline MAGICPIG_ABI

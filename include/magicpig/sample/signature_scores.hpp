// SPDX-License-Identifier: Apache-2.0
// Scores of tokens from their signatures, in integers: estimated logits in sixteenths of a power
// of 2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The queries of a group, made ready to score codes: `temperature` times the logit of a token,
/// less what all tokens share, and where the index has it the log of its value's norm, in steps of
/// log 2 / 16: score = f <x, R q> + log |v - u| with the code's vector x and the token's factor f.
///
/// The query keeps its precision but for one rounding: each four bits of a code select one of 16
/// partial sums, which are rounded to a common step such that those of any eight rows add up to 255
/// at most, some 60 steps from smallest to largest. With 255 steps for each row errors were 0 to
/// 2 % smaller.
///
/// Normative, so that every machine and backend has the same scores: integers, and multiplications
/// of floats by themselves, truncated.
class SignatureQueries {
 public:
  static constexpr int kLimit = 8192;  ///< of a score without the norm, either way

  struct Scratch {
    std::int32_t* rotated = nullptr;      // [padded]
    std::uint8_t* sums = nullptr;         // [rows, group, 16]
    std::int16_t* middles = nullptr;      // [group]
    std::int16_t* units = nullptr;        // [group]
    std::int16_t* multipliers = nullptr;  // [group]
    double* steps = nullptr;              // [group]
  };

  [[nodiscard]] static Scratch carve(Arena& arena, int group, int padded, int bits) {
    const auto heads = static_cast<std::size_t>(group);
    const auto width = static_cast<std::size_t>(padded);
    const std::size_t rows = width / 4 * static_cast<std::size_t>(bits);
    return {.rotated = arena.take<std::int32_t>(width),
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
      scratch_.steps[g] = input.scale * temperature * tabulate(input.index, input.queries[g], g);
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
  template <class Index>
  double tabulate(const Index& index, const float* query, int g) {
    const Levels& levels = index.levels();
    const int padded = index.rotation().padded();
    const Rotated result = index.rotation().rotate(query, scratch_.rotated);
    for (int j = 0; j < padded; ++j) scratch_.rotated[j] /= 4;  // sums of four stay below 2^30
    const float step = step_of(levels, padded);
    int middle = 0;
    for (int p = 0; p < levels.bits(); ++p) {
      const float share = static_cast<float>(2 * levels.amplitude(p)) / step;
      for (int j = 0; j < padded; j += 4) {
        const std::int64_t row = p * (padded / 4) + j / 4;
        middle +=
            tabulate_row(scratch_.rotated + j, share, scratch_.sums + (row * group_ + g) * 16);
      }
    }
    scratch_.middles[g] = static_cast<std::int16_t>(middle);
    scratch_.units[g] = static_cast<std::int16_t>(32767 / (middle > 0 ? middle : 1));
    constexpr double kLog2E = 1.4426950408889634;
    return result.unit * 4.0 * static_cast<double>(step) * (kLog2E * ScoreRule::kSteps);
  }

  // Amplitudes times rotated coordinates per step. The largest partial sums of any eight rows come
  // to 123 steps at most, rounded one by one to 127, so that no eight sums exceed 254; those of all
  // rows to less than 2^15.
  [[nodiscard]] float step_of(const Levels& levels, int padded) const {
    std::int64_t eight = 0;
    std::int64_t largest = 0;
    std::int64_t all = 0;
    int row = 0;
    for (int p = 0; p < levels.bits(); ++p) {
      for (int j = 0; j < padded; j += 4, ++row) {
        const std::int64_t sum = magnitude(scratch_.rotated + j) * levels.amplitude(p);
        eight = row % 8 == 0 ? sum : eight + sum;
        largest = eight > largest ? eight : largest;
        all += sum;
      }
    }
    const std::int64_t by_eight = largest / 123 + 1;
    const std::int64_t by_all = all / (32000 - row / 2) + 1;
    return static_cast<float>(by_eight > by_all ? by_eight : by_all);
  }

  static std::int64_t magnitude(const std::int32_t* four) {
    std::int64_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += four[i] < 0 ? -four[i] : four[i];
    return sum;
  }

  // The sum of four coordinates with signs + where a bit is set and - elsewhere, in steps of
  // 2 / share, rounded to the nearest, above the smallest of them; returns that one's magnitude.
  static int tabulate_row(const std::int32_t* four, float share, std::uint8_t* sums) {
    const int middle = halved(static_cast<float>(magnitude(four)) * share);
    std::int32_t half[8];
    for (int n = 0; n < 8; ++n) {
      half[n] = -four[3];
      for (int i = 0; i < 3; ++i) half[n] += ((n >> i) & 1) != 0 ? four[i] : -four[i];
    }
    for (int n = 0; n < 8; ++n) {
      const int steps = halved(static_cast<float>(half[n]) * share);
      sums[n] = static_cast<std::uint8_t>(middle + steps);
      sums[15 - n] = static_cast<std::uint8_t>(middle - steps);
    }
    return middle;
  }

  // x / 2 to the nearest integer, halves away from zero, for x that is truncated first.
  static int halved(float x) {
    const auto twice = static_cast<int>(x);
    return (twice + (twice < 0 ? -1 : 1)) / 2;
  }

  Scratch scratch_;
  int group_;
  float factor_scale_ = -1.0F;  // that the multipliers are for
};

}  // namespace magicpig::inline MAGICPIG_ABI

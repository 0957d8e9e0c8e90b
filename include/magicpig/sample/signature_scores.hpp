// SPDX-License-Identifier: Apache-2.0
// Scores of tokens from their signatures, in integers: estimated logits in eighths of a power of 2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// For each query head and indexed token the estimate of `temperature` times the token's logit,
/// less what all tokens share, and where the index has it of the log of its value's norm, in steps
/// of an eighth of log 2: score = f <x, R q> + log |v - u| with the code's vector x and the token's
/// factor f. The query keeps its precision but for one rounding: each four bits of a code select
/// one of 16 partial sums, which are rounded to 255 steps between minus and plus the largest. With
/// 15 steps, which would fit half a byte, errors are 7 to 12 % larger (magicpig_compare).
///
/// Normative, so that every machine and backend has the same scores: integers throughout, but for
/// two multiplications of floats per token without an addition, and one conversion towards zero.
struct SignatureScores {
  static constexpr int kSteps = 8;       ///< per power of 2
  static constexpr int kMiddle = 127;    ///< what a partial sum of 0 is stored as
  static constexpr float kLimit = 8192;  ///< of a score, either way

  struct Scratch {
    std::int32_t* rotated = nullptr;  // [padded]
    std::uint8_t* partial = nullptr;  // [group, rows, 16]
    std::int16_t* scores = nullptr;   // [group, tokens]
  };

  [[nodiscard]] static Scratch carve(Arena& arena, const DrawLimits& limits, int padded, int bits) {
    const auto group = static_cast<std::size_t>(limits.group);
    const auto width = static_cast<std::size_t>(padded);
    return {.rotated = arena.take<std::int32_t>(width),
            .partial =
                arena.take<std::uint8_t>(group * width / 4 * static_cast<std::size_t>(bits) * 16),
            .scores = arena.take<std::int16_t>(group * static_cast<std::size_t>(limits.tokens))};
  }

  /// Scores of all indexed tokens, [group, indexed].
  template <class Source, class Index>
  static const std::int16_t* compute(const DrawInput<Source, Index>& input, double temperature,
                                     const Scratch& scratch) {
    const Index& index = input.index;
    const TokenId n = index.indexed().size();
    for (int g = 0; g < input.queries.count; ++g) {
      std::uint8_t* partial = scratch.partial + std::int64_t{g} * index.rows_per_block() * 16;
      const float factor =
          tabulate(index, input.queries[g], input.scale * temperature, scratch.rotated, partial);
      for (int s = 0; s < index.segment_count(); ++s) {
        scan(index, s, input.kv_head, partial, factor,
             scratch.scores + std::int64_t{g} * n + std::int64_t{s} * kSignatureSegment);
      }
    }
    return scratch.scores;
  }

 private:
  // Partial sums of a query, [rows, 16]; returns what one of their steps is worth in scores.
  template <class Index>
  static float tabulate(const Index& index, const float* query, double scale, std::int32_t* rotated,
                        std::uint8_t* partial) {
    const Levels& levels = index.levels();
    const int padded = index.rotation().padded();
    const Rotated result = index.rotation().rotate(query, rotated);
    // A sum of four is largest where all signs agree, and in the plane of the largest amplitude.
    std::int64_t largest = 0;
    for (int j = 0; j < padded; j += 4) {
      std::int64_t sum = 0;
      for (int i = 0; i < 4; ++i) sum += rotated[j + i] < 0 ? -rotated[j + i] : rotated[j + i];
      largest = sum > largest ? sum : largest;
    }
    largest *= levels.amplitude(0);
    if (largest == 0) largest = 1;
    for (int p = 0; p < levels.bits(); ++p) {
      for (int j = 0; j < padded; j += 4, partial += 16) {
        for (int n = 0; n < 16; ++n) {
          std::int64_t sum = 0;
          for (int i = 0; i < 4; ++i) {
            sum += ((n >> i) & 1) != 0 ? rotated[j + i] : -rotated[j + i];
          }
          partial[n] =
              static_cast<std::uint8_t>(kMiddle + rounded(sum * levels.amplitude(p), largest));
        }
      }
    }
    constexpr double kLog2E = 1.4426950408889634;
    const double step = result.unit * static_cast<double>(largest) / kMiddle;
    return static_cast<float>(scale * step * (kLog2E * kSteps));
  }

  // kMiddle * sum / largest, rounded to the nearest, halves away from zero.
  static std::int64_t rounded(std::int64_t sum, std::int64_t largest) {
    const std::int64_t magnitude = sum < 0 ? -sum : sum;
    const std::int64_t steps = (2 * kMiddle * magnitude + largest) / (2 * largest);
    return sum < 0 ? -steps : steps;
  }

  template <class Index>
  static void scan(const Index& index, int number, int kv_head, const std::uint8_t* partial,
                   float factor, std::int16_t* scores) {
    const SignatureSegment& segment = index.segment(number, kv_head);
    const int rows = index.rows_per_block();
    const int tokens = index.segment_tokens(number);
    for (int first = 0; first < tokens; first += kSignatureBlock) {
      const std::uint8_t* block =
          segment.codes.data() + std::int64_t{first / kSignatureBlock} * rows * 16;
      std::int32_t sums[kSignatureBlock];
      for (std::int32_t& sum : sums) sum = -kMiddle * rows;
      for (int r = 0; r < rows; ++r) {
        for (int t = 0; t < 16; ++t) {
          const std::uint8_t byte = block[r * 16 + t];
          sums[t] += partial[r * 16 + (byte & 15)];
          sums[t + 16] += partial[r * 16 + (byte >> 4)];
        }
      }
      const int count = tokens - first < kSignatureBlock ? tokens - first : kSignatureBlock;
      for (int t = 0; t < count; ++t) {
        const float score =
            static_cast<float>(sums[t]) * to_float(segment.factors.data()[first + t]) * factor;
        const float above = score > -kLimit ? score : -kLimit;
        const int norm =
            segment.value_norms.size() != 0 ? segment.value_norms.data()[first + t] : 0;
        scores[first + t] =
            static_cast<std::int16_t>(norm + static_cast<int>(above < kLimit ? above : kLimit));
      }
    }
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Scalar operations on signatures: plain loops, the oracle of the other backends.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/cpu/scalar_products.hpp"
#include "magicpig/hash/levels.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

struct ScalarSignatureOps : ScalarProductOps {
  static void score_codes(const CodeBlocks& blocks, const PartialSums& partial,
                          const ScoreRows& scores) {
    for (int b = 0; b < blocks.blocks; ++b) {
      const std::uint8_t* codes = blocks.codes + std::int64_t{b} * blocks.rows * 64;
      const int first = b * kSignatureBlock;
      for (int g = 0; g < partial.group; ++g) {
        for (int t = 0; t < kSignatureBlock; ++t) {
          const int sum = sum_of(codes, blocks.rows, partial, g, CodePlace::of(t));
          const float factor = to_float(blocks.factors[first + t]) * blocks.factor_scale;
          const int share = static_cast<int>(factor < 32767.0F ? factor : 32767.0F);
          const int scaled = (sum - partial.middles[g]) * partial.units[g];
          const int score = product(product(scaled, share), partial.multipliers[g]);
          const int norm = blocks.norms != nullptr ? blocks.norms[first + t] : 0;
          scores.data[g * scores.stride + first + t] = static_cast<std::int16_t>(score + norm);
        }
      }
    }
  }

  static void combine_scores(const ScoreRows& scores, int n, int group, const std::int16_t* offsets,
                             std::int16_t* to) {
    for (int i = 0; i < n; ++i) {
      int sum = scores.data[i] - offsets[0];
      for (int g = 1; g < group; ++g) {
        const int score = scores.data[g * scores.stride + i] - offsets[g];
        const int difference = sum > score ? sum - score : score - sum;
        const int more = difference < 59 ? (59 - difference) >> 2 : 0;
        sum = (sum > score ? sum : score) + more;
      }
      to[i] = static_cast<std::int16_t>(sum);
    }
  }

  static std::int16_t largest_score(const std::int16_t* scores, int n) {
    std::int16_t largest = scores[0];
    for (int i = 1; i < n; ++i) largest = scores[i] > largest ? scores[i] : largest;
    return largest;
  }

  static std::uint64_t expected(const std::int16_t* scores, int n, const ScoreRule& rule) {
    std::uint64_t sum = 0;
    for (int i = 0; i < n; ++i) sum += ScoreRule::units(rule.gap(scores[i]));
    return sum;
  }

  static void draw_systematic(const std::int16_t* scores, int n, const ScoreRule& rule,
                              std::uint16_t* tracks, std::uint64_t* drawn) {
    draw(n, drawn, [&](int i) {
      const std::uint32_t units = ScoreRule::units(rule.gap(scores[i]));
      if (units == ScoreRule::kCertain) return true;
      std::uint16_t& track = tracks[i % kSystematicTracks];
      track = static_cast<std::uint16_t>(track + units);
      return track < units;
    });
  }

  static void draw_poisson(const std::int16_t* scores, int n, const ScoreRule& rule,
                           const std::uint16_t* noise, std::uint64_t* drawn) {
    draw(n, drawn, [&](int i) { return noise[i] < ScoreRule::units(rule.gap(scores[i])); });
  }

  template <class T>
  static void centre_lanes(const T* const* rows, const float* centre, int dim, float* to,
                           std::uint32_t* largest) {
    for (int l = 0; l < kRotationLanes; ++l) {
      largest[l] = 0;
      for (int j = 0; j < dim; ++j) {
        const float x = scalar_at(rows[l], j) - centre[j];
        to[j * kRotationLanes + l] = x;
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x) & 0x7fffffffU;
        largest[l] = magnitude > largest[l] ? magnitude : largest[l];
      }
    }
  }

  // The squares of floats are exact in double, so that it makes no difference who contracts sums.
  template <class T>
  static double squared_distance(const T* row, const float* centre, int dim) {
    double sums[16] = {};
    for (int j = 0; j < dim; ++j) {
      const auto x = static_cast<double>(scalar_at(row, j) - centre[j]);
      sums[j % 16] += x * x;
    }
    for (int half = 8; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    return sums[0];
  }

  static void scale_lanes(const float* x, const float* powers, int n, std::int32_t* to) {
    for (int i = 0; i < n * kRotationLanes; ++i) {
      to[i] = static_cast<std::int32_t>(x[i] * powers[i % kRotationLanes]);
    }
  }

  static void transform_lanes(const LaneTransform& transform, std::int32_t* x) {
    transform_hadamard<kRotationLanes>(transform, x);
  }

  static void square_lanes(const std::int32_t* x, int n, std::int64_t* squares) {
    for (int l = 0; l < kRotationLanes; ++l) squares[l] = 0;
    for (int i = 0; i < n * kRotationLanes; ++i) {
      squares[i % kRotationLanes] += std::int64_t{x[i]} * x[i];
    }
  }

  template <int kBits>
  static void quantise_lanes(const std::int32_t* x, int n, const std::int32_t* bounds,
                             const CodeLanes& lanes, std::int32_t* sums) {
    constexpr Levels kLevels(kBits);
    for (int l = 0; l < kRotationLanes; ++l) {
      std::uint32_t planes[kBits] = {};
      for (int j = 0; j < n; j += 4) {
        std::uint32_t bits[kBits] = {};
        for (int i = 0; i < 4; ++i) {
          const std::int32_t own = x[(j + i) * kRotationLanes + l];
          const std::int32_t sign = own >> 31;
          int level = kLevels.count() / 2;
          for (int b = 0; b + 1 < kLevels.count() / 2; ++b) {
            level += (own ^ sign) > bounds[b * kRotationLanes + l] ? 1 : 0;
          }
          const auto code = static_cast<std::uint32_t>(kLevels.code(level) ^ sign);
          for (int p = 0; p < kBits; ++p) {
            const std::uint32_t bit = (code >> p) & 1U;
            bits[p] |= bit << i;
            planes[p] += static_cast<std::uint32_t>(bit != 0 ? own : -own);
          }
        }
        for (int p = 0; p < kBits; ++p) {
          put(bits[p] << lanes.shift, lanes.wanted[l],
              lanes.words + std::int64_t{p * n / 4 + j / 4} * CodeLanes::kRowBytes + 2 * l);
        }
      }
      for (int p = 0; p < kBits; ++p) {
        sums[p * kRotationLanes + l] = static_cast<std::int32_t>(planes[p]);
      }
    }
  }

 private:
  static int sum_of(const std::uint8_t* codes, int rows, const PartialSums& partial, int g,
                    const CodePlace& place) {
    int sum = 0;
    for (int r = 0; r < rows; ++r) {
      const int byte = codes[r * 64 + place.byte];
      const int bits = place.upper != 0 ? byte >> 4 : byte & 15;
      sum += partial.sums[(r * partial.group + g) * 16 + bits];
    }
    return sum;
  }

  // The wanted bits of a word.
  static void put(std::uint32_t bits, std::uint16_t wanted, std::uint8_t* to) {
    std::uint16_t word = 0;
    std::memcpy(&word, to, sizeof word);
    word = static_cast<std::uint16_t>((word & ~wanted) | (bits & wanted));
    std::memcpy(to, &word, sizeof word);
  }

  static int product(int a, int b) { return (a * b + (1 << 14)) >> 15; }

  template <class Decide>
  static void draw(int n, std::uint64_t* drawn, const Decide& decide) {
    for (int i = 0; i < n; i += 64) {
      std::uint64_t bits = 0;
      for (int j = 0; j < 64; ++j) bits |= std::uint64_t{decide(i + j)} << j;
      drawn[i / 64] = bits;
    }
  }
};

static_assert(SignatureOps<ScalarSignatureOps>);

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Hamming balls around a code: the buckets that probing visits, and how likely another code lies
// among them.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

inline constexpr int kMaxBits = 15;  ///< largest K: codes and bucket offsets fit 16 bits

/// P(Bin(bits, 1 - agree) <= radius): the probability that two codes of `bits` independent bits,
/// each equal with probability `agree` in [0, 1], differ in at most `radius` bits. All terms are
/// positive, so small results keep their relative precision.
/// Source: a_r(p) = sum_{j<=r} C(K,j) p^(K-j) (1-p)^j; probing as in Lv et al. 2007.
[[nodiscard]] inline double hamming_ball_probability(int bits, int radius, double agree) {
  if (radius >= bits) return 1.0;
  double sum = 0.0;
  double choose = 1.0;
  for (int j = 0; j <= radius; ++j) {
    sum += choose * ::pow(agree, bits - j) * ::pow(1.0 - agree, j);
    choose = choose * (bits - j) / (j + 1);
  }
  return sum < 1.0 ? sum : 1.0;
}

/// The ball as masks: bucket `code ^ mask` for each of them is visited. The first is 0, and they
/// come by number of flipped bits. sum_{j<=radius} C(bits, j) of them.
class HammingBall {
 public:
  /// bits in [1, kMaxBits], radius in [0, bits]. Errors: outside that, memory.
  [[nodiscard]] static Result<HammingBall> create(int bits, int radius) noexcept {
    if (bits < 1 || bits > kMaxBits || radius < 0 || radius > bits) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "probing radius %d must lie in [0, K = %d], K in [1, %d]", radius, bits,
                           kMaxBits);
    }
    HammingBall ball;
    if (!ball.masks_.reserve(std::size_t{1} << bits)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for the masks of a Hamming ball");
    }
    for (int flips = 0; flips <= radius; ++flips) ball.append_masks(bits, flips);
    return ball;
  }

  [[nodiscard]] std::span<const Code> masks() const { return masks_.span(); }

 private:
  void append_masks(int bits, int flips) {
    for (unsigned mask = 0; mask < (1U << bits); ++mask) {
      if (std::popcount(mask) != flips) continue;
      const std::size_t at = masks_.size();
      (void)masks_.resize(at + 1);  // within what create() reserved
      masks_.data()[at] = static_cast<Code>(mask);
    }
  }

  Buffer<Code> masks_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

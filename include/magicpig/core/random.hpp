// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: every draw is a function of what it is for, never of what was drawn
// before.
#pragma once

#include <math.h>

#include <array>
#include <cstdint>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What a random number is for; streams of different purpose never share a counter.
enum class Purpose : std::uint32_t {
  kPlanes = 1,
  kUniform = 2,
  kPoisson = 3,
  kMultinomial = 4,
  kRotation = 5,
  kSystematic = 6,
  kQuantiser = 7,
  kClusters = 8
};

/// Names one stream of random numbers. Two streams that differ in any field are independent.
struct RandomKey {
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;
  std::uint32_t head = 0;    ///< KV head, below 2^24
  std::uint32_t stream = 0;  ///< plane, or decode step
  Purpose purpose = Purpose::kPlanes;
};

/// Philox4x32-10: 128 random bits from a 128-bit counter and a 64-bit key.
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
[[nodiscard]] constexpr std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                                            std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53U} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57U} * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key = {key[0] + 0x9E3779B9U, key[1] + 0xBB67AE85U};
  }
  return counter;
}

/// Random access into one stream: number i is the same whenever and wherever it is asked for.
class RandomStream {
 public:
  explicit constexpr RandomStream(const RandomKey& key)
      : key_{static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32)},
        stream_(key.stream),
        head_(key.head | (static_cast<std::uint32_t>(key.purpose) << 24)),
        layer_(key.layer) {}

  /// 128 random bits, number `index` of the stream.
  [[nodiscard]] constexpr std::array<std::uint32_t, 4> block(std::uint32_t index) const {
    return philox({index, stream_, head_, layer_}, key_);
  }

  /// 64 uniform random bits.
  [[nodiscard]] constexpr std::uint64_t bits(std::uint32_t index) const {
    const auto b = block(index);
    return (std::uint64_t{b[1]} << 32) | b[0];
  }

  /// Uniform integer in [0, bound), bias below bound / 2^64. `bound` below 2^32.
  [[nodiscard]] constexpr std::uint32_t below(std::uint32_t index, std::uint32_t bound) const {
    const std::uint64_t b = bits(index);
    const std::uint64_t low = (b & 0xffffffffU) * bound;
    return static_cast<std::uint32_t>(((b >> 32) * bound + (low >> 32)) >> 32);
  }

  /// Uniform in (0, 1], 53 bits: never 0, so its logarithm is finite.
  [[nodiscard]] constexpr double uniform(std::uint32_t index) const {
    return static_cast<double>((bits(index) >> 11) + 1) * 0x1p-53;
  }

  /// Two independent standard normals (Box and Muller 1958).
  [[nodiscard]] std::array<double, 2> normals(std::uint32_t index) const {
    const auto b = block(index);
    const std::uint64_t radius_bits = (std::uint64_t{b[1]} << 32) | b[0];
    const std::uint64_t angle_bits = (std::uint64_t{b[3]} << 32) | b[2];
    const double radius =
        ::sqrt(-2.0 * ::log(static_cast<double>((radius_bits >> 11) + 1) * 0x1p-53));
    const double angle = 6.283185307179586 * (static_cast<double>(angle_bits >> 11) * 0x1p-53);
    return {radius * ::cos(angle), radius * ::sin(angle)};
  }

 private:
  std::array<std::uint32_t, 2> key_;
  std::uint32_t stream_;
  std::uint32_t head_;
  std::uint32_t layer_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Random numbers for tests, independent of the library's own: the same on every platform.
#pragma once

#include <cmath>
#include <cstdint>

namespace magicpig::test {

/// SplitMix64. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }

  /// Uniform in [0, bound); bound > 0. The bias of the remainder is below bound / 2^64.
  int below(int bound) { return static_cast<int>(bits() % static_cast<std::uint64_t>(bound)); }
  /// Uniform in [first, last].
  int between(int first, int last) { return first + below(last - first + 1); }
  /// Uniform in (0, 1].
  double uniform() { return static_cast<double>((bits() >> 11) + 1) * 0x1p-53; }

  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  }

 private:
  std::uint64_t state_;
};

}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// Quantisation of normally distributed coordinates to 1 to 4 bits whose values add up.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Levels of a quantiser for standard normal numbers with 1 to 4 bits: bit p is worth plus or minus
/// amplitude[p], so that a code's product with a vector is the sum of one product per bit plane.
/// The amplitudes minimise the mean square error; it is that of the best levels without this
/// restriction (Lloyd 1982, Max 1960) for 1 and 2 bits, 2 % above for 3 and 9 % for 4. Bit 0 is the
/// sign for 1 and 2 bits; for 3 and 4 it differs from the sign for numbers near 0.
class Levels {
 public:
  static constexpr int kMaxBits = 4;
  static constexpr int kMaxLevels = 1 << kMaxBits;
  static constexpr int kFraction = 14;  ///< amplitudes and bounds are multiples of 2^-14

  /// `bits` in [1, kMaxBits].
  explicit constexpr Levels(int bits)
      : bits_(bits), amplitudes_(kAmplitudes[static_cast<std::size_t>(bits - 1)]) {
    const int count = 1 << bits;
    for (int c = 0; c < count; ++c) insert(c, c);
    for (int i = 0; i + 1 < count; ++i) {
      bounds_[static_cast<std::size_t>(i)] = (value(code(i)) + value(code(i + 1))) / 2;
    }
  }

  [[nodiscard]] constexpr int bits() const { return bits_; }
  [[nodiscard]] constexpr int count() const { return 1 << bits_; }
  /// What bit p is worth, [bits].
  [[nodiscard]] constexpr std::int32_t amplitude(int p) const {
    return amplitudes_[static_cast<std::size_t>(p)];
  }
  /// The code of the i-th level from below.
  [[nodiscard]] constexpr int code(int i) const { return codes_[static_cast<std::size_t>(i)]; }
  /// Between level i and the next one, i in [0, count - 1).
  [[nodiscard]] constexpr std::int32_t bound(int i) const {
    return bounds_[static_cast<std::size_t>(i)];
  }
  /// Bit p of a code adds its amplitude where set and subtracts it elsewhere.
  [[nodiscard]] constexpr std::int32_t value(int code) const {
    std::int32_t sum = 0;
    for (int p = 0; p < bits_; ++p) sum += ((code >> p) & 1) != 0 ? amplitude(p) : -amplitude(p);
    return sum;
  }

 private:
  // Keeps codes_ [0, size] in the order of their values.
  constexpr void insert(int code, int size) {
    int i = size;
    for (; i > 0 && value(codes_[static_cast<std::size_t>(i - 1)]) > value(code); --i) {
      codes_[static_cast<std::size_t>(i)] = codes_[static_cast<std::size_t>(i - 1)];
    }
    codes_[static_cast<std::size_t>(i)] = code;
  }

  static constexpr std::array<std::array<std::int32_t, kMaxBits>, kMaxBits> kAmplitudes{{
      {13072, 0, 0, 0},
      {16081, 8664, 0, 0},
      {16187, 12255, 7389, 0},
      {16957, 14860, 8159, 4014},
  }};

  int bits_;
  std::array<std::int32_t, kMaxBits> amplitudes_;
  std::array<int, kMaxLevels> codes_{};
  std::array<std::int32_t, kMaxLevels> bounds_{};
};

}  // namespace magicpig::inline MAGICPIG_ABI

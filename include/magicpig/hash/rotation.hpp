// SPDX-License-Identifier: Apache-2.0
// What random rotations share: the concept, how they take a vector in integers, what they return.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A vector that was rotated: coordinate j of it is unit * integers[j].
struct Rotated {
  double unit = 0.0;        ///< 0 for the zero vector
  std::int64_t square = 0;  ///< of the integers: the squared norm is unit^2 * square
};

/// A random rotation of `dim` dimensions, padded with zeros to `padded`. Immutable once made, so
/// that any number of threads and indexes share one; the same bits on every machine.
template <class R>
concept Rotation = requires(const R& rotation, const float* vector, std::int32_t* integers) {
  { rotation.dim() } -> std::convertible_to<int>;
  { rotation.padded() } -> std::convertible_to<int>;  // a multiple of 8
  // `vector` [dim], finite, to `integers` [padded], each below 2^30, all together below 2^31
  { rotation.rotate(vector, integers) } -> std::same_as<Rotated>;
};

/// Rotates kRotationLanes vectors [dim, kRotationLanes], each as rotate() does: `integers` [padded,
/// kRotationLanes], `results` [kRotationLanes]. `one` [dim] and `rotated` [padded] are scratch.
template <class Ops, Rotation R>
void rotate_lanes(const R& rotation, const float* vectors, std::int32_t* integers, float* one,
                  std::int32_t* rotated, Rotated* results) {
  if constexpr (requires { rotation.template rotate_lanes<Ops>(vectors, integers, results); }) {
    rotation.template rotate_lanes<Ops>(vectors, integers, results);
  } else {
    for (int l = 0; l < kRotationLanes; ++l) {
      for (int j = 0; j < rotation.dim(); ++j) one[j] = vectors[j * kRotationLanes + l];
      results[l] = rotation.rotate(one, rotated);
      for (int j = 0; j < rotation.padded(); ++j) integers[j * kRotationLanes + l] = rotated[j];
    }
  }
}

/// How a rotation takes its vectors: padded with zeros to a multiple of 8 coordinates, each an
/// integer after one multiplication by a power of two, which rounds nothing but the fraction away.
class RotationInput {
 public:
  /// `dim` in [1, kMaxDim].
  explicit constexpr RotationInput(int dim)
      : dim_(dim),
        padded_((dim + 7) / 8 * 8),
        bits_(30 - static_cast<int>(std::bit_width(static_cast<unsigned>(padded_ - 1)))) {}

  [[nodiscard]] constexpr int dim() const { return dim_; }
  [[nodiscard]] constexpr int padded() const { return padded_; }

  /// `integers` [padded] = `vector` [dim], finite, over the unit that it returns, rounded towards
  /// zero. Each is below 2^bits with 2^bits padded <= 2^30, so that |integers|_2 <= 2^bits
  /// sqrt(padded) <= 2^30 / sqrt(padded). The unit is a power of two, or 0 for a vector with no
  /// coordinate of 2^-99 or more, which counts as zero.
  double to_integers(const float* vector, std::int32_t* integers) const {
    double unit = 0.0;
    to_integers<1>(vector, integers, &unit);
    return unit;
  }

  /// The same of kLanes vectors [dim, kLanes], lane by lane: `integers` [padded, kLanes], `units`
  /// [kLanes].
  template <int kLanes>
  void to_integers(const float* vectors, std::int32_t* integers, double* units) const {
    std::uint32_t largest[kLanes] = {};
    for (int j = 0; j < dim_; ++j) {
      for (int l = 0; l < kLanes; ++l) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(vectors[j * kLanes + l]);
        const std::uint32_t magnitude = bits & 0x7fffffffU;
        largest[l] = magnitude > largest[l] ? magnitude : largest[l];
      }
    }
    float powers[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      // |x| < 2^(biased - 126) for the largest.
      const int biased = static_cast<int>(largest[l] >> 23);
      const int exponent = bits_ - (biased - 126);
      powers[l] = biased < 28 ? 0.0F : static_cast<float>(power_of_two(exponent));
      units[l] = biased < 28 ? 0.0 : power_of_two(-exponent);
    }
    for (int j = 0; j < dim_; ++j) {
      for (int l = 0; l < kLanes; ++l) {
        integers[j * kLanes + l] = static_cast<std::int32_t>(vectors[j * kLanes + l] * powers[l]);
      }
    }
    for (int j = dim_ * kLanes; j < padded_ * kLanes; ++j) integers[j] = 0;
  }

 private:
  static double power_of_two(int exponent) {
    return std::bit_cast<double>(static_cast<std::uint64_t>(1023 + exponent) << 52);
  }

  int dim_;
  int padded_;
  int bits_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

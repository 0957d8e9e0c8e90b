// SPDX-License-Identifier: Apache-2.0
// What random rotations share: the concept, how they take a vector in integers, what they return.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <span>

#include "magicpig/core/checksum.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/hash/fixed_point.hpp"
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
  // a number that rotations have in common only if they are the same
  { rotation.fingerprint() } -> std::same_as<std::uint64_t>;
  // `vector` [dim], finite, to `integers` [padded], each below 2^30, all together below 2^31
  { rotation.rotate(vector, integers) } -> std::same_as<Rotated>;
};

/// Checksum of a rotation's sizes and of the `numbers` it is made of.
template <class R>
[[nodiscard]] std::uint64_t rotation_fingerprint(const R& rotation,
                                                 std::span<const std::int32_t> numbers) {
  Checksum sum;
  sum.add_value(rotation.dim());
  sum.add_value(rotation.padded());
  sum.add_array(numbers);
  return sum.value();
}

/// Rotates kRotationLanes vectors [dim, kRotationLanes], each as rotate() does: `integers` [padded,
/// kRotationLanes], `results` [kRotationLanes]. `largest` [kRotationLanes] are the bits of each
/// vector's largest magnitude. `one` [dim] and `rotated` [padded] are scratch.
template <class Ops, Rotation R>
void rotate_lanes(const R& rotation, const float* vectors, const std::uint32_t* largest,
                  std::int32_t* integers, float* one, std::int32_t* rotated, Rotated* results) {
  if constexpr (requires {
                  rotation.template rotate_lanes<Ops>(vectors, largest, integers, results);
                }) {
    rotation.template rotate_lanes<Ops>(vectors, largest, integers, results);
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
    const Scale scale = scale_of(largest_magnitude(vector, nullptr, dim_));
    for (int j = 0; j < dim_; ++j) integers[j] = static_cast<std::int32_t>(vector[j] * scale.power);
    for (int j = dim_; j < padded_; ++j) integers[j] = 0;
    return scale.unit;
  }

  /// The same of kRotationLanes vectors [dim, kRotationLanes], lane by lane, whose largest
  /// magnitudes have the bits `largest` [kRotationLanes]: `integers` [padded, kRotationLanes],
  /// `units` [kRotationLanes].
  template <class Ops>
  void lanes_to_integers(const float* vectors, const std::uint32_t* largest, std::int32_t* integers,
                         double* units) const {
    float powers[kRotationLanes];
    for (int l = 0; l < kRotationLanes; ++l) {
      const Scale scale = scale_of(largest[l]);
      powers[l] = scale.power;
      units[l] = scale.unit;
    }
    Ops::scale_lanes(vectors, powers, dim_, integers);
    for (int j = dim_ * kRotationLanes; j < padded_ * kRotationLanes; ++j) integers[j] = 0;
  }

  /// What vectors are multiplied by, and its inverse.
  struct Scale {
    float power = 0.0F;
    double unit = 0.0;
  };
  /// For a vector whose largest magnitude, finite, has these bits.
  [[nodiscard]] constexpr Scale scale_of(std::uint32_t largest) const {
    if (exponent_above(largest) < -98) return {};
    const int exponent = bits_ - exponent_above(largest);
    return {.power = static_cast<float>(power_of_two(exponent)), .unit = power_of_two(-exponent)};
  }

 private:
  int dim_;
  int padded_;
  int bits_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Random rotations of O(d log d) additions of integers: signs and Walsh-Hadamard transforms.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/hash/rotation.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A random rotation of `dim` dimensions, padded with zeros to a multiple of 8: three rounds of
/// random signs and Walsh-Hadamard transforms, of O(d log d) additions. A round has one transform
/// where the padded dimension is a power of two, and else three, with b the power of two below it:
/// of coordinates i and i + padded / 2 in pairs, of the first b coordinates, and of the last b.
/// Each transform has its own signs, so that it undoes nothing of those before it.
///
/// E y_j^2 = |x|^2 / padded for each coordinate y_j of the result, averaged over seeds: exactly for
/// powers of two, within 0.4 % up to 1024 dimensions for others. Without the pairs a padded
/// dimension just below a power of two mixes slowly, as its windows share few coordinates.
///
/// The arithmetic is that of integers, after one multiplication of each coordinate by a power of
/// two: no rounding depends on the order of operations, on contraction or on the vector width. The
/// result is a rotation to a relative error of 2^-16 or so of the vector's norm; 2^-12 for single
/// coordinates of more than 1024 dimensions.
/// Memory: 36 bytes per padded dimension, 12 for powers of two. Immutable; any number of threads
/// share one.
/// Source: Ailon and Chazelle 2009 (fast Johnson-Lindenstrauss); three rounds: Yu et al. 2016.
class HadamardRotation {
 public:
  static constexpr int kMaxDim = magicpig::kMaxDim;

  /// Errors: dim outside [1, kMaxDim], memory.
  [[nodiscard]] static Result<HadamardRotation> create(int dim, std::uint64_t seed) noexcept {
    if (dim < 1 || dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument, "dim %d must lie in [1, %d]", dim, kMaxDim);
    }
    HadamardRotation rotation(dim);
    const auto signs = static_cast<std::size_t>(rotation.transforms()) *
                       static_cast<std::size_t>(rotation.padded_);
    if (!rotation.signs_.resize(signs)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d dimensions", dim);
    }
    for (int t = 0; t < rotation.transforms(); ++t) rotation.draw_signs(t, seed);
    return rotation;
  }

  [[nodiscard]] int dim() const { return input_.dim(); }
  [[nodiscard]] std::uint64_t fingerprint() const {
    return rotation_fingerprint(*this, signs_.span());
  }
  /// Coordinates of the result: a multiple of 8.
  [[nodiscard]] int padded() const { return padded_; }

  /// The rotation of `vector` [dim], finite, to `integers` [padded], each below 2^30. A vector
  /// with no coordinate of 2^-99 or more counts as zero.
  Rotated rotate(const float* vector, std::int32_t* integers) const {
    const double unit = input_.to_integers(vector, integers);
    if (unit == 0.0) return {};
    for (int t = 0; t < transforms(); ++t) apply<1>(t, integers, transform_hadamard<1>);
    std::int64_t square = 0;
    for (int j = 0; j < padded_; ++j) square += std::int64_t{integers[j]} * integers[j];
    return {.unit = unit * growth(), .square = square};
  }

  /// The same of kRotationLanes vectors at once, [dim, kRotationLanes] to [padded,
  /// kRotationLanes], whose largest magnitudes have the bits `largest` [kRotationLanes]; `results`
  /// [kRotationLanes].
  template <class Ops>
  void rotate_lanes(const float* vectors, const std::uint32_t* largest, std::int32_t* integers,
                    Rotated* results) const {
    double units[kRotationLanes];
    input_.lanes_to_integers<Ops>(vectors, largest, integers, units);
    for (int t = 0; t < transforms(); ++t) apply<kRotationLanes>(t, integers, Ops::transform_lanes);
    std::int64_t squares[kRotationLanes];
    Ops::square_lanes(integers, padded_, squares);
    for (int l = 0; l < kRotationLanes; ++l) {
      results[l] = {.unit = units[l] * growth(), .square = squares[l]};
    }
  }

  // What a backend needs that runs the transforms itself, as rotate() does.

  /// The transform of the coordinates from `first` on. The others have the signs that follow and
  /// precede its own in an array of padded(), and are multiplied by 2^-30 kSqrtHalf, rounded, where
  /// is_odd().
  struct Window {
    int first;
    LaneTransform transform;
  };
  [[nodiscard]] const RotationInput& input() const { return input_; }
  [[nodiscard]] int transforms() const { return is_power_of_two() ? kRounds : 3 * kRounds; }

  /// Transform t of transforms(). Windows are divided by sqrt(block), rounded up to a power of two.
  /// Where that is too much by sqrt(2), pairs are not divided, which is too little by as much; else
  /// they are divided by 2.
  [[nodiscard]] Window window(int t) const {
    const int block = 1 << log_block_;
    const std::int32_t* signs = signs_.data() + std::int64_t{t} * padded_;
    if (!is_power_of_two() && t % 3 == 0) {
      return {
          .first = 0,
          .transform = {
              .signs = signs, .count = padded_, .stride = padded_ / 2, .shift = is_odd() ? 0 : 1}};
    }
    const int first = is_power_of_two() || t % 3 == 1 ? 0 : padded_ - block;
    return {
        .first = first,
        .transform = {
            .signs = signs + first, .count = block, .stride = 1, .shift = (log_block_ + 1) / 2}};
  }
  /// Whether sqrt(block) is no power of two.
  [[nodiscard]] bool is_odd() const { return log_block_ % 2 != 0; }
  /// What the unit of the input is multiplied by.
  [[nodiscard]] double growth() const { return shrinks() ? kGrowth : 1.0; }

  static constexpr std::int64_t kSqrtHalf = 759250125;  ///< 2^30 / sqrt(2)

 private:
  static constexpr int kRounds = 3;

  explicit HadamardRotation(int dim)
      : input_(dim),
        padded_(input_.padded()),
        log_block_(static_cast<int>(std::bit_width(static_cast<unsigned>(padded_))) - 1) {}

  [[nodiscard]] bool is_power_of_two() const { return padded_ == 1 << log_block_; }
  // Whether a round leaves the vector shorter by sqrt(2), pairs that lengthen it included.
  [[nodiscard]] bool shrinks() const { return is_odd() || !is_power_of_two(); }

  void draw_signs(int t, std::uint64_t seed) {
    const RandomStream stream(
        {.seed = seed, .stream = static_cast<std::uint32_t>(t), .purpose = Purpose::kRotation});
    std::int32_t* signs = signs_.data() + std::int64_t{t} * padded_;
    for (int begin = 0; begin < padded_; begin += 128) {
      const auto bits = stream.block(static_cast<std::uint32_t>(begin / 128));
      for (int j = begin; j < padded_ && j < begin + 128; ++j) {
        const bool minus = ((bits[static_cast<std::size_t>(j / 32 % 4)] >> (j % 32)) & 1U) != 0;
        signs[j] = minus ? -1 : 0;
      }
    }
  }

  // A transform, and a window's factor for the coordinates outside it. No sum reaches 2^31. With
  // |x|_2 <= 2^30 / sqrt(padded) before a round (RotationInput), sums are at most 2^30: in pairs,
  // sqrt(2) |x|_2; in a window, sqrt(block) |x|_2, or sqrt(2 block) |x|_2 behind pairs that were
  // not divided, with block < padded then: 2^30.5. Rounding adds sqrt(padded) / 2 to |x|_2 per
  // transform at most, and so 4.5 sqrt(2) padded < 2^17 to a sum.
  template <int kLanes>
  void apply(int t, std::int32_t* x, void (*transform)(const LaneTransform&, std::int32_t*)) const {
    const Window own = window(t);
    const int end = own.first + own.transform.count;
    transform(own.transform, x + own.first * kLanes);
    rest<kLanes>(t, 0, own.first, x);
    rest<kLanes>(t, end, padded_, x);
  }

  // Coordinates [from, to), outside a window.
  template <int kLanes>
  void rest(int t, int from, int to, std::int32_t* x) const {
    const std::int32_t* signs = signs_.data() + std::int64_t{t} * padded_;
    for (int j = from; j < to; ++j) {
      const std::int32_t sign = signs[j];
      std::int32_t row[kLanes];  // of its own, so that compilers need not fear that it is `signs`
      std::memcpy(row, x + j * kLanes, sizeof row);
      for (int l = 0; l < kLanes; ++l) row[l] = (row[l] ^ sign) - sign;
      std::memcpy(x + j * kLanes, row, sizeof row);
    }
    if (!is_odd()) return;
    for (int j = from * kLanes; j < to * kLanes; ++j) {
      x[j] = static_cast<std::int32_t>((std::int64_t{x[j]} * kSqrtHalf + (1 << 29)) >> 30);
    }
  }

  static constexpr double kGrowth = 2 * 1.4142135623730951;  // sqrt(2)^kRounds

  RotationInput input_;
  int padded_;
  int log_block_;               // of the largest power of two in padded_
  Buffer<std::int32_t> signs_;  // [transforms, padded], 0 or -1
};
static_assert(Rotation<HadamardRotation>);

}  // namespace magicpig::inline MAGICPIG_ABI

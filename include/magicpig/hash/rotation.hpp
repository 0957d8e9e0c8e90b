// SPDX-License-Identifier: Apache-2.0
// Random rotations in integers: the same bits on every machine, whatever the compiler's flags.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/hash/rotated.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A random rotation of `dim` dimensions, padded with zeros to a multiple of 8: three rounds of
/// random signs and Walsh-Hadamard transforms, of O(d log d) additions. Where the padded dimension
/// is no power of two a round transforms its first 2^k coordinates and then its last.
///
/// The arithmetic is that of integers, after one multiplication of each coordinate by a power of
/// two: no rounding depends on the order of operations, on contraction or on the vector width. The
/// result is a rotation to a relative error of 2^-16 or so of the vector's norm.
/// Immutable; any number of threads share one.
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
    if (!rotation.signs_.resize(kRounds * static_cast<std::size_t>(rotation.padded_))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d dimensions", dim);
    }
    for (int round = 0; round < kRounds; ++round) {
      const RandomStream stream({.seed = seed,
                                 .stream = static_cast<std::uint32_t>(round),
                                 .purpose = Purpose::kRotation});
      std::int32_t* signs = rotation.signs_.data() + std::int64_t{round} * rotation.padded_;
      for (int j = 0; j < rotation.padded_; ++j) {
        const auto bits = stream.block(static_cast<std::uint32_t>(j / 128));
        const bool minus = ((bits[static_cast<std::size_t>(j / 32 % 4)] >> (j % 32)) & 1U) != 0;
        signs[j] = minus ? -1 : 0;
      }
    }
    return rotation;
  }

  [[nodiscard]] int dim() const { return input_.dim(); }
  /// Coordinates of the result: a multiple of 8.
  [[nodiscard]] int padded() const { return padded_; }

  /// The rotation of `vector` [dim], finite, to `integers` [padded], each below 2^30. A vector
  /// with no coordinate of 2^-99 or more counts as zero.
  Rotated rotate(const float* vector, std::int32_t* integers) const {
    const double input_unit = input_.to_integers(vector, integers);
    if (input_unit == 0.0) return {};
    for (int round = 0; round < kRounds; ++round) {
      const std::int32_t* signs = signs_.data() + std::int64_t{round} * padded_;
      for (int j = 0; j < padded_; ++j) integers[j] = (integers[j] ^ signs[j]) - signs[j];
      transform(integers, 0);
      if (block_ < padded_) transform(integers, padded_ - block_);
    }
    std::int64_t square = 0;
    for (int j = 0; j < padded_; ++j) square += std::int64_t{integers[j]} * integers[j];
    return {.unit = unit(input_unit), .square = square};
  }

 private:
  static constexpr int kRounds = 3;

  explicit HadamardRotation(int dim)
      : input_(dim),
        padded_(input_.padded()),
        block_(static_cast<int>(std::bit_floor(static_cast<unsigned>(padded_)))),
        log_block_(static_cast<int>(std::bit_width(static_cast<unsigned>(block_))) - 1) {}

  // A transform of `block_` coordinates from `first` on, and the same factor for all others. No sum
  // reaches 2^31: it is at most sqrt(block) |x|_2, and so at most 2^30 (RotationInput).
  void transform(std::int32_t* x, int first) const {
    std::int32_t* block = x + first;
    for (int half = 1; half < block_; half *= 2) {
      for (int i = 0; i < block_; i += 2 * half) {
        for (int j = i; j < i + half; ++j) {
          const std::int32_t a = block[j];
          const std::int32_t b = block[j + half];
          block[j] = a + b;
          block[j + half] = a - b;
        }
      }
    }
    // By sqrt(block), rounded up to a power of two: norms never grow.
    const int shift = (log_block_ + 1) / 2;
    const std::int32_t rounding = std::int32_t{1} << (shift - 1);
    for (int j = 0; j < block_; ++j) block[j] = (block[j] + rounding) >> shift;
    if (log_block_ % 2 == 0) return;
    const auto rest = [&](int begin, int end) {
      for (int j = begin; j < end; ++j) {
        x[j] = static_cast<std::int32_t>((std::int64_t{x[j]} * kSqrtHalf + (1 << 29)) >> 30);
      }
    };
    rest(0, first);
    rest(first + block_, padded_);
  }

  // What one unit of the result is worth in the vector's own units.
  [[nodiscard]] double unit(double input_unit) const {
    double unit = input_unit;
    const int transforms = kRounds * (block_ < padded_ ? 2 : 1);
    // Each transform of an odd number of steps has shrunk the vector by sqrt(2).
    if (log_block_ % 2 != 0) {
      for (int i = 0; i + 1 < transforms; i += 2) unit *= 2.0;
      if (transforms % 2 != 0) unit *= 1.4142135623730951;
    }
    return unit;
  }

  static constexpr std::int64_t kSqrtHalf = 759250125;  // 2^30 / sqrt(2)

  RotationInput input_;
  int padded_;
  int block_;  // coordinates per transform, a power of two
  int log_block_;
  Buffer<std::int32_t> signs_;  // [rounds, padded], 0 or -1
};
static_assert(Rotation<HadamardRotation>);

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Haar-uniform rotations as matrices of integers: the reference for quicker rotations.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/hash/rotation.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Standard normals from comparisons of uniform integers alone, where RandomStream::normals() asks
/// the C library for a logarithm and a cosine, whose last bits differ between machines. Exact but
/// for probabilities of some 2^-30, steps of 2^-22, and the 1e-15 of them beyond 8.
/// Source: Karney 2016 (sampling exactly from the normal distribution), algorithm N.
class IntegerNormals {
 public:
  /// Units in 1.
  static constexpr std::int32_t kUnit = 1 << 23;
  /// Bound on all results.
  static constexpr std::int32_t kBound = 8 * kUnit;

  /// All of `stream` belongs to it.
  explicit IntegerNormals(const RandomStream& stream) : stream_(stream) {}

  /// The next one, in units of 1 / kUnit; odd, and so never 0.
  [[nodiscard]] std::int32_t next() {
    for (;;) {
      // The density at k + x, x in [0, 1), is exp(-k / 2 - k (k - 1) / 2 - k x - x^2 / 2).
      int k = 0;
      while (k < 8 && happens(kHalf)) ++k;
      bool accepted = k < 8;
      for (int i = 0; accepted && i < k * (k - 1); ++i) accepted = happens(kHalf);
      if (!accepted) continue;
      const std::uint32_t x = word();
      for (int i = 0; accepted && i < k; ++i) accepted = happens(x);
      if (!accepted || !happens(static_cast<std::uint32_t>((std::uint64_t{x} * x) >> 33))) continue;
      const std::int32_t size = k * kUnit + static_cast<std::int32_t>((x >> 9) | 1U);
      return (x & 1U) != 0 ? -size : size;
    }
  }

 private:
  static constexpr std::uint32_t kHalf = 1U << 31;

  [[nodiscard]] std::uint32_t word() {
    if (next_ % 4 == 0) block_ = stream_.block(next_ / 4);
    return block_[next_++ % 4];
  }

  // True with probability exp(-p / 2^32): n uniforms descend from p with probability p^n / n!, so
  // an even number of them with this one. Source: von Neumann 1951.
  [[nodiscard]] bool happens(std::uint32_t p) {
    bool even = true;
    for (std::uint32_t last = p;; even = !even) {
      const std::uint32_t u = word();
      if (u >= last) return even;
      last = u;
    }
  }

  RandomStream stream_;
  std::array<std::uint32_t, 4> block_{};
  std::uint32_t next_ = 0;
};

/// A rotation drawn uniformly from all (Haar measure) of `dim` dimensions, padded with zeros to a
/// multiple of 8: a matrix, of O(d^2) multiplications per vector and O(d^3) to make. What is
/// proved of random rotations holds for this one, where HadamardRotation, of O(d log d), resembles
/// it.
///
/// All arithmetic is that of integers, also in making the matrix (Gram and Schmidt on normal rows,
/// entries of 30 bits): no bit depends on the machine, its C library or the compiler's flags.
/// The result is a rotation to a relative error of 2^-16 or so of the vector's norm.
/// Memory: 4 padded^2 bytes, 64 KiB for 128 dimensions. Immutable; any number of threads share one.
/// Source: Mezzadri 2007 (random matrices from the classical compact groups).
class HaarRotation {
 public:
  /// The matrix has 4 MiB then, and takes a second or two to make.
  static constexpr int kMaxDim = 1024;

  /// Errors: dim outside [1, kMaxDim], memory.
  [[nodiscard]] static Result<HaarRotation> create(int dim, std::uint64_t seed) noexcept {
    if (dim < 1 || dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "dim %d of a HaarRotation must lie in [1, %d]", dim, kMaxDim);
    }
    HaarRotation rotation(dim);
    const auto padded = static_cast<std::size_t>(rotation.padded());
    if (!rotation.matrix_.resize(padded * padded)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d dimensions", dim);
    }
    for (int r = 0; r < rotation.padded(); ++r) rotation.draw_row(r, seed);
    return rotation;
  }

  [[nodiscard]] int dim() const { return input_.dim(); }
  [[nodiscard]] std::uint64_t fingerprint() const {
    return rotation_fingerprint(*this, matrix_.span());
  }
  /// Coordinates of the result: a multiple of 8.
  [[nodiscard]] int padded() const { return input_.padded(); }

  /// The rotation of `vector` [dim], finite, to `integers` [padded], each below 2^30. A vector
  /// with no coordinate of 2^-99 or more counts as zero. Takes 4 KiB of stack.
  Rotated rotate(const float* vector, std::int32_t* integers) const {
    std::int32_t input[kMaxDim];
    const double unit = input_.to_integers(vector, input);
    std::int64_t square = 0;
    for (int j = 0; j < padded(); ++j) {
      // With |input|_2 <= 2^30 / sqrt(padded) this is below 2^29, and the sum below 2^59.
      integers[j] = product(matrix_.data() + std::int64_t{j} * padded(), input);
      square += std::int64_t{integers[j]} * integers[j];
    }
    return {.unit = unit, .square = square};
  }

 private:
  // Of the matrix: entries are in units of 2^-30.
  static constexpr int kEntryBits = 30;
  static constexpr std::int64_t kOne = std::int64_t{1} << kEntryBits;
  // HadamardRotation of the same seed has the streams from 0 on.
  static constexpr std::uint32_t kFirstStream = 1U << 16;
  static_assert(kMaxDim % 8 == 0);  // so that padded is at most kMaxDim

  explicit HaarRotation(int dim) : input_(dim) {}

  [[nodiscard]] std::int32_t* row(int r) { return matrix_.data() + std::int64_t{r} * padded(); }

  // Row r, after those before it. Drawing one anew changes no distribution: its direction does not
  // depend on its length.
  void draw_row(int r, std::uint64_t seed) {
    IntegerNormals normals(RandomStream({.seed = seed,
                                         .stream = kFirstStream + static_cast<std::uint32_t>(r),
                                         .purpose = Purpose::kRotation}));
    do {
      for (int i = 0; i < padded(); ++i) row(r)[i] = normals.next();
    } while (!orthonormalise(r));
  }

  // Row r of any length to one of length 1, at right angles to those before it; false where too
  // little is left of it to say in which direction.
  [[nodiscard]] bool orthonormalise(int r) {
    std::int32_t* own = row(r);
    if (normalise(own) < kShortest) return false;
    for (;;) {
      for (int e = 0; e < r; ++e) subtract_projection(own, row(e));
      const std::int64_t length = normalise(own);
      if (length < kShortest) return false;
      // A row that shrinks more has more of its rounding errors along the others: once again.
      if (length >= kOne / 2) return true;
    }
  }

  // Rounding leaves about padded / 2^31 <= 2^-21 of a row of length 1 along those before it: so far
  // below this that the second round, of a row of length 1 again, is the last.
  static constexpr std::int64_t kShortest = kOne >> 15;

  // Scales a row to length 1 and returns the length that it had, unless that is below kShortest.
  // Squares add up to less than 2^63: entries are normals of at most 2^26, or the row's length is
  // at most 2^30 (1 + 2^-14), the error being that of rounding the length down.
  [[nodiscard]] std::int64_t normalise(std::int32_t* row) const {
    std::int64_t square = 0;
    for (int i = 0; i < padded(); ++i) square += std::int64_t{row[i]} * row[i];
    const std::int64_t length = square_root(square);
    if (length < kShortest) return length;
    for (int i = 0; i < padded(); ++i) {
      row[i] = static_cast<std::int32_t>(row[i] * kOne / length);
    }
    return length;
  }
  static_assert(std::int64_t{IntegerNormals::kBound} * IntegerNormals::kBound <=
                INT64_MAX / kMaxDim);

  void subtract_projection(std::int32_t* row, const std::int32_t* unit) const {
    const std::int64_t share = product(row, unit);
    for (int i = 0; i < padded(); ++i) {
      row[i] -= static_cast<std::int32_t>((share * unit[i] + kOne / 2) >> kEntryBits);
    }
  }

  // The inner product of a row of length 1 and of integers, rounded. With |integers|_2 at most
  // 2^30 (1 + 2^-14), so is what it returns, and no partial sum exceeds 2^60 (1 + 2^-12).
  [[nodiscard]] std::int32_t product(const std::int32_t* row, const std::int32_t* integers) const {
    std::int64_t sum = kOne / 2;
    for (int i = 0; i < padded(); ++i) sum += std::int64_t{row[i]} * integers[i];
    return static_cast<std::int32_t>(sum >> kEntryBits);
  }

  // Rounded down; bit by bit.
  static std::int64_t square_root(std::int64_t square) {
    std::uint64_t root = 0;
    for (std::uint64_t bit = 1U << 31; bit != 0; bit /= 2) {
      if ((root + bit) * (root + bit) <= static_cast<std::uint64_t>(square)) root += bit;
    }
    return static_cast<std::int64_t>(root);
  }

  RotationInput input_;
  Buffer<std::int32_t> matrix_;  // [padded, padded], row by row
};
static_assert(Rotation<HaarRotation>);

}  // namespace magicpig::inline MAGICPIG_ABI

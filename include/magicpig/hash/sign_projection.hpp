// SPDX-License-Identifier: Apache-2.0
// Hashing by the signs of projections on K x L planes; the families differ in how planes are drawn.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/hash/hamming_ball.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

inline constexpr int kMaxTables = 1024;  ///< largest L

/// What a sign-projection family is made from.
struct HashConfig {
  int dim = 0;       ///< of the vectors, the head dimension
  int bits = 10;     ///< K, bits per code, 1 to kMaxBits
  int tables = 150;  ///< L, 1 to kMaxTables
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;  ///< gives each layer planes of its own under one seed
};

/// Errors: dim outside [1, kMaxDim], bits outside [1, kMaxBits], tables outside [1, kMaxTables].
[[nodiscard]] inline Status check_hash_config(int dim, int bits, int tables) noexcept {
  if (dim < 1 || dim > kMaxDim) {
    return Status::error(ErrorCode::kInvalidArgument, "dim %d must lie in [1, %d]", dim, kMaxDim);
  }
  if (bits < 1 || bits > kMaxBits) {
    return Status::error(ErrorCode::kInvalidArgument, "bits (K) %d must lie in [1, %d]", bits,
                         kMaxBits);
  }
  if (tables < 1 || tables > kMaxTables) {
    return Status::error(ErrorCode::kInvalidArgument, "tables (L) %d must lie in [1, %d]", tables,
                         kMaxTables);
  }
  return Status();
}

/// The randomness of one plane.
[[nodiscard]] constexpr RandomStream plane_stream(const HashConfig& config, int plane) {
  return RandomStream({.seed = config.seed,
                       .layer = config.layer,
                       .stream = static_cast<std::uint32_t>(plane),
                       .purpose = Purpose::kPlanes});
}

/// K x L signs of projections, K of them to a code. Bit b of the code in table l is 1 where the
/// projection on plane b * L + l is above 0; a zero vector has code 0 everywhere.
///
/// `Planes::draw(config, planes)` fills planes [K * L, dim]. For planes of uniform direction
/// P(bit equal) = 1 - angle / pi; bits of one table must be independent of each other, so that a
/// table collides with the K-th power of that, and tables of each other for the rule to be
/// binomial. Memory: 4 K L dim bytes, K L rounded up
/// to a multiple of 32. Projections of two backends differ by rounding, and so
/// do codes where a projection is within rounding of 0.
/// Source: Charikar 2002 (SimHash); Chen et al. 2024, section 4.
template <class Planes>
class SignProjection {
 public:
  static constexpr bool kHammingBalls = true;

  /// Errors: dim outside [1, kMaxDim], bits outside [1, 15], tables outside [1, 1024], memory.
  [[nodiscard]] static Result<SignProjection> create(const HashConfig& config) noexcept {
    const Status status = check_hash_config(config.dim, config.bits, config.tables);
    if (!status.ok()) return status;
    SignProjection family(config);
    const auto count = static_cast<std::size_t>(family.plane_count());
    Buffer<float> planes;
    if (!planes.resize(count * static_cast<std::size_t>(config.dim)) ||
        !family.panels_.resize(Panels::size(family.plane_count(), config.dim)) ||
        !Planes::draw(config, planes.data())) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %zu planes of dimension %d",
                           count, config.dim);
    }
    family.fill_panels(planes.data());
    return family;
  }

  [[nodiscard]] int dim() const { return config_.dim; }
  [[nodiscard]] int bits() const { return config_.bits; }
  [[nodiscard]] int tables() const { return config_.tables; }
  [[nodiscard]] std::size_t bytes() const { return panels_.bytes(); }
  /// Scalar j of plane b * L + l, which gives bit b in table l.
  [[nodiscard]] float plane(int number, int j) const {
    return panels_.data()[Panels::place(number, j, config_.dim)];
  }

  [[nodiscard]] std::uint64_t fingerprint() const {
    return family_fingerprint(*this, 0, panels_.span());
  }

  /// P(two codes in one table differ in at most `radius` bits) for vectors at `cosine`.
  [[nodiscard]] double table_collision(double cosine, int radius) const {
    const double clamped = cosine < -1.0 ? -1.0 : cosine > 1.0 ? 1.0 : cosine;
    // 1 - angle / pi, without the difference that a fused multiply-add would take below 0.
    const double agree = ::acos(-clamped) * 0.31830988618379067;
    return hamming_ball_probability(config_.bits, radius, agree);
  }

  [[nodiscard]] std::size_t scratch_floats(int count) const {
    return static_cast<std::size_t>(plane_count()) * static_cast<std::size_t>(count);
  }

  /// vectors [count, dim] -> their products with the planes, [count, bits * tables].
  template <class Ops>
  void project(const float* vectors, int count, float* projections) const {
    Ops::project({.data = panels_.data(), .count = plane_count(), .dim = config_.dim}, vectors,
                 count, projections);
  }

  /// vectors [count, dim] -> codes [count, tables]; count in [0, kHashBatch].
  template <class Ops>
  void hash(const float* vectors, int count, Code* codes, float* scratch) const {
    project<Ops>(vectors, count, scratch);
    for (int v = 0; v < count; ++v) {
      pack(scratch + std::int64_t{v} * plane_count(), codes + std::int64_t{v} * config_.tables);
    }
  }

 private:
  explicit SignProjection(const HashConfig& config) : config_(config) {}

  [[nodiscard]] int plane_count() const { return config_.bits * config_.tables; }

  void fill_panels(const float* planes) {
    for (std::size_t i = 0; i < panels_.size(); ++i) panels_.data()[i] = 0.0F;
    for (int p = 0; p < plane_count(); ++p) {
      for (int j = 0; j < config_.dim; ++j) {
        panels_.data()[Panels::place(p, j, config_.dim)] =
            planes[std::int64_t{p} * config_.dim + j];
      }
    }
  }

  void pack(const float* projections, Code* codes) const {
    for (int l = 0; l < config_.tables; ++l) codes[l] = 0;
    for (int b = 0; b < config_.bits; ++b) {
      const float* row = projections + std::int64_t{b} * config_.tables;
      for (int l = 0; l < config_.tables; ++l) {
        codes[l] = static_cast<Code>(codes[l] | ((row[l] > 0.0F ? 1 : 0) << b));
      }
    }
  }

  HashConfig config_;
  Buffer<float> panels_;  // [K * L, dim] as Panels lays them out
};

}  // namespace magicpig::inline MAGICPIG_ABI

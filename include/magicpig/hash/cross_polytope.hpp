// SPDX-License-Identifier: Apache-2.0
// Cross-polytope hashing: which of the axes of a random space, and which end of it, is nearest.
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
#include "magicpig/hash/gauss_legendre.hpp"
#include "magicpig/hash/hamming_ball.hpp"
#include "magicpig/hash/sign_projection.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// P(two vectors at `cosine` have the same nearest corner +-e_i of a cross-polytope of `axes` axes
/// in a space that both are projected to with independent normal entries):
///   2 d' int int_{u, v > 0} phi(u, v) P(|X| < u, |Y| < v)^(d' - 1) du dv,
/// X, Y and phi bivariate normal with that correlation, d' = axes. In polar coordinates around the
/// bisector of the two vectors neither factor has a ridge at any angle; what is outside of the
/// parallelogram |X| < u, |Y| < v is an integral over its sides, as in Owen's T function.
/// Quadrature in double: relative error below 5e-5 for cosines >= -.5 and up to 512 axes; towards
/// -1, where it falls to 0, no more than an order of magnitude is promised. With 1 and 2 axes it is
/// (1 - angle / pi)^axes. About half a millisecond.
/// Source: Andoni, Indyk, Laarhoven, Razenshteyn and Schmidt 2015 (the hash).
[[nodiscard]] inline double cross_polytope_collision(int axes, double cosine) {
  constexpr double kInversePi = 0.31830988618379067;
  if (cosine >= 1.0) return 1.0;
  if (!(cosine > -1.0)) return 0.0;
  const double half_angle = 0.5 * ::acos(cosine);
  const double half_pi = 0.5 / kInversePi;
  if (axes <= 2) return ::pow((half_pi - half_angle) * 2.0 * kInversePi, axes);
  constexpr int kSide = 10;
  const GaussLegendre<24> over_angles;
  const GaussLegendre<40> over_radii;
  const GaussLegendre<kSide> over_side;
  const double sine = ::sin(2.0 * half_angle);
  // Where both products are large: further out, the further apart the vectors are.
  const double farthest = 5.5 + 2.5 / ::cos(half_angle);
  const double integral = over_angles(0.0, half_pi - half_angle, [&](double angle) {
    // A corner of the parallelogram at this angle and radius r has products u r and v r; its sides
    // are seen from the middle in these directions on either side of their normals.
    const double u = ::cos(angle - half_angle);
    const double v = ::cos(angle + half_angle);
    const double ends[4] = {half_angle - angle, ::atan2(v + cosine * u, sine * u),
                            half_angle + angle, ::atan2(u + cosine * v, sine * v)};
    double powers[4 * kSide];
    double weights[4 * kSide];
    int count = 0;
    for (int side = 0; side < 4; ++side) {
      over_side.each(0.0, ends[side], [&](double direction, double weight) {
        const double distance = (side < 2 ? u : v) / ::cos(direction);
        powers[count] = -0.5 * distance * distance;
        weights[count++] = weight * kInversePi;
      });
    }
    return over_radii(0.0, farthest, [&](double r) {
      double outside = 0.0;
      for (int i = 0; i < 4 * kSide; ++i) outside += weights[i] * ::exp(r * r * powers[i]);
      if (outside >= 1.0) return 0.0;
      return r * ::exp(-0.5 * r * r + (axes - 1) * ::log1p(-outside));
    });
  });
  return 2.0 * axes * integral * kInversePi;
}

/// What a cross-polytope family is made from.
struct CrossPolytopeConfig {
  int dim = 0;      ///< of the vectors, the head dimension
  int bits = 8;     ///< K, bits per code, 1 to kMaxBits, a multiple of `parts`
  int tables = 35;  ///< L, 1 to kMaxTables
  int parts = 1;    ///< cross-polytopes of a table, each of bits / parts bits, 1 to 10
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;  ///< gives each layer planes of its own under one seed
};

/// L tables of K bits, b = K / parts of them from each of `parts` cross-polytopes: of a projection
/// to 2^(b - 1) axes with independent normal entries, the number of the coordinate of largest
/// magnitude and, as the lowest bit, whether that is below 0. Of equal magnitudes the first counts;
/// a zero vector has code 0 everywhere. Vectors at a right angle collide as rarely as with K bits
/// of SimHash, near ones more often: at cosine .5 twice as often with 8 bits in one part.
///
/// The bits of a code are not independent and codes near in Hamming distance say nothing, so there
/// is no probing of balls. The collision probability is exact (cross_polytope_collision), tables
/// are independent of each other. An inclusion curve takes 2,049 of these, about a second. Memory:
/// 4 L parts 2^(b - 1) dim bytes, rows rounded up to a multiple of 32. Projections of two backends
/// differ by rounding, and so do codes where two magnitudes are within it. Source: Andoni, Indyk,
/// Laarhoven, Razenshteyn and Schmidt 2015.
class CrossPolytope {
 public:
  static constexpr bool kHammingBalls = false;
  static constexpr int kMaxPartBits = 10;

  /// Errors: dim outside [1, kMaxDim], bits outside [1, 15], tables outside [1, 1024], parts that
  /// do not divide bits or leave more than kMaxPartBits to one, memory.
  [[nodiscard]] static Result<CrossPolytope> create(const CrossPolytopeConfig& config) noexcept {
    const Status status = check_hash_config(config.dim, config.bits, config.tables);
    if (!status.ok()) return status;
    if (config.parts < 1 || config.bits % config.parts != 0 ||
        config.bits / config.parts > kMaxPartBits) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "parts %d must divide bits (K) %d into parts of 1 to %d", config.parts,
                           config.bits, kMaxPartBits);
    }
    CrossPolytope family(config);
    if (!family.panels_.resize(Panels::size(family.plane_count(), config.dim))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d planes of dimension %d",
                           family.plane_count(), config.dim);
    }
    family.draw();
    return family;
  }

  [[nodiscard]] int dim() const { return config_.dim; }
  [[nodiscard]] int bits() const { return config_.bits; }
  [[nodiscard]] int tables() const { return config_.tables; }
  [[nodiscard]] int parts() const { return config_.parts; }
  /// Axes of a cross-polytope.
  [[nodiscard]] int axes() const { return 1 << (part_bits() - 1); }
  [[nodiscard]] std::size_t bytes() const { return panels_.bytes(); }
  /// Scalar j of the vector that gives axis i of part p in table l, number (l parts + p) axes + i.
  [[nodiscard]] float plane(int number, int j) const {
    return panels_.data()[Panels::place(number, j, config_.dim)];
  }

  [[nodiscard]] std::uint64_t fingerprint() const {
    return family_fingerprint(*this, config_.parts, panels_.span());
  }

  /// P(two codes of one table are the same) for vectors at `cosine`; `radius`, 0, is what the
  /// concept asks for.
  [[nodiscard]] double table_collision(double cosine, [[maybe_unused]] int radius) const {
    return ::pow(cross_polytope_collision(axes(), cosine), config_.parts);
  }

  [[nodiscard]] std::size_t scratch_floats(int count) const {
    return static_cast<std::size_t>(plane_count()) * static_cast<std::size_t>(count);
  }

  /// vectors [count, dim] -> codes [count, tables]; count in [0, kHashBatch].
  template <class Ops>
  void hash(const float* vectors, int count, Code* codes, float* scratch) const {
    Ops::project({.data = panels_.data(), .count = plane_count(), .dim = config_.dim}, vectors,
                 count, scratch);
    const float* projections = scratch;
    for (int i = 0; i < count * config_.tables; ++i) {
      unsigned code = 0;
      for (int p = 0; p < config_.parts; ++p, projections += axes()) {
        code |= corner(projections) << (p * part_bits());
      }
      codes[i] = static_cast<Code>(code);
    }
  }

 private:
  explicit CrossPolytope(const CrossPolytopeConfig& config) : config_(config) {}

  [[nodiscard]] int part_bits() const { return config_.bits / config_.parts; }
  [[nodiscard]] int plane_count() const { return config_.tables * config_.parts * axes(); }

  void draw() {
    for (std::size_t i = 0; i < panels_.size(); ++i) panels_.data()[i] = 0.0F;
    for (int plane = 0; plane < plane_count(); ++plane) {
      const RandomStream stream({.seed = config_.seed,
                                 .layer = config_.layer,
                                 .stream = static_cast<std::uint32_t>(plane),
                                 .purpose = Purpose::kPlanes});
      for (int j = 0; j < config_.dim; ++j) {
        const auto pair = stream.normals(static_cast<std::uint32_t>(j / 2));
        panels_.data()[Panels::place(plane, j, config_.dim)] =
            static_cast<float>(pair[static_cast<std::size_t>(j % 2)]);
      }
    }
  }

  [[nodiscard]] unsigned corner(const float* projections) const {
    unsigned best = 0;
    float largest = ::fabsf(projections[0]);
    for (int i = 1; i < axes(); ++i) {
      const float magnitude = ::fabsf(projections[i]);
      if (magnitude > largest) {
        largest = magnitude;
        best = static_cast<unsigned>(i);
      }
    }
    return 2 * best + (projections[best] < 0.0F ? 1U : 0U);
  }

  CrossPolytopeConfig config_;
  Buffer<float> panels_;  // [L * parts * axes, dim] as Panels lays them out
};
static_assert(HashFamily<CrossPolytope>);

}  // namespace magicpig::inline MAGICPIG_ABI

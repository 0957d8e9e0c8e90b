// SPDX-License-Identifier: Apache-2.0
// Codes of keys that need no training: each coordinate in a random rotation by itself, in 1 to 4
// bits.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "magicpig/core/checksum.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/hadamard.hpp"
#include "magicpig/hash/levels.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/hash/rotation.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Each coordinate of the key in a random rotation R, over their root mean square, in the nearest
/// of 2^bits levels (Levels), with the factor f = |k|^2 / <x, R k>, x being the code's vector: then
/// f <x, R q> estimates <k, q> without bias over rotations. The same for all KV heads.
///
/// Bit plane by bit plane, and in it four dimensions by four, a row has the four bits of a token,
/// the lowest bit being that of the first dimension. So the sign plane is the first part of a
/// block. Memory: that of the rotation. Source: the factor Gao and Long 2024 (RaBitQ).
template <Rotation R>
class ScalarQuantiser {
 public:
  /// `bits` per dimension. Errors: bits outside [1, 4]; as R::create().
  [[nodiscard]] static Result<ScalarQuantiser> create(int dim, int bits,
                                                      std::uint64_t seed) noexcept {
    if (bits < 1 || bits > Levels::kMaxBits) {
      return Status::error(ErrorCode::kInvalidArgument, "bits %d must lie in [1, %d]", bits,
                           Levels::kMaxBits);
    }
    Result<R> rotation = R::create(dim, seed);
    if (!rotation.ok()) return rotation.status();
    return ScalarQuantiser(std::move(*rotation), bits);
  }

  [[nodiscard]] const R& rotation() const { return rotation_; }
  [[nodiscard]] const Levels& levels() const { return levels_; }

  [[nodiscard]] QuantiserShape shape() const {
    return {.dim = rotation_.dim(),
            .bits = levels_.bits(),
            .rows = levels_.bits() * rotation_.padded() / 4,
            .query_scratch = rotation_.padded()};
  }
  [[nodiscard]] static int kv_heads() { return 0; }
  [[nodiscard]] std::uint64_t fingerprint() const {
    Checksum sum;
    sum.add_value(levels_.bits());
    sum.add_value(rotation_.fingerprint());
    return sum.value();
  }
  [[nodiscard]] double temperature() const { return code_temperature(levels_.bits()); }

  double tabulate(int, const float* query, std::int32_t* rotated, std::int32_t* sums) const {
    const Rotated result = rotation_.rotate(query, rotated);
    for (int p = 0; p < levels_.bits(); ++p) {
      for (int j = 0; j < rotation_.padded(); j += 4, sums += 16) {
        std::int32_t four[4];
        for (int i = 0; i < 4; ++i) {  // a quarter, so that all sums stay below 2^30
          four[i] = static_cast<std::int32_t>(
              (std::int64_t{rotated[j + i]} * levels_.amplitude(p)) >> (Levels::kFraction + 2));
        }
        for (int n = 0; n < 16; ++n) {
          sums[n] = 0;
          for (int i = 0; i < 4; ++i) sums[n] += ((n >> i) & 1) != 0 ? four[i] : -four[i];
        }
      }
    }
    return 4.0 * result.unit;
  }

  struct KeyScratch {
    std::int32_t* rotated = nullptr;  // [padded, kRotationLanes]
    float* one = nullptr;             // [dim]
    std::int32_t* one_rotated = nullptr;
  };
  [[nodiscard]] KeyScratch carve(Arena& arena) const {
    const auto dim = static_cast<std::size_t>(rotation_.dim());
    const auto padded = static_cast<std::size_t>(rotation_.padded());
    return {.rotated = arena.take<std::int32_t>(padded * kRotationLanes),
            .one = arena.take<float>(dim),
            .one_rotated = arena.take<std::int32_t>(padded)};
  }

  template <class Ops>
  void encode(int, const float* keys, const std::uint32_t* largest, const CodeLanes& lanes,
              const KeyScratch& scratch, double* factors) const {
    Rotated results[kRotationLanes];
    rotate_lanes<Ops>(rotation_, keys, largest, scratch.rotated, scratch.one, scratch.one_rotated,
                      results);
    std::int64_t dots[kRotationLanes];
    quantise<Ops>(scratch.rotated, results, lanes, dots);
    for (int l = 0; l < kRotationLanes; ++l) {
      // In units of 2^-kFraction of a level of 1, as the dots are.
      const double square = results[l].unit * static_cast<double>(results[l].square);
      factors[l] =
          dots[l] > 0 ? square * (1 << Levels::kFraction) / static_cast<double>(dots[l]) : 0.0;
    }
  }

 private:
  ScalarQuantiser(R rotation, int bits) : rotation_(std::move(rotation)), levels_(bits) {}

  // <x, key> of each to `dots`.
  template <class Ops>
  void quantise(const std::int32_t* rotated, const Rotated* results, const CodeLanes& lanes,
                std::int64_t* dots) const {
    if (levels_.bits() == 1) return quantise<Ops, 1>(rotated, results, lanes, dots);
    if (levels_.bits() == 2) return quantise<Ops, 2>(rotated, results, lanes, dots);
    if (levels_.bits() == 3) return quantise<Ops, 3>(rotated, results, lanes, dots);
    quantise<Ops, 4>(rotated, results, lanes, dots);
  }

  template <class Ops, int kBits>
  void quantise(const std::int32_t* rotated, const Rotated* results, const CodeLanes& lanes,
                std::int64_t* dots) const {
    // Levels are symmetric, so that the bounds of the upper half tell the lower ones.
    constexpr int kBounds = (1 << kBits) / 2 - 1;
    std::int32_t bounds[kBounds * kRotationLanes + 1] = {};
    for (int l = 0; l < kRotationLanes && kBounds > 0; ++l) {
      const double sigma = ::sqrt(static_cast<double>(results[l].square) / rotation_.padded());
      for (int b = 0; b < kBounds; ++b) {
        const double bound = sigma * levels_.bound(kBounds + 1 + b) / (1 << Levels::kFraction);
        bounds[b * kRotationLanes + l] = static_cast<std::int32_t>(bound) - 1;
      }
    }
    std::int32_t sums[kBits * kRotationLanes];  // <signs of plane p, key>: below 2^31, see Rotation
    Ops::template quantise_lanes<kBits>(rotated, rotation_.padded(), bounds, lanes, sums);
    for (int l = 0; l < kRotationLanes; ++l) {
      dots[l] = 0;
      for (int p = 0; p < kBits; ++p) {
        dots[l] += std::int64_t{levels_.amplitude(p)} * sums[p * kRotationLanes + l];
      }
    }
  }

  R rotation_;
  Levels levels_;
};

/// The usual one.
using HadamardQuantiser = ScalarQuantiser<HadamardRotation>;
static_assert(Quantiser<HadamardQuantiser>);

}  // namespace magicpig::inline MAGICPIG_ABI

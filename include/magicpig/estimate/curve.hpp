// SPDX-License-Identifier: Apache-2.0
// The inclusion probability of a hash rule as a tabulated curve of the cosine.
#pragma once

#include <math.h>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// log u(cosine), evaluated in double once and interpolated linearly in float afterwards. A family
/// then needs no SIMD code of its own, and no cancelling formula is ever computed in float.
///
/// The table is uniform in x = sqrt((1 - cosine) / 2), the sine of half the angle: the collision
/// probability 1 - angle / pi has a vertical tangent in the cosine at 1 and none in x. With 2,048
/// segments (8 KiB) the error of log u for cosine >= -0.5 is below 2e-5 for SimHash at (10, 150),
/// t = 2, and below 5e-5 for any K <= 15, L <= 1024, t <= 3 and radius <= 2. It grows towards -1,
/// where log u falls to -inf: below 1.2e-3 at -0.9 and unbounded from -0.99 on; the last node
/// stands at 1/8 of a segment from -1.
class InclusionCurve {
 public:
  static constexpr int kSegments = 2048;

  /// Tabulates log_probability(cosine) -> natural log, non-increasing as the cosine falls.
  /// Error: out of memory.
  template <class LogProbability>
  [[nodiscard]] static Result<InclusionCurve> create(
      const LogProbability& log_probability) noexcept {
    InclusionCurve curve;
    if (!curve.nodes_.resize(kSegments + 1)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for an inclusion curve");
    }
    for (int i = 0; i <= kSegments; ++i) {
      const double x = (i < kSegments ? i : kSegments - 0.125) / kSegments;
      const double value = log_probability(1.0 - 2.0 * x * x);
      curve.nodes_.data()[i] = static_cast<float>(value > kFloor ? value : kFloor);
    }
    return curve;
  }

  [[nodiscard]] CurveView view() const { return {nodes_.data(), kSegments}; }

 private:
  // exp(-80) is still a normal float; no token of smaller probability is ever drawn.
  static constexpr double kFloor = -80.0;

  Buffer<float> nodes_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// SimHash: signs of projections on independent Gaussian planes, the hash MagicPIG is published
// with.
#pragma once

#include <cstdint>

#include "magicpig/core/random.hpp"
#include "magicpig/hash/sign_projection.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Independent standard normal entries: uniform directions, so the collision probability is exact,
/// bits and tables are independent.
struct GaussianPlanes {
  static bool draw(const HashConfig& config, float* planes) {
    for (int plane = 0; plane < config.bits * config.tables; ++plane) {
      const RandomStream stream = plane_stream(config, plane);
      float* row = planes + std::int64_t{plane} * config.dim;
      for (int i = 0; i < config.dim; i += 2) {
        const auto pair = stream.normals(static_cast<std::uint32_t>(i / 2));
        row[i] = static_cast<float>(pair[0]);
        if (i + 1 < config.dim) row[i + 1] = static_cast<float>(pair[1]);
      }
    }
    return true;
  }
};

using SimHash = SignProjection<GaussianPlanes>;

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Rademacher hashing: signs of projections on planes of +1 and -1.
#pragma once

#include <cstdint>

#include "magicpig/core/random.hpp"
#include "magicpig/hash/sign_projection.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Entries +1 or -1 with equal probability. The angle law 1 - angle / pi holds in the limit of many
/// dimensions with no dominant one, not exactly: a vector along one axis falls to either side by a
/// single coin. Needs no libm, so planes are the same bits everywhere.
/// Source: Achlioptas 2003 (random projections with binary coins).
struct RademacherPlanes {
  static bool draw(const HashConfig& config, float* planes) {
    for (int plane = 0; plane < config.bits * config.tables; ++plane) {
      const RandomStream stream = plane_stream(config, plane);
      float* row = planes + std::int64_t{plane} * config.dim;
      for (int i = 0; i < config.dim; ++i) {
        const auto word = static_cast<std::uint32_t>(i / 32);
        const std::uint32_t coins = stream.block(word / 4)[word % 4];
        row[i] = ((coins >> (i % 32)) & 1U) != 0 ? 1.0F : -1.0F;
      }
    }
    return true;
  }
};

using RademacherHash = SignProjection<RademacherPlanes>;

}  // namespace magicpig::inline MAGICPIG_ABI

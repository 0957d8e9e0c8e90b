// SPDX-License-Identifier: Apache-2.0
// The operations of product quantisation without SIMD: the definition that other models are held
// against, and for libraries that have no products of 16-bit integers.
#pragma once

#include <cstdint>
#include <cstring>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// ProductOps in plain loops.
struct ScalarProductOps {
  static void pair_lanes(const std::int32_t* first, const std::int32_t* second, int count,
                         int stride, std::int16_t* to) {
    for (int i = 0; i < count; ++i) {
      for (int l = 0; l < kRotationLanes; ++l) {
        const int at = i * kRotationLanes + l;
        std::int16_t* pair = to + std::int64_t{i} * stride + 2 * l;
        pair[0] = static_cast<std::int16_t>(first[at]);
        pair[1] = second != nullptr ? static_cast<std::int16_t>(second[at]) : std::int16_t{0};
      }
    }
  }

  static void project_lanes(const std::int16_t* matrix, int n, const std::int16_t* x, int shift,
                            std::int32_t* y) {
    for (int j = 0; j < n; ++j) {
      std::int32_t sums[kRotationLanes] = {};
      for (int i = 0; i < n / 2; ++i) {
        const std::int16_t* entries = matrix + (std::int64_t{j} * (n / 2) + i) * 2;
        add_products(entries, x + std::int64_t{i} * 2 * kRotationLanes, sums);
      }
      const std::int32_t rounding = (std::int32_t{1} << shift) / 2;
      for (int l = 0; l < kRotationLanes; ++l) {
        y[j * kRotationLanes + l] = (sums[l] + rounding) >> shift;
      }
    }
  }

  static void nearest_lanes(const Centroids& centroids, const std::int16_t* y,
                            const CodeLanes& lanes, std::int32_t* dots) {
    const int pairs = centroids.pairs;
    for (int l = 0; l < kRotationLanes; ++l) dots[l] = 0;
    for (int r = 0; r < centroids.rows; ++r) {
      std::int32_t best[kRotationLanes] = {};
      std::int32_t best_dots[kRotationLanes] = {};
      std::uint32_t codes[kRotationLanes] = {};
      for (int c = 0; c < 16; ++c) {
        const std::int64_t at = std::int64_t{r} * 16 + c;
        std::int32_t products[kRotationLanes] = {};
        for (int p = 0; p < pairs; ++p) {
          add_products(centroids.values + (at * pairs + p) * 2,
                       y + (std::int64_t{r} * pairs + p) * 2 * kRotationLanes, products);
        }
        for (int l = 0; l < kRotationLanes; ++l) {
          const std::int32_t score = products[l] - centroids.half_norms[at];
          if (c > 0 && score <= best[l]) continue;
          best[l] = score;
          best_dots[l] = products[l];
          codes[l] = static_cast<std::uint32_t>(c);
        }
      }
      for (int l = 0; l < kRotationLanes; ++l) {
        dots[l] = static_cast<std::int32_t>(
            static_cast<std::uint32_t>(dots[l]) +
            static_cast<std::uint32_t>(best_dots[l] >> Centroids::kDotShift));
        std::uint8_t* to = lanes.words + std::int64_t{r} * CodeLanes::kRowBytes + 2 * l;
        std::uint16_t word = 0;
        std::memcpy(&word, to, sizeof word);
        word = static_cast<std::uint16_t>((word & ~lanes.wanted[l]) |
                                          ((codes[l] << lanes.shift) & lanes.wanted[l]));
        std::memcpy(to, &word, sizeof word);
      }
    }
  }

 private:
  // sums[l] += entries[0] x[2 l] + entries[1] x[2 l + 1]
  static void add_products(const std::int16_t* entries, const std::int16_t* x, std::int32_t* sums) {
    for (int l = 0; l < kRotationLanes; ++l) {
      sums[l] += std::int32_t{entries[0]} * x[2 * l] + std::int32_t{entries[1]} * x[2 * l + 1];
    }
  }
};

static_assert(ProductOps<ScalarProductOps>);

}  // namespace magicpig::inline MAGICPIG_ABI

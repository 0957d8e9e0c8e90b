// SPDX-License-Identifier: Apache-2.0
// How far an output is from another.
#pragma once

#include <cmath>
#include <cstddef>
#include <ranges>
#include <span>

namespace magicpig::bench {

/// |out - exact| / |exact|, L2; 0 where both are zero.
template <std::ranges::contiguous_range Exact>
[[nodiscard]] double relative_error(std::span<const float> out, const Exact& exact) {
  double difference = 0.0;
  double norm = 0.0;
  for (std::size_t j = 0; j < out.size(); ++j) {
    const auto e = static_cast<double>(std::ranges::data(exact)[j]);
    const double d = static_cast<double>(out[j]) - e;
    difference += d * d;
    norm += e * e;
  }
  return difference == 0.0 ? 0.0 : std::sqrt(difference / norm);
}

}  // namespace magicpig::bench

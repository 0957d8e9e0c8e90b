// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

namespace magicpig::llama::test {

/// |a - b| / |b|.
inline double difference(std::span<const float> a, std::span<const float> b) {
  double off = 0.0;
  double all = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    off += std::pow(double{a[i]} - double{b[i]}, 2);
    all += std::pow(double{b[i]}, 2);
  }
  return std::sqrt(off / all);
}

}  // namespace magicpig::llama::test

// SPDX-License-Identifier: Apache-2.0
// The planes of a sign-projection family as plain rows.
#pragma once

#include <vector>

namespace magicpig::test {

/// [K * L, dim], plane b * L + l gives bit b in table l.
template <class Family>
[[nodiscard]] std::vector<float> planes_of(const Family& family) {
  std::vector<float> rows;
  for (int p = 0; p < family.bits() * family.tables(); ++p) {
    for (int j = 0; j < family.dim(); ++j) rows.push_back(family.plane(p, j));
  }
  return rows;
}

}  // namespace magicpig::test

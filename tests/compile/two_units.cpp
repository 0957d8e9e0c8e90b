// SPDX-License-Identifier: Apache-2.0
// Links two units compiled alike, and compares what they compute.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "unit.hpp"

int main() {
  const Unit first = unit_baseline();
  const Unit second = unit_again();
  std::printf("%s, Highway %s: %.9g and %.9g\n", first.abi, first.target,
              double{first.sampled_highway}, double{second.sampled_highway});
  const bool same = std::strcmp(first.abi, second.abi) == 0 &&
                    first.exact_scalar == second.exact_scalar &&
                    first.exact_highway == second.exact_highway &&
                    first.sampled_scalar == second.sampled_scalar &&
                    first.sampled_highway == second.sampled_highway;
  return same ? 0 : 1;
}

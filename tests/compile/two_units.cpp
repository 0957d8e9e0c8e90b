// SPDX-License-Identifier: Apache-2.0
// Links two units compiled alike, and compares what they compute.
#include <cstdio>
#include <cstring>

#include "unit.hpp"

int main() {
  const Unit first = unit_baseline();
  const Unit second = unit_again();
  std::printf("%s: %.9g and %.9g\n", first.abi, double{first.result}, double{second.result});
  const bool same = std::strcmp(first.abi, second.abi) == 0 && first.result == second.result;
  return same ? 0 : 1;
}

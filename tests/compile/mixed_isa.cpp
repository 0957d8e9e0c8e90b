// SPDX-License-Identifier: Apache-2.0
// Links units compiled for three instruction sets and runs those that this processor has.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "cpu_supports.hpp"
#include "unit.hpp"

namespace {

bool agrees_with_baseline(const Unit& unit) {
  const Unit baseline = unit_baseline();
  std::printf("%s: %.9g, baseline %.9g\n", unit.abi, double{unit.result}, double{baseline.result});
  if (std::strcmp(unit.abi, baseline.abi) == 0) {
    std::printf("the two units share an inline namespace\n");
    return false;
  }
  // The library's promise across backends and instruction sets.
  return std::abs(unit.result - baseline.result) <= 1e-5F * (1 + std::abs(baseline.result));
}

}  // namespace

int main() {
  bool ok = std::isfinite(unit_baseline().result);
  if (cpu_supports("haswell")) {
    ok = agrees_with_baseline(unit_haswell()) && ok;
  } else {
    std::printf("SKIPPED: this processor lacks haswell, so its unit was linked but NOT run\n");
  }
  if (cpu_supports("skylake_avx512")) {
    ok = agrees_with_baseline(unit_skylake_avx512()) && ok;
  } else {
    std::printf("SKIPPED: this processor lacks skylake_avx512, its unit was linked but NOT run\n");
  }
  return ok ? 0 : 1;
}

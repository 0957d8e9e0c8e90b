// SPDX-License-Identifier: Apache-2.0
// Links units compiled for three instruction sets and runs those that this processor has.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "cpu_supports.hpp"
#include "unit.hpp"

namespace {

// 50 numbers are summed, and each may differ by the 1e-5 that the library promises across backends
// and instruction sets: they are of order 1.
bool close(float a, float b) { return std::abs(a - b) <= 50 * 1e-5F; }

bool agrees_with_itself(const Unit& unit) {
  std::printf("%s, Highway %s: exact %.9g and %.9g, sampled %.9g and %.9g\n", unit.abi, unit.target,
              double{unit.exact_scalar}, double{unit.exact_highway}, double{unit.sampled_scalar},
              double{unit.sampled_highway});
  return close(unit.exact_scalar, unit.exact_highway) &&
         close(unit.sampled_scalar, unit.sampled_highway);
}

bool agrees_with_baseline(const char* isa, Unit (*make)()) {
  if (!cpu_supports(isa)) {
    std::printf("SKIPPED: this processor lacks %s, so its unit was linked but NOT run\n", isa);
    return true;
  }
  const Unit baseline = unit_baseline();
  const Unit unit = make();
  if (std::strcmp(unit.abi, baseline.abi) == 0 || std::strcmp(unit.target, baseline.target) == 0) {
    std::printf("%s and the baseline share a namespace or a Highway target\n", isa);
    return false;
  }
  return agrees_with_itself(unit) && close(unit.exact_scalar, baseline.exact_scalar) &&
         close(unit.sampled_scalar, baseline.sampled_scalar);
}

}  // namespace

int main() {
  const bool baseline = agrees_with_itself(unit_baseline());
  const bool haswell = agrees_with_baseline("haswell", unit_haswell);
  const bool skylake = agrees_with_baseline("skylake_avx512", unit_skylake_avx512);
  return baseline && haswell && skylake ? 0 : 1;
}

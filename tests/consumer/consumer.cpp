// SPDX-License-Identifier: Apache-2.0
// A program that uses the library through its installed or vendored headers.
#include <cstdio>
#include <magicpig/attention.hpp>
#if defined(CONSUMER_USES_HIGHWAY)
#include <magicpig/cpu/highway.hpp>
#endif
#if defined(CONSUMER_USES_OPENMP)
#include <magicpig/cpu/openmp.hpp>
#endif

int main() {
#if defined(CONSUMER_USES_HIGHWAY)
  std::printf("Highway target %s\n", magicpig::highway_target());
#endif
#if defined(CONSUMER_USES_OPENMP)
  const auto executor = magicpig::OpenMpExecutor::create(2);
  executor->parallel_for(2, [](int task, int worker) {
    std::printf("OpenMP ran task %d on worker %d\n", task, worker);
  });
#endif
  const auto family = magicpig::SimHash::create({.dim = 64, .bits = 8, .tables = 75, .seed = 1});
  std::printf("magicpig %s: %s\n", MAGICPIG_VERSION_STRING,
              family.ok() ? "a hash family" : family.status().message());
  return family.ok() ? 0 : 1;
}

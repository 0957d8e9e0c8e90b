// SPDX-License-Identifier: Apache-2.0
// A program that uses the library through its installed or vendored headers.
#include <cstdio>
#include <magicpig/attention.hpp>
#if defined(CONSUMER_USES_HIGHWAY)
#include <magicpig/cpu/highway.hpp>
#endif
#if defined(CONSUMER_USES_XSIMD)
#include <magicpig/cpu/xsimd.hpp>
#endif
#if defined(CONSUMER_USES_EIGEN)
#include <magicpig/cpu/eigen.hpp>
#endif
#if defined(CONSUMER_USES_OPENMP)
#include <magicpig/cpu/openmp.hpp>
#endif

namespace {

// The largest of three numbers: enough to know that a backend compiles and runs.
template <class Ops>
[[maybe_unused]] float largest() {
  const float numbers[] = {1.0F, 3.0F, 2.0F};
  return (Ops::max)(numbers, 3);
}

}  // namespace

int main() {
#if defined(CONSUMER_USES_HIGHWAY)
  std::printf("Highway target %s\n", magicpig::highway_target());
#endif
#if defined(CONSUMER_USES_XSIMD)
  std::printf("xsimd: %.0f\n", static_cast<double>(largest<magicpig::XsimdOps>()));
#endif
#if defined(CONSUMER_USES_EIGEN)
  std::printf("Eigen: %.0f\n", static_cast<double>(largest<magicpig::EigenOps>()));
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

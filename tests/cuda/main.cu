// SPDX-License-Identifier: Apache-2.0
// The main function of the CUDA tests: without a device those that need one are left out, loudly.
#define DOCTEST_CONFIG_IMPLEMENT
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <cstdio>

int main(int argc, char** argv) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  doctest::Context context(argc, argv);
  if (error != cudaSuccess || devices == 0) {
    std::printf("CUDA TESTS NOT RUN: no device here (%s); only what the host computes is tested\n",
                cudaGetErrorString(error));
    context.addFilter("test-case-exclude", "device:*");
  }
  return context.run();
}

// SPDX-License-Identifier: Apache-2.0
// A CPU backend: the SIMD operations to use, and the threads to use them on.
#pragma once

#include "magicpig/core/executor.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Pairs operations with an executor that the host owns and that must outlive the backend.
template <VectorOps O, Executor E>
struct CpuBackend {
  using Ops = O;

  E& executor;
};

/// Makes a backend: `make_backend<HighwayOps>(pool)`.
template <VectorOps O, Executor E>
[[nodiscard]] CpuBackend<O, E> make_backend(E& executor) {
  return {executor};
}

}  // namespace magicpig::inline MAGICPIG_ABI

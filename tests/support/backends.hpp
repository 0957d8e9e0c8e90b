// SPDX-License-Identifier: Apache-2.0
// The models of VectorOps, one line each: conformance and decode tests run on all of them.
#pragma once

#include <tuple>

#include "magicpig/cpu/eigen.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/cpu/xsimd.hpp"

#define MAGICPIG_TEST_BACKENDS \
  magicpig::ScalarOps, magicpig::HighwayOps, magicpig::XsimdOps, magicpig::EigenOps

namespace magicpig::test {

using Backends = std::tuple<MAGICPIG_TEST_BACKENDS>;

/// The oracle and one SIMD library, for what instantiates much and depends on a backend no more
/// than the conformance tests tell.
using TwoBackends = std::tuple<ScalarOps, HighwayOps>;

/// function.operator()<Ops>() for each of them.
template <class Function>
void for_each_backend(const Function& function) {
  [&]<class... Ops>(const std::tuple<Ops...>*) {
    (function.template operator()<Ops>(), ...);
  }(static_cast<const Backends*>(nullptr));
}

}  // namespace magicpig::test

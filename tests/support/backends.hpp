// SPDX-License-Identifier: Apache-2.0
// The backends that the decode tests run on: one line each.
#pragma once

#include <tuple>

#include "magicpig/cpu/highway.hpp"
#include "magicpig/cpu/scalar.hpp"

namespace magicpig::test {

using Backends = std::tuple<  //
    ScalarOps,                //
    HighwayOps                //
    >;

}  // namespace magicpig::test

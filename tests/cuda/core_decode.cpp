// SPDX-License-Identifier: Apache-2.0
#include "core_decode.hpp"

namespace magicpig::test {

std::vector<float> core_decode_by_host_compiler() { return core_decode(); }

}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// One translation unit with every public header; compiled several times, with other flags and
// another function name.
#include "unit.hpp"

#include "all_headers.hpp"

Unit MAGICPIG_TEST_UNIT() { return {.abi = MAGICPIG_STRINGIFY(MAGICPIG_ABI), .result = 1.0F}; }

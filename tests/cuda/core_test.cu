// SPDX-License-Identifier: Apache-2.0
// The core in a file that nvcc compiles: what its front end hands to the host's compiler does what
// the source says. It has not always: in templates nvcc 13.0 passes the members of a designated
// list on by place where the list is assigned or follows a type, x = {.a = .., .c = ..} and T{.a =
// .., .c = ..}, so that the library has no such list with a member left out before the last one
// named.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>

#include "core_decode.hpp"

namespace magicpig::test {
namespace {

TEST_CASE("a decode step of the core is the same in a file of nvcc's and of the host's compiler") {
  const auto own = core_decode();
  const auto expected = core_decode_by_host_compiler();
  REQUIRE(expected.size() == 3 * 16 * 67);
  REQUIRE(own.size() == expected.size());
  double worst = 0.0;
  for (std::size_t i = 0; i < own.size(); ++i) {
    const double off = std::abs(static_cast<double>(own[i]) - static_cast<double>(expected[i])) /
                       (1.0 + std::abs(static_cast<double>(expected[i])));
    worst = off <= worst ? worst : off;
  }
  CHECK(worst <= 1e-6);
}

}  // namespace
}  // namespace magicpig::test

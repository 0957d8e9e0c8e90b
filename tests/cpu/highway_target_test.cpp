// SPDX-License-Identifier: Apache-2.0
// Which of Highway's targets the operations are compiled for: Highway falls back to a lesser one
// without a word.
#include <doctest/doctest.h>

#include <string_view>

#include "magicpig/cpu/highway.hpp"

namespace {

TEST_CASE("HighwayOps.are_compiled_for_the_target_that_the_flags_allow") {
  const std::string_view target = magicpig::highway_target();
  CAPTURE(target);
#if defined(__aarch64__) && !defined(__ARM_FEATURE_SVE)
  CHECK(target.starts_with("NEON"));
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512CD__) && defined(__AVX512VL__)
  CHECK(target.starts_with("AVX3"));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__BMI2__) && defined(__F16C__)
  CHECK(target == "AVX2");
#else
  MESSAGE("no flags of which this test knows the target, so it is not checked: " << target);
#endif
}

}  // namespace

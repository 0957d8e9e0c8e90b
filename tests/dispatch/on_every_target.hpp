// SPDX-License-Identifier: Apache-2.0
// Runs a check on each target of Highway that was compiled and that this processor has.
#pragma once

#include <doctest/doctest.h>
#include <hwy/targets.h>

#include <cstdint>
#include <string>
#include <vector>

namespace magicpig::test {

/// Lets SupportedTargets() decide, as in any program.
inline void choose_by_processor() {
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

/// Calls check() once for each target, while that is the one chosen.
template <class Check>
void on_every_target(const Check& check) {
  choose_by_processor();
  const std::vector<std::int64_t> targets = hwy::SupportedAndGeneratedTargets();
  for (const std::int64_t target : targets) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    const std::string name = hwy::TargetName(target);
    CAPTURE(name);
    check();
  }
  choose_by_processor();
  REQUIRE(!targets.empty());
}

}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// Counts what this program allocates, and lets the non-throwing operator new fail on demand.
#pragma once

#include <cstdint>

namespace magicpig::test {

/// Calls of any operator new so far, on all threads; also of malloc where the linker can wrap it.
/// Defined in attention/allocation_test.cpp.
[[nodiscard]] std::int64_t allocation_count();

/// What any operator new gave and no operator delete has taken back, on all threads.
[[nodiscard]] std::int64_t outstanding_allocations();

/// From now on the non-throwing operator new succeeds `successes` times on this thread and then
/// fails; negative: never fails. Other threads are not affected.
void fail_allocations_after(std::int64_t successes);

}  // namespace magicpig::test

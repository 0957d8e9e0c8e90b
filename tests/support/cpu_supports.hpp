// SPDX-License-Identifier: Apache-2.0
// Asks the processor at run time whether it has an instruction set that tests are compiled for.
#pragma once

#include <string_view>

/// Whether this processor runs code compiled for `isa`: baseline, haswell or skylake_avx512; false
/// for others.
inline bool cpu_supports(std::string_view isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  // Compilers differ in the names they take here; no processor has these without the rest of its
  // generation.
  const bool haswell = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  if (isa == "haswell") return haswell;
  if (isa == "skylake_avx512") {
    return haswell && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("aes");
  }
#endif
  return false;
}

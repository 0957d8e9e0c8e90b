// SPDX-License-Identifier: Apache-2.0
// Operations through Google Highway, for the instruction set that this file is compiled for.
#pragma once

#include "magicpig/cpu/highway-inl.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The operations for the best target that the compiler flags allow, chosen at compile time;
/// nothing to link. Highway 1.0.3 knows nothing between SSSE3 and no SIMD at all, takes
/// -march=x86-64-v3 and -v4 for SSSE3 unless HWY_DISABLE_PCLMUL_AES is defined (or -maes -mpclmul
/// given), and asks for HWY_WANT_AVX3_DL where the flags name every extension of Ice Lake:
/// highway_target() tells which it is.
using HighwayOps = HWY_NAMESPACE::HighwayOps;

/// Name of the target in use, "AVX3" for example.
[[nodiscard]] inline const char* highway_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace magicpig::inline MAGICPIG_ABI

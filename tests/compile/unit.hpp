// SPDX-License-Identifier: Apache-2.0
// What the translation units of the compile checks offer: plain types, for the library's own may
// not cross.
#pragma once

struct Unit {
  const char* abi;     ///< Name of the inline namespace in that unit.
  const char* target;  ///< Highway's target in that unit.
  float exact_scalar;  ///< lse plus sum of the output, the same small problem in every unit.
  float exact_highway;
  float sampled_scalar;
  float sampled_highway;
};

Unit unit_baseline();
Unit unit_again();
Unit unit_haswell();
Unit unit_skylake_avx512();

// SPDX-License-Identifier: Apache-2.0
// What the translation units of the compile checks offer: plain types, for the library's own may
// not cross.
#pragma once

struct Unit {
  const char* abi;  ///< Name of the inline namespace in that unit.
  float result;     ///< Of the same small problem in every unit.
};

Unit unit_baseline();
Unit unit_again();
Unit unit_haswell();
Unit unit_skylake_avx512();

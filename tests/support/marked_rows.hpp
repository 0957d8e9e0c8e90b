// SPDX-License-Identifier: Apache-2.0
// Rows whose first scalar tells where they belong, for tests of where sources look.
#pragma once

#include <cstdint>

#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"

namespace magicpig::test {

/// A number of its own for each (key or value, KV head, token); exact in float32.
[[nodiscard]] inline float mark(bool value, int kv_head, TokenId token) {
  return static_cast<float>((value ? 1 << 20 : 0) + (kv_head << 14) + token);
}

/// Rows of a source of float keys and values whose first or last scalar is not the mark of token
/// `first` + t.
template <KeyValueSource Source>
[[nodiscard]] int wrong_rows(const Source& source, TokenId first = 0) {
  int wrong = 0;
  for (int h = 0; h < source.kv_heads(); ++h) {
    for (TokenId t = 0; t < source.tokens(); ++t) {
      const auto* key = source.key(h, t);
      const auto* value = source.value(h, t);
      wrong += key[0] != mark(false, h, first + t);
      wrong += key[source.head_dim() - 1] != mark(false, h, first + t);
      wrong += value[0] != mark(true, h, first + t);
      wrong += value[source.value_dim() - 1] != mark(true, h, first + t);
    }
  }
  return wrong;
}

/// Writes a marked row of `dim` scalars.
inline void put_mark(float* row, int dim, float number) {
  for (int j = 0; j < dim; ++j) row[j] = number;
}

}  // namespace magicpig::test

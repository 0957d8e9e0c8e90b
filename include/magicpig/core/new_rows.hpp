// SPDX-License-Identifier: Apache-2.0
// Keys and values of new tokens as they are written, before or without the cache they go to.
#pragma once

#include "magicpig/core/mapped_rows.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Where NewRows finds its rows.
struct NewRowsPlace {
  TokenId first = 0;

  [[nodiscard]] static int kv_head(int kv_head) { return kv_head; }
  [[nodiscard]] TokenId token(TokenId token) const { return token - first; }
};

/// `rows` as tokens [first, first + rows.tokens()) of a request: what an index appends from while
/// the rows are in a core's caches, wherever they are copied to. Token t is row t - first; older
/// tokens are not there, and an index that would read one refuses. `first` is at least 0.
///
/// One token of all KV heads, [kv_heads, dim]: NewRows(*StridedKeyValues<bf16>::token_major(keys,
/// values, shape, 1), token).
template <KeyValueSource SourceType>
class NewRows : public MappedRows<SourceType, NewRowsPlace> {
 public:
  NewRows(const SourceType& rows, TokenId first)
      : MappedRows<SourceType, NewRowsPlace>(rows, NewRowsPlace{first}) {}

  [[nodiscard]] TokenId first_token() const { return this->place().first; }
  [[nodiscard]] TokenId tokens() const { return first_token() + this->source().tokens(); }
  [[nodiscard]] int kv_heads() const { return this->source().kv_heads(); }
};

}  // namespace magicpig::inline MAGICPIG_ABI

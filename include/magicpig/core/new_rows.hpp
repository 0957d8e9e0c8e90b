// SPDX-License-Identifier: Apache-2.0
// Keys and values of new tokens as they are written, before or without the cache they go to.
#pragma once

#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// `rows` as tokens [first, first + rows.tokens()) of a request: what an index appends from while
/// the rows are in a core's caches, wherever they are copied to. Token t is row t - first; older
/// tokens are not there, and an index that would read one refuses. `first` is at least 0.
///
/// One token of all KV heads, [kv_heads, dim]: NewRows(*StridedKeyValues<bf16>::token_major(keys,
/// values, shape, 1), token).
template <KeyValueSource SourceType>
class NewRows {
 public:
  using KeyScalar = typename SourceType::KeyScalar;
  using ValueScalar = typename SourceType::ValueScalar;

  NewRows(const SourceType& rows, TokenId first) : rows_(rows), first_(first) {}

  [[nodiscard]] TokenId first_token() const { return first_; }
  [[nodiscard]] TokenId tokens() const { return first_ + rows_.tokens(); }
  [[nodiscard]] int kv_heads() const { return rows_.kv_heads(); }
  [[nodiscard]] int head_dim() const { return rows_.head_dim(); }
  [[nodiscard]] int value_dim() const { return rows_.value_dim(); }
  [[nodiscard]] const KeyScalar* key(int kv_head,
                                     TokenId token) const requires AddressableKeys<SourceType> {
    return rows_.key(kv_head, token - first_);
  }
  [[nodiscard]] const ValueScalar* value(int kv_head, TokenId token) const requires
      AddressableValues<SourceType> {
    return rows_.value(kv_head, token - first_);
  }
  void read_key(int kv_head, TokenId token, KeyScalar* to) const
      requires(!AddressableKeys<SourceType>) {
    rows_.read_key(kv_head, token - first_, to);
  }
  void read_value(int kv_head, TokenId token, ValueScalar* to) const
      requires(!AddressableValues<SourceType>) {
    rows_.read_value(kv_head, token - first_, to);
  }

 private:
  SourceType rows_;
  TokenId first_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

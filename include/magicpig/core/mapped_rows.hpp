// SPDX-License-Identifier: Apache-2.0
// A source whose rows are those of another, elsewhere.
#pragma once

#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The rows of `source`, a copy that refers to the same memory: that of token t and KV head h is
/// its row of token place.token(t) and KV head place.kv_head(h). What is derived from it says how
/// many tokens and KV heads there are.
template <KeyValueSource SourceType, class Place>
class MappedRows {
 public:
  using KeyScalar = typename SourceType::KeyScalar;
  using ValueScalar = typename SourceType::ValueScalar;

  MappedRows(const SourceType& source, const Place& place) : source_(source), place_(place) {}

  [[nodiscard]] int head_dim() const { return source_.head_dim(); }
  [[nodiscard]] int value_dim() const { return source_.value_dim(); }
  [[nodiscard]] const KeyScalar* key(int kv_head,
                                     TokenId token) const requires AddressableKeys<SourceType> {
    return source_.key(place_.kv_head(kv_head), place_.token(token));
  }
  [[nodiscard]] const ValueScalar* value(int kv_head, TokenId token) const requires
      AddressableValues<SourceType> {
    return source_.value(place_.kv_head(kv_head), place_.token(token));
  }
  void read_key(int kv_head, TokenId token, KeyScalar* to) const
      requires(!AddressableKeys<SourceType>) {
    source_.read_key(place_.kv_head(kv_head), place_.token(token), to);
  }
  void read_value(int kv_head, TokenId token, ValueScalar* to) const
      requires(!AddressableValues<SourceType>) {
    source_.read_value(place_.kv_head(kv_head), place_.token(token), to);
  }

 protected:
  [[nodiscard]] const SourceType& source() const { return source_; }
  [[nodiscard]] const Place& place() const { return place_; }

 private:
  SourceType source_;
  Place place_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

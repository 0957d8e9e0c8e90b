// SPDX-License-Identifier: Apache-2.0
// One KV head of keys and values, as a source of its own.
#pragma once

#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// KV head `kv_head` of `source` as KV head 0 of one. A copy of the source, which refers to the
/// same memory. `kv_head` lies in [0, source.kv_heads()).
template <KeyValueSource Source>
class OneHead {
 public:
  using KeyScalar = typename Source::KeyScalar;
  using ValueScalar = typename Source::ValueScalar;

  OneHead(const Source& source, int kv_head) : source_(source), kv_head_(kv_head) {}

  [[nodiscard]] TokenId tokens() const { return source_.tokens(); }
  [[nodiscard]] static constexpr int kv_heads() { return 1; }
  [[nodiscard]] int head_dim() const { return source_.head_dim(); }
  [[nodiscard]] int value_dim() const { return source_.value_dim(); }
  [[nodiscard]] const KeyScalar* key(int, TokenId token) const requires AddressableKeys<Source> {
    return source_.key(kv_head_, token);
  }
  [[nodiscard]] const ValueScalar* value(int,
                                         TokenId token) const requires AddressableValues<Source> {
    return source_.value(kv_head_, token);
  }
  void read_key(int, TokenId token, KeyScalar* to) const requires(!AddressableKeys<Source>) {
    source_.read_key(kv_head_, token, to);
  }
  void read_value(int, TokenId token, ValueScalar* to) const requires(!AddressableValues<Source>) {
    source_.read_value(kv_head_, token, to);
  }

 private:
  Source source_;
  int kv_head_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// One KV head of keys and values, as a source of its own.
#pragma once

#include "magicpig/core/mapped_rows.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Where OneHead finds its rows.
struct OneHeadPlace {
  int number = 0;

  [[nodiscard]] int kv_head(int) const { return number; }
  [[nodiscard]] static TokenId token(TokenId token) { return token; }
};

/// KV head `kv_head` of `source` as KV head 0 of one. A copy of the source, which refers to the
/// same memory. `kv_head` lies in [0, source.kv_heads()).
template <KeyValueSource Source>
class OneHead : public MappedRows<Source, OneHeadPlace> {
 public:
  OneHead(const Source& source, int kv_head)
      : MappedRows<Source, OneHeadPlace>(source, OneHeadPlace{kv_head}) {}

  [[nodiscard]] TokenId tokens() const { return this->source().tokens(); }
  [[nodiscard]] static constexpr int kv_heads() { return 1; }
};

}  // namespace magicpig::inline MAGICPIG_ABI

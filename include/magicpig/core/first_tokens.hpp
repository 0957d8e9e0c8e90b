// SPDX-License-Identifier: Apache-2.0
// The first tokens of keys and values, as a source of its own.
#pragma once

#include "magicpig/core/mapped_rows.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Where FirstTokens finds its rows: where they are.
struct SamePlace {
  [[nodiscard]] static int kv_head(int kv_head) { return kv_head; }
  [[nodiscard]] static TokenId token(TokenId token) { return token; }
};

/// Tokens [0, tokens) of `source`, at most those that it has: what an earlier query sees. A copy of
/// the source, which refers to the same memory. `tokens` is at least 0.
template <KeyValueSource SourceType>
class FirstTokens : public MappedRows<SourceType, SamePlace> {
 public:
  FirstTokens(const SourceType& source, TokenId tokens)
      : MappedRows<SourceType, SamePlace>(source, SamePlace{}),
        tokens_(tokens < source.tokens() ? tokens : source.tokens()) {}

  [[nodiscard]] TokenId tokens() const { return tokens_; }
  [[nodiscard]] int kv_heads() const { return this->source().kv_heads(); }

 private:
  TokenId tokens_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

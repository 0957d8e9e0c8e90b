// SPDX-License-Identifier: Apache-2.0
// Keys that were hashed elsewhere, on a device for one: what bucket tables are made of without
// them.
#pragma once

#include <cmath>
#include <cstdint>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A view of the hashes of the keys k of `tokens`, all arrays dense. The codes are those that the
/// index's family has for k - c, which nobody can check: of other codes, or of others than the
/// queries', estimates are biased.
struct HashedKeys {
  TokenRange tokens;
  const Code* codes = nullptr;   ///< [kv_heads, L, tokens], each below 2^K
  const float* norms = nullptr;  ///< |k - c|, [kv_heads, tokens]
  Centres centres = {};          ///< c, no values; only build() looks at them
};

/// The first of `count` numbers that is not good, or `count`.
template <class T, class Good>
[[nodiscard]] TokenId first_not_good(const T* row, TokenId count, const Good& good) {
  // Without a branch, so that compilers vectorise it.
  bool all = true;
  for (TokenId i = 0; i < count; ++i) all &= good(row[i]);
  if (all) return count;
  TokenId first = 0;
  while (good(row[first])) ++first;
  return first;
}

/// The part of check_hashed_keys() that is about numbers, of at least one token.
template <class Backend, HashFamily Family>
[[nodiscard]] Status check_hashes(const Backend& backend, const HashedKeys& keys, int kv_heads,
                                  const Family& family) noexcept {
  const TokenRange tokens = keys.tokens;
  const std::int64_t count = tokens.size();
  const KeyPlace norm = first_place(backend, kv_heads, [&](int h, int) {
    const TokenId bad = first_not_good(keys.norms + h * count, tokens.size(),
                                       [](float x) { return std::isfinite(x) && x >= 0.0F; });
    return bad < tokens.size() ? tokens.begin + bad : -1;
  });
  if (norm.token >= 0) {
    const float x = keys.norms[norm.kv_head * count + (norm.token - tokens.begin)];
    return Status::error(std::isfinite(x) ? ErrorCode::kInvalidArgument : ErrorCode::kNonFinite,
                         "the norm %g of token %d, KV head %d must be finite and not negative",
                         static_cast<double>(x), norm.token, norm.kv_head);
  }
  const int buckets = bucket_count(family.bits());
  const int tables = family.tables();
  const KeyPlace code = first_place(backend, kv_heads, [&](int h, int) {
    TokenId first = tokens.size();
    for (std::int64_t row = std::int64_t{h} * tables; row < std::int64_t{h + 1} * tables; ++row) {
      first = first_not_good(keys.codes + row * count, first, [&](Code x) { return x < buckets; });
    }
    return first < tokens.size() ? tokens.begin + first : -1;
  });
  if (code.token < 0) return Status();
  return Status::error(ErrorCode::kInvalidArgument,
                       "a code of token %d, KV head %d is not below the %d buckets of a table",
                       code.token, code.kv_head, buckets);
}

/// Errors: a range as check_range(), null pointers, a backend without workers, a norm that is
/// negative or not finite, a code that is no bucket of the family. Of an empty range the rest is
/// not looked at, nor are the centres of any. Cost: one pass over codes and norms.
template <class Backend, HashFamily Family>
[[nodiscard]] Status check_hashed_keys(const Backend& backend, const HashedKeys& keys, int kv_heads,
                                       const Family& family) noexcept {
  Status status = check_range(keys.tokens);
  if (!status.ok() || keys.tokens.empty()) return status;
  if (keys.codes == nullptr || keys.norms == nullptr) {
    return Status::error(ErrorCode::kInvalidArgument, "hashed keys [%d, %d) have no %s",
                         keys.tokens.begin, keys.tokens.end,
                         keys.codes == nullptr ? "codes" : "norms");
  }
  status = check_workers(backend);
  return status.ok() ? check_hashes(backend, keys, kv_heads, family) : status;
}

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// What every index refuses before it looks at a key.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Error: kv_heads outside [1, 2^24), what a (token, KV head) pair in 64 bits has room for.
[[nodiscard]] inline Status check_kv_heads(int kv_heads) noexcept {
  if (kv_heads >= 1 && kv_heads < 1 << 24) return Status();
  return Status::error(ErrorCode::kInvalidArgument, "kv_heads %d must lie in [1, 2^24)", kv_heads);
}

/// Error: truncating to a negative number of tokens.
[[nodiscard]] inline Status check_truncation(TokenId end) noexcept {
  if (end >= 0) return Status();
  return Status::error(ErrorCode::kInvalidArgument, "cannot truncate to %d tokens", end);
}

/// Error: a token outside what is indexed.
[[nodiscard]] inline Status check_erasure(std::span<const TokenId> tokens,
                                          TokenRange indexed) noexcept {
  for (const TokenId token : tokens) {
    if (indexed.contains(token)) continue;
    return Status::error(ErrorCode::kInvalidArgument,
                         "cannot erase token %d of an index of [%d, %d)", token, indexed.begin,
                         indexed.end);
  }
  return Status();
}

/// Error: a range to be rehashed that is no range, or not indexed.
[[nodiscard]] inline Status check_rehash(TokenRange range, TokenRange indexed) noexcept {
  if (range.begin >= indexed.begin && range.begin <= range.end && range.end <= indexed.end) {
    return Status();
  }
  return Status::error(ErrorCode::kInvalidArgument,
                       "cannot rehash [%d, %d) of an index of [%d, %d)", range.begin, range.end,
                       indexed.begin, indexed.end);
}

/// Error: a range that begins below 0 or ends before it begins.
[[nodiscard]] inline Status check_range(TokenRange range) noexcept {
  if (range.begin >= 0 && range.end >= range.begin) return Status();
  return Status::error(ErrorCode::kInvalidArgument, "range [%d, %d) is not a range of tokens",
                       range.begin, range.end);
}

/// Errors: other KV heads or another dimension than the index has, fewer than `end` tokens.
template <KeyValueSource Source>
[[nodiscard]] Status check_source(const Source& source, int kv_heads, int dim,
                                  TokenId end) noexcept {
  if (source.kv_heads() != kv_heads || source.head_dim() != dim) {
    return Status::error(ErrorCode::kShapeMismatch,
                         "source has %d KV heads of dimension %d, the index %d of %d",
                         source.kv_heads(), source.head_dim(), kv_heads, dim);
  }
  if (end > source.tokens()) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "cannot index up to token %d of a cache of %d tokens", end,
                         source.tokens());
  }
  return Status();
}

/// Error: a source without the rows of `range`, which begins before its first_token(), if it has
/// one: NewRows, whose older tokens are elsewhere.
template <KeyValueSource Source>
[[nodiscard]] Status check_rows(const Source& source, TokenRange range) noexcept {
  if constexpr (requires { source.first_token(); }) {
    const TokenId first = source.first_token();
    if (!range.empty() && range.begin < first) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "cannot read token %d of rows that begin at token %d", range.begin,
                           first);
    }
  }
  return Status();
}

/// Error: a backend without workers.
template <class Backend>
[[nodiscard]] Status check_workers(const Backend& backend) noexcept {
  const int workers = backend.executor.workers();
  if (workers >= 1) return Status();
  return Status::error(ErrorCode::kInvalidArgument, "workers %d must be at least 1", workers);
}

/// A key of a cache; no key at all where `token` is negative.
struct KeyPlace {
  TokenId token = -1;
  int kv_head = 0;
};

/// The first of the tokens, and of its KV heads, that find(kv_head, worker) returns on the
/// backend's workers; a negative one is none.
template <class Backend, class Find>
[[nodiscard]] KeyPlace first_place(const Backend& backend, int kv_heads,
                                   const Find& find) noexcept {
  std::atomic<std::int64_t> first{INT64_MAX};  // (token, head)
  backend.executor.parallel_for(kv_heads, [&](int h, int worker) {
    const TokenId token = find(h, worker);
    if (token < 0) return;
    const std::int64_t here = (std::int64_t{token} << 24) | h;
    for (std::int64_t seen = first.load(); here < seen && !first.compare_exchange_weak(seen, here);)
      ;
  });
  if (first.load() == INT64_MAX) return {};
  return {.token = static_cast<TokenId>(first.load() >> 24),
          .kv_head = static_cast<int>(first.load() & ((1 << 24) - 1))};
}

/// The first of `tokens`, and of its KV heads, whose key has a coordinate that is not a number or
/// beyond `limit` in magnitude.
template <class Backend, KeyValueSource Source>
[[nodiscard]] KeyPlace first_key_beyond(const Backend& backend, KeyReader<Source>& keys,
                                        TokenRange tokens, float limit) noexcept {
  return first_place(backend, keys.source().kv_heads(), [&](int h, int worker) {
    for (TokenId t = tokens.begin; t < tokens.end; ++t) {
      const auto* key = keys.row(h, t, worker);
      bool fits = true;
      for (int j = 0; j < keys.dim(); ++j) fits &= std::fabs(scalar_at(key, j)) <= limit;
      if (!fits) return t;
    }
    return TokenId{-1};
  });
}

/// Error: a key that is not finite.
template <class Backend, KeyValueSource Source>
[[nodiscard]] Status check_finite_keys(const Backend& backend, KeyReader<Source>& keys,
                                       TokenRange tokens) noexcept {
  const KeyPlace bad = first_key_beyond(backend, keys, tokens, (std::numeric_limits<float>::max)());
  if (bad.token < 0) return Status();
  return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                       bad.token, bad.kv_head);
}

}  // namespace magicpig::inline MAGICPIG_ABI

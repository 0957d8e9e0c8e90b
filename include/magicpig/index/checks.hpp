// SPDX-License-Identifier: Apache-2.0
// What every index refuses before it looks at a key.
#pragma once

#include "magicpig/core/error.hpp"
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

}  // namespace magicpig::inline MAGICPIG_ABI

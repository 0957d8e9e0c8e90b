// SPDX-License-Identifier: Apache-2.0
// Which tokens of a cache a query sees.
#pragma once

#include <bit>
#include <cstdint>

#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Words of a bit set over `tokens` tokens.
[[nodiscard]] constexpr std::int64_t mask_words(TokenId tokens) {
  return (std::int64_t{tokens} + 63) / 64;
}

/// The tokens of `visible` whose bit is not set: token t has bit t % 64 of word t / 64.
struct TokenMask {
  TokenRange visible;
  const std::uint64_t* hidden = nullptr;  ///< [mask_words(visible.end)], or null: none is hidden

  [[nodiscard]] bool sees(TokenId token) const {
    return visible.contains(token) &&
           (hidden == nullptr || ((hidden[token / 64] >> (token % 64)) & 1U) == 0);
  }
  /// Whether all tokens of `range` are seen without a look at any of them.
  [[nodiscard]] bool sees_all(TokenRange range) const {
    return hidden == nullptr && range.begin >= visible.begin && range.end <= visible.end;
  }
  /// The part of `range` that lies in `visible`.
  [[nodiscard]] TokenRange clip(TokenRange range) const {
    const TokenId begin = range.begin > visible.begin ? range.begin : visible.begin;
    const TokenId end = range.end < visible.end ? range.end : visible.end;
    return {.begin = begin, .end = end > begin ? end : begin};
  }
  /// Tokens of `range` that are seen.
  [[nodiscard]] TokenId count(TokenRange range) const {
    const TokenRange part = clip(range);
    TokenId seen = part.size();
    if (hidden == nullptr || part.empty()) return seen;
    for (TokenId word = part.begin / 64; word <= (part.end - 1) / 64; ++word) {
      std::uint64_t bits = hidden[word];
      if (word == part.begin / 64) bits &= ~std::uint64_t{0} << (part.begin % 64);
      if (word == (part.end - 1) / 64) bits &= ~std::uint64_t{0} >> (63 - (part.end - 1) % 64);
      seen -= std::popcount(bits);
    }
    return seen;
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

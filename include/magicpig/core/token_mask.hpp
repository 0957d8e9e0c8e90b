// SPDX-License-Identifier: Apache-2.0
// Tokens that a query does not see: erased ones, hidden ones, and those outside a window.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Words of a bit set over `tokens` tokens.
[[nodiscard]] constexpr std::int64_t mask_words(TokenId tokens) {
  return (std::int64_t{tokens} + 63) / 64;
}

/// A view of a bit set over tokens: token t has bit t % 64 of word t / 64. Tokens that it has no
/// words for are not in it.
struct TokenWords {
  const std::uint64_t* words = nullptr;  ///< null for none
  TokenId count = 0;                     ///< of words

  [[nodiscard]] bool has(TokenId token) const {
    return token / 64 < count && (words[token / 64] >> (token % 64) & 1U) != 0;
  }
  /// Those of tokens [first, first + 64), `first` in the lowest bit.
  [[nodiscard]] std::uint64_t bits(TokenId first) const {
    const TokenId word = first / 64;
    const int shift = first % 64;
    const std::uint64_t low = word < count ? words[word] >> shift : 0;
    return shift != 0 && word + 1 < count ? low | words[word + 1] << (64 - shift) : low;
  }
};

/// Which tokens are gone for a query, neither drawn nor attended to: what its index has erased,
/// what its request hides, and what lies outside `seen`. Nothing, if left as it is.
struct TokenMask {
  TokenWords erased = {};
  TokenWords hidden = {};
  TokenRange seen = {.begin = 0, .end = kEnd};

  static constexpr TokenId kEnd = (std::numeric_limits<TokenId>::max)();

  /// Whether anything may be gone.
  [[nodiscard]] bool any() const {
    return erased.words != nullptr || hidden.words != nullptr || seen.begin > 0 || seen.end < kEnd;
  }
  [[nodiscard]] bool has(TokenId token) const {
    return !seen.contains(token) || erased.has(token) || hidden.has(token);
  }
  /// Those of tokens [first, first + 64), `first` in the lowest bit.
  [[nodiscard]] std::uint64_t bits(TokenId first) const {
    return erased.bits(first) | hidden.bits(first) | below(seen.begin, first) |
           ~below(seen.end, first);
  }
  /// The part of `range` that lies in `seen`.
  [[nodiscard]] TokenRange clip(TokenRange range) const {
    const TokenId begin = range.begin > seen.begin ? range.begin : seen.begin;
    const TokenId end = range.end < seen.end ? range.end : seen.end;
    return {.begin = begin, .end = end > begin ? end : begin};
  }
  /// How many tokens of a range are gone.
  [[nodiscard]] TokenId count(TokenRange range) const {
    if (!any()) return 0;
    const TokenRange inside = clip(range);
    TokenId sum = range.size() - inside.size();
    for (std::int64_t t = inside.begin; t < inside.end; t += 64) {
      const auto first = static_cast<TokenId>(t);
      sum += std::popcount((erased.bits(first) | hidden.bits(first)) & below(inside.end, first));
    }
    return sum;
  }
  /// And how many are not.
  [[nodiscard]] TokenId present(TokenRange range) const { return range.size() - count(range); }

 private:
  // Of tokens [first, first + 64) those before `end`.
  [[nodiscard]] static std::uint64_t below(TokenId end, TokenId first) {
    if (end <= first) return 0;
    return end - first < 64 ? (std::uint64_t{1} << (end - first)) - 1 : ~std::uint64_t{0};
  }
};

/// The tokens of an index that were erased. Memory: one bit per token of the cache up to the last
/// one, and none before the first is erased.
class TokenBits {
 public:
  [[nodiscard]] TokenMask view() const {
    if (count_ == 0) return {};
    return {.erased = {.words = words_.data(), .count = static_cast<TokenId>(words_.size())}};
  }
  /// Tokens that are in.
  [[nodiscard]] TokenId count() const { return count_; }
  [[nodiscard]] std::size_t bytes() const { return words_.bytes(); }

  /// Adds tokens, all of them below `end`. False when memory is short, and then nothing has
  /// changed.
  [[nodiscard]] bool add(std::span<const TokenId> tokens, TokenId end) noexcept {
    const std::size_t needed = static_cast<std::size_t>(end) / 64 + 1;
    const std::size_t had = words_.size();
    if (had < needed) {
      const bool growing = had != 0 && needed * sizeof(std::uint64_t) > words_.bytes();
      if (!words_.reserve(growing ? needed + needed / 2 : needed) || !words_.resize(needed)) {
        return false;
      }
      std::memset(words_.data() + had, 0, (needed - had) * sizeof(std::uint64_t));
    }
    for (const TokenId token : tokens) {
      std::uint64_t& word = words_.data()[token / 64];
      const std::uint64_t bit = std::uint64_t{1} << (token % 64);
      count_ += (word & bit) == 0 ? 1 : 0;
      word |= bit;
    }
    return true;
  }

  /// Takes out the tokens from `end` on; without any left, the memory is given back.
  void truncate(TokenId end) noexcept {
    if (count_ == 0) return;
    const std::size_t word = static_cast<std::size_t>(end) / 64;
    if (word < words_.size()) {
      words_.data()[word] &= (std::uint64_t{1} << (end % 64)) - 1;
      (void)words_.resize(word + 1);
    }
    count_ = view().count({.begin = 0, .end = end});
    if (count_ == 0) words_ = Buffer<std::uint64_t>();
  }

  /// All words; none before the first token.
  [[nodiscard]] std::span<const std::uint64_t> words() const {
    return count_ > 0 ? words_.span() : std::span<const std::uint64_t>();
  }
  /// Becomes the set of these words. False when memory is short, and then nothing has changed.
  [[nodiscard]] bool assign(std::span<const std::uint64_t> words) noexcept {
    if (!words_.resize(words.size())) return false;
    count_ = 0;
    for (std::size_t i = 0; i < words.size(); ++i) {
      words_.data()[i] = words[i];
      count_ += std::popcount(words[i]);
    }
    return true;
  }

  /// Becomes what `other` is. False when memory is short, and then nothing has changed.
  [[nodiscard]] bool assign(const TokenBits& other) noexcept {
    if (!words_.resize(other.words_.size())) return false;
    if (words_.size() != 0) std::memcpy(words_.data(), other.words_.data(), words_.size() * 8);
    count_ = other.count_;
    return true;
  }

 private:
  Buffer<std::uint64_t> words_;
  TokenId count_ = 0;
};

/// The tokens of an index that are not to be drawn or attended to: what its erased() says, where it
/// has one.
template <class Index>
[[nodiscard]] TokenMask erased_of(const Index& index) {
  if constexpr (requires { index.erased(); }) {
    return index.erased();
  } else {
    return {};
  }
}

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Tokens that are not there any more: one bit each, by their place in the cache.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A view of bits by token: one that is set says that the token is not there, neither drawn nor
/// attended to. Tokens that the view has no words for are there; a view without words hides none.
struct TokenMask {
  const std::uint64_t* words = nullptr;  ///< bit t % 64 of words[t / 64]; null for none
  TokenId word_count = 0;

  /// Whether it may hide anything.
  [[nodiscard]] bool any() const { return words != nullptr; }

  [[nodiscard]] bool has(TokenId token) const {
    return token / 64 < word_count && (words[token / 64] >> (token % 64) & 1U) != 0;
  }
  /// Those of tokens [first, first + 64), `first` in the lowest bit.
  [[nodiscard]] std::uint64_t bits(TokenId first) const {
    const TokenId word = first / 64;
    const int shift = first % 64;
    const std::uint64_t low = word < word_count ? words[word] >> shift : 0;
    return shift != 0 && word + 1 < word_count ? low | words[word + 1] << (64 - shift) : low;
  }
  /// How many of the tokens of a range are hidden.
  [[nodiscard]] TokenId count(TokenRange range) const {
    TokenId sum = 0;
    if (!any()) return sum;
    for (std::int64_t t = range.begin; t < range.end && t / 64 < word_count; t += 64) {
      const std::int64_t left = range.end - t;
      const std::uint64_t own = left < 64 ? (std::uint64_t{1} << left) - 1 : ~std::uint64_t{0};
      sum += std::popcount(bits(static_cast<TokenId>(t)) & own);
    }
    return sum;
  }
  /// And how many are not.
  [[nodiscard]] TokenId present(TokenRange range) const { return range.size() - count(range); }
};

/// The tokens of an index that were erased. Memory: one bit per token of the cache up to the last
/// one, and none before the first is erased.
class TokenBits {
 public:
  [[nodiscard]] TokenMask view() const {
    return {.words = count_ > 0 ? words_.data() : nullptr,
            .word_count = count_ > 0 ? static_cast<TokenId>(words_.size()) : 0};
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

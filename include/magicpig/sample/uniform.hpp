// SPDX-License-Identifier: Apache-2.0
// Uniform sampling without replacement: every indexed token with the same, known probability.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A set of the tokens of a range, and uniform picks for it: always among the tokens that are not
/// in yet, all of those equally likely.
class TokenSet {
 public:
  struct Scratch {
    std::uint64_t* words = nullptr;
  };

  [[nodiscard]] static Scratch carve(Arena& arena, TokenId tokens) {
    return {.words = arena.take<std::uint64_t>(words(tokens))};
  }

  /// The empty set of n tokens.
  TokenSet(TokenId n, const Scratch& scratch) : n_(n), words_(scratch.words) {
    std::memset(words_, 0, words(n) * sizeof *words_);
  }

  /// A copy of `other`, which goes on where that stands in its stream.
  TokenSet(const TokenSet& other, const Scratch& scratch)
      : n_(other.n_), words_(scratch.words), count_(other.count_), next_(other.next_) {
    std::memcpy(words_, other.words_, words(n_) * sizeof *words_);
  }

  [[nodiscard]] bool has(TokenId i) const { return (words_[i / 64] >> (i % 64) & 1U) != 0; }
  void add(TokenId i) {
    count_ += has(i) ? 0 : 1;
    words_[i / 64] |= std::uint64_t{1} << (i % 64);
  }
  /// Adds those of the tokens [first, first + n), n those of the set, that a mask has.
  void add(const TokenMask& mask, TokenId first) {
    if (!mask.any()) return;
    for (TokenId word = 0; std::int64_t{word} * 64 < n_; ++word) {
      const TokenId left = n_ - word * 64;
      const std::uint64_t own = left < 64 ? (std::uint64_t{1} << left) - 1 : ~std::uint64_t{0};
      const std::uint64_t fresh = mask.bits(first + word * 64) & own & ~words_[word];
      count_ += std::popcount(fresh);
      words_[word] |= fresh;
    }
  }
  [[nodiscard]] TokenId count() const { return count_; }

  /// Adds `picks` of the tokens that are missing, at most all: those that the stream names next. Of
  /// the same stream and the same set, more picks contain fewer. Takes n log(missing / left) random
  /// numbers.
  void pick(const RandomStream& stream, TokenId picks) {
    const TokenId missing = n_ - count_;
    if (picks >= missing) return fill();
    for (const TokenId end = count_ + picks; count_ < end;) {
      add(static_cast<TokenId>(stream.below(next_++, static_cast<std::uint32_t>(n_))));
    }
  }

  /// use(i) for every token, ascending.
  template <class Use>
  void for_each(const Use& use) const {
    for (TokenId word = 0; std::int64_t{word} * 64 < n_; ++word) {
      for (std::uint64_t bits = words_[word]; bits != 0; bits &= bits - 1) {
        use(word * 64 + std::countr_zero(bits));
      }
    }
  }

 private:
  static std::size_t words(TokenId n) { return static_cast<std::size_t>(n) / 64 + 1; }

  void fill() {
    for (TokenId i = 0; i < n_; ++i) add(i);
  }

  TokenId n_;
  std::uint64_t* words_;
  TokenId count_ = 0;
  std::uint32_t next_ = 0;  // number of the stream
};

/// Draws m = budget tokens of the n indexed ones that are there, all subsets of that size equally
/// likely; one draw for the whole group, fresh for every noise key; for the same key a larger
/// budget draws what a smaller one does, and more. pi = m / n.
class Uniform {
 public:
  static constexpr bool kUnbiased = true;
  /// Without replacement the variance is below that of independent draws.
  static constexpr bool kVerifiable = true;

  /// Error: a budget below one token or above the whole range's fraction 1.
  [[nodiscard]] static Result<Uniform> create(const Budget& budget) noexcept {
    const Status status = budget.check();
    if (!status.ok()) return status;
    return Uniform(budget);
  }

  struct Scratch {
    TokenSet::Scratch drawn;
    TokenId* tokens = nullptr;  // [limits.tokens]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    return {.drawn = TokenSet::carve(arena, limits.tokens),
            .tokens = arena.take<TokenId>(static_cast<std::size_t>(limits.tokens))};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<ConstantInclusion> draw(const DrawInput<Source, Index>& input,
                                                   Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const TokenId n = input.present();
    const TokenId m = budget_.of(n, input.doublings);
    TokenSet drawn(range.size(), scratch.drawn);
    drawn.add(input.gone, range.begin);
    drawn.pick(input.noise_for(Purpose::kUniform), m);
    std::size_t count = 0;
    drawn.for_each([&](TokenId i) {
      if (!input.gone.has(range.begin + i)) scratch.tokens[count++] = range.begin + i;
    });
    const double pi = n > 0 ? static_cast<double>(m) / n : 1.0;
    return {.tokens = {scratch.tokens, count},
            .members = {},
            .inclusion = {.log_pi = static_cast<float>(::log(pi))}};
  }

  /// m / n for n tokens: the probability with which each is drawn.
  [[nodiscard]] double probability(TokenId n) const {
    return n > 0 ? static_cast<double>(budget_.of(n)) / n : 1.0;
  }

 private:
  explicit Uniform(const Budget& budget) : budget_(budget) {}

  Budget budget_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

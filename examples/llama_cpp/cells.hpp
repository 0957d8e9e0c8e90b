// SPDX-License-Identifier: Apache-2.0
// Sets of cells: those that a mask hides, and those that were written since an index saw them.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <magicpig/core/token_mask.hpp>
#include <magicpig/core/types.hpp>
#include <span>
#include <vector>

namespace magicpig::llama {

/// Bits of cells, as Request::hidden has them.
class CellSet {
 public:
  void add(TokenId cell) {
    const auto word = static_cast<std::size_t>(cell) / 64;
    if (word >= words_.size()) words_.resize(word + 1);
    words_[word] |= std::uint64_t{1} << (cell % 64);
  }
  void add(TokenRange cells) {
    for (TokenId cell = cells.begin; cell < cells.end; ++cell) add(cell);
  }
  /// Takes out the cells before `end`.
  void remove_before(TokenId end) {
    const auto whole = static_cast<std::size_t>(end) / 64;
    for (std::size_t i = 0; i < whole && i < words_.size(); ++i) words_[i] = 0;
    if (whole < words_.size()) words_[whole] &= ~std::uint64_t{0} << (end % 64);
  }
  void clear() { words_.clear(); }

  [[nodiscard]] TokenId count_before(TokenId end) const {
    TokenId count = 0;
    for (TokenId cell = 0; cell < end; cell += 64) {
      const auto word = static_cast<std::size_t>(cell) / 64;
      if (word >= words_.size()) break;
      const int beyond = end - cell < 64 ? 64 - (end - cell) : 0;
      count += std::popcount(words_[word] << beyond);
    }
    return count;
  }

  /// The first stretch of cells at or behind `from` and before `end`; empty, at `end`, if none is.
  [[nodiscard]] TokenRange first_run(TokenId from, TokenId end) const {
    TokenRange run{.begin = next(from, end, true), .end = end};
    run.end = next(run.begin, end, false);
    return run;
  }

 private:
  // The first cell in [from, end) that is in the set, or is not; `end` if there is none.
  [[nodiscard]] TokenId next(TokenId from, TokenId end, bool in) const {
    while (from < end) {
      const auto word = static_cast<std::size_t>(from) / 64;
      const std::uint64_t bits = word < words_.size() ? words_[word] : 0;
      const std::uint64_t wanted = (in ? bits : ~bits) >> (from % 64);
      if (wanted != 0) {
        const TokenId cell = from + std::countr_zero(wanted);
        return cell < end ? cell : end;
      }
      from = (from / 64 + 1) * 64;
    }
    return end;
  }

  std::vector<std::uint64_t> words_;
};

/// What a row of ggml's mask says: half floats, 0 for a cell that the query sees, -inf for others.
class VisibleCells {
 public:
  /// False for a mask with any other number in it: it is not one of what is visible alone.
  [[nodiscard]] bool read(std::span<const fp16> mask) {
    hidden_.assign(static_cast<std::size_t>(mask_words(static_cast<TokenId>(mask.size()))), 0);
    count_ = 0;
    end_ = 0;
    bool known = true;
    for (std::size_t word = 0; word < hidden_.size(); ++word) {
      const std::span<const fp16> part =
          mask.subspan(word * 64, word * 64 + 64 < mask.size() ? 64 : mask.size() - word * 64);
      std::uint64_t hidden = 0;
      for (std::size_t i = 0; i < part.size(); ++i) {
        const bool seen = (part[i].bits & 0x7FFF) == 0;
        known = known && (seen || part[i].bits == kMinusInfinity);
        hidden |= std::uint64_t{!seen} << i;
      }
      hidden_[word] = hidden;
      const std::uint64_t all =
          part.size() == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << part.size()) - 1;
      const std::uint64_t seen = all & ~hidden;
      count_ += std::popcount(seen);
      if (seen != 0) end_ = static_cast<TokenId>(word * 64) + 64 - std::countl_zero(seen);
    }
    return known;
  }

  [[nodiscard]] std::span<const std::uint64_t> hidden() const { return hidden_; }
  [[nodiscard]] TokenId count() const { return count_; }
  /// Behind the last one.
  [[nodiscard]] TokenId end() const { return end_; }

 private:
  static constexpr std::uint16_t kMinusInfinity = 0xFC00;

  std::vector<std::uint64_t> hidden_;
  TokenId count_ = 0;
  TokenId end_ = 0;
};

}  // namespace magicpig::llama

// SPDX-License-Identifier: Apache-2.0
// Where the pages of a paged cache are: an engine's block table.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The physical page and the slot in it of each token of a request: token t is in slot
/// t % page_tokens of page table[t / page_tokens]. The table belongs to the host and is not copied.
class BlockTable {
 public:
  /// The largest page.
  static constexpr int kMaxPage = 1 << 20;

  /// A view; `pages` must outlive it and keep the entries of its tokens. Entries behind those of
  /// `tokens` are neither read nor checked. A page may occur any number of times. Errors:
  /// page_tokens that is no power of 2 in [1, kMaxPage], too few entries for the tokens, an entry
  /// outside [0, physical_pages).
  [[nodiscard]] static Result<BlockTable> create(std::span<const std::int32_t> pages,
                                                 int page_tokens, std::int64_t physical_pages,
                                                 TokenId tokens) noexcept {
    const Status status = check_page(page_tokens);
    if (!status.ok()) return status;
    const std::size_t used =
        tokens > 0 ? static_cast<std::size_t>((tokens - 1) / page_tokens) + 1 : 0;
    if (pages.size() < used) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "block_table has %zu entries, %d tokens on pages of %d need %zu",
                           pages.size(), tokens, page_tokens, used);
    }
    for (std::size_t i = 0; i < used; ++i) {
      if (pages[i] >= 0 && pages[i] < physical_pages) continue;
      return Status::error(ErrorCode::kInvalidArgument,
                           "block_table[%zu] = %d must lie in [0, physical_pages = %lld)", i,
                           pages[i], static_cast<long long>(physical_pages));
    }
    return BlockTable(pages.data(), page_tokens);
  }

  /// Error: page_tokens that is no power of 2 in [1, kMaxPage].
  [[nodiscard]] static Status check_page(int page_tokens) noexcept {
    if (page_tokens >= 1 && page_tokens <= kMaxPage &&
        std::has_single_bit(static_cast<unsigned>(page_tokens))) {
      return Status();
    }
    return Status::error(ErrorCode::kInvalidArgument,
                         "page_tokens %d must be a power of 2 in [1, %d]", page_tokens, kMaxPage);
  }

  /// The physical page that holds the token.
  [[nodiscard]] std::int64_t page(TokenId token) const { return pages_[token >> shift_]; }
  /// Its place there, in [0, page_tokens()).
  [[nodiscard]] int slot(TokenId token) const { return token & (page_tokens() - 1); }
  [[nodiscard]] int page_tokens() const { return 1 << shift_; }

 private:
  BlockTable(const std::int32_t* pages, int page_tokens)
      : pages_(pages), shift_(std::countr_zero(static_cast<unsigned>(page_tokens))) {}

  const std::int32_t* pages_;
  int shift_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

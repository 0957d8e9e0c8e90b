// SPDX-License-Identifier: Apache-2.0
// Keys and values on pages of a pool that requests share, found through a block table.
#pragma once

#include <cstdint>
#include <span>

#include "magicpig/core/block_table.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/key_value_checks.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Where rows lie on pages, in bytes: that of KV head h in slot s of physical page p begins at
/// p * page + h * head + s * token. So pages may be [kv_heads, page_tokens, dim] (HND),
/// [page_tokens, kv_heads, dim] (NHD), or have keys and values side by side. Any strides may be
/// negative.
struct PageStrides {
  std::int64_t page = 0;
  std::int64_t head = 0;
  std::int64_t token = 0;
};

/// Keys of type K and values of type V on pages of one pool, or of one each. What vLLM, FlashInfer
/// and their kin have; physical pages may be shared by requests, and occur twice in one.
template <class K, class V = K>
class PagedKeyValues {
 public:
  using KeyScalar = K;
  using ValueScalar = V;

  struct Layout {
    const K* keys = nullptr;    ///< row of physical page 0, KV head 0, slot 0
    const V* values = nullptr;  ///< likewise
    PageStrides key_strides = {};
    PageStrides value_strides = {};
    std::span<const std::int32_t> block_table = {};  ///< physical page of each page of the request
    std::int64_t physical_pages = 0;                 ///< in the pool
    int page_tokens = 16;                            ///< a power of 2 up to 2^20
    int kv_heads = 1;
    int head_dim = 0;
    int value_dim = 0;
    TokenId tokens = 0;
  };

  /// A view; memory and block table must outlive it. The table's entries for `tokens` tokens are
  /// looked at once, here. Errors: those of check_key_values() and BlockTable::create(), strides
  /// that break the scalar's alignment.
  [[nodiscard]] static Result<PagedKeyValues> create(const Layout& layout) noexcept {
    Status status = check_key_values(layout);
    if (status.ok()) status = check_strides(layout);
    if (!status.ok()) return status;
    const Result<BlockTable> table = BlockTable::create(layout.block_table, layout.page_tokens,
                                                        layout.physical_pages, layout.tokens);
    if (!table.ok()) return table.status();
    return PagedKeyValues(layout, *table);
  }

  [[nodiscard]] TokenId tokens() const { return layout_.tokens; }
  [[nodiscard]] int kv_heads() const { return layout_.kv_heads; }
  [[nodiscard]] int head_dim() const { return layout_.head_dim; }
  [[nodiscard]] int value_dim() const { return layout_.value_dim; }

  /// [head_dim] scalars.
  [[nodiscard]] const K* key(int kv_head, TokenId token) const {
    return row(layout_.keys, layout_.key_strides, kv_head, token);
  }
  /// [value_dim] scalars.
  [[nodiscard]] const V* value(int kv_head, TokenId token) const {
    return row(layout_.values, layout_.value_strides, kv_head, token);
  }

 private:
  PagedKeyValues(const Layout& layout, const BlockTable& table) : layout_(layout), table_(table) {}

  template <class T>
  [[nodiscard]] const T* row(const T* base, const PageStrides& strides, int kv_head,
                             TokenId token) const {
    return at_offset(base, table_.page(token) * strides.page + kv_head * strides.head +
                               table_.slot(token) * strides.token);
  }

  Layout layout_;
  BlockTable table_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

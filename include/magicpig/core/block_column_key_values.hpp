// SPDX-License-Identifier: Apache-2.0
// Keys in columns of each page and values in rows of it: the cache of vLLM on CPUs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/block_table.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/key_value_checks.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Keys of type K and values of type V on pages of a pool, as PagedKeyValues, but for the keys of
/// a page and KV head, which are transposed: [head_dim, page_tokens], so that scalar j of the token
/// in slot s is scalar j * page_tokens + s of them. Values are [page_tokens, value_dim]. This is
/// how vLLM's attention on CPUs keeps them where it works on vectors (cpu_attn_vec.hpp); its other
/// instruction sets pack otherwise.
///
/// A key is copied together, scalar by scalar, whenever it is read; values are read where they lie.
/// K is a type of single scalars: float, fp16, bf16.
template <class K, class V = K>
class BlockColumnKeyValues {
  static_assert(kScalarsPerElement<K> == 1, "columns of blocks are no layout that there is");

 public:
  using KeyScalar = K;
  using ValueScalar = V;

  /// Where a page of a KV head begins, in bytes: page p of KV head h at p * page + h * head.
  struct Strides {
    std::int64_t page = 0;
    std::int64_t head = 0;
  };

  struct Layout {
    const K* keys = nullptr;    ///< of physical page 0, KV head 0
    const V* values = nullptr;  ///< likewise
    Strides key_strides = {};
    Strides value_strides = {};
    std::span<const std::int32_t> block_table = {};  ///< physical page of each page of the request
    std::int64_t physical_pages = 0;                 ///< in the pool
    int page_tokens = 16;                            ///< a power of 2 up to 2^20
    int kv_heads = 1;
    int head_dim = 0;
    int value_dim = 0;
    TokenId tokens = 0;
  };

  /// A view; memory and block table must outlive it. Errors: those of check_key_values() and
  /// BlockTable::create(), strides that break the scalar's alignment.
  [[nodiscard]] static Result<BlockColumnKeyValues> create(const Layout& layout) noexcept {
    Status status = check_key_values(layout);
    if (status.ok()) status = check_strides(layout);
    if (!status.ok()) return status;
    const Result<BlockTable> table = BlockTable::create(layout.block_table, layout.page_tokens,
                                                        layout.physical_pages, layout.tokens);
    if (!table.ok()) return table.status();
    return BlockColumnKeyValues(layout, *table);
  }

  /// Dense pools as vLLM has them: keys [physical_pages, kv_heads, head_dim, page_tokens], values
  /// [physical_pages, kv_heads, page_tokens, value_dim]. The strides of `layout` are made here.
  /// Errors: as create(), and kv_heads of 2^24 or more.
  [[nodiscard]] static Result<BlockColumnKeyValues> dense(Layout layout) noexcept {
    if (layout.kv_heads >= 1 << 24) {  // the strides of all others fit 64 bits
      return Status::error(ErrorCode::kInvalidArgument, "kv_heads %d must be below 2^24",
                           layout.kv_heads);
    }
    Status status = check_key_values(layout);
    if (status.ok()) status = BlockTable::check_page(layout.page_tokens);
    if (!status.ok()) return status;
    const auto page = std::int64_t{layout.page_tokens};
    layout.key_strides.head = page * std::int64_t{sizeof(K)} * layout.head_dim;
    layout.key_strides.page = layout.key_strides.head * layout.kv_heads;
    layout.value_strides.head = page * value_row(layout.value_dim);
    layout.value_strides.page = layout.value_strides.head * layout.kv_heads;
    return create(layout);
  }

  [[nodiscard]] TokenId tokens() const { return layout_.tokens; }
  [[nodiscard]] int kv_heads() const { return layout_.kv_heads; }
  [[nodiscard]] int head_dim() const { return layout_.head_dim; }
  [[nodiscard]] int value_dim() const { return layout_.value_dim; }

  /// Copies a key's head_dim scalars to `to`.
  void read_key(int kv_head, TokenId token, K* to) const {
    const K* from = at_offset(layout_.keys, table_.page(token) * layout_.key_strides.page +
                                                kv_head * layout_.key_strides.head) +
                    table_.slot(token);
    const std::int64_t step = table_.page_tokens();
    for (std::int64_t j = 0; j < layout_.head_dim; ++j) to[j] = from[j * step];
  }
  /// [value_dim] scalars.
  [[nodiscard]] const V* value(int kv_head, TokenId token) const {
    return at_offset(layout_.values, table_.page(token) * layout_.value_strides.page +
                                         kv_head * layout_.value_strides.head +
                                         table_.slot(token) * value_row(layout_.value_dim));
  }

 private:
  BlockColumnKeyValues(const Layout& layout, const BlockTable& table)
      : layout_(layout), table_(table) {}

  // Bytes.
  static std::int64_t value_row(int value_dim) {
    return static_cast<std::int64_t>(row_bytes<V>(static_cast<std::size_t>(value_dim)));
  }

  Layout layout_;
  BlockTable table_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

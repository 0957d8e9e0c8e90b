// SPDX-License-Identifier: Apache-2.0
// Keys and values in a pool of rows, with a list that says in which row each token is.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/core/key_value_checks.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What numbers the rows of a pool.
template <class I>
concept RowId = std::same_as<I, std::int32_t> || std::same_as<I, std::int64_t>;

/// Keys of type K and values of type V in pools of rows: token t is in row ids[t], as in SGLang.
/// Tokens may share a row.
template <class K, class V = K, RowId Id = std::int32_t>
class ListedKeyValues {
 public:
  using KeyScalar = K;
  using ValueScalar = V;

  struct Layout {
    const K* keys = nullptr;         ///< pool row 0 of KV head 0
    const V* values = nullptr;       ///< likewise
    ByteStrides key_strides = {};    ///< `token` is from row to row of the pool
    ByteStrides value_strides = {};  ///< likewise
    std::span<const Id> ids = {};    ///< one for each token of the request
    std::int64_t pool_rows = 0;
    int kv_heads = 1;
    int head_dim = 0;
    int value_dim = 0;
  };

  /// A view; memory and ids must outlive it. All ids are looked at once, here. Errors: 2^31 ids or
  /// more, null pointers with any id, no KV heads, dimensions as check_key_values(), strides that
  /// break the scalar's alignment, an id outside [0, pool_rows).
  [[nodiscard]] static Result<ListedKeyValues> create(const Layout& layout) noexcept {
    constexpr auto kMost = static_cast<std::size_t>((std::numeric_limits<TokenId>::max)());
    if (layout.ids.size() > kMost) {
      return Status::error(ErrorCode::kInvalidArgument, "%zu ids are 2^31 or more",
                           layout.ids.size());
    }
    Status status =
        check_key_values(Counted{layout.keys, layout.values, layout.kv_heads, layout.head_dim,
                                 layout.value_dim, static_cast<TokenId>(layout.ids.size())});
    if (status.ok()) status = check_strides(layout);
    for (std::size_t i = 0; status.ok() && i < layout.ids.size(); ++i) {
      if (layout.ids[i] >= 0 && layout.ids[i] < layout.pool_rows) continue;
      status = Status::error(
          ErrorCode::kInvalidArgument, "ids[%zu] = %lld must lie in [0, pool_rows = %lld)", i,
          static_cast<long long>(layout.ids[i]), static_cast<long long>(layout.pool_rows));
    }
    if (!status.ok()) return status;
    return ListedKeyValues(layout);
  }

  [[nodiscard]] TokenId tokens() const { return static_cast<TokenId>(layout_.ids.size()); }
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
  // A layout with a number of tokens, for check_key_values().
  struct Counted {
    const K* keys;
    const V* values;
    int kv_heads;
    int head_dim;
    int value_dim;
    TokenId tokens;
  };

  explicit ListedKeyValues(const Layout& layout) : layout_(layout) {}

  template <class T>
  [[nodiscard]] const T* row(const T* base, const ByteStrides& strides, int kv_head,
                             TokenId token) const {
    const std::int64_t id = layout_.ids[static_cast<std::size_t>(token)];
    return at_offset(base, kv_head * strides.head + id * strides.token);
  }

  Layout layout_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

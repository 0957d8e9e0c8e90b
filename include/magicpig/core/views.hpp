// SPDX-License-Identifier: Apache-2.0
// Views over the keys and values that the host owns; the library copies neither.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Read access to one layer's key/value cache of one request. Rows are contiguous, of scalars or of
/// blocks of them (q8_0); where they lie is the source's affair. Copyable and cheap to copy; a copy
/// refers to the same memory.
template <class S>
concept KeyValueSource = requires(const S& s, int kv_head, TokenId token) {
  typename S::Scalar;                              // float, fp16, bf16, q8_0
  { s.tokens() } -> std::convertible_to<TokenId>;  // rows per KV head
  { s.kv_heads() } -> std::convertible_to<int>;
  { s.head_dim() } -> std::convertible_to<int>;
  { s.value_dim() } -> std::convertible_to<int>;
  { s.key(kv_head, token) } -> std::same_as<const typename S::Scalar*>;    // [head_dim]
  { s.value(kv_head, token) } -> std::same_as<const typename S::Scalar*>;  // [value_dim]
};

/// Where rows lie in memory, in bytes: row (h, t) starts at h * head + t * token. Negative strides
/// are allowed, overlapping rows too.
struct ByteStrides {
  std::int64_t head = 0;
  std::int64_t token = 0;
};

/// Keys and values at fixed strides over the host's memory.
template <class T>
class StridedKeyValues {
 public:
  using Scalar = T;

  struct Layout {
    const T* keys = nullptr;    ///< row of KV head 0, token 0
    const T* values = nullptr;  ///< likewise
    ByteStrides key_strides = {};
    ByteStrides value_strides = {};
    int kv_heads = 1;
    int head_dim = 0;
    int value_dim = 0;
    TokenId tokens = 0;
  };

  /// A view; the memory must outlive it. Errors: null pointers with tokens > 0, a negative count,
  /// dimensions outside [1, kMaxDim] or not in whole blocks, strides that break the scalar's
  /// alignment.
  [[nodiscard]] static Result<StridedKeyValues> create(const Layout& layout) noexcept {
    if (layout.tokens < 0 || layout.kv_heads < 1) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "tokens %d must be at least 0 and kv_heads %d at least 1", layout.tokens,
                           layout.kv_heads);
    }
    if (layout.head_dim < 1 || layout.head_dim > kMaxDim || layout.value_dim < 1 ||
        layout.value_dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "head_dim %d and value_dim %d must lie in [1, %d]", layout.head_dim,
                           layout.value_dim, kMaxDim);
    }
    if (layout.head_dim % kScalarsPerElement<T> != 0 ||
        layout.value_dim % kScalarsPerElement<T> != 0) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "head_dim %d and value_dim %d must be multiples of the block of %d",
                           layout.head_dim, layout.value_dim, kScalarsPerElement<T>);
    }
    if (layout.tokens > 0 && (layout.keys == nullptr || layout.values == nullptr)) {
      return Status::error(ErrorCode::kInvalidArgument, "%s is null with %d tokens",
                           layout.keys == nullptr ? "keys" : "values", layout.tokens);
    }
    for (const ByteStrides& s : {layout.key_strides, layout.value_strides}) {
      if (s.head % std::int64_t{alignof(T)} != 0 || s.token % std::int64_t{alignof(T)} != 0) {
        return Status::error(ErrorCode::kInvalidArgument,
                             "strides %lld, %lld bytes are no multiples of the scalar's %zu",
                             static_cast<long long>(s.head), static_cast<long long>(s.token),
                             alignof(T));
      }
    }
    return StridedKeyValues(layout);
  }

  /// Dense [kv_heads, tokens, dim] arrays, the layout known as HND.
  [[nodiscard]] static Result<StridedKeyValues> head_major(const T* keys, const T* values,
                                                           const Shape& shape,
                                                           TokenId tokens) noexcept {
    return dense(keys, values, shape, tokens, {.head = tokens, .token = 1});
  }

  /// Dense [tokens, kv_heads, dim] arrays, the layout known as NHD.
  [[nodiscard]] static Result<StridedKeyValues> token_major(const T* keys, const T* values,
                                                            const Shape& shape,
                                                            TokenId tokens) noexcept {
    return dense(keys, values, shape, tokens, {.head = 1, .token = shape.kv_heads});
  }

  [[nodiscard]] TokenId tokens() const { return layout_.tokens; }
  [[nodiscard]] int kv_heads() const { return layout_.kv_heads; }
  [[nodiscard]] int head_dim() const { return layout_.head_dim; }
  [[nodiscard]] int value_dim() const { return layout_.value_dim; }

  /// [head_dim] scalars.
  [[nodiscard]] const T* key(int kv_head, TokenId token) const {
    return row(layout_.keys, layout_.key_strides, kv_head, token);
  }
  /// [value_dim] scalars.
  [[nodiscard]] const T* value(int kv_head, TokenId token) const {
    return row(layout_.values, layout_.value_strides, kv_head, token);
  }

  /// The same cache seen up to `tokens` tokens, as a causal mask does; `tokens` in [0, tokens()].
  [[nodiscard]] StridedKeyValues first(TokenId tokens) const {
    StridedKeyValues part = *this;
    part.layout_.tokens = tokens < layout_.tokens ? tokens : layout_.tokens;
    return part;
  }

 private:
  explicit StridedKeyValues(const Layout& layout) : layout_(layout) {}

  // Dense rows; `rows` are strides counted in them.
  static Result<StridedKeyValues> dense(const T* keys, const T* values, const Shape& shape,
                                        TokenId tokens, const ByteStrides& rows) noexcept {
    const std::int64_t key_row =
        static_cast<std::int64_t>(row_bytes<T>(static_cast<std::size_t>(shape.head_dim)));
    const std::int64_t value_row =
        static_cast<std::int64_t>(row_bytes<T>(static_cast<std::size_t>(shape.value_dim)));
    return create(
        {.keys = keys,
         .values = values,
         .key_strides = {.head = rows.head * key_row, .token = rows.token * key_row},
         .value_strides = {.head = rows.head * value_row, .token = rows.token * value_row},
         .kv_heads = shape.kv_heads,
         .head_dim = shape.head_dim,
         .value_dim = shape.value_dim,
         .tokens = tokens});
  }

  static const T* row(const T* base, const ByteStrides& strides, int kv_head, TokenId token) {
    const std::int64_t offset = kv_head * strides.head + token * strides.token;
    return reinterpret_cast<const T*>(reinterpret_cast<const std::byte*>(base) + offset);
  }

  Layout layout_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

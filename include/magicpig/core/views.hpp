// SPDX-License-Identifier: Apache-2.0
// Views over the keys and values that the host owns; the library copies neither.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/error.hpp"
#include "magicpig/core/key_value_checks.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A source whose keys lie in memory as contiguous rows of head_dim scalars.
template <class S>
concept AddressableKeys = requires(const S& s, int kv_head, TokenId token) {
  { s.key(kv_head, token) } -> std::same_as<const typename S::KeyScalar*>;
};
/// The same of values, [value_dim].
template <class S>
concept AddressableValues = requires(const S& s, int kv_head, TokenId token) {
  { s.value(kv_head, token) } -> std::same_as<const typename S::ValueScalar*>;
};

/// A source that copies a key's head_dim scalars to `to` from wherever they lie. It is asked from
/// several threads at once.
template <class S>
concept CopiedKeys = requires(const S& s, int kv_head, TokenId token, typename S::KeyScalar* to) {
  s.read_key(kv_head, token, to);
};
/// The same of values, [value_dim].
template <class S>
concept CopiedValues = requires(const S& s, int kv_head, TokenId token,
                                typename S::ValueScalar* to) {
  s.read_value(kv_head, token, to);
};

/// Read access to one layer's key/value cache of one request, in rows of scalars or of blocks of
/// them (q8_0, q4_0). Rows that lie in memory as such are read there, wherever that is; others are
/// copied one by one when they are read (core/row_reader.hpp). Copyable and cheap to copy; a copy
/// refers to the same memory.
template <class S>
concept KeyValueSource = requires(const S& s, int kv_head, TokenId token) {
  typename S::KeyScalar;                           // float, fp16, bf16, q8_0, q4_0
  typename S::ValueScalar;                         // one of these too, not always the same
  { s.tokens() } -> std::convertible_to<TokenId>;  // rows per KV head
  { s.kv_heads() } -> std::convertible_to<int>;
  { s.head_dim() } -> std::convertible_to<int>;
  { s.value_dim() } -> std::convertible_to<int>;
  requires AddressableKeys<S> || CopiedKeys<S>;
  requires AddressableValues<S> || CopiedValues<S>;
};

/// Where rows lie in memory, in bytes: row (h, t) starts at h * head + t * token. Negative strides
/// are allowed, overlapping rows too.
struct ByteStrides {
  std::int64_t head = 0;
  std::int64_t token = 0;
};

/// The T that lies `bytes` behind `base`.
template <class T>
[[nodiscard]] const T* at_offset(const T* base, std::int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const std::byte*>(base) + bytes);
}

/// Keys of type K and values of type V at fixed strides over the host's memory.
template <class K, class V = K>
class StridedKeyValues {
 public:
  using KeyScalar = K;
  using ValueScalar = V;

  struct Layout {
    const K* keys = nullptr;    ///< row of KV head 0, token 0
    const V* values = nullptr;  ///< likewise
    ByteStrides key_strides = {};
    ByteStrides value_strides = {};
    int kv_heads = 1;
    int head_dim = 0;
    int value_dim = 0;
    TokenId tokens = 0;
  };

  /// A view; the memory must outlive it. Errors: those of check_key_values(), strides that break
  /// the scalar's alignment.
  [[nodiscard]] static Result<StridedKeyValues> create(const Layout& layout) noexcept {
    Status status = check_key_values(layout);
    if (status.ok()) status = check_strides(layout);
    if (!status.ok()) return status;
    return StridedKeyValues(layout);
  }

  /// Dense [kv_heads, tokens, dim] arrays, the layout known as HND.
  [[nodiscard]] static Result<StridedKeyValues> head_major(const K* keys, const V* values,
                                                           const Shape& shape,
                                                           TokenId tokens) noexcept {
    return dense(keys, values, shape, tokens, {.head = tokens, .token = 1});
  }

  /// Dense [tokens, kv_heads, dim] arrays, the layout known as NHD.
  [[nodiscard]] static Result<StridedKeyValues> token_major(const K* keys, const V* values,
                                                            const Shape& shape,
                                                            TokenId tokens) noexcept {
    return dense(keys, values, shape, tokens, {.head = 1, .token = shape.kv_heads});
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

  /// The same cache seen up to `tokens` tokens, as a causal mask does; `tokens` in [0, tokens()].
  [[nodiscard]] StridedKeyValues first(TokenId tokens) const {
    StridedKeyValues part = *this;
    part.layout_.tokens = tokens < layout_.tokens ? tokens : layout_.tokens;
    return part;
  }

 private:
  explicit StridedKeyValues(const Layout& layout) : layout_(layout) {}

  // Dense rows; `rows` are strides counted in them.
  static Result<StridedKeyValues> dense(const K* keys, const V* values, const Shape& shape,
                                        TokenId tokens, const ByteStrides& rows) noexcept {
    const std::int64_t key_row =
        static_cast<std::int64_t>(row_bytes<K>(static_cast<std::size_t>(shape.head_dim)));
    const std::int64_t value_row =
        static_cast<std::int64_t>(row_bytes<V>(static_cast<std::size_t>(shape.value_dim)));
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

  template <class T>
  static const T* row(const T* base, const ByteStrides& strides, int kv_head, TokenId token) {
    return at_offset(base, kv_head * strides.head + token * strides.token);
  }

  Layout layout_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// What every source of keys and values refuses of the layout that it is made from.
#pragma once

#include <cstdint>
#include <type_traits>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Errors: a negative number of tokens, no KV heads, dimensions outside [1, kMaxDim] or not in
/// whole blocks of their scalar, null pointers with tokens > 0. A layout has the fields keys,
/// values, kv_heads, head_dim, value_dim and tokens.
template <class Layout>
[[nodiscard]] Status check_key_values(const Layout& layout) noexcept {
  constexpr int kKeyBlock = kScalarsPerElement<std::remove_cvref_t<decltype(*layout.keys)>>;
  constexpr int kValueBlock = kScalarsPerElement<std::remove_cvref_t<decltype(*layout.values)>>;
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
  if (layout.head_dim % kKeyBlock != 0) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "head_dim %d must be a multiple of the keys' block of %d", layout.head_dim,
                         kKeyBlock);
  }
  if (layout.value_dim % kValueBlock != 0) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "value_dim %d must be a multiple of the values' block of %d",
                         layout.value_dim, kValueBlock);
  }
  if (layout.tokens > 0 && (layout.keys == nullptr || layout.values == nullptr)) {
    return Status::error(ErrorCode::kInvalidArgument, "%s is null with %d tokens",
                         layout.keys == nullptr ? "keys" : "values", layout.tokens);
  }
  return Status();
}

/// Error: a stride that would break the alignment of T; `field` is named in the message.
template <class T>
[[nodiscard]] Status check_stride(const char* field, const char* of, std::int64_t bytes) noexcept {
  if (bytes % std::int64_t{alignof(T)} == 0) return Status();
  return Status::error(ErrorCode::kInvalidArgument,
                       "%s.%s: %lld bytes are no multiple of the scalar's %zu", field, of,
                       static_cast<long long>(bytes), alignof(T));
}

/// The same of those of page, head and token that `strides` has.
template <class T, class Strides>
[[nodiscard]] Status check_strides(const char* field, const Strides& strides) noexcept {
  Status status;
  if constexpr (requires { strides.page; }) status = check_stride<T>(field, "page", strides.page);
  if (status.ok()) status = check_stride<T>(field, "head", strides.head);
  if constexpr (requires { strides.token; }) {
    if (status.ok()) status = check_stride<T>(field, "token", strides.token);
  }
  return status;
}

/// The same of both strides of a layout, which also has the fields keys and values.
template <class Layout>
[[nodiscard]] Status check_strides(const Layout& layout) noexcept {
  using K = std::remove_cvref_t<decltype(*layout.keys)>;
  using V = std::remove_cvref_t<decltype(*layout.values)>;
  const Status status = check_strides<K>("key_strides", layout.key_strides);
  return status.ok() ? check_strides<V>("value_strides", layout.value_strides) : status;
}

}  // namespace magicpig::inline MAGICPIG_ABI

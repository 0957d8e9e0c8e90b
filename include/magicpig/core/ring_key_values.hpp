// SPDX-License-Identifier: Apache-2.0
// Keys and values in a ring buffer, where new tokens take the place of the oldest.
#pragma once

#include <cstdint>

#include "magicpig/core/error.hpp"
#include "magicpig/core/key_value_checks.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Keys of type K and values of type V in rings of `capacity` slots: token t is in slot
/// t % capacity, as in gemma.cpp, whose keys and values of a head lie next to each other.
///
/// Of `tokens` tokens the newest `capacity` exist, from first_token() on. Asking for an older one
/// gives the row of the token that has taken its slot: memory that may be read, and another token's
/// numbers. decode() and the indexes read every token of their ranges, so that of a ring that has
/// gone round they are to be given newest(), or ranges from first_token() on. An index built over
/// tokens that have since been replaced draws those that replaced them: it must be built anew.
template <class K, class V = K>
class RingKeyValues {
 public:
  using KeyScalar = K;
  using ValueScalar = V;

  struct Layout {
    const K* keys = nullptr;         ///< row of KV head 0, slot 0
    const V* values = nullptr;       ///< likewise
    ByteStrides key_strides = {};    ///< `token` is from slot to slot
    ByteStrides value_strides = {};  ///< likewise
    TokenId capacity = 0;            ///< slots of the ring
    int kv_heads = 1;
    int head_dim = 0;
    int value_dim = 0;
    TokenId tokens = 0;  ///< all that were ever written
  };

  /// A view; the memory must outlive it. Errors: those of check_key_values(), a capacity below 1,
  /// strides that break the scalar's alignment.
  [[nodiscard]] static Result<RingKeyValues> create(const Layout& layout) noexcept {
    Status status = check_key_values(layout);
    if (status.ok() && layout.capacity < 1) {
      return Status::error(ErrorCode::kInvalidArgument, "capacity %d must be at least 1",
                           layout.capacity);
    }
    if (status.ok()) status = check_strides(layout);
    if (!status.ok()) return status;
    return RingKeyValues(layout);
  }

  [[nodiscard]] TokenId tokens() const { return layout_.tokens; }
  [[nodiscard]] int kv_heads() const { return layout_.kv_heads; }
  [[nodiscard]] int head_dim() const { return layout_.head_dim; }
  [[nodiscard]] int value_dim() const { return layout_.value_dim; }

  /// The oldest token that there still is; tokens() where there are none.
  [[nodiscard]] TokenId first_token() const {
    return layout_.tokens > layout_.capacity ? layout_.tokens - layout_.capacity : 0;
  }
  /// The tokens that there are, numbered from 0: token i is token first_token() + i of this.
  [[nodiscard]] RingKeyValues newest() const {
    RingKeyValues part = *this;
    part.first_slot_ = slot(first_token());
    part.layout_.tokens = layout_.tokens - first_token();
    return part;
  }

  /// [head_dim] scalars.
  [[nodiscard]] const K* key(int kv_head, TokenId token) const {
    return row(layout_.keys, layout_.key_strides, kv_head, token);
  }
  /// [value_dim] scalars.
  [[nodiscard]] const V* value(int kv_head, TokenId token) const {
    return row(layout_.values, layout_.value_strides, kv_head, token);
  }

 private:
  explicit RingKeyValues(const Layout& layout) : layout_(layout) {}

  [[nodiscard]] TokenId slot(TokenId token) const {
    // Both are below 2^31.
    const auto place = static_cast<std::uint32_t>(first_slot_) + static_cast<std::uint32_t>(token);
    return static_cast<TokenId>(place % static_cast<std::uint32_t>(layout_.capacity));
  }

  template <class T>
  [[nodiscard]] const T* row(const T* base, const ByteStrides& strides, int kv_head,
                             TokenId token) const {
    return at_offset(base, kv_head * strides.head + slot(token) * strides.token);
  }

  Layout layout_;
  TokenId first_slot_ = 0;  // of token 0
};

}  // namespace magicpig::inline MAGICPIG_ABI

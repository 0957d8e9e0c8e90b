// SPDX-License-Identifier: Apache-2.0
// Keys and values as rows in memory, whether they lie there as rows or have to be copied together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Bytes of the copy of a row, in whole cache lines.
template <class T>
[[nodiscard]] constexpr std::size_t copy_bytes(int dim) {
  return (row_bytes<T>(static_cast<std::size_t>(dim)) + kCacheLine - 1) / kCacheLine * kCacheLine;
}

/// Bytes that a copy of a key and one of a value take: 0 where rows are read where they lie.
struct RowCopies {
  std::size_t key = 0;
  std::size_t value = 0;

  /// Those of a source's rows of these dimensions.
  template <KeyValueSource Source>
  [[nodiscard]] static constexpr RowCopies of(int head_dim, int value_dim) {
    return {.key = AddressableKeys<Source> ? 0 : copy_bytes<typename Source::KeyScalar>(head_dim),
            .value = AddressableValues<Source>
                         ? 0
                         : copy_bytes<typename Source::ValueScalar>(value_dim)};
  }
};

/// A key, [head_dim]: where it lies, or copied to `copy` if it lies nowhere as a row. `copy` is not
/// touched otherwise and may be null; it is aligned, and of RowCopies::key bytes.
template <KeyValueSource Source>
[[nodiscard]] const typename Source::KeyScalar* key_row(const Source& source, int kv_head,
                                                        TokenId token,
                                                        [[maybe_unused]] std::byte* copy) {
  if constexpr (AddressableKeys<Source>) {
    return source.key(kv_head, token);
  } else {
    auto* row = reinterpret_cast<typename Source::KeyScalar*>(copy);
    source.read_key(kv_head, token, row);
    return row;
  }
}

/// The same of a value, [value_dim].
template <KeyValueSource Source>
[[nodiscard]] const typename Source::ValueScalar* value_row(const Source& source, int kv_head,
                                                            TokenId token,
                                                            [[maybe_unused]] std::byte* copy) {
  if constexpr (AddressableValues<Source>) {
    return source.value(kv_head, token);
  } else {
    auto* row = reinterpret_cast<typename Source::ValueScalar*>(copy);
    source.read_value(kv_head, token, row);
    return row;
  }
}

/// Reads keys or values of a source on several workers. It owns memory for copies only where there
/// are any.
template <KeyValueSource Source, bool kKeys>
class RowReader {
 public:
  using Scalar =
      std::conditional_t<kKeys, typename Source::KeyScalar, typename Source::ValueScalar>;
  static constexpr bool kCopies = kKeys ? !AddressableKeys<Source> : !AddressableValues<Source>;

  /// `source` must outlive the reader.
  explicit RowReader(const Source& source) : source_(source) {}

  [[nodiscard]] const Source& source() const { return source_; }
  /// Scalars of a row.
  [[nodiscard]] int dim() const { return kKeys ? source_.head_dim() : source_.value_dim(); }

  /// Memory for `slots` rows of each of `workers` workers; false when it is short.
  [[nodiscard]] bool reserve([[maybe_unused]] int workers, [[maybe_unused]] int slots) noexcept {
    if constexpr (kCopies) {
      slots_ = static_cast<std::size_t>(slots);
      bytes_ = copy_bytes<Scalar>(dim());
      return copies_.resize(static_cast<std::size_t>(workers) * slots_ * bytes_);
    } else {
      return true;
    }
  }

  /// [dim()] scalars, until the same worker asks for another row in the same slot.
  [[nodiscard]] const Scalar* row(int kv_head, TokenId token, [[maybe_unused]] int worker = 0,
                                  [[maybe_unused]] int slot = 0) {
    std::byte* copy = nullptr;
    if constexpr (kCopies) {
      copy = copies_.data() +
             (static_cast<std::size_t>(worker) * slots_ + static_cast<std::size_t>(slot)) * bytes_;
    }
    if constexpr (kKeys) {
      return key_row(source_, kv_head, token, copy);
    } else {
      return value_row(source_, kv_head, token, copy);
    }
  }

  /// Asks for a row that is read soon. One that is copied together is left to that: its scalars may
  /// lie in as many lines of cache, which neighbouring tokens share.
  MAGICPIG_ALWAYS_INLINE void prefetch([[maybe_unused]] int kv_head,
                                       [[maybe_unused]] TokenId token) const {
    if constexpr (!kCopies) {
      const std::size_t bytes = row_bytes<Scalar>(static_cast<std::size_t>(dim()));
      if constexpr (kKeys) {
        prefetch_far(source_.key(kv_head, token), bytes);
      } else {
        prefetch_far(source_.value(kv_head, token), bytes);
      }
    }
  }

 private:
  const Source& source_;
  std::size_t slots_ = 0;
  std::size_t bytes_ = 0;
  Buffer<std::byte> copies_;  // [workers, slots_, bytes_]
};

template <KeyValueSource Source>
using KeyReader = RowReader<Source, true>;
template <KeyValueSource Source>
using ValueReader = RowReader<Source, false>;

}  // namespace magicpig::inline MAGICPIG_ABI

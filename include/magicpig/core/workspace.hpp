// SPDX-License-Identifier: Apache-2.0
// The host's scratch memory: one piece of code both measures how much is needed and carves it up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Hands out aligned arrays from a block of memory; without a block it only counts. Because the
/// same calls run in both modes, size and use cannot disagree (FlashInfer's plan does this too).
class Arena {
 public:
  /// Counts: take() returns null pointers.
  Arena() = default;
  /// Carves `memory`, of any alignment.
  explicit Arena(std::span<std::byte> memory) : memory_(memory.data()) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_);
    used_ = (kAlignment - address % kAlignment) % kAlignment;
  }

  /// `count` uninitialised T on a cache-line boundary. T is trivial.
  template <class T>
  [[nodiscard]] T* take(std::size_t count) {
    std::byte* place = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(place);
  }

  /// Bytes of memory, of any alignment, that what was taken so far needs.
  [[nodiscard]] std::size_t bytes_needed() const { return used_ + kAlignment; }

 private:
  std::byte* memory_ = nullptr;
  std::size_t used_ = 0;
};

}  // namespace magicpig::inline MAGICPIG_ABI

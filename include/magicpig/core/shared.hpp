// SPDX-License-Identifier: Apache-2.0
// An array that several owners read and whose writer makes it its own first.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Array of trivially copyable T on a cache-line boundary, which share() gives to another owner
/// without copying it. Each owner has a size of its own. Not copyable but by share(); moved from,
/// it is empty. One cache line before the array counts the owners.
///
/// Threads: one owner is one object, as any other; different owners of an array may be read,
/// shared, changed and destroyed on different threads at once.
///
/// Memory order. A count is raised relaxed: whoever raises it owns the array, so that it cannot
/// reach 0 meanwhile, and nothing is published by it; the new owner travels to its thread by other
/// means, which order everything before. It is lowered with release: what an owner read of the
/// array comes before. alone() reads with acquire: where it sees 1 it sees what was before every
/// lowering (each is in the release sequence of those before it, as all are read-modify-writes),
/// so that the writes which follow do not race with reads of owners that are gone; and none can be
/// added, because only an owner adds owners and the only one left is writing. The owner that lowers
/// the count to 0 acquires for the same reason, before it frees the array.
template <class T>
class SharedArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  SharedArray() = default;
  SharedArray(SharedArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  SharedArray& operator=(SharedArray&& other) noexcept {
    SharedArray taken(std::move(other));
    std::swap(data_, taken.data_);
    std::swap(size_, taken.size_);
    std::swap(capacity_, taken.capacity_);
    return *this;
  }
  SharedArray(const SharedArray&) = delete;
  SharedArray& operator=(const SharedArray&) = delete;
  ~SharedArray() {
    if (data_ != nullptr && owners()->fetch_sub(1, std::memory_order_acq_rel) == 1) {
      ::operator delete (owners(), std::align_val_t{kAlignment});
    }
  }

  /// The same array for another owner.
  [[nodiscard]] SharedArray share() const noexcept {
    SharedArray other;
    if (data_ != nullptr) owners()->fetch_add(1, std::memory_order_relaxed);
    other.data_ = data_;
    other.size_ = size_;
    other.capacity_ = capacity_;
    return other;
  }

  /// Whether there is no other owner, so that the array may be written.
  [[nodiscard]] bool alone() const noexcept {
    return data_ == nullptr || owners()->load(std::memory_order_acquire) == 1;
  }

  /// Afterwards alone() and room for `capacity` elements, the first size() of which are kept: a
  /// copy of its own where it is shared or too small. False when memory is short, and then nothing
  /// has changed. New memory is shown to `advice`, if there is one.
  [[nodiscard]] bool reserve(std::size_t capacity, MemoryAdvice advice = nullptr) noexcept {
    if (capacity <= capacity_ && alone()) return true;
    return replace(capacity > size_ ? capacity : size_, size_, advice);
  }

  /// `size` elements of its own; new ones are not initialised. False as for reserve().
  [[nodiscard]] bool resize(std::size_t size, MemoryAdvice advice = nullptr) noexcept {
    if (!reserve(size, advice)) return false;
    size_ = size;
    return true;
  }

  /// Makes the array its own, of which only the first `kept` elements have to be kept.
  [[nodiscard]] bool own(std::size_t kept, MemoryAdvice advice = nullptr) noexcept {
    return alone() || replace(capacity_, kept < size_ ? kept : size_, advice);
  }

  /// The first `size` of its elements. Neither needs memory nor writes to the array.
  void shrink(std::size_t size) noexcept { size_ = size < size_ ? size : size_; }

  [[nodiscard]] const T* data() const { return data_; }
  /// To be written to; only where alone().
  [[nodiscard]] T* writable() { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::size_t capacity() const { return capacity_; }
  /// Of the array, whoever owns it; not of the line that counts owners.
  [[nodiscard]] std::size_t bytes() const { return capacity_ * sizeof(T); }
  /// bytes() where others own the array too, else 0.
  [[nodiscard]] std::size_t shared_bytes() const { return alone() ? 0 : bytes(); }

 private:
  using Count = std::atomic<std::int64_t>;
  static_assert(sizeof(Count) <= kAlignment && alignof(T) <= kAlignment);

  [[nodiscard]] Count* owners() const {
    return reinterpret_cast<Count*>(reinterpret_cast<std::byte*>(data_) - kAlignment);
  }

  // An array of its own of `capacity` elements, of which the first `kept` are those of this one.
  bool replace(std::size_t capacity, std::size_t kept, MemoryAdvice advice) noexcept {
    if (capacity > (static_cast<std::size_t>(PTRDIFF_MAX) - kAlignment) / sizeof(T)) return false;
    void* memory = ::operator new (kAlignment + capacity * sizeof(T), std::align_val_t{kAlignment},
                                   std::nothrow);
    if (memory == nullptr) return false;
    SharedArray fresh;
    fresh.data_ = reinterpret_cast<T*>(static_cast<std::byte*>(memory) + kAlignment);
    fresh.size_ = size_;
    fresh.capacity_ = capacity;
    if (advice != nullptr) advice(fresh.data_, fresh.bytes());
    new (memory) Count(1);
    if (kept != 0) std::memcpy(fresh.data_, data_, kept * sizeof(T));
    *this = std::move(fresh);
    return true;
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace magicpig::inline MAGICPIG_ABI

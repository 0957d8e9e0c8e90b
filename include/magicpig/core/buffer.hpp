// SPDX-License-Identifier: Apache-2.0
// An owned, cache-line-aligned array whose growth reports failure instead of throwing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Alignment of every array of the library: a cache line, and the widest vector register.
inline constexpr std::size_t kAlignment = 64;

/// Told of an array before anything is written to it, so that a host may choose its pages: huge
/// ones (advise_huge_pages() in core/huge_pages.hpp), or those of a NUMA node. Called on the thread
/// that allocates; the array may begin and end within a page, and is freed without another call.
using MemoryAdvice = void (*)(void* data, std::size_t bytes) noexcept;

/// Owned array of trivially copyable T. Not copyable; moved from, it is empty.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer taken(std::move(other));
    std::swap(data_, taken.data_);
    std::swap(size_, taken.size_);
    std::swap(capacity_, taken.capacity_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete (data_, std::align_val_t{kAlignment}); }

  /// Room for `capacity` elements; false when memory is short, and then nothing has changed. New
  /// memory is shown to `advice`, if there is one.
  [[nodiscard]] bool reserve(std::size_t capacity, MemoryAdvice advice = nullptr) noexcept {
    if (capacity <= capacity_) return true;
    if (capacity > static_cast<std::size_t>(PTRDIFF_MAX) / sizeof(T)) return false;
    void* fresh = ::operator new (capacity * sizeof(T), std::align_val_t{kAlignment}, std::nothrow);
    if (fresh == nullptr) return false;
    if (advice != nullptr) advice(fresh, capacity * sizeof(T));
    if (size_ != 0) std::memcpy(fresh, data_, size_ * sizeof(T));
    ::operator delete (data_, std::align_val_t{kAlignment});
    data_ = static_cast<T*>(fresh);
    capacity_ = capacity;
    return true;
  }

  /// `size` elements; new ones are not initialised. False as for reserve().
  [[nodiscard]] bool resize(std::size_t size, MemoryAdvice advice = nullptr) noexcept {
    if (!reserve(size, advice)) return false;
    size_ = size;
    return true;
  }

  [[nodiscard]] T* data() { return data_; }
  [[nodiscard]] const T* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::size_t bytes() const { return capacity_ * sizeof(T); }
  [[nodiscard]] std::span<T> span() { return {data_, size_}; }
  [[nodiscard]] std::span<const T> span() const { return {data_, size_}; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace magicpig::inline MAGICPIG_ABI

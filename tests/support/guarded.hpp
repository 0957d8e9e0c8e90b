// SPDX-License-Identifier: Apache-2.0
// Arrays whose neighbouring pages fault: a read or write one scalar too far ends the test program.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>

namespace magicpig::test {

/// Which end of the array lies at a page that must not be touched.
enum class Guard { kBefore, kBehind };

/// `size` value-initialised T; T is trivial.
template <class T>
class GuardedArray {
 public:
  GuardedArray(std::size_t size, Guard guard) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inside = (size * sizeof(T) + page - 1) / page * page;
    bytes_ = inside + 2 * page;
    void* memory = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    base_ = static_cast<std::byte*>(memory);
    std::byte* begin = base_ + page;
    if (inside != 0 && mprotect(begin, inside, PROT_READ | PROT_WRITE) != 0) std::abort();
    if (guard == Guard::kBehind) begin += inside - size * sizeof(T);
    data_ = reinterpret_cast<T*>(begin);
  }
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;
  ~GuardedArray() { munmap(base_, bytes_); }

  [[nodiscard]] T* data() { return data_; }
  [[nodiscard]] T& operator[](std::size_t i) { return data_[i]; }

 private:
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
  T* data_ = nullptr;
};

}  // namespace magicpig::test

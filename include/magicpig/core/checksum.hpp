// SPDX-License-Identifier: Apache-2.0
// A number that tells whether bytes are the same: of blobs, and of what indexes are made with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// FNV-1a over 64-bit words in place of bytes, with a mixing step at the end: one changed word
/// always changes the sum, anything else but for a chance of 2^-64. Not a protection against those
/// who mean harm. Words are read as this machine stores them.
/// Source: Fowler, Noll and Vo (FNV-1a); the last step from splitmix64, Steele et al. 2014.
class Checksum {
 public:
  void add(std::span<const std::byte> bytes) {
    std::size_t i = 0;
    for (; i + 8 <= bytes.size(); i += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, bytes.data() + i, 8);
      mix(word);
    }
    if (i < bytes.size()) {
      std::uint64_t word = 0;
      std::memcpy(&word, bytes.data() + i, bytes.size() - i);
      mix(word);
    }
    mix(bytes.size());  // so that zeros at the end count
  }

  template <class T>
  void add_value(T x) {
    static_assert(std::is_arithmetic_v<T>);
    add(std::as_bytes(std::span<const T>(&x, 1)));
  }
  template <class T>
  void add_array(std::span<const T> values) {
    static_assert(std::has_unique_object_representations_v<T> || std::is_floating_point_v<T>);
    add(std::as_bytes(values));
  }

  [[nodiscard]] std::uint64_t value() const {
    std::uint64_t x = sum_;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
  }

 private:
  void mix(std::uint64_t word) { sum_ = (sum_ ^ word) * 0x100000001B3ULL; }

  std::uint64_t sum_ = 0xCBF29CE484222325ULL;
};

}  // namespace magicpig::inline MAGICPIG_ABI

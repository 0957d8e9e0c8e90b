// SPDX-License-Identifier: Apache-2.0
// The segments of an index, so many per KV head.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <utility>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Segments [count, kv_heads]. Segments can be moved and say their bytes(); those that share()
/// their arrays make a table that does. It grows by half, so that a segment more costs little.
template <class SegmentType>
class SegmentTable {
 public:
  explicit SegmentTable(int kv_heads) : kv_heads_(kv_heads) {}

  [[nodiscard]] int kv_heads() const { return kv_heads_; }
  [[nodiscard]] int count() const { return count_; }
  [[nodiscard]] SegmentType& at(int number, int kv_head) { return all_[place(number, kv_head)]; }
  [[nodiscard]] const SegmentType& at(int number, int kv_head) const {
    return all_[place(number, kv_head)];
  }

  /// Room for `count` segments. False when memory is short; nothing has changed then.
  [[nodiscard]] bool reserve(int count) noexcept {
    if (count <= capacity_) return true;
    const int room = capacity_ == 0 ? count : count + count / 2;
    std::unique_ptr<SegmentType[]> all(new (std::nothrow) SegmentType[size(room)]);
    if (all == nullptr) return false;
    for (std::size_t i = 0; i < size(count_); ++i) all[i] = std::move(all_[i]);
    all_ = std::move(all);
    capacity_ = room;
    return true;
  }

  /// `count` segments: new ones are empty, those behind are given back. Needs reserve().
  void resize(int count) noexcept {
    for (std::size_t i = size(count); i < size(count_); ++i) all_[i] = SegmentType();
    count_ = count;
  }

  /// Exchanges the segments from `first` on, empty ones beyond count(), for those of `other`. Needs
  /// reserve().
  void exchange(int first, SegmentTable& other) noexcept {
    if (first + other.count_ > count_) count_ = first + other.count_;
    for (std::size_t i = 0; i < size(other.count_); ++i) {
      std::swap(all_[size(first) + i], other.all_[i]);
    }
  }

  /// Becomes a table of the segments of `other`, shared with it. False when memory is short.
  [[nodiscard]] bool share(const SegmentTable& other) noexcept {
    if (!reserve(other.count_)) return false;
    for (std::size_t i = 0; i < size(other.count_); ++i) all_[i] = other.all_[i].share();
    count_ = other.count_;
    return true;
  }

  /// Of all arrays.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = 0;
    for (std::size_t i = 0; i < size(count_); ++i) sum += all_[i].bytes();
    return sum;
  }
  /// Of those that other tables share.
  [[nodiscard]] std::size_t shared_bytes() const {
    std::size_t sum = 0;
    for (std::size_t i = 0; i < size(count_); ++i) sum += all_[i].shared_bytes();
    return sum;
  }

 private:
  [[nodiscard]] std::size_t size(int count) const {
    return static_cast<std::size_t>(count) * static_cast<std::size_t>(kv_heads_);
  }
  [[nodiscard]] std::size_t place(int number, int kv_head) const {
    return size(number) + static_cast<std::size_t>(kv_head);
  }

  int kv_heads_;
  int count_ = 0;
  int capacity_ = 0;
  std::unique_ptr<SegmentType[]> all_;  // [capacity, kv_heads]
};

}  // namespace magicpig::inline MAGICPIG_ABI

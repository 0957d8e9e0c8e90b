// SPDX-License-Identifier: Apache-2.0
// The tasks of a decode step, and where in the workspace each of them keeps what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cpu/attend_totals.hpp"
#include "magicpig/request.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// One task: a part of the exact tokens of one KV head of one query row of a request; the first
/// part draws, too.
struct DecodeTask {
  std::size_t request = 0;
  int row = 0;
  int kv_head = 0;
  int part = 0;
  int parts = 1;
  std::size_t slot = 0;  ///< place of the task's totals, where there are several parts
};

/// The workspace of a step, from its start: for each query row the number of its first task and
/// slot, totals of heads that are cut into parts, scratch of each worker. Every array begins with a
/// cache line of its own, so that no two workers write to the same one.
class DecodeLayout {
 public:
  DecodeLayout(const Shape& shape, std::size_t scratch_bytes, int workers)
      : shape_(shape), scratch_bytes_(round_up(scratch_bytes)), workers_(workers) {
    Arena arena;
    (void)AttendTotals::carve(arena, shape.group(), shape.value_dim);
    slot_bytes_ = round_up(arena.bytes_needed());
  }

  /// Counts more query rows, each cut as `exact` says.
  void add(std::size_t rows, const ExactParts& exact) {
    const auto more =
        rows * static_cast<std::size_t>(shape_.kv_heads) * static_cast<std::size_t>(exact.count());
    rows_ += rows;
    tasks_ += more;
    if (exact.count() > 1) slots_ += more;
  }

  [[nodiscard]] std::size_t tasks() const { return tasks_; }
  [[nodiscard]] int workers() const { return workers_; }
  /// Of workspace, of any alignment.
  [[nodiscard]] std::size_t bytes() const {
    return kAlignment + list_bytes() + slots_ * slot_bytes_ +
           static_cast<std::size_t>(workers_) * scratch_bytes_;
  }

  /// Writes down where the tasks of each query row begin.
  template <class Plan, class Requests>
  void fill(const Plan& plan, const Requests& requests, std::span<std::byte> workspace) const {
    First* list = first(workspace);
    First next;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      next.request = static_cast<std::uint32_t>(i);
      for (int row = 0; row < requests[i].query_rows; ++row) {
        next.row = static_cast<std::uint32_t>(row);
        next.parts = static_cast<std::uint32_t>(exact_parts(plan, requests[i], row).count());
        *list++ = next;
        const std::uint32_t more = static_cast<std::uint32_t>(shape_.kv_heads) * next.parts;
        next.task += more;
        if (next.parts > 1) next.slot += more;
      }
    }
  }

  /// Task number `task` < tasks(). Needs fill().
  [[nodiscard]] DecodeTask find(std::span<std::byte> workspace, int task) const {
    const First* list = first(workspace);
    std::size_t low = 0;  // the last row whose first task is not behind `task`
    for (std::size_t high = rows_; high - low > 1;) {
      const std::size_t middle = low + (high - low) / 2;
      (list[middle].task <= static_cast<std::uint32_t>(task) ? low : high) = middle;
    }
    const First& at = list[low];
    const std::uint32_t number = static_cast<std::uint32_t>(task) - at.task;
    return {.request = at.request,
            .row = static_cast<int>(at.row),
            .kv_head = static_cast<int>(number / at.parts),
            .part = static_cast<int>(number % at.parts),
            .parts = static_cast<int>(at.parts),
            .slot = at.slot + number};
  }

  [[nodiscard]] AttendTotals totals(std::span<std::byte> workspace, std::size_t slot) const {
    Arena arena({base(workspace) + list_bytes() + slot * slot_bytes_, slot_bytes_});
    return AttendTotals::carve(arena, shape_.group(), shape_.value_dim);
  }

  [[nodiscard]] Arena scratch(std::span<std::byte> workspace, int worker) const {
    return Arena({base(workspace) + list_bytes() + slots_ * slot_bytes_ +
                      static_cast<std::size_t>(worker) * scratch_bytes_,
                  scratch_bytes_});
  }

 private:
  struct First {
    std::uint32_t request = 0;
    std::uint32_t row = 0;
    std::uint32_t task = 0;
    std::uint32_t slot = 0;
    std::uint32_t parts = 1;
  };

  static std::size_t round_up(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  static std::byte* base(std::span<std::byte> workspace) {
    const auto address = reinterpret_cast<std::uintptr_t>(workspace.data());
    return workspace.data() + (kAlignment - address % kAlignment) % kAlignment;
  }
  static First* first(std::span<std::byte> workspace) {
    return reinterpret_cast<First*>(base(workspace));
  }
  [[nodiscard]] std::size_t list_bytes() const { return round_up(rows_ * sizeof(First)); }

  Shape shape_;
  std::size_t scratch_bytes_;
  std::size_t slot_bytes_ = 0;
  int workers_;
  std::size_t rows_ = 0;  // of queries, of all requests
  std::size_t tasks_ = 0;
  std::size_t slots_ = 0;
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// A table of segments: it grows, is cut, shares and takes over.
#include "magicpig/index/segment_table.hpp"

#include <doctest/doctest.h>

#include <cstddef>

#include "allocations.hpp"
#include "magicpig/core/shared.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

struct Numbered {
  SharedArray<int> number;

  [[nodiscard]] Numbered share() const noexcept { return {.number = number.share()}; }
  [[nodiscard]] std::size_t bytes() const { return number.bytes(); }
  [[nodiscard]] std::size_t shared_bytes() const { return number.shared_bytes(); }
};

// Segments [first, count) of three heads, numbered from `start` on.
void number(SegmentTable<Numbered>& table, int first, int start) {
  for (int s = first; s < table.count(); ++s) {
    for (int h = 0; h < 3; ++h) {
      REQUIRE(table.at(s, h).number.resize(1));
      table.at(s, h).number.writable()[0] = start + 10 * s + h;
    }
  }
}

int at(const SegmentTable<Numbered>& table, int s, int h) {
  return table.at(s, h).number.data()[0];
}

TEST_CASE("SegmentTable.keeps_its_segments_while_it_grows_and_gives_back_what_is_cut_off") {
  SegmentTable<Numbered> table(3);
  for (int count = 1; count <= 20; ++count) {
    REQUIRE(table.reserve(count));
    table.resize(count);
    number(table, count - 1, 0);
    CHECK(table.bytes() == static_cast<std::size_t>(count) * 3 * sizeof(int));
  }
  for (int s = 0; s < 20; ++s) {
    for (int h = 0; h < 3; ++h) CHECK(at(table, s, h) == 10 * s + h);
  }
  fail_allocations_after(0);
  CHECK_FALSE(table.reserve(1000));
  fail_allocations_after(-1);
  CHECK(table.count() == 20);
  CHECK(at(table, 19, 2) == 192);
  table.resize(4);
  CHECK(table.bytes() == 12 * sizeof(int));
  table.resize(5);
  CHECK(table.at(4, 0).bytes() == 0);
}

TEST_CASE("SegmentTable.shares_and_takes_over_segments") {
  SegmentTable<Numbered> table(3);
  REQUIRE(table.reserve(5));
  table.resize(5);
  number(table, 0, 0);
  SegmentTable<Numbered> other(3);
  REQUIRE(other.share(table));
  CHECK(other.count() == 5);
  CHECK(table.shared_bytes() == table.bytes());
  CHECK(&table.at(2, 1).number.data()[0] == &other.at(2, 1).number.data()[0]);
  SegmentTable<Numbered> fresh(3);
  REQUIRE(fresh.reserve(3));
  fresh.resize(3);
  number(fresh, 0, 500);
  REQUIRE(other.reserve(7));
  other.exchange(4, fresh);  // the last one, and two behind it
  CHECK(fresh.count() == 3);
  CHECK(at(fresh, 0, 2) == 42);
  CHECK(fresh.bytes() == 3 * sizeof(int));
  fresh.resize(0);
  CHECK(other.count() == 7);
  CHECK(at(other, 3, 2) == 32);
  CHECK(at(other, 4, 0) == 500);
  CHECK(at(other, 6, 2) == 522);
  CHECK(at(table, 4, 0) == 40);
  CHECK(table.shared_bytes() == 12 * sizeof(int));
}

}  // namespace

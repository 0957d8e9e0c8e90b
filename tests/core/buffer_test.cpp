// SPDX-License-Identifier: Apache-2.0
// Buffer: growth, failure and moves.
#include "magicpig/core/buffer.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

namespace {

using namespace magicpig;

Buffer<int> counted(int size) {
  Buffer<int> buffer;
  REQUIRE(buffer.resize(static_cast<std::size_t>(size)));
  for (int i = 0; i < size; ++i) buffer.data()[i] = i;
  return buffer;
}

bool holds_counted(const Buffer<int>& buffer, int size) {
  if (buffer.size() < static_cast<std::size_t>(size)) return false;
  for (int i = 0; i < size; ++i) {
    if (buffer.data()[i] != i) return false;
  }
  return true;
}

TEST_CASE("a buffer starts empty and without memory") {
  const Buffer<double> buffer;
  CHECK(buffer.size() == 0);
  CHECK(buffer.bytes() == 0);
  CHECK(buffer.data() == nullptr);
  CHECK(buffer.span().empty());
}

TEST_CASE("a buffer lies on a cache line, of whatever size it is") {
  for (std::size_t size = 1; size < 200; size += 7) {
    Buffer<std::uint16_t> buffer;
    REQUIRE(buffer.resize(size));
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % kAlignment == 0);
    CHECK(buffer.size() == size);
    CHECK(buffer.bytes() == size * sizeof(std::uint16_t));
  }
}

TEST_CASE("a buffer keeps its elements as it grows, and its memory as it shrinks") {
  Buffer<int> buffer = counted(10);
  REQUIRE(buffer.resize(100000));
  CHECK(holds_counted(buffer, 10));
  const int* place = buffer.data();
  REQUIRE(buffer.resize(3));
  CHECK(buffer.size() == 3);
  CHECK(buffer.data() == place);
  CHECK(buffer.bytes() == 100000 * sizeof(int));
  REQUIRE(buffer.resize(10));
  CHECK(holds_counted(buffer, 10));
}

TEST_CASE("reserve() takes memory and leaves the size alone") {
  Buffer<int> buffer = counted(4);
  REQUIRE(buffer.reserve(1000));
  CHECK(buffer.size() == 4);
  CHECK(holds_counted(buffer, 4));
  const int* place = buffer.data();
  REQUIRE(buffer.resize(1000));
  CHECK(buffer.data() == place);
}

TEST_CASE("a size that no memory can hold is refused and loses nothing") {
  Buffer<int> buffer = counted(10);
  const int* place = buffer.data();
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
  // Products with the element size overflow for all of these.
  for (const std::size_t absurd : {kMost, kMost / 2, kMost / 4 + 1, kMost / 8 + 1}) {
    CAPTURE(absurd);
    CHECK(!buffer.reserve(absurd));
    CHECK(!buffer.resize(absurd));
    CHECK(buffer.data() == place);
    CHECK(buffer.size() == 10);
    CHECK(holds_counted(buffer, 10));
  }
}

TEST_CASE("moving a buffer hands over the memory and leaves the source empty") {
  Buffer<int> source = counted(10);
  const int* place = source.data();
  Buffer<int> made(std::move(source));
  CHECK(made.data() == place);
  CHECK(holds_counted(made, 10));
  CHECK(source.size() == 0);  // NOLINT: moved from on purpose
  CHECK(source.data() == nullptr);
  CHECK(source.bytes() == 0);

  Buffer<int> assigned = counted(50);
  assigned = std::move(made);
  CHECK(assigned.data() == place);
  CHECK(assigned.size() == 10);
  CHECK(made.size() == 0);  // NOLINT
  CHECK(made.data() == nullptr);

  REQUIRE(made.resize(5));  // and it can be used again
  CHECK(made.size() == 5);
}

TEST_CASE("a buffer survives being assigned to itself") {
  Buffer<int> buffer = counted(10);
  Buffer<int>& same = buffer;
  buffer = std::move(same);
  CHECK(holds_counted(buffer, 10));
}

}  // namespace

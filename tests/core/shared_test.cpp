// SPDX-License-Identifier: Apache-2.0
// Shared arrays: owners that read the same memory, and writers that make it their own.
#include "magicpig/core/shared.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "allocations.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

SharedArray<int> numbers(std::size_t count) {
  SharedArray<int> array;
  REQUIRE(array.resize(count));
  std::iota(array.writable(), array.writable() + count, 0);
  return array;
}

TEST_CASE("SharedArray.is_shared_without_a_copy_and_copied_by_who_would_write") {
  SharedArray<int> a = numbers(100);
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % kAlignment == 0);
  CHECK(a.alone());
  CHECK(a.shared_bytes() == 0);
  SharedArray<int> b = a.share();
  CHECK(b.data() == a.data());
  CHECK_FALSE(a.alone());
  CHECK_FALSE(b.alone());
  CHECK(a.shared_bytes() == 400);
  b.shrink(50);
  CHECK(a.size() == 100);
  REQUIRE(b.own(10));
  CHECK(b.data() != a.data());
  CHECK(a.alone());
  CHECK(b.alone());
  CHECK(b.size() == 50);
  for (int i = 0; i < 10; ++i) CHECK(b.data()[i] == i);
  b.writable()[3] = 77;
  CHECK(a.data()[3] == 3);
  // Growing a shared one copies, growing one of its own within its room does not.
  SharedArray<int> c = a.share();
  REQUIRE(c.resize(101));
  CHECK(c.data() != a.data());
  for (int i = 0; i < 100; ++i) CHECK(c.data()[i] == i);
  c.shrink(4);
  const int* place = c.data();
  REQUIRE(c.resize(101));
  CHECK(c.data() == place);
}

TEST_CASE("SharedArray.is_freed_by_its_last_owner_and_stays_as_it_was_without_memory") {
  const std::int64_t before = outstanding_allocations();
  {
    SharedArray<int> a = numbers(10);
    SharedArray<int> b = a.share();
    CHECK(outstanding_allocations() == before + 1);
    a = SharedArray<int>();
    CHECK(outstanding_allocations() == before + 1);
    CHECK(b.alone());
    SharedArray<int> c = b.share();
    const int* place = c.data();
    fail_allocations_after(0);
    CHECK_FALSE(c.own(10));
    CHECK_FALSE(c.resize(5));
    CHECK_FALSE(c.reserve(1000));
    fail_allocations_after(-1);
    CHECK(c.data() == place);
    CHECK(c.size() == 10);
    SharedArray<int> moved = std::move(c);
    CHECK(moved.data() == place);
    CHECK_FALSE(moved.alone());
    CHECK(SharedArray<int>().share().alone());
  }
  CHECK(outstanding_allocations() == before);
}

// ThreadSanitizer watches: each thread reads what it shares and writes as soon as it is alone.
TEST_CASE("SharedArray.has_owners_on_many_threads") {
  SharedArray<int> array = numbers(1000);
  std::vector<std::thread> threads;
  std::vector<int> sums(8);
  for (std::size_t i = 0; i < sums.size(); ++i) {
    threads.emplace_back([&sums, i, own = array.share()]() mutable {
      for (int round = 0; round < 100; ++round) {
        SharedArray<int> again = own.share();
        sums[i] += again.data()[round];
        if (round % 10 != 9) continue;
        again = SharedArray<int>();
        if (!own.own(1000)) return;
        for (int j = 0; j < 1000; ++j) own.writable()[j] += 0;
      }
    });
  }
  array = SharedArray<int>();
  for (std::thread& thread : threads) thread.join();
  for (const int sum : sums) CHECK(sum == 4950);
}

}  // namespace

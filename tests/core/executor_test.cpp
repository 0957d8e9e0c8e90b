// SPDX-License-Identifier: Apache-2.0
// What every executor must do, over the serial one and pools of several sizes.
#include "magicpig/core/executor.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace magicpig;

std::unique_ptr<ThreadPool> make_pool(int workers) {
  auto pool = ThreadPool::create(workers);
  REQUIRE(pool.ok());
  REQUIRE((*pool)->workers() == workers);
  return std::move(*pool);
}

// One line per model.
template <class Check>
void for_each_executor(const Check& check) {
  SUBCASE("serial") {
    SerialExecutor serial;
    check(serial);
  }
  SUBCASE("a pool of 1") { check(*make_pool(1)); }
  SUBCASE("a pool of 2") { check(*make_pool(2)); }
  SUBCASE("a pool of 3") { check(*make_pool(3)); }
  SUBCASE("a pool of 7") { check(*make_pool(7)); }
}

TEST_CASE("every task runs exactly once, for any number of tasks") {
  for_each_executor([](auto& executor) {
    for (const int tasks : {0, 1, 2, 3, 7, 100, 5000}) {
      CAPTURE(tasks);
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      executor.parallel_for(tasks, [&](int task, int) { ++runs[static_cast<std::size_t>(task)]; });
      int wrong = 0;
      for (const auto& run : runs) wrong += run.load() != 1;
      CHECK(wrong == 0);
    }
  });
}

TEST_CASE("a negative number of tasks runs none") {
  for_each_executor([](auto& executor) {
    int runs = 0;
    executor.parallel_for(-5, [&](int, int) { ++runs; });
    CHECK(runs == 0);
  });
}

TEST_CASE("workers are in range, and no two calls with the same worker overlap") {
  for_each_executor([](auto& executor) {
    std::vector<std::atomic<bool>> busy(static_cast<std::size_t>(executor.workers()));
    std::atomic<int> violations{0};
    for (int call = 0; call < 20; ++call) {
      executor.parallel_for(200, [&](int, int worker) {
        if (worker < 0 || worker >= executor.workers()) {
          ++violations;
          return;
        }
        auto& mine = busy[static_cast<std::size_t>(worker)];
        if (mine.exchange(true)) ++violations;
        std::this_thread::yield();  // gives an overlap a chance to happen
        mine.store(false);
      });
    }
    CHECK(violations.load() == 0);
  });
}

TEST_CASE("what the tasks wrote is visible when the call returns, call after call") {
  for_each_executor([](auto& executor) {
    std::vector<int> values(257, 0);  // plain ints: a missing barrier is a data race
    for (int call = 1; call <= 500; ++call) {
      executor.parallel_for(257,
                            [&](int task, int) { values[static_cast<std::size_t>(task)] += call; });
      if (call % 100 != 0) continue;
      int wrong = 0;
      for (const int value : values) wrong += value != call * (call + 1) / 2;
      CHECK(wrong == 0);
    }
  });
}

TEST_CASE("a worker's scratch needs no lock") {
  for_each_executor([](auto& executor) {
    std::vector<int> counts(static_cast<std::size_t>(executor.workers()), 0);
    for (int call = 0; call < 50; ++call) {
      executor.parallel_for(300,
                            [&](int, int worker) { ++counts[static_cast<std::size_t>(worker)]; });
    }
    int total = 0;
    for (const int count : counts) total += count;
    CHECK(total == 50 * 300);
  });
}

TEST_CASE("a pool serves callers from several threads, each with all of its own tasks") {
  for (const int workers : {1, 2, 3, 7}) {
    CAPTURE(workers);
    const std::unique_ptr<ThreadPool> pool = make_pool(workers);
    constexpr int kCallers = 4;
    constexpr int kTasks = 50;
    std::vector<int> runs(kCallers * kTasks, 0);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kCallers; ++caller) {
      callers.emplace_back([&pool, &runs, caller] {
        for (int call = 0; call < 40; ++call) {
          pool->parallel_for(kTasks, [&](int task, int) {
            ++runs[static_cast<std::size_t>(caller * kTasks + task)];
          });
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    int wrong = 0;
    for (const int count : runs) wrong += count != 40;
    CHECK(wrong == 0);
  }
}

TEST_CASE("every worker of a pool takes part: as many tasks as workers can wait for each other") {
  const std::unique_ptr<ThreadPool> pool = make_pool(3);
  std::atomic<int> arrived{0};
  std::vector<int> tasks_of(3, 0);
  pool->parallel_for(3, [&](int, int worker) {
    ++tasks_of[static_cast<std::size_t>(worker)];
    ++arrived;
    while (arrived.load() < 3) std::this_thread::yield();
  });
  CHECK(tasks_of == std::vector<int>{1, 1, 1});
}

TEST_CASE("pools start and end unused, many times") {
  for (int i = 0; i < 50; ++i) CHECK(make_pool(1 + i % 4)->workers() == 1 + i % 4);
}

TEST_CASE("a pool outside its bounds is refused with the number and the bounds") {
  for (const int workers : {-1, 0, 1025}) {
    const auto pool = ThreadPool::create(workers);
    REQUIRE(!pool.ok());
    CHECK(pool.status().code() == ErrorCode::kInvalidArgument);
    CHECK(std::string(pool.status().message()) ==
          "workers " + std::to_string(workers) + " must lie in [1, 1024]");
  }
}

TEST_CASE("both executors model the concept") {
  static_assert(Executor<SerialExecutor>);
  static_assert(Executor<ThreadPool>);
  CHECK(SerialExecutor::workers() == 1);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// What every executor must do, over the serial one, and pools and OpenMP of several sizes.
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

#if defined(_OPENMP)
#include "magicpig/cpu/openmp.hpp"
#endif

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
#if defined(_OPENMP)
  SUBCASE("OpenMP with 1") { check(*OpenMpExecutor::create(1)); }
  SUBCASE("OpenMP with 2") { check(*OpenMpExecutor::create(2)); }
  SUBCASE("OpenMP with 3") { check(*OpenMpExecutor::create(3)); }
  SUBCASE("OpenMP with 7") { check(*OpenMpExecutor::create(7)); }
#endif
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

TEST_CASE("callers from several threads are served, each with all of its own tasks") {
  for_each_executor([](auto& executor) {
    constexpr int kCallers = 4;
    constexpr int kTasks = 50;
    std::vector<int> runs(kCallers * kTasks, 0);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kCallers; ++caller) {
      callers.emplace_back([&executor, &runs, caller] {
        for (int call = 0; call < 40; ++call) {
          executor.parallel_for(kTasks, [&](int task, int) {
            ++runs[static_cast<std::size_t>(caller * kTasks + task)];
          });
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    int wrong = 0;
    for (const int count : runs) wrong += count != 40;
    CHECK(wrong == 0);
  });
}

TEST_CASE("every worker takes part: as many tasks as workers can wait for each other") {
  for_each_executor([](auto& executor) {
    const int workers = executor.workers();
    std::atomic<int> arrived{0};
    std::vector<int> tasks_of(static_cast<std::size_t>(workers), 0);
    executor.parallel_for(workers, [&](int, int worker) {
      ++tasks_of[static_cast<std::size_t>(worker)];
      ++arrived;
      while (arrived.load() < workers) std::this_thread::yield();
    });
    CHECK(tasks_of == std::vector<int>(static_cast<std::size_t>(workers), 1));
  });
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

#if defined(_OPENMP)

TEST_CASE("OpenMP with workers outside the bounds is refused with the number and the bounds") {
  for (const int workers : {-1, 0, 1025}) {
    const auto executor = OpenMpExecutor::create(workers);
    REQUIRE(!executor.ok());
    CHECK(executor.status().code() == ErrorCode::kInvalidArgument);
    CHECK(std::string(executor.status().message()) ==
          "workers " + std::to_string(workers) + " must lie in [1, 1024]");
  }
}

// Runs of each task, called from every thread of an enclosing region of `team` threads; tasks that
// ran on a worker out of range do not count.
struct Nested {
  std::vector<std::atomic<int>> runs = std::vector<std::atomic<int>>(100);
  std::atomic<int> threads{0};
  std::atomic<int> largest_worker{0};

  explicit Nested(int team) {
    const auto executor = OpenMpExecutor::create(3);
#pragma omp parallel num_threads(team)
    {
      ++threads;
      executor->parallel_for(100, [&](int task, int worker) {
        if (worker > largest_worker.load()) largest_worker.store(worker);
        if (worker >= 0 && worker < 3) ++runs[static_cast<std::size_t>(task)];
      });
    }
  }

  [[nodiscard]] bool each_thread_ran_all() const {
    bool all = threads.load() > 0;
    for (const auto& run : runs) all = all && run.load() == threads.load();
    return all;
  }
};

TEST_CASE("inside a parallel region each thread runs all tasks of its own call as worker 0") {
  for (const int team : {1, 2, 4}) {
    CAPTURE(team);
    const Nested nested(team);
    CHECK(nested.threads.load() == team);
    CHECK(nested.each_thread_ran_all());
    if (team > 1) CHECK(nested.largest_worker.load() == 0);
  }
}

TEST_CASE("inside a parallel region a host may allow nested teams, which run all tasks too") {
  const int levels = omp_get_max_active_levels();
  omp_set_max_active_levels(2);
  const Nested nested(2);
  omp_set_max_active_levels(levels);
  CHECK(nested.each_thread_ran_all());
}

TEST_CASE("a body may open a call of its own") {
  const auto executor = OpenMpExecutor::create(3);
  std::vector<std::atomic<int>> runs(20);
  executor->parallel_for(4, [&](int, int) {
    executor->parallel_for(20, [&](int task, int) { ++runs[static_cast<std::size_t>(task)]; });
  });
  for (const auto& run : runs) CHECK(run.load() == 4);
}

TEST_CASE("where OpenMP gives fewer threads than asked for, those run all tasks") {
  const int dynamic = omp_get_dynamic();
  omp_set_dynamic(1);
  const auto executor = OpenMpExecutor::create(1024);
  std::vector<std::atomic<int>> runs(3000);
  std::vector<std::atomic<bool>> worked(1024);
  executor->parallel_for(3000, [&](int task, int worker) {
    ++runs[static_cast<std::size_t>(task)];
    worked[static_cast<std::size_t>(worker)] = true;
  });
  omp_set_dynamic(dynamic);
  int wrong = 0;
  for (const auto& run : runs) wrong += run.load() != 1;
  CHECK(wrong == 0);
  // Fewer it was, or this has tested nothing.
  if (omp_get_num_procs() < 1024) CHECK(!worked.back().load());
}

#endif

}  // namespace

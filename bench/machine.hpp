// SPDX-License-Identifier: Apache-2.0
// The machine that a benchmark runs on: its caches, its read bandwidth, threads that are awake.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/executor.hpp"

namespace magicpig::bench {

/// Ends the program with a message: benchmarks have nobody to hand an error to.
[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "error: %s\n", message);
  std::exit(1);
}

[[nodiscard]] inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Bytes of the last-level cache, 32 MiB where the system does not say.
[[nodiscard]] inline std::size_t last_level_cache() {
  int size = 0;
  for (const auto& cache : ::benchmark::CPUInfo::Get().caches) {
    if (cache.level >= 3) size = std::max(size, cache.size);
  }
  return size > 0 ? static_cast<std::size_t>(size) : std::size_t{32} << 20;
}

[[nodiscard]] inline std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const std::size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

/// CPUs that this process may run on; asked for once, before anything is pinned.
[[nodiscard]] inline const std::vector<int>& allowed_cpus() {
  static const std::vector<int> cpus = [] {
    std::vector<int> list;
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
      for (int c = 0; c < CPU_SETSIZE; ++c) {
        if (CPU_ISSET(c, &set)) list.push_back(c);
      }
    }
#endif
    return list;
  }();
  return cpus;
}

inline void pin_this_thread(int number) {
#if defined(__linux__)
  const std::vector<int>& cpus = allowed_cpus();
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus[static_cast<std::size_t>(number) % cpus.size()], &set);
  (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
  (void)number;
#endif
}

/// A pool whose threads are each pinned to a CPU of their own and have run together for 50 ms.
/// Without that, fresh threads often share one CPU for their first milliseconds.
[[nodiscard]] inline std::unique_ptr<ThreadPool> make_warm_pool(int workers) {
  (void)allowed_cpus();
  auto pool = ThreadPool::create(workers);
  if (!pool.ok()) fail(pool.status().message());
  for (const double start = seconds_now(); seconds_now() - start < 0.05;) {
    std::atomic<int> arrived{0};
    (*pool)->parallel_for(workers, [&](int, int worker) {
      pin_this_thread(worker);
      // Nobody leaves before all have come, so each worker has one task.
      arrived.fetch_add(1);
      while (arrived.load() < workers) std::this_thread::yield();
    });
  }
  return std::move(*pool);
}

/// Bytes per second at which the pool's threads together read memory that is not in any cache: the
/// fastest of ten sums over a buffer of at least 4 last-level caches and 256 MiB.
[[nodiscard]] inline double read_bandwidth(ThreadPool& pool) {
  const std::size_t words = std::max(4 * last_level_cache(), std::size_t{256} << 20) / 8;
  Buffer<std::uint64_t> buffer;
  if (!buffer.resize(words)) fail("no memory to measure the read bandwidth");
  const auto parts = static_cast<std::size_t>(pool.workers());
  const std::size_t part = words / parts;
  pool.parallel_for(pool.workers(), [&](int task, int) {
    std::uint64_t* from = buffer.data() + part * static_cast<std::size_t>(task);
    std::fill(from, from + part, 1);
  });
  double fastest = std::numeric_limits<double>::infinity();
  for (int pass = 0; pass < 10; ++pass) {
    const double start = seconds_now();
    pool.parallel_for(pool.workers(), [&](int task, int) {
      const std::uint64_t* from = buffer.data() + part * static_cast<std::size_t>(task);
      std::uint64_t sum = 0;  // a loop that compilers vectorise
      for (std::size_t i = 0; i < part; ++i) sum += from[i];
      ::benchmark::DoNotOptimize(sum);
    });
    fastest = std::min(fastest, seconds_now() - start);
  }
  return static_cast<double>(part * parts * 8) / fastest;
}

}  // namespace magicpig::bench

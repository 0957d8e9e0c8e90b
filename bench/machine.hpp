// SPDX-License-Identifier: Apache-2.0
// The machine that a benchmark runs on: its caches, its read bandwidth, threads that are awake.
#pragma once

#include <benchmark/benchmark.h>
#include <hwy/highway.h>

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
#include <span>
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
#include "magicpig/core/prefetch.hpp"

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

/// A buffer of 4 last-level caches, 256 MiB at least, which is in no cache but for its end.
class ColdMemory {
 public:
  /// Reads all of it on the pool's threads, a part on each: nothing else is cached then.
  void empty_caches(ThreadPool& pool) {
    read(pool, [](const std::uint64_t* from, std::size_t count) {
      std::uint64_t sum = 0;  // a loop that compilers vectorise
      for (std::size_t i = 0; i < count; ++i) sum += from[i];
      return sum;
    });
  }

  /// Bytes per second that the pool's threads together read: the fastest of ten passes, five of
  /// them with prefetches a page ahead, which are faster where registers are narrow.
  [[nodiscard]] double read_bandwidth(ThreadPool& pool) {
    double fastest = std::numeric_limits<double>::infinity();
    const std::size_t bytes = words(pool).size() * sizeof(std::uint64_t);
    const auto note = [&](double start) { fastest = std::min(fastest, seconds_now() - start); };
    for (int pass = 0; pass < 5; ++pass) {
      double start = seconds_now();
      empty_caches(pool);
      note(start);
      start = seconds_now();
      read_with_prefetches(pool);
      note(start);
    }
    return static_cast<double>(bytes) / fastest;
  }

 private:
  // sum(first, count) of each thread's part.
  template <class Sum>
  void read(ThreadPool& pool, const Sum& sum) {
    const auto parts = static_cast<std::size_t>(pool.workers());
    const std::size_t part = words(pool).size() / parts;
    pool.parallel_for(pool.workers(), [&](int task, int) {
      const std::uint64_t total = sum(buffer_.data() + part * static_cast<std::size_t>(task), part);
      ::benchmark::DoNotOptimize(total);
    });
  }

  void read_with_prefetches(ThreadPool& pool) {
    read(pool, [](const std::uint64_t* from, std::size_t count) {
      constexpr std::size_t kLine = kCacheLine / sizeof(std::uint64_t);
      constexpr std::size_t kAhead = 4096 / sizeof(std::uint64_t);
      std::uint64_t sum = 0;
      for (std::size_t i = 0; i + kLine <= count; i += kLine) {
        prefetch_far(from + i + kAhead, kCacheLine);
        for (std::size_t j = 0; j < kLine; ++j) sum += from[i + j];
      }
      return sum;
    });
  }

  // Written once, by the threads that ask for it first.
  [[nodiscard]] std::span<const std::uint64_t> words(ThreadPool& pool) {
    if (buffer_.size() == 0) {
      constexpr std::size_t kPart = 1 << 20;
      const std::size_t bytes = std::max(4 * last_level_cache(), std::size_t{256} << 20);
      const std::size_t parts = bytes / sizeof(std::uint64_t) / kPart;
      if (!buffer_.resize(parts * kPart)) fail("no memory to empty the caches with");
      pool.parallel_for(static_cast<int>(parts), [&](int task, int) {
        std::uint64_t* from = buffer_.data() + kPart * static_cast<std::size_t>(task);
        std::fill(from, from + kPart, 1);
      });
    }
    return buffer_.span();
  }

  Buffer<std::uint64_t> buffer_;
};

/// Float multiply-adds per second of one thread: the fastest of ten runs of 12 chains that never
/// leave the registers, more than latency times issue rate of processors so far.
[[nodiscard]] inline double multiply_add_rate() {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  constexpr int kRounds = 1 << 18;
  double fastest = std::numeric_limits<double>::infinity();
  for (int pass = 0; pass < 10; ++pass) {
    float first = 1.0F;
    ::benchmark::DoNotOptimize(first);  // so that nothing is computed beforehand
    const auto x = hn::Set(d, first);
    const auto chain = [&](int number) {  // different numbers, or the compiler makes one of two
      return hn::Set(d, first + static_cast<float>(number));
    };
    auto a = chain(1), b = chain(2), c = chain(3), e = chain(4), f = chain(5), g = chain(6);
    auto h = chain(7), i = chain(8), j = chain(9), k = chain(10), l = chain(11), m = chain(12);
    const double start = seconds_now();
    for (int round = 0; round < kRounds; ++round) {
      a = hn::MulAdd(a, x, x), b = hn::MulAdd(b, x, x), c = hn::MulAdd(c, x, x);
      e = hn::MulAdd(e, x, x), f = hn::MulAdd(f, x, x), g = hn::MulAdd(g, x, x);
      h = hn::MulAdd(h, x, x), i = hn::MulAdd(i, x, x), j = hn::MulAdd(j, x, x);
      k = hn::MulAdd(k, x, x), l = hn::MulAdd(l, x, x), m = hn::MulAdd(m, x, x);
    }
    fastest = std::min(fastest, seconds_now() - start);
    const auto sum = hn::Add(
        hn::Add(hn::Add(a, b), hn::Add(c, e)),
        hn::Add(hn::Add(hn::Add(f, g), hn::Add(h, i)), hn::Add(hn::Add(j, k), hn::Add(l, m))));
    ::benchmark::DoNotOptimize(hn::GetLane(sum));
  }
  return 12.0 * kRounds * static_cast<double>(hn::Lanes(d)) / fastest;
}

}  // namespace magicpig::bench

// SPDX-License-Identifier: Apache-2.0
// Who runs the work: the executor concept, a model that runs it in place, and a pool of threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>

#include "magicpig/core/error.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Runs body(task, worker) once for each task in [0, tasks) and returns when all have run. `worker`
/// lies in [0, workers()) and no two calls with the same worker overlap. Tasks may run in any
/// order; the library's results depend neither on that nor on workers(). A host wraps its own
/// threads in a type with these two functions; bodies never throw.
template <class E>
concept Executor = requires(E& e, void (*body)(int task, int worker)) {
  { e.workers() } -> std::convertible_to<int>;
  e.parallel_for(1, body);
};

/// Runs everything on the calling thread, in order. The model that documents the concept.
struct SerialExecutor {
  [[nodiscard]] static constexpr int workers() { return 1; }

  template <class Body>
  void parallel_for(int tasks, const Body& body) {
    for (int task = 0; task < tasks; ++task) body(task, 0);
  }
};

/// A fixed pool of std::threads; the caller works too, as worker 0. Destruction joins. Calls from
/// several threads at once are served one after the other; calls from inside a body deadlock.
/// parallel_for allocates nothing.
class ThreadPool {
 public:
  /// `workers` in [1, 1024], the caller included. Errors: outside that, or no thread to be had
  /// (without exceptions the C++ library ends the process in that last case).
  [[nodiscard]] static Result<std::unique_ptr<ThreadPool>> create(int workers) noexcept {
    if (workers < 1 || workers > 1024) {
      return Status::error(ErrorCode::kInvalidArgument, "workers %d must lie in [1, 1024]",
                           workers);
    }
    std::unique_ptr<ThreadPool> pool(new (std::nothrow) ThreadPool(workers));
    if (pool != nullptr) pool->threads_.reset(new (std::nothrow) std::thread[size(workers - 1)]);
    if (pool == nullptr || pool->threads_ == nullptr || !pool->start()) {
      return Status::error(ErrorCode::kOutOfMemory, "cannot start %d threads", workers - 1);
    }
    return pool;
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (int i = 0; i < started_; ++i) threads_[size(i)].join();
  }

  [[nodiscard]] int workers() const { return workers_; }

  template <class Body>
  void parallel_for(int tasks, const Body& body) {
    if (tasks <= 0) return;
    const std::lock_guard one_caller(callers_);
    {
      const std::lock_guard lock(mutex_);
      call_ = [](const void* context, int task, int worker) {
        (*static_cast<const Body*>(context))(task, worker);
      };
      context_ = &body;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      busy_ = started_;
      ++generation_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  using Call = void (*)(const void* context, int task, int worker);

  explicit ThreadPool(int workers) : workers_(workers) {}

  static std::size_t size(int n) { return static_cast<std::size_t>(n); }

  bool start() noexcept {
#if defined(__cpp_exceptions)
    try {
#endif
      while (started_ < workers_ - 1) {
        const int worker = started_ + 1;
        threads_[size(started_)] = std::thread([this, worker] { serve(worker); });
        ++started_;
      }
#if defined(__cpp_exceptions)
    } catch (...) {
      return false;
    }
#endif
    return true;
  }

  void serve(int worker) {
    unsigned seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
        if (stopping_) return;
        seen = generation_;
      }
      work(worker);
      const std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void work(int worker) {
    for (int task = next_.fetch_add(1); task < tasks_; task = next_.fetch_add(1)) {
      call_(context_, task, worker);
    }
  }

  std::mutex callers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::unique_ptr<std::thread[]> threads_;
  int workers_;
  int started_ = 0;
  bool stopping_ = false;
  unsigned generation_ = 0;
  int busy_ = 0;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int tasks_ = 0;
  std::atomic<int> next_{0};
};

}  // namespace magicpig::inline MAGICPIG_ABI

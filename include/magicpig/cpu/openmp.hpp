// SPDX-License-Identifier: Apache-2.0
// An executor on OpenMP's threads, for hosts whose own loops run on them.
#pragma once

#if !defined(_OPENMP)
#error "magicpig/cpu/openmp.hpp needs OpenMP: compile with -fopenmp or link magicpig::openmp"
#endif

#include <omp.h>

#include "magicpig/core/error.hpp"
#include "magicpig/core/executor.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Opens a parallel region per call, in which threads take one task after the other: the caller as
/// worker 0, and the threads that OpenMP keeps for it. Where OpenMP gives fewer threads than asked
/// for (thread limit, dynamic adjustment), those run all tasks.
///
/// Inside an enclosing parallel region, as in a body, a call runs all of its tasks on the calling
/// thread as worker 0, or on a nested team if the host allows more than one active level. A host
/// that is in a region already and wants its whole team to work uses DecodeStep::run_share().
///
/// Calls from several threads at once run at the same time, each with its own team and its own
/// numbering of workers, so that each needs its own workspace.
class OpenMpExecutor {
 public:
  /// `workers` in [1, 1024], the caller included. Errors: outside that. Threads are started by the
  /// first call; OpenMP ends the process if there is none to be had.
  [[nodiscard]] static Result<OpenMpExecutor> create(int workers) noexcept {
    if (workers < 1 || workers > 1024) {
      return Status::error(ErrorCode::kInvalidArgument, "workers %d must lie in [1, 1024]",
                           workers);
    }
    return OpenMpExecutor(workers);
  }

  [[nodiscard]] int workers() const { return workers_; }

  template <class Body>
  void parallel_for(int tasks, const Body& body) const {
    if (tasks <= 0) return;
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers_)
    for (int task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
  }

 private:
  explicit OpenMpExecutor(int workers) : workers_(workers) {}

  int workers_;
};

static_assert(Executor<OpenMpExecutor>);

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Progress on standard error, for runs that take longer than a moment.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>

namespace magicpig::bench {

/// Says how far a run is: nothing in its first 2 seconds, then twice a second on a terminal, and
/// every 10 seconds elsewhere.
class Progress {
 public:
  explicit Progress(int steps) : steps_(steps), terminal_(isatty(fileno(stderr)) != 0) {}
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress() {
    if (terminal_ && spoken_) (void)std::fputs("\r\033[K", stderr);
  }

  /// One more step is about to begin: `what` on `where`.
  void step(const std::string& what, const std::string& where) {
    using Seconds = std::chrono::duration<double>;
    const auto now = std::chrono::steady_clock::now();
    const double pause = !spoken_ ? kQuiet : terminal_ ? 0.5 : 10.0;
    const int done = done_++;
    if (Seconds(now - last_).count() < pause) return;
    (void)std::fprintf(stderr, "%s%3d %%, %.0f s: %s on %s%s", terminal_ ? "\r\033[K" : "",
                       done * 100 / steps_, Seconds(now - start_).count(), what.c_str(),
                       where.c_str(), terminal_ ? "" : "\n");
    (void)std::fflush(stderr);
    spoken_ = true;
    last_ = now;
  }

 private:
  static constexpr double kQuiet = 2.0;

  int steps_;
  int done_ = 0;
  bool terminal_;
  bool spoken_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point last_ = start_;
};

}  // namespace magicpig::bench

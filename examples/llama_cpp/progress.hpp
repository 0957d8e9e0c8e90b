// SPDX-License-Identifier: Apache-2.0
// A progress bar, clocks, and what the process takes.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace magicpig::llama {

/// Seconds since it was made.
class Stopwatch {
 public:
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

/// On a terminal's standard error, and nowhere else.
class ProgressBar {
 public:
  ProgressBar(const char* name, std::size_t total) : name_(name), total_(total) {}
  void operator()(std::size_t done) const {
    if (isatty(STDERR_FILENO) == 0) return;
    constexpr int kWidth = 40;
    const int filled = total_ == 0 ? kWidth : static_cast<int>(done * kWidth / total_);
    (void)std::fprintf(stderr, "\r%s [%.*s%*s] %zu / %zu%s", name_, filled,
                       "########################################", kWidth - filled, "", done,
                       total_, done == total_ ? "\n" : "");
  }

 private:
  const char* name_;
  std::size_t total_;
};

/// MiB that the process has in memory, where the system says so; else 0.
[[nodiscard]] inline double resident_mib() {
  std::ifstream file("/proc/self/statm");
  double pages = 0.0;
  double resident = 0.0;
  file >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1048576.0;
}

[[nodiscard]] inline std::string file_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return text.str();
}

}  // namespace magicpig::llama

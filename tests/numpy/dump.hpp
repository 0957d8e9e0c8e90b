// SPDX-License-Identifier: Apache-2.0
// What programs share that write arrays for numpy to read.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <utility>

namespace magicpig::test {

[[noreturn]] inline void fail(const char* message) {
  (void)std::fprintf(stderr, "dump: %s\n", message);
  std::exit(2);
}

/// A folder of raw little-endian arrays.
class Dump {
 public:
  explicit Dump(std::filesystem::path folder) : folder_(std::move(folder)) {}

  template <class T>
  void append(const char* name, std::span<const T> values) {
    std::ofstream file(folder_ / name, std::ios::binary | std::ios::app);
    file.write(reinterpret_cast<const char*>(values.data()),
               static_cast<std::streamsize>(values.size_bytes()));
    if (!file.flush()) fail(name);
  }

 private:
  std::filesystem::path folder_;
};

}  // namespace magicpig::test

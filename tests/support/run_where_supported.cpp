// SPDX-License-Identifier: Apache-2.0
// run_where_supported ISA PROGRAM [ARGUMENT...]: runs the program, or says SKIPPED where the
// processor lacks the ISA.
#include <unistd.h>

#include <cstdio>
#include <string_view>

#include "cpu_supports.hpp"

namespace {

constexpr int kSkipped = 77;  // SKIP_RETURN_CODE of the CTest tests.
constexpr int kFailed = 1;

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s ISA PROGRAM [ARGUMENT...]\n", argv[0]);
    return kFailed;
  }
  if (!cpu_supports(argv[1])) {
    std::printf("SKIPPED: this processor lacks %s, so %s was compiled but NOT run\n", argv[1],
                argv[2]);
    return kSkipped;
  }
  execv(argv[2], argv + 2);
  std::perror(argv[2]);
  return kFailed;
}

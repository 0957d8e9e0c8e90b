// SPDX-License-Identifier: Apache-2.0
// Advice on memory: what it is shown, and that asking for huge pages asks.
#include "magicpig/core/huge_pages.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

#include "magicpig/core/buffer.hpp"

namespace {

using namespace magicpig;

int advised = 0;
void* advised_data = nullptr;
std::size_t advised_bytes = 0;

void note(void* data, std::size_t bytes) noexcept {
  ++advised;
  advised_data = data;
  advised_bytes = bytes;
}

TEST_CASE("a buffer shows new memory to its advice, and only new memory") {
  advised = 0;
  Buffer<int> buffer;
  REQUIRE(buffer.resize(100, note));
  CHECK(advised == 1);
  CHECK(advised_data == buffer.data());
  CHECK(advised_bytes == 400);
  REQUIRE(buffer.resize(50, note));
  REQUIRE(buffer.resize(100, note));
  CHECK(advised == 1);
  REQUIRE(buffer.resize(101, note));
  CHECK(advised == 2);
  CHECK(advised_data == buffer.data());
  CHECK(advised_bytes == 404);
}

TEST_CASE("advice on less than a page, or on nothing, does nothing") {
  advise_huge_pages(nullptr, 0);
  Buffer<char> buffer;
  REQUIRE(buffer.resize(100, advise_huge_pages));
  buffer.data()[99] = 1;
  CHECK(buffer.data()[99] == 1);
}

#if defined(__linux__)
// Whether the mapping that holds `address` is one that huge pages were asked for.
bool asked_for(const void* address) {
  const auto wanted = reinterpret_cast<std::uintptr_t>(address);
  std::ifstream file("/proc/self/smaps");
  std::string line;
  bool here = false;
  while (std::getline(file, line)) {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    char dash = 0;
    std::istringstream words(line);
    if (words >> std::hex >> begin >> dash >> end && dash == '-') {
      here = begin <= wanted && wanted < end;
    } else if (here && line.rfind("VmFlags:", 0) == 0) {
      return line.find(" hg") != std::string::npos;
    }
  }
  return false;
}

TEST_CASE("huge pages are asked for under an array that was advised so, and under no other") {
  if (!std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled") ||
      !std::ifstream("/proc/self/smaps")) {
    MESSAGE("SKIPPED: this system has no transparent huge pages");
    return;
  }
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  Buffer<char> plain;
  REQUIRE(plain.resize(kBytes));
  Buffer<char> huge;
  REQUIRE(huge.resize(kBytes, advise_huge_pages));
  CHECK(asked_for(huge.data() + kBytes / 2));
  CHECK_FALSE(asked_for(plain.data() + kBytes / 2));
}
#endif

}  // namespace

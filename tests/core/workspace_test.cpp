// SPDX-License-Identifier: Apache-2.0
// Arena: measuring and carving are the same thing.
#include "magicpig/core/workspace.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "random.hpp"

namespace {

using namespace magicpig;

struct Taken {
  std::byte* begin;
  std::size_t bytes;
};

// The same random sequence of arrays for the same seed.
std::vector<Taken> take_some(Arena& arena, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<Taken> taken;
  for (int i = 0; i < 12; ++i) {
    const auto count = static_cast<std::size_t>(random.below(200));
    switch (random.below(3)) {
      case 0:
        taken.push_back({reinterpret_cast<std::byte*>(arena.take<char>(count)), count});
        break;
      case 1:
        taken.push_back({reinterpret_cast<std::byte*>(arena.take<double>(count)), count * 8});
        break;
      default:
        taken.push_back({reinterpret_cast<std::byte*>(arena.take<float>(count)), count * 4});
        break;
    }
  }
  return taken;
}

TEST_CASE("an arena without memory counts and hands out null") {
  Arena arena;
  for (const Taken& t : take_some(arena, 1)) CHECK(t.begin == nullptr);
  CHECK(arena.bytes_needed() > 0);
}

TEST_CASE("the bytes that measuring asks for suffice at any start address, aligned and apart") {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    Arena measuring;
    (void)take_some(measuring, seed);
    const std::size_t needed = measuring.bytes_needed();
    std::vector<std::byte> block(needed + 2 * kAlignment);
    for (std::size_t offset = 0; offset <= kAlignment; ++offset) {
      CAPTURE(seed);
      CAPTURE(offset);
      std::byte* begin = block.data() + offset;
      Arena carving({begin, needed});
      const std::vector<Taken> taken = take_some(carving, seed);
      int wrong = 0;
      const std::byte* end = begin;
      for (const Taken& t : taken) {
        wrong += reinterpret_cast<std::uintptr_t>(t.begin) % kAlignment != 0;
        wrong += t.begin < end;
        end = t.begin + t.bytes;
      }
      wrong += end > begin + needed;
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("carving aligned memory uses exactly what measuring counted") {
  alignas(64) static std::byte memory[100000];
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    Arena measuring;
    (void)take_some(measuring, seed);
    Arena carving({memory, sizeof memory});
    (void)take_some(carving, seed);
    CHECK(carving.bytes_needed() == measuring.bytes_needed());
  }
}

}  // namespace

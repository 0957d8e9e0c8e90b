// SPDX-License-Identifier: Apache-2.0
// Philox against its published vectors, and the distributions of RandomStream.
//
// Draws are functions of their key, so each statistic below is one fixed number: a test cannot fail
// now and then. Bounds are the 1 - 1e-6 quantiles of the null distributions.
#include "magicpig/core/random.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

using namespace magicpig;
using Words = std::array<std::uint32_t, 4>;

// Upper 1e-6 quantile of chi-square (Wilson and Hilferty 1931).
double chi_square_bound(int degrees) {
  const double spread = 2.0 / (9.0 * degrees);
  return degrees * std::pow(1.0 - spread + 4.753 * std::sqrt(spread), 3.0);
}

// The largest distance between the empirical distribution of `values` and `cdf`, times sqrt(n);
// above 2.694 with probability 2 exp(-2 * 2.694^2) = 1e-6 (Kolmogorov).
template <class Cdf>
double kolmogorov_distance(std::vector<double> values, const Cdf& cdf) {
  std::sort(values.begin(), values.end());
  const auto n = static_cast<double>(values.size());
  double largest = 0.0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double p = cdf(values[i]);
    largest =
        std::max({largest, p - static_cast<double>(i) / n, static_cast<double>(i + 1) / n - p});
  }
  return largest * std::sqrt(n);
}
constexpr double kKolmogorovBound = 2.694;

TEST_CASE("Philox4x32-10 gives the known answers that Random123 publishes") {
  CHECK(philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  constexpr std::uint32_t kOnes = 0xffffffff;
  CHECK(philox({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
        Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("a stream is Philox of its key: seed as key, place, stream, head with purpose, layer") {
  const RandomStream stream({.seed = 0x299f31d0a4093822,
                             .layer = 0x03707344,
                             .head = 0x00198a2e,
                             .stream = 0x85a308d3,
                             .purpose = Purpose::kPoisson});
  CHECK(stream.block(0x243f6a88) ==
        philox({0x243f6a88, 0x85a308d3, 0x03198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}));
}

TEST_CASE("streams whose keys differ in any one field share no block") {
  const RandomKey base{.seed = 9, .layer = 1, .head = 2, .stream = 3};
  std::vector<RandomKey> keys(7, base);
  keys[1].seed = 10;
  keys[2].seed += std::uint64_t{1} << 32;
  keys[3].layer = 4;
  keys[4].head = 5;
  keys[5].stream = 6;
  keys[6].purpose = Purpose::kUniform;
  std::vector<Words> blocks;
  for (const RandomKey& key : keys) {
    for (std::uint32_t i = 0; i < 256; ++i) blocks.push_back(RandomStream(key).block(i));
  }
  // 1,792 random 128-bit blocks coincide with probability below 1e-32.
  std::sort(blocks.begin(), blocks.end());
  CHECK(std::adjacent_find(blocks.begin(), blocks.end()) == blocks.end());
}

TEST_CASE("the same key gives the same numbers, in any order of asking") {
  const RandomKey key{.seed = 77, .layer = 3, .head = 1, .stream = 12};
  const RandomStream stream(key);
  const double late = stream.uniform(1000);
  const double early = stream.uniform(0);
  CHECK(RandomStream(key).uniform(0) == early);
  CHECK(RandomStream(key).uniform(1000) == late);
  CHECK(early != late);
}

TEST_CASE("below() scales 64 bits to the bound, without overflow for the largest bounds") {
  const RandomStream stream({.seed = 4, .purpose = Purpose::kMultinomial});
  for (const std::uint32_t bound : {1U, 2U, 3U, 1000U, 0x80000000U, 0xffffffffU}) {
    CAPTURE(bound);
    for (std::uint32_t i = 0; i < 2000; ++i) {
      __extension__ using Wide = unsigned __int128;
      const auto expected = static_cast<std::uint32_t>((Wide{stream.bits(i)} * bound) >> 64);
      REQUIRE(stream.below(i, bound) == expected);
      REQUIRE(expected < bound);
    }
  }
}

TEST_CASE("below() is uniform") {
  for (const int bound : {2, 3, 10, 97, 1000}) {
    CAPTURE(bound);
    const RandomStream stream({.seed = 5, .stream = static_cast<std::uint32_t>(bound)});
    const int draws = 1000 * bound;
    std::vector<int> counts(static_cast<std::size_t>(bound));
    for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(draws); ++i) {
      ++counts[stream.below(i, static_cast<std::uint32_t>(bound))];
    }
    double chi_square = 0.0;
    for (const int count : counts) chi_square += (count - 1000.0) * (count - 1000.0) / 1000.0;
    CHECK(chi_square < chi_square_bound(bound - 1));
    CHECK(chi_square > 0.0);  // exactly equal counts would not be random either
  }
}

TEST_CASE("every bit of a block is a fair coin, independent of the block before") {
  constexpr int kBlocks = 20000;
  const RandomStream stream({.seed = 6});
  int ones[128] = {};
  int changes[128] = {};
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    const Words block = stream.block(i);
    const Words next = stream.block(i + 1);
    for (std::size_t b = 0; b < 128; ++b) {
      ones[b] += static_cast<int>((block[b / 32] >> (b % 32)) & 1U);
      changes[b] += static_cast<int>(((block[b / 32] ^ next[b / 32]) >> (b % 32)) & 1U);
    }
  }
  // 256 counts, each within 5.8 standard deviations: a two-sided 1e-6 after Bonferroni.
  const double bound = 5.8 * std::sqrt(kBlocks * 0.25);
  for (std::size_t b = 0; b < 128; ++b) {
    CAPTURE(b);
    CHECK(std::fabs(ones[b] - 0.5 * kBlocks) < bound);
    CHECK(std::fabs(changes[b] - 0.5 * kBlocks) < bound);
  }
}

TEST_CASE("uniform() is uniform on (0, 1]") {
  const RandomStream stream({.seed = 7, .purpose = Purpose::kPoisson});
  std::vector<double> values;
  for (std::uint32_t i = 0; i < 50000; ++i) {
    values.push_back(stream.uniform(i));
    REQUIRE(values.back() > 0.0);
    REQUIRE(values.back() <= 1.0);
  }
  CHECK(kolmogorov_distance(values, [](double x) { return x; }) < kKolmogorovBound);
}

TEST_CASE("normals() are standard normal, and the two of a pair independent") {
  constexpr int kPairs = 50000;
  const RandomStream stream({.seed = 8});
  std::vector<double> first;
  std::vector<double> second;
  double moments[5] = {};
  double product = 0.0;
  for (std::uint32_t i = 0; i < kPairs; ++i) {
    const auto pair = stream.normals(i);
    first.push_back(pair[0]);
    second.push_back(pair[1]);
    for (int m = 1; m <= 4; ++m) moments[m] += std::pow(pair[0], m) + std::pow(pair[1], m);
    product += pair[0] * pair[1];
  }
  const auto cdf = [](double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); };
  CHECK(kolmogorov_distance(first, cdf) < kKolmogorovBound);
  CHECK(kolmogorov_distance(second, cdf) < kKolmogorovBound);
  // Mean of x^m over n: expectation 0, 1, 0, 3 and variance 1, 2, 15, 96, divided by n.
  const double expected[5] = {0.0, 0.0, 1.0, 0.0, 3.0};
  const double variance[5] = {0.0, 1.0, 2.0, 15.0, 96.0};
  constexpr double kNumbers = 2.0 * kPairs;
  for (int m = 1; m <= 4; ++m) {
    CAPTURE(m);
    CHECK(std::fabs(moments[m] / kNumbers - expected[m]) < 4.9 * std::sqrt(variance[m] / kNumbers));
  }
  CHECK(std::fabs(product / kPairs) < 4.9 / std::sqrt(static_cast<double>(kPairs)));
}

}  // namespace

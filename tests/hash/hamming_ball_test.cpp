// SPDX-License-Identifier: Apache-2.0
// Hamming balls: which buckets they hold, and how likely a code lies in one.
#include "magicpig/hash/hamming_ball.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <string>
#include <vector>

namespace {

using namespace magicpig;

double choose(int n, int k) {
  double product = 1.0;
  for (int i = 1; i <= k; ++i) product = product * (n - k + i) / i;
  return std::round(product);
}

// The probability of every pattern of flipped bits, added up. At most 2^15 positive terms.
double enumerated(int bits, int radius, double agree) {
  double sum = 0.0;
  for (unsigned flips = 0; flips < (1U << bits); ++flips) {
    if (std::popcount(flips) > radius) continue;
    double p = 1.0;
    for (int b = 0; b < bits; ++b) p *= ((flips >> b) & 1U) != 0 ? 1.0 - agree : agree;
    sum += p;
  }
  return sum;
}

TEST_CASE("a ball holds every mask of at most r bits once, by number of bits, 0 first") {
  for (int bits = 1; bits <= kMaxBits; ++bits) {
    for (int radius = 0; radius <= bits; ++radius) {
      CAPTURE(bits);
      CAPTURE(radius);
      const auto ball = HammingBall::create(bits, radius);
      REQUIRE(ball.ok());
      const auto masks = ball->masks();
      double expected = 0.0;
      for (int j = 0; j <= radius; ++j) expected += choose(bits, j);
      CHECK(static_cast<double>(masks.size()) == expected);
      std::vector<bool> seen(std::size_t{1} << bits);
      int wrong = masks.front() != 0;
      int flips_before = 0;
      for (const Code mask : masks) {
        const int flips = std::popcount(static_cast<unsigned>(mask));
        wrong += flips < flips_before || flips > radius || mask >= seen.size();
        if (mask < seen.size()) {
          wrong += seen[mask];
          seen[mask] = true;
        }
        flips_before = flips;
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("a ball outside its bounds is refused with the value and the bound") {
  const auto refusal = [](int bits, int radius) -> std::string {
    const auto ball = HammingBall::create(bits, radius);
    if (ball.ok()) return "accepted";
    CHECK(ball.status().code() == ErrorCode::kInvalidArgument);
    return ball.status().message();
  };
  CHECK(refusal(10, 11) == "probing radius 11 must lie in [0, K = 10], K in [1, 15]");
  CHECK(refusal(10, -1) == "probing radius -1 must lie in [0, K = 10], K in [1, 15]");
  CHECK(refusal(0, 0) == "probing radius 0 must lie in [0, K = 0], K in [1, 15]");
  CHECK(refusal(16, 0) == "probing radius 0 must lie in [0, K = 16], K in [1, 15]");
  CHECK(refusal(15, 15) == "accepted");
}

TEST_CASE("the probability of a ball is the sum over its masks") {
  // Each side rounds some 30 times per term, in positive terms only: far below 1e-12 in relation.
  for (const int bits : {1, 2, 5, 10, 13}) {
    for (int radius = 0; radius <= bits; ++radius) {
      for (const double agree : {1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0 - 1e-9}) {
        CAPTURE(bits);
        CAPTURE(radius);
        CAPTURE(agree);
        const double exact = enumerated(bits, radius, agree);
        CHECK(std::fabs(hamming_ball_probability(bits, radius, agree) - exact) <= 1e-12 * exact);
      }
    }
  }
}

TEST_CASE("a ball of all buckets is certain, and one short of that nearly") {
  for (int bits = 1; bits <= kMaxBits; ++bits) {
    for (const double agree : {0.0, 0.2, 0.5, 1.0}) {
      CAPTURE(bits);
      CAPTURE(agree);
      CHECK(hamming_ball_probability(bits, bits, agree) == 1.0);
      const double all_but_one = hamming_ball_probability(bits, bits - 1, agree);
      CHECK(std::fabs(all_but_one - (1.0 - std::pow(1.0 - agree, bits))) < 1e-14);
      CHECK(all_but_one <= 1.0);
    }
  }
}

TEST_CASE("small probabilities keep their relative precision, and impossible is 0") {
  CHECK(hamming_ball_probability(10, 0, 1e-20) == doctest::Approx(1e-200).epsilon(1e-12));
  CHECK(hamming_ball_probability(15, 1, 1e-10) == doctest::Approx(15e-140).epsilon(1e-8));
  CHECK(hamming_ball_probability(10, 0, 0.0) == 0.0);
  CHECK(hamming_ball_probability(10, 9, 0.0) == 0.0);
  CHECK(hamming_ball_probability(10, 0, 1.0) == 1.0);
}

}  // namespace

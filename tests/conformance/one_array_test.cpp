// SPDX-License-Identifier: Apache-2.0
// What every model of VectorOps must do with one array: max, exponentials, logarithms, curves.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "backends.hpp"
#include "guarded.hpp"
#include "random.hpp"
#include "row_batch.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<int> lengths() {
  std::vector<int> lengths = range(1, 70);
  for (const int n : {96, 128, 192, 256, 257}) lengths.push_back(n);
  return lengths;
}

TEST_CASE_TEMPLATE(
    "functions of one array stay within it where it ends or begins at a forbidden page", Ops,
    MAGICPIG_TEST_BACKENDS) {
  for (const Guard guard : {Guard::kBefore, Guard::kBehind}) {
    GuardedArray<float> nodes(6, guard);
    for (std::size_t i = 0; i < 6; ++i) nodes[i] = static_cast<float>(i);
    for (const int n : range(0, 70)) {
      CAPTURE(n);
      GuardedArray<float> x(static_cast<std::size_t>(n), guard);
      CHECK(Ops::max(x.data(), n) == (n == 0 ? -kInf : 0.0F));
      Ops::interpolate({.nodes = nodes.data(), .segments = 5}, x.data(), n);
      for (int i = 0; i < n; ++i) x[static_cast<std::size_t>(i)] = 0.0F;
      Ops::log_affine_exp(x.data(), n, 1.0F, 0.0F);
      for (int i = 0; i < n; ++i) CHECK(x[static_cast<std::size_t>(i)] == 0.0F);
      CHECK(Ops::exp_sum(x.data(), n, 0.0F) == static_cast<float>(n));  // exp(0) is exactly 1
    }
  }
}

TEST_CASE_TEMPLATE("max finds the largest in any place", Ops, MAGICPIG_TEST_BACKENDS) {
  for (const int n : lengths()) {
    std::vector<float> x(static_cast<std::size_t>(n + 1));
    for (int i = 0; i <= n; ++i) x[static_cast<std::size_t>(i)] = static_cast<float>(-2 - i);
    x[0] = 5.0F;  // before the array
    for (int at = 1; at <= n; ++at) {
      CAPTURE(n);
      CAPTURE(at);
      const float kept = x[static_cast<std::size_t>(at)];
      x[static_cast<std::size_t>(at)] = -1.5F;
      CHECK(Ops::max(x.data() + 1, n) == -1.5F);
      x[static_cast<std::size_t>(at)] = kept;
    }
  }
}

TEST_CASE_TEMPLATE("max passes over NaN, knows infinities, and is -inf for nothing", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  CHECK(Ops::max(nullptr, 0) == -kInf);
  for (const int n : range(1, 70)) {
    CAPTURE(n);
    std::vector<float> x(static_cast<std::size_t>(n), kNaN);
    CHECK(Ops::max(x.data(), n) == -kInf);
    for (int at = 0; at < n; ++at) {
      CAPTURE(at);
      x[static_cast<std::size_t>(at)] = -3.0F;
      CHECK(Ops::max(x.data(), n) == -3.0F);
      x[static_cast<std::size_t>(at)] = kInf;
      CHECK(Ops::max(x.data(), n) == kInf);
      x[static_cast<std::size_t>(at)] = kNaN;
    }
    x.assign(static_cast<std::size_t>(n), -kInf);
    CHECK(Ops::max(x.data(), n) == -kInf);
  }
}

// exp of one float may err by 2 units in the last place (4 roundings' worth) where the result is
// normal and one of the smallest subnormal where it is not; before that, x - shift is rounded,
// which changes the result by |x - shift| roundings.
double exp_tolerance(double argument, bool rounded_argument) {
  const double of_argument = rounded_argument ? std::fabs(argument) * kUnit : 0.0;
  return std::exp(argument) * (1.01 * of_argument + 4.0 * kUnit) + 0x1p-149;
}

TEST_CASE_TEMPLATE("exp_sum is within 2 units in the last place over its whole range", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  // Steps of a prime number of floats over all negative ones down to -104, then up to 88.7.
  Worst worst;
  std::vector<float> x;
  for (std::uint32_t bits = 0; bits <= std::bit_cast<std::uint32_t>(104.0F); bits += 7919) {
    x.push_back(-std::bit_cast<float>(bits));
    if (x.back() >= -88.7F) x.push_back(-x.back());
  }
  std::vector<float> y = x;
  (void)Ops::exp_sum(y.data(), static_cast<int>(y.size()), 0.0F);
  for (std::size_t i = 0; i < x.size(); ++i) {
    worst.add(wide(y[i]), std::exp(wide(x[i])), exp_tolerance(wide(x[i]), false));
  }
  CHECK(worst.ratio() <= 1.0);
}

TEST_CASE_TEMPLATE("exp_sum subtracts the shift and returns the sum of what it wrote", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 301;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int n : {0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 70, 128, 1000}) {
    for (const float shift : {0.0F, 3.25F, -40.0F, 1000.1F}) {
      CAPTURE(n);
      CAPTURE(shift);
      std::vector<float> x(static_cast<std::size_t>(n + 2), 9.0F);
      for (int i = 1; i <= n; ++i) {
        x[static_cast<std::size_t>(i)] = shift - static_cast<float>(30.0 * random.uniform());
      }
      std::vector<float> y = x;
      const float sum = Ops::exp_sum(y.data() + 1, n, shift);
      Worst worst;
      double written = 0.0;
      for (std::size_t i = 1; i <= static_cast<std::size_t>(n); ++i) {
        const double argument = wide(x[i]) - wide(shift);
        worst.add(wide(y[i]), std::exp(argument), exp_tolerance(argument, true));
        written += wide(y[i]);
      }
      CHECK(worst.ratio() <= 1.0);
      // All terms are positive: at most n roundings in whatever order.
      CHECK(std::fabs(wide(sum) - written) <= 1.01 * n * kUnit * written);
      CHECK(y.front() == 9.0F);
      CHECK(y.back() == 9.0F);
    }
  }
}

TEST_CASE_TEMPLATE("exp_sum: exp(0) is 1, exp(-inf) is 0, far below is 0, far above is infinite",
                   Ops, MAGICPIG_TEST_BACKENDS) {
  const struct {
    float x;
    float expected;
  } cases[] = {{0.0F, 1.0F}, {-0.0F, 1.0F}, {-kInf, 0.0F}, {-104.5F, 0.0F},   {-1e30F, 0.0F},
               {kInf, kInf}, {89.0F, kInf}, {1e30F, kInf}, {0x1p-140F, 1.0F}, {-0x1p-140F, 1.0F}};
  for (const auto& c : cases) {
    for (const int n : {1, 5, 16, 21}) {
      CAPTURE(c.x);
      CAPTURE(n);
      std::vector<float> x(static_cast<std::size_t>(n), -kInf);
      x.back() = c.x;
      CHECK(Ops::exp_sum(x.data(), n, 0.0F) == c.expected);
      CHECK(x.back() == c.expected);
      if (n > 1) CHECK(x.front() == 0.0F);
    }
  }
}

TEST_CASE_TEMPLATE("exp_sum keeps subnormal results", Ops, MAGICPIG_TEST_BACKENDS) {
  for (float x = -103.5F; x < -87.5F; x += 0.25F) {
    CAPTURE(x);
    float y = x;
    CHECK(Ops::exp_sum(&y, 1, 0.0F) == y);
    CHECK(y > 0.0F);
  }
}

TEST_CASE_TEMPLATE("exp_sum leaves NaN where it is and spreads it to the sum", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (const int n : range(1, 40)) {
    for (int at = 0; at < n; ++at) {
      std::vector<float> x(static_cast<std::size_t>(n), 1.0F);
      x[static_cast<std::size_t>(at)] = kNaN;
      CHECK(std::isnan(Ops::exp_sum(x.data(), n, 1.0F)));
      int wrong = 0;
      for (int i = 0; i < n; ++i) {
        wrong += i == at ? !std::isnan(x[static_cast<std::size_t>(i)])
                         : x[static_cast<std::size_t>(i)] != 1.0F;
      }
      CAPTURE(n);
      CAPTURE(at);
      CHECK(wrong == 0);
    }
  }
  float infinite[1] = {kInf};
  CHECK(std::isnan(Ops::exp_sum(infinite, 1, kInf)));
}

// a + b exp(x) errs by 4 roundings in exp and 2 more, which log takes over as an absolute error;
// log itself errs by 4 units in the last place, 8 roundings. Subnormal exp(x), x < -87, adds less
// than b 2^-149 / a <= 2^-49 for the a and b below.
double log_tolerance(double exact) { return 1.01 * kUnit * (6.0 + 8.0 * std::fabs(exact)); }

double exact_log_affine_exp(double x, double a, double b) {
  return a > 0.0 ? std::log(a + b * std::exp(x)) : std::log(b) + x;
}

TEST_CASE_TEMPLATE("log_affine_exp agrees with double precision, a = 0 and b = 0 included", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  const struct {
    float a;
    float b;
  } cases[] = {{0.0F, 1.0F},   {0.0F, 0.3F},   {0.0F, 2.5F},  {1.0F, 0.0F},
               {0.3F, 0.0F},   {1.0F, 1.0F},   {0.5F, 0.5F},  {1e-4F, 1.0F},
               {0.02F, 0.98F}, {0.98F, 0.02F}, {1e-6F, 3.0F}, {1e-30F, 1.0F}};
  for (const auto& c : cases) {
    for (const int n : {0, 1, 3, 16, 31, 1700}) {
      CAPTURE(c.a);
      CAPTURE(c.b);
      CAPTURE(n);
      std::vector<float> x(static_cast<std::size_t>(n + 2), 9.0F);
      // From 0 down to -212, and twice as dense near 0.
      for (int i = 1; i <= n; ++i) {
        x[static_cast<std::size_t>(i)] =
            static_cast<float>(-(i - 1) * (i % 2 != 0 ? 0.125 : 0.001));
      }
      std::vector<float> y = x;
      Ops::log_affine_exp(y.data() + 1, n, c.a, c.b);
      Worst worst;
      for (std::size_t i = 1; i <= static_cast<std::size_t>(n); ++i) {
        const double exact = exact_log_affine_exp(wide(x[i]), wide(c.a), wide(c.b));
        worst.add(wide(y[i]), exact, log_tolerance(exact));
      }
      CHECK(worst.ratio() <= 1.0);
      CHECK(y.front() == 9.0F);
      CHECK(y.back() == 9.0F);
    }
  }
}

TEST_CASE_TEMPLATE("log_affine_exp with a = 0, b = 1 gives back x, however far down", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (const float x : {-0.5F, -50.0F, -100.0F, -110.0F, -1e4F, -1e30F}) {
    CAPTURE(x);
    float y = x;
    Ops::log_affine_exp(&y, 1, 0.0F, 1.0F);
    CHECK(y == x);
  }
}

// A curve that bends, rises and falls.
std::vector<float> curve_nodes(int segments) {
  std::vector<float> nodes;
  for (int i = 0; i <= segments; ++i) {
    const double x = static_cast<double>(i) / segments;
    nodes.push_back(static_cast<float>(3.0 * std::sin(5.0 * x) - 20.0 * x * x));
  }
  return nodes;
}

double exact_interpolation(const std::vector<float>& nodes, float x) {
  const auto segments = static_cast<double>(nodes.size() - 1);
  const double cosine = x > -1.0F ? std::fmin(wide(x), 1.0) : -1.0;
  const double place = std::sqrt(0.5 - 0.5 * cosine) * segments;
  const double node = std::fmin(std::floor(place), segments - 1.0);
  const auto left = static_cast<std::size_t>(node);
  return wide(nodes[left]) + (place - node) * (wide(nodes[left + 1]) - wide(nodes[left]));
}

// 0.5 - 0.5 c, its root and the product with `segments` round once each: the place is off by at
// most 2.5 roundings of `segments`, along the steepest segment. The value itself rounds at most 3
// times.
double interpolation_tolerance(const std::vector<float>& nodes) {
  double steepest = 0.0;
  double largest = 0.0;
  for (std::size_t i = 0; i + 1 < nodes.size(); ++i) {
    steepest = std::fmax(steepest, std::fabs(wide(nodes[i + 1]) - wide(nodes[i])));
    largest =
        std::fmax(largest, std::fmax(std::fabs(wide(nodes[i])), std::fabs(wide(nodes[i + 1]))));
  }
  return 1.01 * kUnit *
         (2.5 * static_cast<double>(nodes.size() - 1) * steepest + 3.0 * (largest + steepest));
}

TEST_CASE_TEMPLATE("interpolate follows the curve over [-1, 1] for any number of segments", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (const int segments : {1, 2, 3, 7, 64, 1000, 2048}) {
    const std::vector<float> nodes = curve_nodes(segments);
    const double tolerance = interpolation_tolerance(nodes);
    for (const int n : {0, 1, 5, 16, 37, 10007}) {
      CAPTURE(segments);
      CAPTURE(n);
      std::vector<float> x(static_cast<std::size_t>(n + 2), 9.0F);
      for (int i = 0; i < n; ++i) {  // both ends included
        x[static_cast<std::size_t>(i + 1)] =
            n == 1 ? 0.3F : static_cast<float>(-1.0 + 2.0 * i / (n - 1));
      }
      std::vector<float> y = x;
      Ops::interpolate({.nodes = nodes.data(), .segments = segments}, y.data() + 1, n);
      Worst worst;
      for (std::size_t i = 1; i <= static_cast<std::size_t>(n); ++i) {
        worst.add(wide(y[i]), exact_interpolation(nodes, x[i]), tolerance);
      }
      CHECK(worst.ratio() <= 1.0);
      CHECK(y.front() == 9.0F);
      CHECK(y.back() == 9.0F);
    }
  }
}

TEST_CASE_TEMPLATE("interpolate near a cosine of 1, where the curve is steepest in the cosine", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  const std::vector<float> nodes = curve_nodes(2048);
  const double tolerance = interpolation_tolerance(nodes);
  Worst worst;
  float x = 1.0F;
  for (int i = 0; i < 3000; ++i) {
    float y = x;
    Ops::interpolate({.nodes = nodes.data(), .segments = 2048}, &y, 1);
    worst.add(wide(y), exact_interpolation(nodes, x), tolerance);
    x = std::nextafter(x, 0.0F);
  }
  CHECK(worst.ratio() <= 1.0);
}

TEST_CASE_TEMPLATE("interpolate clamps cosines to [-1, 1] and takes NaN for -1", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  const std::vector<float> nodes = curve_nodes(64);
  const CurveView curve{.nodes = nodes.data(), .segments = 64};
  float ends[2] = {1.0F, -1.0F};
  Ops::interpolate(curve, ends, 2);
  CHECK(ends[0] == nodes.front());
  CHECK(std::fabs(wide(ends[1]) - wide(nodes.back())) <= interpolation_tolerance(nodes));
  for (const int n : {1, 9, 16, 29}) {
    for (const float above : {1.0000001F, 1.5F, 1e30F, kInf}) {
      for (const float below : {-1.0000001F, -1.5F, -1e30F, -kInf, kNaN, -kNaN}) {
        CAPTURE(n);
        CAPTURE(above);
        CAPTURE(below);
        std::vector<float> x(static_cast<std::size_t>(n), above);
        x.back() = below;
        Ops::interpolate(curve, x.data(), n);
        for (int i = 0; i + 1 < n; ++i) CHECK(x[static_cast<std::size_t>(i)] == ends[0]);
        CHECK(x.back() == ends[1]);
      }
    }
  }
}

}  // namespace

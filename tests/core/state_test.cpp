// SPDX-License-Identifier: Apache-2.0
// merge: attention over a union of token sets from the states of its parts.
#include "magicpig/core/state.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "random.hpp"

namespace {

using namespace magicpig;

constexpr std::size_t kDim = 6;
constexpr double kUnit = 0x1p-24;  // relative error of one rounding to float

// A state with memory of its own.
struct OwnedState {
  std::array<float, kDim> out{};
  float lse = kEmptyLse;

  OwnedState& add(OwnedState part) {
    AttentionState into{.out = out, .lse = lse};
    merge(into, {.out = part.out, .lse = part.lse});
    lse = into.lse;
    return *this;
  }
};

OwnedState merged(OwnedState a, const OwnedState& b) { return a.add(b); }

struct Tokens {
  std::vector<double> logits;
  std::vector<std::array<double, kDim>> values;  // in [-1, 1]

  Tokens(std::size_t count, double spread, std::uint64_t seed) {
    test::Random random(seed);
    for (std::size_t i = 0; i < count; ++i) {
      logits.push_back(spread * random.normal());
      values.emplace_back();
      for (double& v : values.back()) v = 2.0 * random.uniform() - 1.0;
    }
  }

  // Softmax over [first, last) in double, rounded to float once.
  [[nodiscard]] OwnedState attend(std::size_t first, std::size_t last) const {
    OwnedState state;
    if (first == last) return state;
    double largest = logits[first];
    for (std::size_t i = first; i < last; ++i) largest = std::max(largest, logits[i]);
    double weight = 0.0;
    std::array<double, kDim> sums{};
    for (std::size_t i = first; i < last; ++i) {
      const double w = std::exp(logits[i] - largest);
      weight += w;
      for (std::size_t j = 0; j < kDim; ++j) sums[j] += w * values[i][j];
    }
    for (std::size_t j = 0; j < kDim; ++j) state.out[j] = static_cast<float>(sums[j] / weight);
    state.lse = static_cast<float>(largest + std::log(weight));
    return state;
  }
};

// One merge: lse of each part is off by up to |lse| roundings, which changes shares by as much in
// relative terms, hence values of at most 1; shares, products and sum round 4 times more.
double tolerance(double lse, int merges) {
  return 1.01 * merges * kUnit * (2.0 * std::fabs(lse) + 4.0);
}

void check_close(const OwnedState& actual, const OwnedState& expected, double bound) {
  CHECK(std::fabs(static_cast<double>(actual.lse - expected.lse)) <= bound);
  double largest = 0.0;
  for (std::size_t j = 0; j < kDim; ++j) {
    largest = std::max(largest, std::fabs(static_cast<double>(actual.out[j] - expected.out[j])));
  }
  CHECK(largest <= bound);
}

TEST_CASE("merging the states of two parts gives attention over the whole, wherever it is split") {
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    for (const double spread : {0.1, 3.0, 40.0}) {
      const Tokens tokens(50, spread, seed);
      const OwnedState whole = tokens.attend(0, 50);
      // Logits of both signs: the lse of a part may be larger than that of the whole in magnitude.
      const double largest = 4.0 * spread + 5.0;
      for (std::size_t split = 0; split <= 50; ++split) {
        CAPTURE(seed);
        CAPTURE(spread);
        CAPTURE(split);
        check_close(merged(tokens.attend(0, split), tokens.attend(split, 50)), whole,
                    tolerance(largest, 1));
      }
    }
  }
}

TEST_CASE("merging many parts one by one gives attention over the whole") {
  const Tokens tokens(60, 2.0, 4);
  const OwnedState whole = tokens.attend(0, 60);
  for (const std::size_t part : {1U, 2U, 7U, 20U}) {
    CAPTURE(part);
    OwnedState state;
    for (std::size_t first = 0; first < 60; first += part) {
      state.add(tokens.attend(first, std::min<std::size_t>(first + part, 60)));
    }
    check_close(state, whole, tolerance(10.0, static_cast<int>(60 / part + 1)));
  }
}

TEST_CASE("merge is commutative") {
  const Tokens tokens(40, 3.0, 5);
  for (std::size_t split = 0; split <= 40; split += 5) {
    CAPTURE(split);
    const OwnedState a = tokens.attend(0, split);
    const OwnedState b = tokens.attend(split, 40);
    const OwnedState ab = merged(a, b);
    const OwnedState ba = merged(b, a);
    CHECK(ab.lse == ba.lse);
    check_close(ab, ba, 2.0 * kUnit);  // a compiler may fuse one of the two products
  }
}

TEST_CASE("merge is associative up to rounding") {
  const Tokens tokens(40, 3.0, 6);
  for (std::size_t first = 1; first < 39; first += 6) {
    for (std::size_t second = first; second < 40; second += 6) {
      CAPTURE(first);
      CAPTURE(second);
      const OwnedState a = tokens.attend(0, first);
      const OwnedState b = tokens.attend(first, second);
      const OwnedState c = tokens.attend(second, 40);
      check_close(merged(merged(a, b), c), merged(a, merged(b, c)), tolerance(17.0, 4));
    }
  }
}

TEST_CASE("the empty state is the exact identity on either side") {
  const OwnedState state = Tokens(10, 3.0, 7).attend(0, 10);
  const OwnedState empty;
  for (const OwnedState& same : {merged(state, empty), merged(empty, state)}) {
    CHECK(same.lse == state.lse);
    CHECK(same.out == state.out);
  }
  const OwnedState none = merged(empty, empty);
  CHECK(none.lse == kEmptyLse);
  CHECK(none.out == std::array<float, kDim>{});
}

TEST_CASE("the memory of an empty state is not read") {
  OwnedState garbage;
  garbage.out.fill(std::numeric_limits<float>::quiet_NaN());
  const OwnedState state = Tokens(10, 3.0, 8).attend(0, 10);
  CHECK(merged(state, garbage).out == state.out);
  CHECK(merged(garbage, state).out == state.out);
}

TEST_CASE("a state merged with the same memory keeps its output and doubles its weight") {
  OwnedState state = Tokens(10, 3.0, 9).attend(0, 10);
  const OwnedState before = state;
  AttentionState into{.out = state.out, .lse = state.lse};
  merge(into, {.out = state.out, .lse = state.lse});
  state.lse = into.lse;
  CHECK(state.out == before.out);  // halves are exact
  const double expected = static_cast<double>(before.lse) + std::log(2.0);
  CHECK(std::fabs(static_cast<double>(state.lse) - expected) <= kUnit * std::fabs(expected));
}

TEST_CASE("a part that weighs nothing beside the other leaves it unchanged, even far apart") {
  OwnedState heavy = Tokens(5, 1.0, 10).attend(0, 5);
  OwnedState light = Tokens(5, 1.0, 11).attend(0, 5);
  heavy.lse = 3e38F;
  light.lse = -3e38F;
  for (const OwnedState& both : {merged(heavy, light), merged(light, heavy)}) {
    CHECK(both.lse == heavy.lse);
    CHECK(both.out == heavy.out);
  }
}

TEST_CASE("NaN in the lse of either part is seen in the result") {
  const OwnedState good = Tokens(5, 1.0, 12).attend(0, 5);
  OwnedState bad = good;
  bad.lse = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(merged(good, bad).lse));
  CHECK(std::isnan(merged(bad, good).lse));
  CHECK(std::isnan(merged(good, bad).out[0]));
  CHECK(std::isnan(merged(bad, good).out[0]));
}

TEST_CASE("lse converts to base 2 and back, and the empty set stays empty") {
  CHECK(to_base2(0.0F) == 0.0F);
  for (const float lse : {-50.0F, -1.0F, 0.6931472F, 3.5F, 88.0F}) {
    CAPTURE(lse);
    const double exact = static_cast<double>(lse) / std::log(2.0);
    // The constant and the product round once each.
    CHECK(std::fabs(static_cast<double>(to_base2(lse)) - exact) <= 2.01 * kUnit * std::fabs(exact));
    CHECK(std::fabs(static_cast<double>(from_base2(to_base2(lse)) - lse)) <=
          4.01 * kUnit * static_cast<double>(std::fabs(lse)));
  }
  CHECK(to_base2(kEmptyLse) == kEmptyLse);
  CHECK(from_base2(kEmptyLse) == kEmptyLse);
}

}  // namespace

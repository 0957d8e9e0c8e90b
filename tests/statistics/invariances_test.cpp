// SPDX-License-Identifier: Apache-2.0
// What sampled attention must not depend on: the order of tokens, shifts of keys and values,
// scales.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/sample/collision.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 2, .kv_heads = 1, .head_dim = 16, .value_dim = 4};
constexpr TokenId kTokens = 256;

// Everything a problem gives: the drawn set and the decoded outputs.
struct Attended {
  std::vector<TokenId> first;   // drawn by head 0
  std::vector<TokenId> second;  // and by head 1
  std::vector<float> out;
  std::vector<float> lse;
};

Attended attend(const Problem<float>& problem) {
  const auto family = SimHash::create({.dim = 16, .bits = 4, .tables = 12, .seed = 6});
  auto index = BucketTables<SimHash>::create(*family, {});
  SerialExecutor executor;
  const auto source = problem.source();
  const TokenRange range{.begin = 0, .end = problem.tokens()};
  REQUIRE(index->build(make_backend<ScalarOps>(executor), source, range).ok());
  const auto sampler = Collisions::create(*family, {});
  const DecodePlan<Collisions> plan{.shape = kShape, .sampler = &*sampler, .exact_below = 0};
  Outputs outputs(kShape);
  REQUIRE(
      decode_one<ScalarOps>(executor, plan, make_request(problem, source, &*index, outputs)).ok());
  const Drawn drawn = draw_tokens(*sampler, problem, *index);
  return {.first = drawn.of(0),
          .second = drawn.of(1),
          .out = outputs.values,
          .lse = {outputs.lse(0), outputs.lse(1)}};
}

// Keys, queries and values are small whole numbers and tokens a power of 2 in number: centres and
// centred keys are exact in float, so that sets can be compared exactly.
void make_whole(Problem<float>& problem) {
  for (TokenId t = 0; t < problem.tokens(); ++t) {
    for (int j = 0; j < 16; ++j) problem.key(0, t)[j] = std::round(4.0F * problem.key(0, t)[j]);
    for (int j = 0; j < 4; ++j) problem.value(0, t)[j] = std::round(4.0F * problem.value(0, t)[j]);
  }
  for (float& x : problem.query()) x = std::round(4.0F * x) / 16.0F;
}

// Float sums over some 100 drawn tokens in another order or at another magnitude: some 10 roundings
// of logits of size 10 and of values of size 10.
constexpr double kRounding = 1e-4;

void check_close(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    CHECK(std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])) < kRounding);
  }
}

struct Original {
  Problem<float> problem{{.shape = kShape, .tokens = kTokens, .key_offset = 1.0}};
  Attended attended;

  Original() {
    make_whole(problem);
    attended = attend(problem);
    REQUIRE(attended.first.size() > 20);
    REQUIRE(attended.first.size() < 200);
  }
};

TEST_CASE("Sampling.follows_a_permutation_of_the_tokens") {
  const Original original;
  Problem<float> permuted({.shape = kShape, .tokens = kTokens});
  permuted.query() = original.problem.query();
  Random random(first_seed());
  std::vector<TokenId> place(kTokens);
  std::iota(place.begin(), place.end(), 0);
  for (int i = kTokens - 1; i > 0; --i) {
    std::swap(place[static_cast<std::size_t>(i)],
              place[static_cast<std::size_t>(random.below(i + 1))]);
  }
  const auto source = original.problem.source();
  for (TokenId t = 0; t < kTokens; ++t) {
    const TokenId to = place[static_cast<std::size_t>(t)];
    std::copy(source.key(0, t), source.key(0, t) + 16, permuted.key(0, to));
    std::copy(source.value(0, t), source.value(0, t) + 4, permuted.value(0, to));
  }
  const Attended attended = attend(permuted);
  const auto moved = [&](std::vector<TokenId> tokens) {
    for (TokenId& t : tokens) t = place[static_cast<std::size_t>(t)];
    std::sort(tokens.begin(), tokens.end());
    return tokens;
  };
  CHECK(attended.first == moved(original.attended.first));
  CHECK(attended.second == moved(original.attended.second));
  check_close(attended.out, original.attended.out);
  check_close(attended.lse, original.attended.lse);
}

TEST_CASE("Sampling.ignores_a_shift_of_all_keys_which_moves_lse_alone") {
  Original original;
  for (TokenId t = 0; t < kTokens; ++t) {
    for (int j = 0; j < 16; ++j) original.problem.key(0, t)[j] += static_cast<float>(j - 5);
  }
  const Attended shifted = attend(original.problem);
  CHECK(shifted.first == original.attended.first);
  CHECK(shifted.second == original.attended.second);
  check_close(shifted.out, original.attended.out);
  for (int h = 0; h < 2; ++h) {
    double dot = 0.0;
    for (int j = 0; j < 16; ++j) {
      dot += static_cast<double>(original.problem.query(h)[j]) * (j - 5);
    }
    const auto at = static_cast<std::size_t>(h);
    CHECK(std::abs(static_cast<double>(shifted.lse[at]) -
                   static_cast<double>(original.attended.lse[at]) - dot / 4.0) < kRounding);
  }
}

TEST_CASE("Sampling.moves_and_scales_with_the_values") {
  Original original;
  for (TokenId t = 0; t < kTokens; ++t) {
    for (int j = 0; j < 4; ++j) {
      original.problem.value(0, t)[j] = 2.0F * original.problem.value(0, t)[j] + 3.0F;
    }
  }
  const Attended changed = attend(original.problem);
  CHECK(changed.lse == original.attended.lse);
  std::vector<float> expected = original.attended.out;
  for (float& x : expected) x = 2.0F * x + 3.0F;
  check_close(changed.out, expected);
}

TEST_CASE("Sampling.draws_the_same_tokens_for_a_longer_query") {
  const Original original;
  for (const float factor : {2.0F, 0.125F, 3.0F}) {
    Problem<float> scaled({.shape = kShape, .tokens = kTokens, .key_offset = 1.0});
    make_whole(scaled);
    for (float& x : scaled.query()) x *= factor;
    const Attended attended = attend(scaled);
    // By 3 a projection may cross 0 only within rounding of it; none here does.
    CHECK(attended.first == original.attended.first);
    CHECK(attended.second == original.attended.second);
  }
}

TEST_CASE("Sampling.draws_copies_of_a_token_together_so_that_doubling_all_changes_lse_alone") {
  const Original original;
  Problem<float> doubled({.shape = kShape, .tokens = 2 * kTokens});
  doubled.query() = original.problem.query();
  const auto source = original.problem.source();
  for (TokenId t = 0; t < 2 * kTokens; ++t) {
    std::copy(source.key(0, t / 2), source.key(0, t / 2) + 16, doubled.key(0, t));
    std::copy(source.value(0, t / 2), source.value(0, t / 2) + 4, doubled.value(0, t));
  }
  const Attended attended = attend(doubled);
  std::vector<TokenId> expected;
  for (const TokenId t : original.attended.first) {
    expected.push_back(2 * t);
    expected.push_back(2 * t + 1);
  }
  CHECK(attended.first == expected);
  check_close(attended.out, original.attended.out);
  for (std::size_t h = 0; h < 2; ++h) {
    CHECK(std::abs(static_cast<double>(attended.lse[h]) -
                   static_cast<double>(original.attended.lse[h]) - std::log(2.0)) < kRounding);
  }
}

}  // namespace

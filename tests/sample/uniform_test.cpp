// SPDX-License-Identifier: Apache-2.0
// Uniform sampling without replacement: subsets, their probabilities and their keys.
#include "magicpig/sample/uniform.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "magicpig/index/index.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 4, .kv_heads = 2, .head_dim = 2, .value_dim = 2};

TEST_CASE("Uniform.draws_exactly_its_budget_of_distinct_ascending_tokens_of_the_range") {
  const Problem<float> problem({.shape = kShape, .tokens = 300});
  for (const TokenRange range : {TokenRange{0, 1}, {5, 69}, {4, 68}, {7, 300}, {0, 128}}) {
    const RangeIndex index(range, 2, 2);
    for (const TokenId budget : {1, 2, 31, 64, 250}) {
      const auto uniform = Uniform::create({.tokens = budget});
      REQUIRE(uniform.ok());
      for (std::uint32_t step = 0; step < 20; ++step) {
        const Drawn drawn = draw_tokens(*uniform, problem, index, {.seed = 3, .step = step});
        const TokenId expected = std::min(budget, range.size());
        CHECK(static_cast<TokenId>(drawn.tokens.size()) == expected);
        for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
          CHECK(range.contains(drawn.tokens[i]));
          if (i > 0) CHECK(drawn.tokens[i] > drawn.tokens[i - 1]);
          // log of a float ratio, rounded once.
          CHECK(static_cast<double>(drawn.log_pi[0][i]) ==
                doctest::Approx(std::log(static_cast<double>(expected) / range.size()))
                    .epsilon(1e-7));
          CHECK(drawn.log_pi[1][i] == drawn.log_pi[0][i]);
        }
        CHECK(drawn.members.empty());
      }
    }
  }
}

TEST_CASE("Uniform.draws_every_token_and_every_pair_equally_often") {
  // 20,000 keys, m = 5 of n = 16: tokens and pairs by chi-square. Indicators of tokens covary as
  // -pi (1 - pi) / (n - 1), those of pairs likewise, so the plain sums of squares are rescaled: for
  // tokens chi^2 (n - 1) / n / (1 - pi) has n - 1 degrees of freedom.
  const TokenId n = 16;
  const TokenId m = 5;
  const int draws = replications(20000);
  const std::uint64_t seed = first_seed();
  INFO("seed ", seed);
  const Problem<float> problem({.shape = kShape, .tokens = n + 3});
  const RangeIndex index({.begin = 3, .end = 3 + n}, 2, 2);
  const auto uniform = Uniform::create({.tokens = m});
  REQUIRE(uniform.ok());
  std::vector<double> tokens(static_cast<std::size_t>(n));
  std::vector<double> pairs(static_cast<std::size_t>(n) * static_cast<std::size_t>(n));
  for (int d = 0; d < draws; ++d) {
    const Drawn drawn = draw_tokens(*uniform, problem, index,
                                    {.seed = seed, .step = static_cast<std::uint32_t>(d)});
    for (const TokenId i : drawn.tokens) {
      tokens[static_cast<std::size_t>(i - 3)] += 1.0;
      for (const TokenId j : drawn.tokens) {
        if (j > i) pairs[static_cast<std::size_t>((i - 3) * n + j - 3)] += 1.0;
      }
    }
  }
  const double pi = static_cast<double>(m) / n;
  const double pi_pair = pi * (m - 1.0) / (n - 1.0);
  double chi_square = 0.0;
  for (const double count : tokens) {
    chi_square += std::pow(count - draws * pi, 2) / (draws * pi * (1.0 - pi)) * (n - 1.0) / n;
  }
  CHECK(std::abs(chi_square_z(chi_square, n - 1)) < kZ);
  // Bonferroni over 120 pairs: kZ + .5 keeps the probability of a false alarm below 7e-5.
  for (TokenId i = 0; i < n; ++i) {
    for (TokenId j = i + 1; j < n; ++j) {
      const double frequency = pairs[static_cast<std::size_t>(i * n + j)] / draws;
      CHECK(std::abs(frequency_z(frequency, pi_pair, draws)) < kZ + 0.5);
    }
  }
}

TEST_CASE("Uniform.draws_the_same_for_the_same_key_and_anew_for_any_other") {
  const Problem<float> problem({.shape = kShape, .tokens = 1000});
  const RangeIndex index({.begin = 0, .end = 1000}, 2, 2);
  const auto uniform = Uniform::create({.tokens = 100});
  REQUIRE(uniform.ok());
  const auto draw = [&](const NoiseKey& key, int kv_head) {
    return draw_tokens(*uniform, problem, index, key, kv_head).tokens;
  };
  const auto first = draw({.seed = 1, .step = 2, .layer = 3}, 0);
  CHECK(draw({.seed = 1, .step = 2, .layer = 3}, 0) == first);
  for (const auto& other :
       {draw({.seed = 2, .step = 2, .layer = 3}, 0), draw({.seed = 1, .step = 3, .layer = 3}, 0),
        draw({.seed = 1, .step = 2, .layer = 4}, 0), draw({.seed = 1, .step = 2, .layer = 3}, 1),
        draw({.seed = 1 + (std::uint64_t{1} << 32), .step = 2, .layer = 3}, 0)}) {
    // Of two independent draws 10 tokens are expected in common, with a variance of 8.1: 30 are
    // 7 standard deviations.
    std::vector<TokenId> common;
    std::set_intersection(first.begin(), first.end(), other.begin(), other.end(),
                          std::back_inserter(common));
    CHECK(common.size() < 30);
  }
}

TEST_CASE("Budget.is_at_least_one_token_and_at_most_the_range") {
  CHECK(Budget{.fraction = 1e-9}.of(1000) == 1);
  CHECK(Budget{.fraction = 0.02}.of(1000) == 20);
  CHECK(Budget{.fraction = 0.0201}.of(1000) == 21);
  CHECK(Budget{.fraction = 1.0}.of(1000) == 1000);
  CHECK(Budget{.tokens = 7}.of(1000) == 7);
  CHECK(Budget{.tokens = 7}.of(5) == 5);
  CHECK(Budget{.fraction = 0.5, .tokens = 7}.of(1000) == 7);
  for (const Budget& budget : {Budget{.fraction = 0.5}, Budget{.tokens = 3}}) {
    CHECK(budget.of(0) == 0);
    CHECK(budget.of(1) == 1);
  }
  CHECK(Budget{.fraction = 1.0}.of(std::numeric_limits<TokenId>::max()) ==
        std::numeric_limits<TokenId>::max());
}

TEST_CASE("Budget.refuses_what_is_not_a_fraction_or_a_number_of_tokens") {
  const double nan = std::nan("");
  for (const Budget& budget :
       {Budget{}, Budget{.fraction = -0.1}, Budget{.fraction = 1.01}, Budget{.fraction = nan},
        Budget{.tokens = -1}, Budget{.fraction = 0.5, .tokens = -1}}) {
    const auto uniform = Uniform::create(budget);
    CHECK_FALSE(uniform.ok());
    CHECK(uniform.status().code() == ErrorCode::kInvalidArgument);
  }
}

TEST_CASE("Uniform.reads_the_whole_range_with_certainty_where_the_budget_allows") {
  const Problem<float> problem({.shape = kShape, .tokens = 130});
  const RangeIndex index({.begin = 2, .end = 130}, 2, 2);
  for (const Budget& budget : {Budget{.fraction = 1.0}, Budget{.tokens = 128}}) {
    const auto uniform = Uniform::create(budget);
    REQUIRE(uniform.ok());
    const Drawn drawn = draw_tokens(*uniform, problem, index);
    CHECK(drawn.tokens.size() == 128);
    for (const float log_pi : drawn.log_pi[0]) CHECK(log_pi == 0.0F);
    CHECK(uniform->probability(128) == 1.0);
  }
}

}  // namespace

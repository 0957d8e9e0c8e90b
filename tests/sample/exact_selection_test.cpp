// SPDX-License-Identifier: Apache-2.0
// Samplers that look at every score: exact TopK and the two oracles.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "magicpig/index/index.hpp"
#include "magicpig/sample/oracle.hpp"
#include "magicpig/sample/top_k.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kGrouped{.query_heads = 3, .kv_heads = 1, .head_dim = 8, .value_dim = 4};
constexpr Shape kSingle{.query_heads = 1, .kv_heads = 1, .head_dim = 8, .value_dim = 4};
constexpr TokenId kTokens = 200;
constexpr TokenRange kRange{.begin = 5, .end = 195};

// Logits of one head over the range, as the samplers compute them.
std::vector<double> logits(const Problem<float>& problem, int head) {
  std::vector<double> s;
  for (TokenId t = kRange.begin; t < kRange.end; ++t) {
    s.push_back(oracle_logit(problem.source(),
                             {.data = problem.query(head),
                              .kv_head = 0,
                              .scale = 1.0 / std::sqrt(problem.shape().head_dim)},
                             t));
  }
  return s;
}

std::vector<double> probabilities(const std::vector<double>& s) {
  std::vector<double> p;
  double sum = 0.0;
  for (const double x : s) p.push_back(std::exp(x)), sum += p.back();
  for (double& x : p) x /= sum;
  return p;
}

TEST_CASE("TopK.of_one_head_is_its_tokens_of_largest_logit") {
  const Problem<float> problem({.shape = kSingle, .tokens = kTokens});
  const RangeIndex index(kRange, 1, 8);
  for (const TokenId budget : {1, 10, 190, 1000}) {
    const auto top = TopK<>::create({.tokens = budget});
    REQUIRE(top.ok());
    std::vector<std::pair<double, TokenId>> ranked;
    const auto s = logits(problem, 0);
    for (std::size_t i = 0; i < s.size(); ++i) {
      ranked.emplace_back(-s[i], kRange.begin + static_cast<TokenId>(i));
    }
    std::sort(ranked.begin(), ranked.end());
    std::vector<TokenId> expected;
    for (std::size_t i = 0; i < ranked.size() && i < static_cast<std::size_t>(budget); ++i) {
      expected.push_back(ranked[i].second);
    }
    std::sort(expected.begin(), expected.end());
    const Drawn drawn = draw_tokens(*top, problem, index);
    CHECK(drawn.tokens == expected);
    for (const float log_pi : drawn.log_pi[0]) CHECK(log_pi == 0.0F);
  }
}

TEST_CASE("TopK.of_a_group_fills_the_budget_with_each_heads_own_best") {
  const Problem<float> problem({.shape = kGrouped, .tokens = kTokens});
  const RangeIndex index(kRange, 1, 8);
  for (const TokenId budget : {1, 2, 3, 20, 100, 190}) {
    const auto top = TopK<>::create({.tokens = budget});
    REQUIRE(top.ok());
    const Drawn drawn = draw_tokens(*top, problem, index);
    CHECK(static_cast<TokenId>(drawn.tokens.size()) == budget);
    CHECK(std::is_sorted(drawn.tokens.begin(), drawn.tokens.end()));
    for (int g = 0; g < 3; ++g) {
      // Whatever a head holds is at least as good as whatever it does not hold.
      const auto own = drawn.of(g);
      const auto s = logits(problem, g);
      double worst = 1e30;
      double best_left = -1e30;
      for (TokenId t = kRange.begin; t < kRange.end; ++t) {
        const double logit = s[static_cast<std::size_t>(t - kRange.begin)];
        if (std::binary_search(own.begin(), own.end(), t)) {
          worst = std::min(worst, logit);
        } else {
          best_left = std::max(best_left, logit);
        }
      }
      CHECK(worst > best_left);
      CHECK(static_cast<TokenId>(own.size()) >= budget / 3);
    }
  }
}

TEST_CASE("TopK.gives_ties_to_the_older_token") {
  Problem<float> problem({.shape = kSingle, .tokens = kTokens});
  for (TokenId t = 1; t < kTokens; ++t) {
    std::copy(problem.key(0, 0), problem.key(0, 0) + 8, problem.key(0, t));
  }
  const auto top = TopK<>::create({.tokens = 4});
  REQUIRE(top.ok());
  CHECK(draw_tokens(*top, problem, RangeIndex(kRange, 1, 8)).tokens ==
        std::vector<TokenId>{5, 6, 7, 8});
}

// pi = min(1, size / tau) with sum pi = rows, tau by bisection.
std::vector<double> poisson_design(const std::vector<double>& size, double rows) {
  double low = 1e-12;
  double high = 1e3;
  std::vector<double> pi(size.size());
  for (int i = 0; i < 200; ++i) {
    const double tau = std::sqrt(low * high);
    double sum = 0.0;
    for (std::size_t j = 0; j < size.size(); ++j) sum += pi[j] = std::min(1.0, size[j] / tau);
    (sum > rows ? low : high) = tau;
  }
  return pi;
}

TEST_CASE("OraclePoisson.includes_tokens_in_proportion_to_their_softmax_up_to_certainty") {
  for (const double query_scale : {1.0, 4.0}) {  // without and with tokens that are certain
    const Problem<float> problem(
        {.shape = kGrouped, .tokens = kTokens, .query_scale = query_scale});
    const RangeIndex index(kRange, 1, 8);
    std::vector<double> size(static_cast<std::size_t>(kRange.size()));
    for (int g = 0; g < 3; ++g) {
      const auto p = probabilities(logits(problem, g));
      for (std::size_t i = 0; i < size.size(); ++i) size[i] += p[i];
    }
    const TokenId budget = 20;
    const auto pi = poisson_design(size, budget);
    const auto oracle = OraclePoisson::create({.tokens = budget});
    REQUIRE(oracle.ok());
    const int draws = replications(20000);
    const std::uint64_t seed = first_seed();
    INFO("seed ", seed);
    std::vector<double> counts(size.size());
    Sample rows;
    for (int d = 0; d < draws; ++d) {
      const Drawn drawn = draw_tokens(*oracle, problem, index,
                                      {.seed = seed, .step = static_cast<std::uint32_t>(d)});
      rows.add(static_cast<double>(drawn.tokens.size()));
      for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
        const auto at = static_cast<std::size_t>(drawn.tokens[i] - kRange.begin);
        counts[at] += 1.0;
        // Logits in float: 1e-6 of their size, which is below 30; log pi rounded to float.
        REQUIRE(std::abs(static_cast<double>(drawn.log_pi[0][i]) - std::log(pi[at])) < 5e-5);
        REQUIRE(drawn.log_pi[2][i] == drawn.log_pi[0][i]);
      }
    }
    CHECK(std::abs(rows.z(budget)) < kZ);
    for (std::size_t i = 0; i < pi.size(); ++i) {
      if (pi[i] > 1.0 - 1e-9) {
        CHECK(counts[i] == draws);
      } else if (draws * pi[i] > 5.0) {
        // Bonferroni over 190 tokens: kZ + .5 keeps false alarms below 1.1e-4.
        CHECK(std::abs(frequency_z(counts[i] / draws, pi[i], draws)) < kZ + 0.5);
      }
    }
  }
}

TEST_CASE("OraclePoisson.takes_everything_with_certainty_where_the_budget_allows") {
  const Problem<float> problem({.shape = kGrouped, .tokens = kTokens});
  const auto oracle = OraclePoisson::create({.fraction = 1.0});
  REQUIRE(oracle.ok());
  const Drawn drawn = draw_tokens(*oracle, problem, RangeIndex(kRange, 1, 8));
  CHECK(static_cast<TokenId>(drawn.tokens.size()) == kRange.size());
  for (const float log_pi : drawn.log_pi[0]) CHECK(log_pi == 0.0F);
}

TEST_CASE("OracleMultinomial.draws_each_head_in_proportion_to_its_softmax") {
  const Problem<float> problem({.shape = kGrouped, .tokens = kTokens});
  const RangeIndex index(kRange, 1, 8);
  const auto oracle = OracleMultinomial::create({.tokens = 60});  // 20 draws each
  REQUIRE(oracle.ok());
  const int steps = replications(4000);
  const std::uint64_t seed = first_seed();
  INFO("seed ", seed);
  for (int g = 0; g < 3; ++g) {
    const auto p = probabilities(logits(problem, g));
    std::vector<double> observed(p.size());
    std::vector<double> expected(p.size());
    for (std::size_t i = 0; i < p.size(); ++i) expected[i] = p[i] * 20.0 * steps;
    for (int d = 0; d < steps; ++d) {
      const Drawn drawn = draw_tokens(*oracle, problem, index,
                                      {.seed = seed, .step = static_cast<std::uint32_t>(d)});
      double total = 0.0;
      for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
        if (!drawn.has(i, g)) continue;
        const auto at = static_cast<std::size_t>(drawn.tokens[i] - kRange.begin);
        // log pi is log(B p / c): c is a whole number.
        const double c =
            20.0 * p[at] /
            std::exp(static_cast<double>(drawn.log_pi[static_cast<std::size_t>(g)][i]));
        REQUIRE(std::abs(c - std::round(c)) < 1e-4);
        observed[at] += std::round(c);
        total += std::round(c);
      }
      REQUIRE(total == 20.0);
    }
    CHECK(std::abs(chi_square_z(observed, expected)) < kZ);
  }
}

TEST_CASE("OracleMultinomial.reads_as_many_rows_as_distinct_draws_are_expected") {
  // E|S| = n - sum (1 - p)^B, at most 1 + B (1 - max p). Chen et al. 2024, theorem 3.3.
  const Problem<float> problem({.shape = kSingle, .tokens = kTokens, .query_scale = 3.0});
  const RangeIndex index(kRange, 1, 8);
  const auto oracle = OracleMultinomial::create({.tokens = 50});
  REQUIRE(oracle.ok());
  double expected = 0.0;
  double largest = 0.0;
  for (const double p : probabilities(logits(problem, 0))) {
    expected += 1.0 - std::pow(1.0 - p, 50);
    largest = std::max(largest, p);
  }
  CHECK(expected <= 1.0 + 50.0 * (1.0 - largest));
  const std::uint64_t seed = first_seed();
  INFO("seed ", seed);
  Sample rows;
  for (int d = 0; d < replications(4000); ++d) {
    rows.add(static_cast<double>(
        draw_tokens(*oracle, problem, index, {.seed = seed, .step = static_cast<std::uint32_t>(d)})
            .tokens.size()));
  }
  CHECK(std::abs(rows.z(expected)) < kZ);
}

TEST_CASE("TopK_and_oracles.refuse_a_budget_of_nothing") {
  CHECK_FALSE(TopK<>::create({}).ok());
  CHECK_FALSE(OraclePoisson::create({}).ok());
  CHECK_FALSE(OracleMultinomial::create({.fraction = 2.0}).ok());
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// vAttention and uniform tails: who is certain, how many are drawn, and that the sums are unbiased.
#include "magicpig/sample/vattention.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "magicpig/index/index.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/uniform_tail.hpp"
#include "oracle.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 4};
constexpr TokenRange kRange{5, 405};
constexpr TokenId kTokens = 420;
constexpr double kScale = 0.35355339059327379;  // 1 / sqrt(8), as draw_tokens() has it

Problem<float> make_problem() {
  return Problem<float>({.shape = kShape, .tokens = kTokens, .seed = 11, .query_scale = 1.2});
}

RangeIndex range_index() { return {kRange, kShape.kv_heads, kShape.head_dim}; }

double weight(const Problem<float>& problem, int head, TokenId token) {
  return std::exp(oracle_logit(
      problem.source(), {.data = problem.query(head), .kv_head = 0, .scale = kScale}, token));
}

std::set<TokenId> heavy_tokens(const Problem<float>& problem, TokenId count) {
  const auto top = TopK<>::create({.tokens = count});
  REQUIRE(top.ok());
  const Drawn drawn = draw_tokens(*top, problem, range_index());
  return {drawn.tokens.begin(), drawn.tokens.end()};
}

// Tokens of a draw by their kind: certain or with the one probability of the others.
struct Kinds {
  explicit Kinds(const Drawn& drawn) {
    for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
      if (drawn.log_pi[0][i] == 0.0F) {
        certain.insert(drawn.tokens[i]);
      } else {
        sample.push_back(drawn.tokens[i]);
        pi = std::exp(static_cast<double>(drawn.log_pi[0][i]));
      }
      CHECK(drawn.log_pi[1][i] == drawn.log_pi[0][i]);
    }
  }
  std::set<TokenId> certain;
  std::vector<TokenId> sample;
  double pi = 1.0;
};

TEST_CASE("UniformTail.draws_from_what_its_finder_leaves") {
  const Problem<float> problem = make_problem();
  const std::set<TokenId> heavy = heavy_tokens(problem, 20);
  const auto tail = UniformTail<TopK<>>::create(*TopK<>::create({.tokens = 20}), {.tokens = 38});
  REQUIRE(tail.ok());
  for (std::uint32_t step = 0; step < 20; ++step) {
    const Drawn drawn = draw_tokens(*tail, problem, range_index(), {.seed = 5, .step = step});
    CHECK(std::is_sorted(drawn.tokens.begin(), drawn.tokens.end()));
    const Kinds kinds(drawn);
    CHECK(kinds.certain == heavy);
    CHECK(kinds.sample.size() == 38);
    CHECK(kinds.pi == doctest::Approx(38.0 / 380.0).epsilon(1e-6));
  }
  CHECK(!UniformTail<TopK<>>::create(*TopK<>::create({.tokens = 20}), {}).ok());
}

TEST_CASE("UniformTail.of_a_finder_that_finds_everything_is_exact") {
  const Problem<float> problem = make_problem();
  const auto tail = UniformTail<TopK<>>::create(*TopK<>::create({.fraction = 1.0}), {.tokens = 3});
  REQUIRE(tail.ok());
  const Kinds kinds(draw_tokens(*tail, problem, range_index()));
  CHECK(static_cast<TokenId>(kinds.certain.size()) == kRange.size());
  CHECK(kinds.sample.empty());
}

// b of one head by lemma 4.1, from the tokens known and those of the pilot, with the correction of
// a finite population: b = b0 / (1 + b0 / rest).
double needed(const Problem<float>& problem, const VAttentionConfig& config, int head,
              const std::set<TokenId>& heavy, const std::set<TokenId>& pilot) {
  const auto source = problem.source();
  const auto dim = static_cast<std::size_t>(kShape.value_dim);
  const double rest = kRange.size() - static_cast<double>(heavy.size() + pilot.size());
  const auto value = [&](TokenId t, std::size_t j) {
    return weight(problem, head, t) * static_cast<double>(source.value(0, t)[j]);
  };
  double denominator = 0.0;
  std::vector<double> numerator(dim);
  for (TokenId t = 0; t < kTokens; ++t) {
    if (kRange.contains(t) && heavy.count(t) + pilot.count(t) == 0) continue;
    denominator += weight(problem, head, t);
    for (std::size_t j = 0; j < dim; ++j) numerator[j] += value(t, j);
  }
  const auto count = static_cast<double>(pilot.size());
  double mean = 0.0;
  std::vector<double> mean_value(dim);
  for (const TokenId t : pilot) {
    mean += weight(problem, head, t) / count;
    for (std::size_t j = 0; j < dim; ++j) mean_value[j] += value(t, j) / count;
  }
  double variance = 0.0;
  double trace = 0.0;
  double norm = 0.0;
  for (const TokenId t : pilot) {
    variance += std::pow(weight(problem, head, t) - mean, 2) / (count - 1);
    for (std::size_t j = 0; j < dim; ++j) {
      trace += std::pow(value(t, j) - mean_value[j], 2) / (count - 1);
    }
  }
  for (std::size_t j = 0; j < dim; ++j) norm += std::pow(numerator[j] + rest * mean_value[j], 2);
  const double z = normal_quantile(config.two_sided ? config.delta / 2 : config.delta);
  const auto budget = [&](double of, double sum) {
    const double b0 = std::pow(z * rest * std::sqrt(of) / (config.epsilon * sum), 2);
    return b0 / (1.0 + b0 / rest);
  };
  const double of_denominator = budget(variance, denominator + rest * mean);
  const double of_numerator = budget(trace, std::sqrt(norm));
  double b = std::max(of_denominator, of_numerator);
  if (config.sum == SampledSum::kDenominator) b = of_denominator;
  if (config.sum == SampledSum::kNumerator) b = of_numerator;
  return std::clamp(b, 1.0, rest);
}

TEST_CASE("VAttention.draws_as_many_as_the_lemma_asks_for") {
  const Problem<float> problem = make_problem();
  const std::set<TokenId> heavy = heavy_tokens(problem, 12);
  for (const SampledSum sum :
       {SampledSum::kDenominator, SampledSum::kNumerator, SampledSum::kBoth}) {
    for (const bool two_sided : {true, false}) {
      for (const double epsilon : {0.02, 0.1, 0.3, 5.0}) {
        const VAttentionConfig config{.heavy = {.tokens = 12},
                                      .base = {.tokens = 40},
                                      .epsilon = epsilon,
                                      .delta = 0.1,
                                      .two_sided = two_sided,
                                      .sum = sum};
        CAPTURE(static_cast<int>(sum));
        CAPTURE(two_sided);
        CAPTURE(epsilon);
        const auto sampler = VAttention<>::create(config);
        REQUIRE(sampler.ok());
        for (std::uint32_t step = 0; step < 5; ++step) {
          const Drawn drawn =
              draw_tokens(*sampler, problem, range_index(), {.seed = 1, .step = step});
          CHECK(std::is_sorted(drawn.tokens.begin(), drawn.tokens.end()));
          const Kinds kinds(drawn);
          std::set<TokenId> pilot;
          std::set_difference(kinds.certain.begin(), kinds.certain.end(), heavy.begin(),
                              heavy.end(), std::inserter(pilot, pilot.begin()));
          if (kinds.sample.empty()) {  // everything was needed, and is certain
            CHECK(static_cast<TokenId>(drawn.tokens.size()) == kRange.size());
            continue;
          }
          CHECK(std::includes(kinds.certain.begin(), kinds.certain.end(), heavy.begin(),
                              heavy.end()));
          CHECK(pilot.size() == 40);
          const double b = std::ceil(std::max(needed(problem, config, 0, heavy, pilot),
                                              needed(problem, config, 1, heavy, pilot)) -
                                     1e-4);
          CHECK(std::abs(static_cast<double>(kinds.sample.size()) - b) <= 1.0);
          CHECK(
              kinds.pi ==
              doctest::Approx(static_cast<double>(kinds.sample.size()) / (400 - 52)).epsilon(1e-6));
        }
      }
    }
  }
}

// Over draws, with weights 1 / pi scaled by `shrink`: standard errors of the normaliser's mean.
double normaliser_z(const Problem<float>& problem, const VAttentionConfig& config, bool published) {
  const auto sampler = VAttention<>::create(config);
  REQUIRE(sampler.ok());
  double exact = 0.0;
  for (TokenId t = kRange.begin; t < kRange.end; ++t) exact += weight(problem, 0, t);
  const int draws = replications(4000);
  Sample sums;
  for (int d = 0; d < draws; ++d) {
    const Drawn drawn = draw_tokens(*sampler, problem, range_index(),
                                    {.seed = first_seed(), .step = static_cast<std::uint32_t>(d)});
    const Kinds kinds(drawn);
    const double rest = kRange.size() - static_cast<double>(kinds.certain.size());
    double sum = 0.0;
    for (const TokenId t : kinds.certain) sum += weight(problem, 0, t);
    // As published: b draws with replacement, of which the distinct ones keep the weight rest / b.
    const auto b = static_cast<double>(kinds.sample.size());
    const auto distinct = static_cast<std::size_t>(rest * (1.0 - std::pow(1.0 - 1.0 / rest, b)));
    const std::size_t kept =
        published ? std::min(distinct, kinds.sample.size()) : kinds.sample.size();
    Random random(static_cast<std::uint64_t>(d) + 1);
    std::vector<TokenId> sample = kinds.sample;
    for (std::size_t i = 0; i < kept; ++i) {  // a random subset of that size
      std::swap(
          sample[i],
          sample[i + static_cast<std::size_t>(random.below(static_cast<int>(sample.size() - i)))]);
      sum += weight(problem, 0, sample[i]) / kinds.pi;
    }
    sums.add(sum);
  }
  return sums.z(exact);
}

TEST_CASE("VAttention.sums_are_unbiased_though_the_pilot_decides_and_those_as_published_are_not") {
  const Problem<float> problem = make_problem();
  const VAttentionConfig config{
      .heavy = {.tokens = 12}, .base = {.tokens = 20}, .epsilon = 0.1, .delta = 0.1};
  CHECK(std::abs(normaliser_z(problem, config, false)) < kZ);
  CHECK(normaliser_z(problem, config, true) < -2.0 * kZ);
}

TEST_CASE("VAttention.of_few_tokens_takes_all_of_them") {
  const Problem<float> problem = make_problem();
  const auto sampler = VAttention<>::create({.heavy = {.tokens = 5}, .base = {.tokens = 5}});
  REQUIRE(sampler.ok());
  for (const TokenId n : {1, 2, 5, 7, 10}) {
    const RangeIndex index({.begin = 7, .end = 7 + n}, 1, kShape.head_dim);
    const Drawn drawn = draw_tokens(*sampler, problem, index);
    CHECK(static_cast<TokenId>(drawn.tokens.size()) == n);
    for (const float log_pi : drawn.log_pi[0]) CHECK(log_pi == 0.0F);
  }
}

TEST_CASE("VAttention.refuses_what_means_nothing") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(VAttention<>::create({}).ok());
  for (const double epsilon : {0.0, -1.0, nan, 1e31}) {
    CHECK(!VAttention<>::create({.epsilon = epsilon}).ok());
  }
  for (const double delta : {0.0, 1.0, nan}) CHECK(!VAttention<>::create({.delta = delta}).ok());
  CHECK(!VAttention<>::create({.heavy = {}}).ok());
  CHECK(!VAttention<>::create({.base = {.fraction = 2.0}}).ok());
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Poisson draws by signatures.
#include "magicpig/sample/poisson.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

using Index = Signatures<HadamardRotation>;

constexpr Shape kShape{.query_heads = 6, .kv_heads = 2, .head_dim = 24, .value_dim = 8};
constexpr TokenId kTokens = 600;
constexpr TokenRange kRange{.begin = 4, .end = 580};

struct Setting {
  Setting(int bits, double query_scale, const Shape& shape = kShape)
      : problem({.shape = shape, .tokens = kTokens, .query_scale = query_scale}) {
    auto made = HadamardRotation::create(shape.head_dim, 5);
    REQUIRE(made.ok());
    rotation = std::make_unique<HadamardRotation>(std::move(*made));
    auto empty = Index::create(*rotation, {.kv_heads = shape.kv_heads, .bits = bits});
    REQUIRE(empty.ok());
    index = std::make_unique<Index>(std::move(*empty));
    SerialExecutor executor;
    REQUIRE(index->build(make_backend<ScalarOps>(executor), problem.source(), kRange).ok());
  }
  [[nodiscard]] Poisson sampler(const PoissonConfig& config) const {
    const auto made = Poisson::create(*rotation, index->levels().bits(), config);
    REQUIRE(made.ok());
    return *made;
  }

  Problem<float> problem;
  std::unique_ptr<HadamardRotation> rotation;
  std::unique_ptr<Index> index;
};

// What every token's probability is: that of a draw that reads everything with the same design.
std::vector<double> design(const Setting& s, const PoissonConfig& config) {
  // Probabilities do not depend on the noise, so draws of many steps show those of all tokens.
  const Poisson sampler = s.sampler(config);
  std::vector<double> pi(static_cast<std::size_t>(kRange.size()), 0.0);
  for (std::uint32_t step = 0; step < 3000; ++step) {
    const Drawn drawn = draw_tokens(sampler, s.problem, *s.index, {.seed = 77, .step = step});
    for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
      pi[static_cast<std::size_t>(drawn.tokens[i] - kRange.begin)] =
          std::exp(static_cast<double>(drawn.log_pi[0][i]));
    }
  }
  return pi;
}

TEST_CASE("Poisson.draws_each_token_as_often_as_it_says_and_each_by_itself") {
  for (const double query_scale : {1.0, 4.0}) {
    CAPTURE(query_scale);
    const Setting s(2, query_scale);
    const PoissonConfig config{.budget = {.tokens = 60}};
    const std::vector<double> pi = design(s, config);
    const Poisson sampler = s.sampler(config);
    const int draws = replications(20000);
    INFO("seed ", first_seed());
    std::vector<double> counts(pi.size());
    Sample rows;
    Sample tokens;  // Horvitz-Thompson estimate of their number
    double variance = 0.0;
    for (const double p : pi) variance += p * (1.0 - p);
    for (int d = 0; d < draws; ++d) {
      const Drawn drawn =
          draw_tokens(sampler, s.problem, *s.index,
                      {.seed = first_seed(), .step = static_cast<std::uint32_t>(d)});
      REQUIRE(drawn.members.empty());
      REQUIRE(std::is_sorted(drawn.tokens.begin(), drawn.tokens.end()));
      rows.add(static_cast<double>(drawn.tokens.size()));
      double estimate = 0.0;
      for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
        counts[static_cast<std::size_t>(drawn.tokens[i] - kRange.begin)] += 1.0;
        estimate += std::exp(-static_cast<double>(drawn.log_pi[0][i]));
      }
      tokens.add(estimate);
    }
    CHECK(std::abs(rows.mean() - 60.0) < 0.01 * 60.0 + kZ * rows.standard_error());
    CHECK(std::abs(rows.variance_z(variance)) < kZ);  // as independent draws have it
    for (std::size_t i = 0; i < pi.size(); ++i) {
      if (pi[i] == 1.0) {
        CHECK(counts[i] == draws);
      } else if (draws * pi[i] > 5.0) {
        CHECK(std::abs(frequency_z(counts[i] / draws, pi[i], draws)) < kZ + 0.5);
      }
    }
    if (query_scale == 1.0) CHECK(std::abs(tokens.z(kRange.size())) < kZ);
  }
}

// The weighted sum and the normaliser, scaled back from a state: out * exp(lse) and exp(lse).
struct Sums {
  Sample normaliser;
  Sample weighted;
};

template <class Estimator>
Sums run(const Setting& s, const PoissonConfig& config, const Estimator& estimator, int head,
         int draws) {
  const Poisson sampler = s.sampler(config);
  const DecodePlan<Poisson, Estimator> plan{
      .shape = s.problem.shape(), .sampler = &sampler, .estimator = estimator, .exact_below = 0};
  Outputs outputs(s.problem.shape());
  SerialExecutor executor;
  const auto source = s.problem.source();
  auto request = make_request(s.problem, source, s.index.get(), outputs);
  request.seed = first_seed();
  Sums sums;
  for (int d = 0; d < draws; ++d) {
    request.step = static_cast<std::uint32_t>(d);
    REQUIRE(decode_one<ScalarOps>(executor, plan, request).ok());
    const double normaliser = std::exp(static_cast<double>(outputs.lse(head)));
    sums.normaliser.add(normaliser);
    sums.weighted.add(normaliser * static_cast<double>(outputs.out(head)[2]));
  }
  return sums;
}

TEST_CASE("Poisson.sums_are_unbiased_given_the_codes_and_uncorrected_ones_are_not") {
  for (const int bits : {1, 3}) {
    CAPTURE(bits);
    const Setting s(bits, 1.5);
    const int head = 4;
    const OracleState exact = oracle_attention(
        s.problem.source(),
        {.data = s.problem.query(head), .kv_head = 1, .scale = 1.0 / std::sqrt(24.0)},
        every_token({.begin = 0, .end = kTokens}));
    const double normaliser = std::exp(exact.lse);
    const int draws = replications(4000);
    INFO("seed ", first_seed());
    const PoissonConfig config{.budget = {.fraction = 0.1}};
    const Sums right = run(s, config, SelfNormalised{}, head, draws);
    CHECK(std::abs(right.normaliser.z(normaliser)) < kZ);
    CHECK(std::abs(right.weighted.z(normaliser * exact.out[2])) < kZ);
    const Sums with_least =
        run(s, {.budget = {.fraction = 0.1}, .least = 0.05}, SelfNormalised{}, head, draws);
    CHECK(std::abs(with_least.normaliser.z(normaliser)) < kZ);
    // Controls that the test can fail: no correction, and a floor under every probability.
    CHECK(std::abs(run(s, config, Uncorrected{}, head, draws).normaliser.z(normaliser)) > 10.0);
    CHECK(std::abs(run(s, config, Floored{.floor = 0.1F}, head, draws).normaliser.z(normaliser)) >
          10.0);
  }
}

TEST_CASE("Poisson.keeps_its_budget_in_the_mean_whatever_the_logits") {
  for (const double query_scale : {0.0, 0.5, 2.0, 6.0}) {
    for (const TokenId budget : {6, 30, 150}) {
      CAPTURE(query_scale);
      CAPTURE(budget);
      const Setting s(2, query_scale);
      const Poisson sampler = s.sampler({.budget = {.tokens = budget}});
      Sample rows;
      for (std::uint32_t d = 0; d < 400; ++d) {
        rows.add(static_cast<double>(
            draw_tokens(sampler, s.problem, *s.index, {.seed = first_seed(), .step = d})
                .tokens.size()));
      }
      CHECK(std::abs(rows.mean() - budget) < 0.02 * budget + kZ * rows.standard_error());
    }
  }
}

TEST_CASE("Poisson.reads_everything_with_certainty_where_the_budget_allows") {
  const Setting s(2, 1.0);
  for (const PoissonConfig config :
       {PoissonConfig{.budget = {.fraction = 1.0}}, PoissonConfig{.budget = {.tokens = 100000}},
        PoissonConfig{.budget = {.tokens = 1}, .least = 1.0}}) {
    const Drawn drawn = draw_tokens(s.sampler(config), s.problem, *s.index, {.seed = 1});
    REQUIRE(drawn.tokens.size() == static_cast<std::size_t>(kRange.size()));
    for (const float log_pi : drawn.log_pi[0]) CHECK(log_pi == 0.0F);
  }
}

TEST_CASE("Poisson.draws_anew_for_every_noise_key_and_the_same_for_the_same") {
  const Setting s(2, 1.0);
  const Poisson sampler = s.sampler({.budget = {.fraction = 0.2}});
  const auto draw = [&](const NoiseKey& key, int kv_head = 0) {
    return draw_tokens(sampler, s.problem, *s.index, key, kv_head).tokens;
  };
  const NoiseKey key{.seed = 1, .step = 2, .layer = 3};
  CHECK(draw(key) == draw(key));
  CHECK(draw(key) != draw({.seed = 2, .step = 2, .layer = 3}));
  CHECK(draw(key) != draw({.seed = 1, .step = 3, .layer = 3}));
  CHECK(draw(key) != draw({.seed = 1, .step = 2, .layer = 4}));
  CHECK(draw(key, 0) != draw(key, 1));
}

// Numbers that no library of functions has a say in: FNV-1a of the tokens of some draws.
TEST_CASE("Poisson.draws_the_same_tokens_on_every_machine") {
  std::uint64_t hash = 14695981039346656037ULL;
  for (const int bits : {1, 2, 3, 4}) {
    const Shape shape{.query_heads = 6, .kv_heads = 2, .head_dim = 65, .value_dim = 7};
    Problem<float> problem({.shape = shape, .tokens = kTokens});
    auto number = [state = std::uint32_t{1}]() mutable {
      state = state * 1664525U + 1013904223U;
      return static_cast<float>(state >> 16) / 16384.0F - 2.0F;
    };
    for (int h = 0; h < 2; ++h) {
      for (TokenId t = 0; t < kTokens; ++t) {
        for (int j = 0; j < 65; ++j) problem.key(h, t)[j] = number() + number();
        for (int j = 0; j < 7; ++j) problem.value(h, t)[j] = number();
      }
    }
    for (float& x : problem.query()) x = number() + number();
    const auto rotation = HadamardRotation::create(65, 9);
    REQUIRE(rotation.ok());
    auto index = Index::create(*rotation, {.kv_heads = 2, .bits = bits, .value_dim = 7});
    REQUIRE(index.ok());
    SerialExecutor executor;
    REQUIRE(index->build(make_backend<ScalarOps>(executor), problem.source(), kRange).ok());
    const auto sampler = Poisson::create(*rotation, bits, {.budget = {.fraction = 0.05}});
    REQUIRE(sampler.ok());
    for (const int kv_head : {0, 1}) {
      for (const TokenId t : draw_tokens(*sampler, problem, *index, {.seed = 3}, kv_head).tokens) {
        hash = (hash ^ static_cast<std::uint32_t>(t)) * 1099511628211ULL;
      }
    }
  }
  CHECK(hash == 10530422179164010416ULL);
}

TEST_CASE("Poisson.refuses_what_is_out_of_bounds") {
  const Setting s(2, 1.0);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const PoissonConfig config :
       {PoissonConfig{}, PoissonConfig{.budget = {.fraction = nan}},
        PoissonConfig{.budget = {.fraction = 1.5}}, PoissonConfig{.budget = {.tokens = -1}},
        PoissonConfig{.budget = {.tokens = 5}, .temperature = 0.0},
        PoissonConfig{.budget = {.tokens = 5}, .temperature = nan},
        PoissonConfig{.budget = {.tokens = 5}, .least = 1.5},
        PoissonConfig{.budget = {.tokens = 5}, .least = nan}}) {
    CHECK(Poisson::create(*s.rotation, 2, config).status().code() == ErrorCode::kInvalidArgument);
  }
  CHECK(Poisson::create(*s.rotation, 5, {.budget = {.tokens = 5}}).status().code() ==
        ErrorCode::kInvalidArgument);
  const auto other = Poisson::create(*s.rotation, 3, {.budget = {.tokens = 5}});
  REQUIRE(other.ok());
  CHECK(other->supports(*s.index).code() == ErrorCode::kShapeMismatch);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Sampling budgets: the published ones from a one-parameter model of cosines, the same through real
// tables, and what they become without centring.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "magicpig/estimate/rule.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/sample/collision.hpp"
#include "moments.hpp"
#include "statistics.hpp"
#include "table_trials.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

// Standard deviation of cos(q, k - c) that reproduces the published table.
constexpr double kSpread = 0.105;

// Mean and mean square of u over cosines ~ N(0, kSpread^2), by the trapezoidal rule on +-8 standard
// deviations; for a smooth integrand that vanishes at both ends its error is below 1e-10.
struct ModelBudget {
  double mean = 0.0;
  double square = 0.0;
};

ModelBudget model_budget(int bits, int tables) {
  const auto family = SimHash::create({.dim = 1, .bits = bits, .tables = tables});
  REQUIRE(family.ok());
  const int steps = 800;
  const double h = 16.0 / steps;
  ModelBudget budget;
  for (int i = 0; i <= steps; ++i) {
    const double z = -8.0 + h * i;
    const double density = std::exp(-0.5 * z * z) / std::sqrt(6.283185307179586) * h;
    const double u = std::exp(log_at_least(2, tables, family->table_collision(kSpread * z, 0)));
    budget.mean += density * u;
    budget.square += density * u * u;
  }
  return budget;
}

TEST_CASE("Budgets.of_the_thirty_published_settings_follow_from_one_spread_of_cosines") {
  // Chen et al. 2024, table 9: measured percentages, given to two digits or fewer.
  const int tables[] = {75, 100, 120, 150, 200, 300};
  const double percent[5][6] = {{14, 21, 27, 35, 48, 66},
                                {5, 8, 11, 15, 22, 36},
                                {1.6, 2.7, 4, 5.4, 8.5, 15.4},
                                {.5, .9, 1.5, 2, 3, 6},
                                {.15, .3, .5, .6, 1, 2}};
  for (int k = 0; k < 5; ++k) {
    for (int l = 0; l < 6; ++l) {
      const int bits = 7 + k;
      CAPTURE(bits);
      CAPTURE(tables[l]);
      // (10, 120) is given as 1.2 % in the paper's table 13.
      const double published = bits == 10 && tables[l] == 120 ? 1.2 : percent[k][l];
      // One digit, .15 to .6, is known to 25 % only.
      const double tolerance = bits == 11 ? 0.25 : 0.10;
      CHECK(100.0 * model_budget(bits, tables[l]).mean ==
            doctest::Approx(published).epsilon(tolerance).scale(0.0));
    }
  }
}

// Keys with isotropic noise around a centre opposite to the query. In d = 91 dimensions the cosine
// of a random direction has standard deviation 1 / sqrt(91) = .1048. `mirrored` keys follow with
// the opposite sign, so that the mean of all keys is 0.
struct OppositeKeys {
  static constexpr Shape kShape{.query_heads = 1, .kv_heads = 1, .head_dim = 91, .value_dim = 1};
  Problem<float> problem;

  OppositeKeys(TokenId tokens, bool mirrored)
      : problem({.shape = kShape, .tokens = mirrored ? 2 * tokens : tokens, .seed = 99}) {
    const float* query = problem.query(0);
    double square = 0.0;
    for (int j = 0; j < 91; ++j) square += std::pow(static_cast<double>(query[j]), 2);
    // 1.5 times the noise's norm: cosines of whole keys near -.83, as keys around a sink have.
    const auto shift = static_cast<float>(-1.5 * std::sqrt(91.0 / square));
    for (TokenId t = 0; t < tokens; ++t) {
      for (int j = 0; j < 91; ++j) {
        problem.key(0, t)[j] += shift * query[j];
        if (mirrored) problem.key(0, t + tokens)[j] = -problem.key(0, t)[j];
      }
    }
  }

  // Tokens below `limit` drawn at (bits, tables), t = 2.
  [[nodiscard]] std::vector<TokenId> drawn(int bits, int tables, TokenId limit,
                                           std::uint64_t seed) const {
    const auto family = SimHash::create({.dim = 91, .bits = bits, .tables = tables, .seed = seed});
    auto index = BucketTables<SimHash>::create(*family, {});
    SerialExecutor executor;
    const auto backend = make_backend<TrialOps>(executor);
    REQUIRE(index->build(backend, problem.source(), {.begin = 0, .end = problem.tokens()}).ok());
    const auto sampler = Collisions::create(*family, {});
    std::vector<TokenId> tokens;
    for (const TokenId t : draw_tokens<TrialOps>(*sampler, problem, *index).tokens) {
      if (t < limit) tokens.push_back(t);
    }
    return tokens;
  }
};

TEST_CASE("Budgets.through_real_tables_agree_with_the_model") {
  // 4,000 independent keys, eight seeds of planes. The drawn fraction varies with keys and planes:
  // per token as a coin, plus what tokens share through the planes, the mean covariance of two
  // tokens. That is E[u_2(pair)] - u^2 over the cosine between two independent centred keys, ~N(0,
  // 1 / 91), and their cosines with the query; it is computed below on 4,000 random triples.
  const std::uint64_t seed = first_seed();
  INFO("seed ", seed);
  const int bits = 8;
  const int tables = 75;
  const TokenId n = 4000;
  const int seeds = 8;
  const OppositeKeys keys(n, false);
  double fraction = 0.0;
  for (int s = 0; s < seeds; ++s) {
    const auto drawn = keys.drawn(bits, tables, n, seed + static_cast<std::uint64_t>(s));
    fraction += static_cast<double>(drawn.size()) / n / seeds;
  }
  const ModelBudget model = model_budget(bits, tables);
  Random random(7);
  double shared = 0.0;
  const int triples = 4000;
  for (int i = 0; i < triples; ++i) {
    const auto cosine_of_two = [&] { return random.normal() / std::sqrt(91.0); };
    const double p = same_side(cosine_of_two());
    const double q = same_side(cosine_of_two());
    const double both = same_side(p, q, same_side(cosine_of_two()));
    const TablePair table{
        .first = std::pow(p, bits), .second = std::pow(q, bits), .both = std::pow(both, bits)};
    shared += (both_at_least(2, tables, table) - (1.0 - fewer_than(2, tables, table.first)) *
                                                     (1.0 - fewer_than(2, tables, table.second))) /
              triples;
  }
  // The keys are the same under every seed, so their share of the variance does not average out.
  const double of_keys = (model.square - model.mean * model.mean) / n;
  const double of_planes = (model.mean - model.square) / n + std::max(shared, 0.0);
  const double variance = of_keys + of_planes / seeds;
  CAPTURE(fraction);
  CAPTURE(model.mean);
  CAPTURE(std::sqrt(variance));
  // The model's spread of .105 against .1048 changes the budget by 1 %.
  CHECK(std::abs(fraction - model.mean) < kZ * std::sqrt(variance) + 0.01 * model.mean);
  // The bound is of use: below a quarter of the budget itself.
  CHECK(kZ * std::sqrt(variance) < 0.25 * model.mean);
}

TEST_CASE("Budgets.collapse_without_centring_when_keys_point_away_from_the_query") {
  // Mirrored keys make the centre 0: the published ablation. Without centring below .1 % of the
  // keys are drawn, with it the 1.9 % of the model.
  const TokenId n = 1500;
  const auto without = OppositeKeys(n, true).drawn(10, 150, n, first_seed()).size();
  const auto with = OppositeKeys(n, false).drawn(10, 150, n, first_seed()).size();
  CAPTURE(without);
  CAPTURE(with);
  CHECK(static_cast<double>(without) < 0.001 * n);
  // 28 are expected; as a Poisson number 10 to 60 leaves out 1e-4 and 1e-7, and its true spread
  // over planes is wider by little.
  CHECK(with >= 10);
  CHECK(with <= 60);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// How often tokens and pairs of tokens are drawn over seeds of planes, and how often they collide.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "magicpig/hash/orthogonal.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/sample/collision.hpp"
#include "table_trials.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr std::size_t kTokens = Trial::kRange.size();

// Counts over seeds of how often each indexed token, and each pair of the first kPaired of them,
// was drawn by head 0.
struct Counts {
  static constexpr std::size_t kPaired = 48;
  std::array<double, kTokens> token{};
  std::array<std::array<double, kPaired>, kPaired> pair{};

  void add(const std::vector<TokenId>& drawn) {
    for (const TokenId t : drawn) {
      const auto i = static_cast<std::size_t>(t - Trial::kRange.begin);
      token[i] += 1.0;
      for (const TokenId other : drawn) {
        const auto j = static_cast<std::size_t>(other - Trial::kRange.begin);
        if (i < j && j < kPaired) pair[i][j] += 1.0;
      }
    }
  }
};

template <class Family>
Counts count_draws(const Trial& trial, const DesignConfig& config, int seeds) {
  const auto family =
      Family::create({.dim = 32, .bits = config.bits, .tables = config.tables, .seed = 1});
  const auto sampler = Collisions::create(
      *family, {.min_collisions = config.min_collisions, .probe_radius = config.radius});
  Counts counts;
  for_each_seed<Family>(trial, config, seeds, [&](const auto& index, std::uint64_t) {
    counts.add(draw_tokens<TrialOps>(*sampler, trial.problem(), index).of(0));
  });
  return counts;
}

// Largest |z| over the tokens that are expected often enough for a normal approximation.
double worst_token(const Counts& counts, const Design& design, int seeds) {
  double worst = 0.0;
  for (std::size_t i = 0; i < kTokens; ++i) {
    if (design.single[i] * seeds < 5.0 || (1.0 - design.single[i]) * seeds < 5.0) continue;
    worst =
        std::max(worst, std::abs(frequency_z(counts.token[i] / seeds, design.single[i], seeds)));
  }
  return worst;
}

double worst_pair(const Counts& counts, const Design& design, int seeds) {
  double worst = 0.0;
  for (std::size_t i = 0; i < Counts::kPaired; ++i) {
    for (std::size_t j = i + 1; j < Counts::kPaired; ++j) {
      const double p = design.both[i][j];
      if (p * seeds < 10.0 || (1.0 - p) * seeds < 10.0) continue;
      worst = std::max(worst, std::abs(frequency_z(counts.pair[i][j] / seeds, p, seeds)));
    }
  }
  return worst;
}

TEST_CASE("Inclusion.tokens_and_pairs_are_drawn_as_often_as_stated") {
  const std::uint64_t seed = first_seed();
  INFO("seed ", seed);
  const Trial trial;
  const int seeds = replications(2000);
  for (const DesignConfig& config :
       {DesignConfig{.bits = 4, .tables = 16, .min_collisions = 2},
        DesignConfig{.bits = 6, .tables = 16, .min_collisions = 2, .radius = 1}}) {
    CAPTURE(config.radius);
    const Counts counts = count_draws<SimHash>(trial, config, seeds);
    const Design design = make_design(trial, 0, config);
    // Bonferroni over 240 tokens: |z| > 4.9 by chance with probability 2.3e-4, over 1,128 pairs
    // |z| > 5.2 likewise.
    CHECK(worst_token(counts, design, seeds) < 4.9);
    CHECK(worst_pair(counts, design, seeds) < 5.2);
  }
}

// Collisions in L tables of one vector per cosine with the query, over seeds: counts[cosine][c].
template <class Family>
std::vector<std::vector<double>> count_collisions(const std::vector<double>& cosines, int dim,
                                                  int bits, int tables, int seeds) {
  const auto size = static_cast<std::size_t>(dim);
  std::vector<float> vectors(size * (cosines.size() + 1));
  std::vector<std::vector<double>> counts(
      cosines.size(), std::vector<double>(static_cast<std::size_t>(tables) + 1));
  std::vector<Code> codes(static_cast<std::size_t>(tables) * (cosines.size() + 1));
  for (int s = 0; s < seeds; ++s) {
    const std::uint64_t seed = first_seed() + static_cast<std::uint64_t>(s);
    const auto family = Family::create({.dim = dim, .bits = bits, .tables = tables, .seed = seed});
    // A fresh query and fresh directions away from it, from numbers of another generator.
    Random random(seed ^ 0x5bd1e995U);
    std::vector<double> query(size);
    double square = 0.0;
    for (double& x : query) x = random.normal(), square += x * x;
    for (double& x : query) x /= std::sqrt(square);
    for (std::size_t j = 0; j < size; ++j) vectors[j] = static_cast<float>(query[j]);
    for (std::size_t c = 0; c < cosines.size(); ++c) {
      std::vector<double> away(size);
      double along = 0.0;
      for (std::size_t j = 0; j < size; ++j) away[j] = random.normal(), along += away[j] * query[j];
      double rest = 0.0;
      for (std::size_t j = 0; j < size; ++j) away[j] -= along * query[j], rest += away[j] * away[j];
      const double sine = std::sqrt((1.0 - cosines[c] * cosines[c]) / rest);
      for (std::size_t j = 0; j < size; ++j) {
        vectors[(c + 1) * size + j] = static_cast<float>(cosines[c] * query[j] + sine * away[j]);
      }
    }
    const int count = static_cast<int>(cosines.size()) + 1;
    std::vector<float> scratch(family->scratch_floats(count));
    family->template hash<TrialOps>(vectors.data(), count, codes.data(), scratch.data());
    const auto l = static_cast<std::size_t>(tables);
    for (std::size_t c = 0; c < cosines.size(); ++c) {
      std::size_t collisions = 0;
      for (std::size_t i = 0; i < l; ++i)
        collisions += codes[i] == codes[(c + 1) * l + i] ? 1U : 0U;
      counts[c][collisions] += 1.0;
    }
  }
  return counts;
}

std::vector<double> binomial(int trials, double probability) {
  std::vector<double> p;
  for (int c = 0; c <= trials; ++c) {
    p.push_back(factorial(trials) / (factorial(c) * factorial(trials - c)) *
                std::pow(probability, c) * std::pow(1.0 - probability, trials - c));
  }
  return p;
}

const std::vector<double> kCosines = {-0.5, -0.2, 0.0, 0.2, 0.5, 0.8};

TEST_CASE("SimHash.collides_in_a_binomial_number_of_tables") {
  const std::uint64_t seed = first_seed();
  INFO("seed ", seed);
  const int seeds = replications(8000);
  const auto counts = count_collisions<SimHash>(kCosines, 32, 4, 24, seeds);
  for (std::size_t c = 0; c < kCosines.size(); ++c) {
    CAPTURE(kCosines[c]);
    std::vector<double> expected = binomial(24, std::pow(same_side(kCosines[c]), 4));
    for (double& e : expected) e *= seeds;
    CHECK(std::abs(chi_square_z(counts[c], expected)) < kZ);
  }
}

TEST_CASE("OrthogonalHash.keeps_the_expected_collisions_and_narrows_their_spread") {
  // P(one table collides) is exact, so the mean of the count is; tables that share a rotation
  // depend on each other, so inclusion is not. Measured over 20,000 seeds at d = 32, K = 4, L = 24:
  // u_2 is understated by 2.4 +- .8 % at cosine 0, by 2.0 +- .5 % at .2 and by .8 +- .1 % at .5.
  const std::uint64_t seed = first_seed();
  INFO("seed ", seed);
  const int seeds = replications(4000);
  const auto counts = count_collisions<OrthogonalHash>(kCosines, 32, 4, 24, seeds);
  for (std::size_t c = 0; c < kCosines.size(); ++c) {
    CAPTURE(kCosines[c]);
    const double a = std::pow(same_side(kCosines[c]), 4);
    Sample collisions;
    double found = 0.0;
    for (std::size_t i = 0; i < counts[c].size(); ++i) {
      for (int k = 0; k < static_cast<int>(counts[c][i]); ++k) {
        collisions.add(static_cast<double>(i));
      }
      found += i >= 2 ? counts[c][i] : 0.0;
    }
    CHECK(std::abs(collisions.z(24.0 * a)) < kZ);
    CHECK(collisions.variance_z(24.0 * a * (1.0 - a)) < kZ);  // not wider than a binomial
    // The stated deviation, rounded up, and chance.
    const double u = 1.0 - fewer_than(2, 24, a);
    CHECK(std::abs(found / seeds - u) < 0.04 * u + kZ * std::sqrt(u * (1.0 - u) / seeds));
  }
}

}  // namespace

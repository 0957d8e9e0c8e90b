// SPDX-License-Identifier: Apache-2.0
// Horvitz-Thompson sums over the tokens that were not erased: unbiased, for every sampler; with one
// mistake they are not.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/sample/oracle.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/uniform_tail.hpp"
#include "magicpig/sample/vattention.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 2, .kv_heads = 1, .head_dim = 16, .value_dim = 4};
constexpr TokenRange kRange{.begin = 3, .end = 503};

bool is_erased(TokenId t) { return t % 5 < 2 || (t > 130 && t < 260); }

std::vector<TokenId> erased() {
  std::vector<TokenId> ids;
  for (TokenId t = kRange.begin; t < kRange.end; ++t) {
    if (is_erased(t)) ids.push_back(t);
  }
  return ids;
}

double weight(const Problem<float>& problem, int head, TokenId token) {
  double dot = 0.0;
  for (int j = 0; j < 16; ++j) {
    dot += static_cast<double>(problem.query(head)[j]) *
           static_cast<double>(problem.source().key(0, token)[j]);
  }
  return std::exp(dot / 4.0);
}

// Of the tokens that are left; of all of them with `all`.
double sum_of_weights(const Problem<float>& problem, int head, bool all = false) {
  double sum = 0.0;
  for (TokenId t = kRange.begin; t < kRange.end; ++t) {
    sum += all || !is_erased(t) ? weight(problem, head, t) : 0.0;
  }
  return sum;
}

double estimate(const Problem<float>& problem, const Drawn& drawn, int head) {
  double sum = 0.0;
  for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
    if (!drawn.has(i, head)) continue;
    sum += weight(problem, head, drawn.tokens[i]) /
           std::exp(static_cast<double>(drawn.log_pi[static_cast<std::size_t>(head)][i]));
  }
  return sum;
}

// |z| of the mean over seeds of both heads, the larger; none of the tokens drawn was erased.
template <class Sampler, class Index>
double largest_z(const Problem<float>& problem, const Sampler& sampler, const Index& index,
                 int seeds, bool all = false) {
  Sample sums[2];
  int wrong = 0;
  for (int s = 0; s < seeds; ++s) {
    const Drawn drawn = draw_tokens(sampler, problem, index,
                                    {.seed = first_seed() + static_cast<std::uint64_t>(s)});
    for (const TokenId t : drawn.tokens) wrong += is_erased(t) ? 1 : 0;
    for (int h = 0; h < 2; ++h) sums[h].add(estimate(problem, drawn, h));
  }
  CHECK(wrong == 0);
  double largest = 0.0;
  for (int h = 0; h < 2; ++h) {
    largest = std::max(largest, std::abs(sums[h].z(sum_of_weights(problem, h, all))));
  }
  return largest;
}

// Draws among the tokens that are left and states the probabilities of the whole range.
struct StatedForAll {
  Uniform uniform;
  using Scratch = Uniform::Scratch;
  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    return uniform.carve(arena, limits);
  }
  template <class Ops, class Source, class Index>
  auto draw(const DrawInput<Source, Index>& input, Scratch& scratch) const {
    auto drawn = uniform.draw<Ops>(input, scratch);
    const double share = static_cast<double>(input.present()) / input.index.indexed().size();
    drawn.inclusion.log_pi += static_cast<float>(std::log(share));
    return drawn;
  }
};

TEST_CASE("HorvitzThompsonSums.over_what_was_not_erased_are_unbiased") {
  const Problem<float> problem({.shape = kShape, .tokens = kRange.end});
  const auto quantiser = HadamardQuantiser::create(16, 2, 4);
  REQUIRE(quantiser.ok());
  auto index = Signatures<HadamardQuantiser>::create(*quantiser, {});
  REQUIRE(index.ok());
  SerialExecutor serial;
  REQUIRE(index->build(make_backend<ScalarOps>(serial), problem.source(), kRange).ok());
  REQUIRE(index->erase(erased()).ok());
  const int seeds = replications(2000);
  const Budget budget{.tokens = 25};
  // Seven samplers of two heads: a correct library fails one of them with probability 9.5e-5.
  CHECK(largest_z(problem, *Systematic::create(*quantiser, {.budget = budget}), *index, seeds) <
        kZ);
  CHECK(largest_z(problem, *Poisson::create(*quantiser, {.budget = budget, .least = 0.01}), *index,
                  seeds) < kZ);
  CHECK(largest_z(problem, *Systematic::create(*quantiser, {.budget = budget, .certain = 0.4}),
                  *index, seeds) < kZ);
  CHECK(largest_z(problem, *Uniform::create(budget), *index, seeds) < kZ);
  CHECK(largest_z(problem, *OraclePoisson::create(budget), *index, seeds) < kZ);
  CHECK(largest_z(problem, *UniformTail<TopK<>>::create(*TopK<>::create({.tokens = 5}), budget),
                  *index, seeds) < kZ);
  CHECK(largest_z(problem, *VAttention<>::create({.epsilon = 0.3}), *index, replications(400)) <
        kZ);

  const Uniform uniform = *Uniform::create(budget);
  CHECK(largest_z(problem, StatedForAll{uniform}, *index, seeds) > 1.5 * kZ);
  CHECK(largest_z(problem, uniform, *index, seeds, true) > 1.5 * kZ);
}

// Rows in the mean over draws.
template <class Sampler, class Index>
double mean_rows(const Problem<float>& problem, const Sampler& sampler, const Index& index) {
  double rows = 0.0;
  for (std::uint64_t s = 0; s < 100; ++s) {
    rows += static_cast<double>(
        draw_tokens(sampler, problem, index, {.seed = first_seed() + s}).tokens.size());
  }
  return rows / 100;
}

TEST_CASE("HorvitzThompsonSums.spend_no_rows_on_what_was_erased") {
  const Problem<float> problem({.shape = kShape, .tokens = kRange.end});
  const auto quantiser = HadamardQuantiser::create(16, 2, 4);
  auto index = Signatures<HadamardQuantiser>::create(*quantiser, {});
  REQUIRE(index.ok());
  SerialExecutor serial;
  REQUIRE(index->build(make_backend<ScalarOps>(serial), problem.source(), kRange).ok());
  REQUIRE(index->erase(erased()).ok());
  const TokenId left = kRange.size() - static_cast<TokenId>(erased().size());
  for (const TokenId rows : {10, 25, 100, left}) {
    CAPTURE(rows);
    const Budget budget{.tokens = rows};
    const auto near = [&](double mean) { return std::abs(mean - rows) < 0.08 * rows; };
    CHECK(near(mean_rows(problem, *Systematic::create(*quantiser, {.budget = budget}), *index)));
    CHECK(near(mean_rows(problem, *TopScores::create(*quantiser, {.budget = budget}), *index)));
    CHECK(mean_rows(problem, *Uniform::create(budget), *index) == rows);
    CHECK(mean_rows(problem, *TopK<>::create(budget), *index) == rows);
  }
  const auto tail = *UniformTail<TopK<>>::create(*TopK<>::create({.tokens = 5}), {.tokens = 25});
  CHECK(mean_rows(problem, tail, *index) == 30);
  const auto bounded =
      *VAttention<>::create({.heavy = {.tokens = 5}, .base = {.tokens = 10}, .epsilon = 1e9});
  CHECK(mean_rows(problem, bounded, *index) == 16);
  // And a fraction is one of what is left.
  CHECK(mean_rows(problem, *Uniform::create({.fraction = 0.5}), *index) == std::ceil(0.5 * left));
}

// Beyond the pilot's 8,192 tokens, too: what is erased has no share in the eight tracks either,
// each of which takes a whole number of tokens but for the last.
TEST_CASE("HorvitzThompsonSums.vary_as_little_in_rows_by_systematic_draws_when_half_is_erased") {
  constexpr TokenId kMany = 30000;
  const Problem<float> problem({.shape = kShape, .tokens = kMany});
  const auto quantiser = HadamardQuantiser::create(16, 2, 4);
  auto index = Signatures<HadamardQuantiser>::create(*quantiser, {});
  REQUIRE(index.ok());
  SerialExecutor serial;
  REQUIRE(index->build(make_backend<ScalarOps>(serial), problem.source(), {0, kMany}).ok());
  std::vector<TokenId> half;
  for (TokenId t = 0; t < kMany; ++t) {
    if (t / 8 % 2 == 0) half.push_back(t);
  }
  REQUIRE(index->erase(half).ok());
  const auto sampler = *Systematic::create(*quantiser, {.budget = {.tokens = 600}});
  std::size_t least = kMany;
  std::size_t most = 0;
  for (std::uint64_t s = 0; s < 20; ++s) {
    const std::size_t rows =
        draw_tokens(sampler, problem, *index, {.seed = first_seed() + s}).tokens.size();
    least = std::min(least, rows);
    most = std::max(most, rows);
  }
  CHECK(most - least <= 8);
  CHECK(least > 500);
  CHECK(most < 700);
}

TEST_CASE("HorvitzThompsonSums.over_what_was_not_erased_are_unbiased_by_collisions") {
  const Problem<float> problem({.shape = kShape, .tokens = kRange.end});
  SerialExecutor serial;
  Sample plain[2];
  Sample defended[2];
  for (int s = 0; s < replications(1000); ++s) {
    const std::uint64_t seed = first_seed() + static_cast<std::uint64_t>(s);
    const auto family = SimHash::create({.dim = 16, .bits = 4, .tables = 12, .seed = seed});
    auto index = BucketTables<SimHash>::create(*family, {.segment_tokens = 100});
    REQUIRE(index.ok());
    REQUIRE(index->build(make_backend<ScalarOps>(serial), problem.source(), kRange).ok());
    REQUIRE(index->erase(erased()).ok());
    const CollisionConfig rule{.min_collisions = 2};
    const auto sampler = std::move(*Collisions::create(*family, rule));
    const auto both = std::move(*Defensive<Collisions>::create(
        std::move(*Collisions::create(*family, rule)), {.tokens = 20}));
    const Drawn a = draw_tokens(sampler, problem, *index, {.seed = seed});
    const Drawn b = draw_tokens(both, problem, *index, {.seed = seed});
    for (int h = 0; h < 2; ++h) {
      plain[h].add(estimate(problem, a, h));
      defended[h].add(estimate(problem, b, h));
    }
  }
  for (int h = 0; h < 2; ++h) {
    CHECK(std::abs(plain[h].z(sum_of_weights(problem, h))) < kZ);
    CHECK(std::abs(defended[h].z(sum_of_weights(problem, h))) < kZ);
    CHECK(std::abs(defended[h].z(sum_of_weights(problem, h, true))) > 1.5 * kZ);
  }
}

}  // namespace

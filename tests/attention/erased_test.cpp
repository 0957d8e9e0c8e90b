// SPDX-License-Identifier: Apache-2.0
// Erased tokens are neither drawn nor attended to: decode() gives the attention over the others,
// whatever the sampler and however the indexed tokens are read.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/sample/code_scores.hpp"
#include "magicpig/sample/oracle.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/top_p.hpp"
#include "magicpig/sample/uniform_tail.hpp"
#include "magicpig/sample/vattention.hpp"
#include "problem.hpp"

namespace magicpig::test {
namespace {

constexpr Shape kShape{.query_heads = 4, .kv_heads = 2, .head_dim = 16, .value_dim = 8};
constexpr TokenId kTokens = 900;
constexpr TokenRange kRange{.begin = 5, .end = 850};

using Codes = Signatures<HadamardQuantiser>;
using Tables = BucketTables<SimHash>;

// Two of three tokens, and a stretch of whole words.
std::vector<TokenId> erased() {
  std::vector<TokenId> ids;
  for (TokenId t = kRange.begin; t < kRange.end; ++t) {
    if (t % 3 != 0 || (t > 200 && t < 420)) ids.push_back(t);
  }
  return ids;
}

// A problem whose erased rows are not numbers, an index without them, and the same cache without.
template <class Index>
struct Subject {
  Problem<float> problem{{.shape = kShape, .tokens = kTokens}};
  Problem<float> rest;  // the others, in their order
  Index index;

  explicit Subject(Index made)
      : rest({.shape = kShape,
              .tokens = kTokens - static_cast<TokenId>(erased().size()),
              .seed = 2}),
        index(std::move(made)) {
    SerialExecutor serial;
    REQUIRE(index.build(make_backend<ScalarOps>(serial), problem.source(), kRange).ok());
    REQUIRE(index.erase(erased()).ok());
    rest.query() = problem.query();
    TokenId to = 0;
    for (TokenId t = 0; t < kTokens; ++t) {
      const bool gone = index.erased().has(t);
      for (int h = 0; h < 2; ++h) {
        for (int j = 0; j < 16 && !gone; ++j) rest.key(h, to)[j] = problem.key(h, t)[j];
        for (int j = 0; j < 8 && !gone; ++j) rest.value(h, to)[j] = problem.value(h, t)[j];
        for (int j = 0; j < 16 && gone; ++j) {
          problem.key(h, t)[j] = std::numeric_limits<float>::quiet_NaN();
        }
      }
      to += gone ? 0 : 1;
    }
    REQUIRE(to == rest.tokens());
  }

  // Every token that is left.
  void exact(Outputs& outputs) const {
    const Exact sampler;
    const DecodePlan<> plan{.shape = kShape, .sampler = &sampler};
    const auto source = rest.source();
    SerialExecutor serial;
    REQUIRE(decode_one<ScalarOps>(
                serial, plan,
                make_request(rest, source, static_cast<const RangeIndex*>(nullptr), outputs))
                .ok());
  }
};

Subject<Codes> codes() {
  static const HadamardQuantiser quantiser = std::move(*HadamardQuantiser::create(16, 2, 1));
  return Subject<Codes>(std::move(*Codes::create(quantiser, {.kv_heads = 2})));
}

const SimHash& family() {
  static const SimHash made =
      std::move(*SimHash::create({.dim = 16, .bits = 4, .tables = 20, .seed = 3}));
  return made;
}

Subject<Tables> tables() {
  return Subject<Tables>(std::move(
      *Tables::create(family(), {.kv_heads = 2, .segment_tokens = 200, .seal_tokens = 1})));
}

// Whether decode() with this plan gives the exact attention over what is left, to `error` of it.
template <class Ops = ScalarOps, class S, class Plan>
void check_near_exact(const S& subject, Plan plan, double error) {
  plan.shape = kShape;
  Outputs outputs(kShape);
  Outputs expected(kShape);
  subject.exact(expected);
  const auto source = subject.problem.source();
  SerialExecutor serial;
  const Status status =
      decode_one<Ops>(serial, plan, make_request(subject.problem, source, &subject.index, outputs));
  REQUIRE(status.ok());
  const TokenId left = kTokens - static_cast<TokenId>(erased().size());
  const TokenId drawable = kRange.size() - static_cast<TokenId>(erased().size());
  for (int h = 0; h < kShape.query_heads; ++h) {
    double off = 0.0;
    double square = 0.0;
    for (std::size_t j = 0; j < 8; ++j) {
      const auto x = static_cast<double>(expected.out(h)[j]);
      off += (static_cast<double>(outputs.out(h)[j]) - x) *
             (static_cast<double>(outputs.out(h)[j]) - x);
      square += x * x;
    }
    CHECK(std::sqrt(off / square) <= error);
    const HeadReport& report = outputs.report(h);
    if (report.indexed == 0 || report.promise == PromiseOutcome::kDense) {
      CHECK(report.exact == left);
    } else {
      CHECK(report.exact == left - drawable);
      CHECK(report.indexed == drawable);
      CHECK(report.rows_read <= drawable);
    }
  }
}

// Draws everything, gone or not.
struct Careless {
  static constexpr bool kUnbiased = true;
  bool members = false;
  struct Scratch {
    TokenId* tokens = nullptr;
    std::uint32_t* members = nullptr;
  };
  [[nodiscard]] static Scratch carve(Arena& arena, const DrawLimits& limits) {
    return {.tokens = arena.take<TokenId>(static_cast<std::size_t>(limits.tokens)),
            .members = arena.take<std::uint32_t>(static_cast<std::size_t>(limits.tokens))};
  }
  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<ConstantInclusion> draw(const DrawInput<Source, Index>& input,
                                                   Scratch& scratch) const {
    const auto n = static_cast<std::size_t>(input.index.indexed().size());
    for (std::size_t i = 0; i < n; ++i) {
      scratch.tokens[i] = input.index.indexed().begin + static_cast<TokenId>(i);
      scratch.members[i] = input.queries.everyone();
    }
    Candidates<ConstantInclusion> all{
        .tokens = {scratch.tokens, n}, .members = {}, .inclusion = {}};
    if (members) all.members = {scratch.members, n};
    return all;
  }
};

template <class Sampler>
DecodePlan<Sampler> plan_of(const Sampler& sampler, TokenId exact_below = 0) {
  return {.shape = kShape, .sampler = &sampler, .exact_below = exact_below};
}

TEST_CASE("erased tokens are not attended to where the index is read exactly") {
  const auto subject = codes();
  const auto sampler = *Systematic::create(subject.index.quantiser(), {.budget = {.tokens = 50}});
  check_near_exact(subject, plan_of(Exact{}), 1e-5);
  // Few are left: fewer than exact_below.
  check_near_exact(subject, plan_of(sampler, 300), 1e-5);
  // A promise that only reading everything keeps.
  const auto poisson = *Poisson::create(subject.index.quantiser(), {.budget = {.tokens = 10}});
  auto promised = plan_of(poisson);
  promised.promise = {.epsilon = 1e-6};
  check_near_exact(subject, promised, 1e-5);
  // And with all of them erased, only the window is left.
  auto none = codes();
  std::vector<TokenId> all;
  for (TokenId t = kRange.begin; t < kRange.end; ++t) all.push_back(t);
  REQUIRE(none.index.erase(all).ok());
  Outputs outputs(kShape);
  const auto source = none.problem.source();
  SerialExecutor serial;
  REQUIRE(decode_one<ScalarOps>(serial, plan_of(sampler),
                                make_request(none.problem, source, &none.index, outputs))
              .ok());
  CHECK(outputs.report(0).exact == kTokens - kRange.size());
  CHECK(outputs.report(0).drawn == 0);
}

TEST_CASE("erased tokens are dropped from what a sampler returns that does not know of them") {
  check_near_exact(codes(), plan_of(Careless{.members = false}), 1e-5);
  check_near_exact(codes(), plan_of(Careless{.members = true}), 1e-5);
  check_near_exact<HighwayOps>(codes(), plan_of(Careless{.members = true}), 1e-5);
}

// With the whole range for a budget each sampler reads all that is left; with less, nothing that
// is not a number.
template <class S, class Make>
void check_budgets(const S& subject, const Make& make) {
  const auto all = make(Budget{.fraction = 1.0});
  check_near_exact(subject, plan_of(all), 1e-5);
  const auto some = make(Budget{.fraction = 0.3});
  check_near_exact(subject, plan_of(some), 3.0);
  check_near_exact<HighwayOps>(subject, plan_of(some), 3.0);
}

TEST_CASE("erased tokens are not drawn by any sampler") {
  const auto c = codes();
  const auto& quantiser = c.index.quantiser();
  check_budgets(c, [&](Budget b) { return *Systematic::create(quantiser, {.budget = b}); });
  check_budgets(
      c, [&](Budget b) { return *Poisson::create(quantiser, {.budget = b, .certain = 0.5}); });
  check_budgets(c, [&](Budget b) { return *TopScores::create(quantiser, {.budget = b}); });
  check_budgets(c, [&](Budget b) { return *Uniform::create(b); });
  check_budgets(c, [&](Budget b) { return *OraclePoisson::create(b); });
  check_budgets(c, [&](Budget b) { return *TopK<>::create(b); });
  check_budgets(c, [&](Budget b) { return *TopK<CodeScores>::create(b, CodeScores(quantiser)); });
  check_budgets(c, [&](Budget b) { return *TopP<>::create(b.fraction); });
  check_budgets(c, [&](Budget b) { return *VAttention<>::create({.heavy = b}); });
  check_budgets(
      c, [&](Budget b) { return *UniformTail<TopK<>>::create(*TopK<>::create({.tokens = 9}), b); });
  const auto multinomial = *OracleMultinomial::create({.tokens = 4000});
  check_near_exact(c, plan_of(multinomial), 0.2);
  const auto t = tables();
  const auto collisions = std::move(*Collisions::create(family(), {.min_collisions = 1}));
  check_near_exact(t, plan_of(collisions), 3.0);
  const auto defensive = std::move(*Defensive<Collisions>::create(
      std::move(*Collisions::create(family(), {.min_collisions = 1})), {.fraction = 1.0}));
  check_near_exact(t, plan_of(defensive), 1e-5);
}

// 20,000 tokens of which those of every block that the pilot reads are erased.
TEST_CASE("where none of the pilot's tokens is left, all others are read") {
  const Shape shape{.query_heads = 1, .kv_heads = 1, .head_dim = 8, .value_dim = 4};
  constexpr TokenId kMany = 20000;
  const Problem<float> problem({.shape = shape, .tokens = kMany});
  const auto quantiser = std::move(*HadamardQuantiser::create(8, 2, 1));
  auto index = std::move(*Codes::create(quantiser, {}));
  SerialExecutor serial;
  REQUIRE(index.build(make_backend<ScalarOps>(serial), problem.source(), {0, kMany}).ok());
  const int blocks = index.block_count();
  std::vector<TokenId> ids;
  for (int i = 0; i < 64; ++i) {
    const int middle = (blocks * i / 64 + blocks * (i + 1) / 64) / 2;
    for (TokenId t = middle * 128; t < (middle + 1) * 128 && t < kMany; ++t) ids.push_back(t);
  }
  REQUIRE(index.erase(ids).ok());
  const auto sampler = *Systematic::create(quantiser, {.budget = {.fraction = 0.05}});
  Outputs outputs(shape);
  const auto source = problem.source();
  const DecodePlan<Systematic> plan{.shape = shape, .sampler = &sampler};
  REQUIRE(decode_one<ScalarOps>(serial, plan, make_request(problem, source, &index, outputs)).ok());
  CHECK(outputs.report(0).rows_read == kMany - static_cast<TokenId>(ids.size()));
}

}  // namespace
}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// Sampled decoding equals a computation by brute force: codes compared token by token, probability,
// softmax and report in double.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "backends.hpp"
#include "brute_force.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/hash/orthogonal.hpp"
#include "magicpig/hash/rademacher.hpp"
#include "oracle.hpp"
#include "problem.hpp"

namespace magicpig::test {
namespace {

// log pi is a float32 from a piecewise linear curve whose error is below 2e-5 for the cosines that
// random keys have here (see InclusionCurve), and a cosine in float32 adds about 1e-6 times the
// curve's slope of some 30. Outputs and lse follow; a factor of 4 is left.
constexpr double kTolerance = 1e-4;
// Reports hold 1 - pi, which loses digits where pi nears 1: the settings keep most of pi below 0.9.
constexpr double kReportTolerance = 2e-3;

struct Case {
  Shape shape;
  TokenId tokens = 300;
  CollisionRule rule;
  Window window = {.sink = 4, .local = 16};
  int segment_tokens = 64;
  std::uint64_t seed = 1;
  double key_offset = 0.5;
  bool check_sample = true;  ///< effective sample and error, which are ill-conditioned at pi near 1
};

// The factor by which each estimator multiplies a weight, from its documentation.
double factor(const SelfNormalised&, double pi) { return 1.0 / pi; }
double factor(const Floored& floored, double pi) {
  return 1.0 / (pi + static_cast<double>(floored.floor));
}
double factor(const Uncorrected&, double) { return 1.0; }

bool near(float actual, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(actual);  // relative error of an output of zero
  return std::fabs(static_cast<double>(actual) - expected) <=
         tolerance * std::fmax(1.0, std::fabs(expected));
}

void check_head(const ExpectedHead& expected, const Outputs& outputs, int h, bool check_sample) {
  CAPTURE(h);
  if (expected.state.lse == -std::numeric_limits<double>::infinity()) {
    CHECK(outputs.lse(h) == kEmptyLse);
  } else {
    CHECK(near(outputs.lse(h), expected.state.lse, kTolerance));
  }
  CHECK(relative_error(outputs.out(h), expected.state.out) <= kTolerance);
  const HeadReport& report = outputs.report(h);
  CHECK(report.exact == expected.exact);
  CHECK(report.drawn == expected.drawn);
  CHECK(near(report.estimated_tokens, expected.estimated_tokens, kTolerance));
  if (!check_sample) return;
  CHECK(near(report.effective_sample_size, expected.effective_sample_size, kReportTolerance));
  CHECK(near(report.relative_error, expected.relative_error, kReportTolerance));
  CHECK(near(report.alarm, expected.alarm, kReportTolerance));
}

template <class T, class Family>
struct Fixture {
  Case setting;
  Problem<T> problem;
  StridedKeyValues<T> source;
  Family family;
  BucketTables<Family> index;

  template <class Ops>
  static Fixture* make(const Case& c) {
    auto* f = new Fixture(c);
    SerialExecutor executor;
    const Status status =
        f->index.build(make_backend<Ops>(executor), f->source, c.window.middle(c.tokens));
    CHECK_MESSAGE(status.ok(), status.message());
    return f;
  }

 private:
  explicit Fixture(const Case& c)
      : setting(c),
        problem({.shape = c.shape,
                 .tokens = c.tokens,
                 .placement = Placement::kPadded,
                 .seed = c.seed,
                 .key_offset = c.key_offset}),
        source(problem.source()),
        family(std::move(*Family::create({.dim = c.shape.head_dim,
                                          .bits = c.rule.bits,
                                          .tables = c.rule.tables,
                                          .seed = c.seed + 1000}))),
        index(std::move(*BucketTables<Family>::create(
            family, {.kv_heads = c.shape.kv_heads, .segment_tokens = c.segment_tokens}))) {}
};

template <class Ops, class T, class Family>
std::vector<TokenDraw> brute_force(const Fixture<T, Family>& f, int h, float scale) {
  return BruteForce::draw<Ops>(f.source, f.index,
                               {.data = f.problem.query(h),
                                .kv_head = h / f.setting.shape.group(),
                                .scale = static_cast<double>(scale)},
                               f.setting.rule);
}

// In the place of groups: of a token that only the uniform sample has.
constexpr int kUniformAlone = -1;

// Decodes with `sampler` and compares with `draws` [query_heads][indexed], from `tables` tables and
// a uniform sample of the share rho.
template <class Ops, class T, class Family, class Sampler, class Estimator>
void check_decode(const Fixture<T, Family>& f, const Sampler& sampler, const Estimator& estimator,
                  const std::vector<std::vector<TokenDraw>>& draws, int tables = 0,
                  double rho = 0.0) {
  const Shape& shape = f.setting.shape;
  const DecodePlan<Sampler, Estimator> plan{
      .shape = shape, .sampler = &sampler, .estimator = estimator, .exact_below = 0};
  Outputs outputs(shape);
  SerialExecutor executor;
  const Status status = decode_one<Ops>(
      executor, plan,
      make_request(f.problem, f.source, &f.index, outputs, {.seed = f.setting.seed, .step = 3}));
  REQUIRE_MESSAGE(status.ok(), status.message());
  for (int h = 0; h < shape.query_heads; ++h) {
    const int first = h / shape.group() * shape.group();
    std::vector<DrawnToken> drawn;
    std::int64_t rows = 0;
    for (std::size_t i = 0; i < draws[static_cast<std::size_t>(h)].size(); ++i) {
      bool any = false;
      for (int g = first; g < first + shape.group(); ++g) {
        any |= draws[static_cast<std::size_t>(g)][i].drawn;
      }
      rows += any ? 1 : 0;
      const TokenDraw& draw = draws[static_cast<std::size_t>(h)][i];
      if (!draw.drawn) continue;
      drawn.push_back({.token = draw.token,
                       .pi = draw.pi,
                       .factor = factor(estimator, draw.pi),
                       .essential = draw.essential});
      if (draw.essential == std::vector<int>{kUniformAlone}) {
        drawn.back().essential = {ErrorSketch::group_of(draw.token, table_groups(tables))};
        drawn.back().noise =
            static_cast<double>(ErrorSketch::sign(draw.token, 0)) * std::sqrt(1.0 - rho);
      }
    }
    check_head(expected_head(f.source,
                             {.data = f.problem.query(h),
                              .kv_head = h / shape.group(),
                              .scale = static_cast<double>(plan.logit_scale())},
                             f.index.indexed(), drawn, tables),
               outputs, h, f.setting.check_sample);
    CHECK(outputs.report(h).rows_read == rows);
    CHECK(outputs.report(h).indexed == f.index.indexed().size());
  }
}

template <class Ops, class T = float, class Family = SimHash>
void check_collisions(const Case& c) {
  CAPTURE(c.seed);
  CAPTURE(c.rule.bits);
  CAPTURE(c.rule.tables);
  CAPTURE(c.rule.at_least);
  CAPTURE(c.rule.radius);
  const std::unique_ptr<Fixture<T, Family>> f(Fixture<T, Family>::template make<Ops>(c));
  const auto sampler = Collisions::create(
      f->family, {.min_collisions = c.rule.at_least, .probe_radius = c.rule.radius});
  REQUIRE_MESSAGE(sampler.ok(), sampler.status().message());
  std::vector<std::vector<TokenDraw>> draws;
  for (int h = 0; h < c.shape.query_heads; ++h) draws.push_back(brute_force<Ops>(*f, h, 1.0F));
  check_decode<Ops>(*f, *sampler, SelfNormalised{}, draws, c.rule.tables);
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Family, SimHash>) {
    check_decode<Ops>(*f, *sampler, Floored{}, draws, c.rule.tables);
    check_decode<Ops>(*f, *sampler, Uncorrected{}, draws, c.rule.tables);
  }
}

constexpr Shape kShape{.query_heads = 6, .kv_heads = 2, .head_dim = 24, .value_dim = 19};

TEST_CASE_TEMPLATE_DEFINE("drawing by collisions equals brute force for t 1 to 3 and r 0 to 2", Ops,
                          rules) {
  std::uint64_t seed = 10;
  for (const int t : {1, 2, 3}) {
    for (const int r : {0, 1, 2}) {
      check_collisions<Ops>({.shape = kShape,
                             .rule = {.bits = 6 + 2 * r, .tables = 40, .at_least = t, .radius = r},
                             .seed = ++seed});
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(rules, Backends);

TEST_CASE_TEMPLATE_DEFINE("drawing by collisions equals brute force at the extremes of K and L",
                          Ops, extremes) {
  std::uint64_t seed = 50;
  for (const int bits : {1, 15}) {
    for (const int tables : {1, 2, 1024}) {
      for (int t = 1; t <= 3 && t <= tables; ++t) {
        // At K = 1 with many tables every pi is 1 to rounding.
        check_collisions<Ops>(
            {.shape = {.query_heads = 2, .kv_heads = 1, .head_dim = 16, .value_dim = 8},
             .tokens = 150,
             .rule = {.bits = bits, .tables = tables, .at_least = t},
             .seed = ++seed,
             .check_sample = bits != 1});
      }
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(extremes, Backends);

TEST_CASE_TEMPLATE_DEFINE("drawing by collisions equals brute force in 16 bits and odd shapes", Ops,
                          scalars) {
  std::uint64_t seed = 90;
  for (const int group : {1, 5, 32}) {
    for (const int dim : {1, 2, 33, 129}) {
      const Case c{.shape = {.query_heads = 2 * group,
                             .kv_heads = 2,
                             .head_dim = dim,
                             .value_dim = 131 - dim},
                   .tokens = 213,
                   .rule = {.bits = 5, .tables = 12, .at_least = 2, .radius = 0},
                   .window = {.sink = 1, .local = 3},
                   .seed = ++seed,
                   // In one dimension every cosine is 1 or -1, where pi is 1 or 0.
                   .check_sample = dim > 2};
      check_collisions<Ops, fp16>(c);
      check_collisions<Ops, bf16>(c);
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(scalars, Backends);

TEST_CASE_TEMPLATE_DEFINE("drawing by collisions equals brute force with every hash family", Ops,
                          families) {
  const Case c{
      .shape = kShape, .rule = {.bits = 6, .tables = 40, .at_least = 2, .radius = 0}, .seed = 130};
  check_collisions<Ops, float, RademacherHash>(c);
  check_collisions<Ops, float, OrthogonalHash>(c);
}
TEST_CASE_TEMPLATE_APPLY(families, TwoBackends);

TEST_CASE_TEMPLATE_DEFINE("probing every bucket is exact attention", Ops, everything) {
  // Of 32 heads that all draw a token each reads it on its own.
  const Shape wide{.query_heads = 32, .kv_heads = 1, .head_dim = 16, .value_dim = 8};
  for (const int bits : {1, 4, 5}) {
    const Case c{.shape = bits == 5 ? wide : kShape,
                 .rule = {.bits = bits, .tables = 3, .at_least = 3, .radius = bits},
                 .seed = 150};
    const std::unique_ptr<Fixture<float, SimHash>> f(
        Fixture<float, SimHash>::template make<Ops>(c));
    const auto sampler = Collisions::create(f->family, {.min_collisions = 3, .probe_radius = bits});
    const DecodePlan<Collisions> plan{.shape = c.shape, .sampler = &*sampler, .exact_below = 0};
    Outputs outputs(c.shape);
    SerialExecutor executor;
    REQUIRE(decode_one<Ops>(executor, plan, make_request(f->problem, f->source, &f->index, outputs))
                .ok());
    for (int h = 0; h < c.shape.query_heads; ++h) {
      const OracleState expected =
          oracle_attention(f->source,
                           {.data = f->problem.query(h),
                            .kv_head = h / c.shape.group(),
                            .scale = static_cast<double>(plan.logit_scale())},
                           every_token({.begin = 0, .end = c.tokens}));
      // Every pi is exactly 1, so that this is as good as exact attention.
      CHECK(relative_error(outputs.out(h), expected.out) <= 1e-5);
      CHECK(near(outputs.lse(h), expected.lse, 1e-5));
      CHECK(outputs.report(h).drawn == f->index.indexed().size());
      CHECK(outputs.report(h).relative_error == 0.0F);
      CHECK(outputs.report(h).estimated_tokens == static_cast<float>(f->index.indexed().size()));
      CHECK(outputs.report(h).alarm == 0.0F);
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(everything, Backends);

TEST_CASE_TEMPLATE_DEFINE("nothing drawn leaves the exact tokens, or nothing at all", Ops,
                          nothing) {
  // K = 15 and one table: 200 tokens collide with probability 2^-15 each; this seed has none.
  Case c{.shape = {.query_heads = 2, .kv_heads = 2, .head_dim = 32, .value_dim = 6},
         .tokens = 200,
         .rule = {.bits = 15, .tables = 1, .at_least = 1, .radius = 0},
         .seed = 170};
  for (const Window window : {Window{.sink = 2, .local = 5}, Window{.sink = 0, .local = 0}}) {
    c.window = window;
    CAPTURE(window.sink);
    check_collisions<Ops>(c);
    const std::unique_ptr<Fixture<float, SimHash>> f(
        Fixture<float, SimHash>::template make<Ops>(c));
    const auto sampler = Collisions::create(f->family, {.min_collisions = 1});
    const DecodePlan<Collisions> plan{.shape = c.shape, .sampler = &*sampler, .exact_below = 0};
    Outputs outputs(c.shape);
    SerialExecutor executor;
    REQUIRE(decode_one<Ops>(executor, plan, make_request(f->problem, f->source, &f->index, outputs))
                .ok());
    for (int h = 0; h < 2; ++h) {
      REQUIRE(outputs.report(h).drawn == 0);
      CHECK(outputs.report(h).rows_read == 0);
      CHECK(outputs.report(h).alarm == 0.0F);
      if (window.sink != 0) continue;
      CHECK(outputs.lse(h) == kEmptyLse);
      for (const float x : outputs.out(h)) CHECK(same_bits(x, 0.0F));
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(nothing, Backends);

template <class Ops, class Sampler, class T, class Family>
DrawnCandidates candidates_of(const Fixture<T, Family>& f, const Sampler& sampler, int kv_head) {
  const Shape& shape = f.setting.shape;
  return draw_candidates<Ops>(sampler,
                              DrawInput<StridedKeyValues<T>, BucketTables<Family>>{
                                  .key_values = f.source,
                                  .index = f.index,
                                  .kv_head = kv_head,
                                  .queries = {.data = f.problem.query(kv_head * shape.group()),
                                              .count = shape.group(),
                                              .dim = shape.head_dim},
                                  .noise = {.seed = f.setting.seed, .step = 3},
                                  .report = true});
}

TEST_CASE_TEMPLATE_DEFINE("uniform sampling weighs its tokens by n / m", Ops, uniforms) {
  const Case c{.shape = kShape, .rule = {.bits = 4, .tables = 2}, .seed = 190};
  const std::unique_ptr<Fixture<float, SimHash>> f(Fixture<float, SimHash>::template make<Ops>(c));
  const TokenId n = f->index.indexed().size();
  for (const Budget budget :
       {Budget{.fraction = 0.1}, Budget{.tokens = 1}, Budget{.tokens = n - 1}, Budget{.tokens = n},
        Budget{.tokens = n + 1000}, Budget{.fraction = 1.0}, Budget{.fraction = 1e-9}}) {
    CAPTURE(budget.fraction);
    CAPTURE(budget.tokens);
    const auto sampler = Uniform::create(budget);
    REQUIRE(sampler.ok());
    const double wanted =
        budget.tokens > 0 ? budget.tokens : std::fmax(1.0, std::ceil(budget.fraction * n));
    const auto m = static_cast<std::size_t>(std::fmin(wanted, n));
    std::vector<std::vector<TokenDraw>> draws;
    for (int h = 0; h < c.shape.query_heads; ++h) {
      const DrawnCandidates found = candidates_of<Ops>(*f, *sampler, h / c.shape.group());
      REQUIRE(found.tokens.size() == m);
      std::vector<TokenDraw> draw;
      for (TokenId t = f->index.indexed().begin; t < f->index.indexed().end; ++t) {
        draw.push_back({.token = t, .pi = static_cast<double>(m) / n});
      }
      for (std::size_t i = 0; i < m; ++i) {
        REQUIRE(f->index.indexed().contains(found.tokens[i]));
        if (i > 0) REQUIRE(found.tokens[i - 1] < found.tokens[i]);
        draw[static_cast<std::size_t>(found.tokens[i] - f->index.indexed().begin)].drawn = true;
      }
      draws.push_back(draw);
    }
    check_decode<Ops>(*f, *sampler, SelfNormalised{}, draws);
    check_decode<Ops>(*f, *sampler, Floored{}, draws);
    check_decode<Ops>(*f, *sampler, Uncorrected{}, draws);
  }
}
TEST_CASE_TEMPLATE_APPLY(uniforms, TwoBackends);

TEST_CASE_TEMPLATE_DEFINE("the defensive union has the union's tokens and probability", Ops,
                          unions) {
  std::uint64_t seed = 210;
  for (const int t : {1, 2, 3}) {
    for (const Budget budget : {Budget{.fraction = 0.05}, Budget{.tokens = 300}}) {
      const Case c{.shape = kShape,
                   .rule = {.bits = 6, .tables = 30, .at_least = t, .radius = 0},
                   .seed = ++seed,
                   .check_sample = budget.tokens == 0};  // a full budget makes every pi 1
      CAPTURE(c.seed);
      const std::unique_ptr<Fixture<float, SimHash>> f(
          Fixture<float, SimHash>::template make<Ops>(c));
      const auto uniform = Uniform::create(budget);
      auto inner = Collisions::create(f->family, {.min_collisions = t});
      REQUIRE(inner.ok());
      const auto sampler = Defensive<Collisions>::create(std::move(*inner), budget);
      REQUIRE(sampler.ok());
      const double n = f->index.indexed().size();
      std::vector<std::vector<TokenDraw>> draws;
      double rho = 0.0;
      for (int h = 0; h < c.shape.query_heads; ++h) {
        auto draw = brute_force<Ops>(*f, h, 1.0F);
        const DrawnCandidates extra = candidates_of<Ops>(*f, *uniform, h / c.shape.group());
        rho = static_cast<double>(extra.tokens.size()) / n;
        for (TokenDraw& d : draw) d.pi = d.pi + rho - d.pi * rho;
        for (const TokenId token : extra.tokens) {
          TokenDraw& d = draw[static_cast<std::size_t>(token - f->index.indexed().begin)];
          d.essential = d.drawn ? std::vector<int>() : std::vector<int>{kUniformAlone};
          d.drawn = true;
        }
        draws.push_back(draw);
      }
      check_decode<Ops>(*f, *sampler, SelfNormalised{}, draws, c.rule.tables, rho);
      check_decode<Ops>(*f, *sampler, Floored{}, draws, c.rule.tables, rho);
      check_decode<Ops>(*f, *sampler, Uncorrected{}, draws, c.rule.tables, rho);
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(unions, TwoBackends);

TEST_CASE_TEMPLATE_DEFINE("candidates name the groups of tables that they hang on", Ops, groups) {
  std::uint64_t seed = 240;
  for (const int tables : {3, 16, 40}) {
    for (const int t : {1, 2, 3}) {
      const Case c{.shape = kShape,
                   .rule = {.bits = 5, .tables = tables, .at_least = t, .radius = t - 1},
                   .seed = ++seed};
      CAPTURE(tables);
      CAPTURE(t);
      const std::unique_ptr<Fixture<float, SimHash>> f(
          Fixture<float, SimHash>::template make<Ops>(c));
      const auto sampler =
          Collisions::create(f->family, {.min_collisions = t, .probe_radius = c.rule.radius});
      REQUIRE(sampler.ok());
      std::size_t several = 0;
      std::size_t none = 0;
      for (int h = 0; h < c.shape.query_heads; ++h) {
        const int group = c.shape.group();
        const DrawnCandidates found = candidates_of<Ops>(*f, *sampler, h / group);
        const auto draw = brute_force<Ops>(*f, h, 1.0F);
        REQUIRE(found.essential.size() == found.tokens.size() * static_cast<std::size_t>(group));
        for (std::size_t i = 0; i < found.tokens.size(); ++i) {
          const auto at = static_cast<std::size_t>(found.tokens[i] - f->index.indexed().begin);
          unsigned expected = 0;
          for (const int j : draw[at].essential) expected |= 1U << j;
          const std::size_t own =
              i * static_cast<std::size_t>(group) + static_cast<std::size_t>(h % group);
          CHECK(found.essential[own] == expected);
          several += draw[at].essential.size() > 1 ? 1U : 0U;
          none += draw[at].drawn && draw[at].essential.empty() ? 1U : 0U;
        }
      }
      CHECK((several > 0) == (t > 1));
      CHECK((none > 0 || tables == 3));
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(groups, TwoBackends);

TEST_CASE_TEMPLATE_DEFINE("candidates name the heads that drew them, in token order", Ops,
                          memberships) {
  const Case c{.shape = {.query_heads = 32, .kv_heads = 1, .head_dim = 24, .value_dim = 4},
               .rule = {.bits = 6, .tables = 20, .at_least = 2, .radius = 0},
               .seed = 230};
  const std::unique_ptr<Fixture<float, SimHash>> f(Fixture<float, SimHash>::template make<Ops>(c));
  const auto sampler = Collisions::create(f->family, {.min_collisions = 2});
  const DrawnCandidates found = candidates_of<Ops>(*f, *sampler, 0);
  std::vector<TokenId> tokens;
  std::vector<std::uint32_t> members(static_cast<std::size_t>(f->index.indexed().size()));
  for (int g = 0; g < 32; ++g) {
    const auto draw = brute_force<Ops>(*f, g, 1.0F);
    for (std::size_t i = 0; i < draw.size(); ++i) members[i] |= (draw[i].drawn ? 1U : 0U) << g;
  }
  std::vector<std::uint32_t> expected;
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (members[i] == 0) continue;
    tokens.push_back(f->index.indexed().begin + static_cast<TokenId>(i));
    expected.push_back(members[i]);
  }
  CHECK(tokens.size() > 10);
  CHECK(found.tokens == tokens);
  CHECK(found.members == expected);
}
TEST_CASE_TEMPLATE_APPLY(memberships, TwoBackends);

}  // namespace
}  // namespace magicpig::test

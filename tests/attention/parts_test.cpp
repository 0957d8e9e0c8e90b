// SPDX-License-Identifier: Apache-2.0
// Long stretches of exact tokens are cut into parts; short indexes are not drawn from.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backends.hpp"
#include "brute_force.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"
#include "oracle.hpp"
#include "problem.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 3, .kv_heads = 1, .head_dim = 8, .value_dim = 5};

std::vector<TokenId> tokens_of(const ExactParts& parts) {
  std::vector<TokenId> tokens;
  for (int part = 0; part < parts.count(); ++part) {
    for (const TokenRange range : {parts.before(part), parts.behind(part)}) {
      for (TokenId t = range.begin; t < range.end; ++t) tokens.push_back(t);
    }
  }
  return tokens;
}

TEST_CASE("ExactParts.hold_every_exact_token_once_and_in_order") {
  for (const TokenId tokens : {0, 1, kPartTokens - 1, kPartTokens, kPartTokens + 1, 30000}) {
    for (const TokenRange sampled : {TokenRange{}, TokenRange{.begin = 0, .end = tokens},
                                     TokenRange{.begin = 4, .end = tokens / 2},
                                     TokenRange{.begin = tokens / 3, .end = tokens - tokens / 3},
                                     TokenRange{.begin = tokens / 2, .end = tokens}}) {
      if (sampled.end > 0 && sampled.empty()) continue;
      CAPTURE(tokens);
      CAPTURE(sampled.begin);
      CAPTURE(sampled.end);
      const ExactParts parts{.sampled = sampled, .tokens = tokens};
      std::vector<TokenId> expected;
      for (TokenId t = 0; t < tokens; ++t) {
        if (!sampled.contains(t)) expected.push_back(t);
      }
      CHECK(tokens_of(parts) == expected);
      CHECK(parts.count() >= 1);
      for (int part = 0; part < parts.count(); ++part) {
        CHECK(parts.before(part).size() + parts.behind(part).size() <= kPartTokens);
      }
    }
  }
}

TEST_CASE("ExactParts.of_the_longest_cache_do_not_overflow") {
  const ExactParts parts{.sampled = {.begin = 4, .end = 100}, .tokens = 0x7fffffff};
  const int last = parts.count() - 1;
  CHECK(parts.behind(last).end == 0x7fffffff);
  CHECK(parts.behind(last - 1).end == parts.behind(last).begin);
}

// A cache of three parts around a sampled middle.
struct Long {
  static constexpr TokenId kTokens = 21000;
  static constexpr TokenRange kMiddle{.begin = 9000, .end = 12000};

  Problem<float> problem{{.shape = kShape, .tokens = kTokens, .seed = 5}};
  Problem<float>::Source source = problem.source();
  RangeIndex index{kMiddle, 1, 8};
};

template <class Ops, class Plan>
Outputs& run(Long& data, const Plan& plan, int workers, Outputs& outputs) {
  const auto pool = ThreadPool::create(workers);
  REQUIRE(pool.ok());
  const auto request =
      make_request<float, RangeIndex>(data.problem, data.source, &data.index, outputs);
  const Status status = decode_one<Ops>(**pool, plan, request);
  REQUIRE_MESSAGE(status.ok(), status.message());
  return outputs;
}

TEST_CASE_TEMPLATE("a cache of several parts equals the definition, exact and drawn", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  Long data;
  const Exact exact;
  const DecodePlan<> all{.shape = kShape, .sampler = &exact};
  Outputs outputs(kShape);
  run<Ops>(data, all, 1, outputs);
  const auto uniform = Uniform::create({.tokens = 100000});  // draws every token
  REQUIRE(uniform.ok());
  const DecodePlan<Uniform> drawn{.shape = kShape, .sampler = &*uniform, .exact_below = 0};
  Outputs sampled(kShape);
  run<Ops>(data, drawn, 1, sampled);
  for (int h = 0; h < kShape.query_heads; ++h) {
    CAPTURE(h);
    const OracleState expected = oracle_attention(
        data.source,
        {.data = data.problem.query(h), .scale = static_cast<double>(all.logit_scale())},
        every_token({.begin = 0, .end = Long::kTokens}));
    CHECK(relative_error(outputs.out(h), expected.out) < 1e-5);
    CHECK(std::fabs(static_cast<double>(outputs.lse(h)) - expected.lse) < 1e-5 * expected.lse);
    CHECK(relative_error(sampled.out(h), expected.out) < 1e-5);
    CHECK(outputs.report(h).exact == Long::kTokens);
    CHECK(sampled.report(h).exact == Long::kTokens - Long::kMiddle.size());
    CHECK(sampled.report(h).drawn == Long::kMiddle.size());
    CHECK(sampled.report(h).rows_read == Long::kMiddle.size());
    CHECK(sampled.report(h).indexed == Long::kMiddle.size());
    CHECK(sampled.report(h).relative_error < 1e-6F);
  }
}

TEST_CASE("draws from tables tell their error in a cache of several parts, too") {
  Long data;
  const CollisionRule rule{.bits = 6, .tables = 40, .at_least = 2, .radius = 0};
  const auto family = SimHash::create({.dim = 8, .bits = 6, .tables = 40, .seed = 3});
  REQUIRE(family.ok());
  auto index = BucketTables<SimHash>::create(*family, {});
  REQUIRE(index.ok());
  SerialExecutor serial;
  REQUIRE(index->build(make_backend<ScalarOps>(serial), data.source, Long::kMiddle).ok());
  const auto sampler = Collisions::create(*family, {.min_collisions = 2});
  REQUIRE(sampler.ok());
  const DecodePlan<Collisions> plan{.shape = kShape, .sampler = &*sampler, .exact_below = 0};
  Outputs outputs(kShape);
  Outputs several(kShape);
  const auto pool = ThreadPool::create(3);
  REQUIRE(pool.ok());
  const auto request = [&](Outputs& to) {
    return make_request(data.problem, data.source, &*index, to);
  };
  REQUIRE(decode_one<ScalarOps>(serial, plan, request(outputs)).ok());
  REQUIRE(decode_one<ScalarOps>(**pool, plan, request(several)).ok());
  CHECK(same_bits(outputs, several));
  for (int h = 0; h < kShape.query_heads; ++h) {
    const OracleQuery query{.data = data.problem.query(h),
                            .scale = static_cast<double>(plan.logit_scale())};
    std::vector<DrawnToken> drawn;
    for (const TokenDraw& d : BruteForce::draw<ScalarOps>(data.source, *index, query, rule)) {
      if (!d.drawn) continue;
      drawn.push_back(
          {.token = d.token, .pi = d.pi, .factor = 1.0 / d.pi, .essential = d.essential});
    }
    const ExpectedHead expected =
        expected_head(data.source, query, Long::kMiddle, drawn, rule.tables);
    const HeadReport& report = outputs.report(h);
    CHECK(static_cast<double>(report.relative_error) ==
          doctest::Approx(expected.relative_error).epsilon(5e-3));
    CHECK(report.error_95 > 2.0F * report.relative_error);  // all errors in one direction
  }
}

TEST_CASE("the bits of a cache of several parts do not depend on the number of workers") {
  Long data;
  const auto uniform = Uniform::create({.tokens = 300});
  REQUIRE(uniform.ok());
  const DecodePlan<Uniform> plan{.shape = kShape, .sampler = &*uniform, .exact_below = 0};
  Outputs one(kShape);
  run<HighwayOps>(data, plan, 1, one);
  CHECK(one.report(0).drawn == 300);
  CHECK(one.report(0).relative_error > 0.0F);
  for (const int workers : {2, 3, 7}) {
    CAPTURE(workers);
    Outputs several(kShape);
    CHECK(same_bits(one, run<HighwayOps>(data, plan, workers, several)));
  }
}

TEST_CASE("one head of a long cache is work for several workers, and a short one for one") {
  Long data;
  const Exact exact;
  const DecodePlan<> plan{.shape = kShape, .sampler = &exact};
  Outputs outputs(kShape);
  auto request = make_request<float, RangeIndex>(data.problem, data.source, nullptr, outputs);
  std::vector<std::byte> workspace(workspace_bytes(plan, Long::kTokens, 2));
  using Step = DecodeStep<ScalarOps, DecodePlan<>, decltype(request)>;
  const auto step = Step::create(plan, std::span(&request, 1), workspace, 2);
  REQUIRE(step.ok());
  CHECK(step->tasks() == 3);
  const auto brief = data.source.first(kPartTokens);
  request.key_values = &brief;
  const auto short_step = Step::create(plan, std::span(&request, 1), workspace, 2);
  REQUIRE(short_step.ok());
  CHECK(short_step->tasks() == 1);
}

TEST_CASE("NaN in any part of a cache is reported") {
  for (const TokenId token : {10, kPartTokens + 1, Long::kTokens - 1}) {
    CAPTURE(token);
    Long data;
    data.problem.key(0, token)[2] = std::numeric_limits<float>::quiet_NaN();
    const Exact exact;
    const DecodePlan<> plan{.shape = kShape, .sampler = &exact};
    Outputs outputs(kShape);
    SerialExecutor executor;
    const Status status = decode_one<HighwayOps>(
        executor, plan,
        make_request<float, RangeIndex>(data.problem, data.source, nullptr, outputs));
    CHECK(status.code() == ErrorCode::kNonFinite);
  }
}

TEST_CASE(
    "an index of fewer tokens than exact_below is attended to exactly, any other is drawn from") {
  Long data;
  const auto uniform = Uniform::create({.tokens = 300});
  REQUIRE(uniform.ok());
  DecodePlan<Uniform> plan{.shape = kShape, .sampler = &*uniform};
  CHECK(plan.exact_below == kExactBelow);
  plan.exact_below = Long::kMiddle.size() + 1;
  Outputs exact(kShape);
  run<HighwayOps>(data, plan, 1, exact);
  CHECK(exact.report(0).exact == Long::kTokens);
  CHECK(exact.report(0).indexed == 0);
  plan.exact_below = Long::kMiddle.size();
  Outputs drawn(kShape);
  run<HighwayOps>(data, plan, 1, drawn);
  CHECK(drawn.report(0).drawn == 300);
}

// Rows of q8_0 blocks with scales of several sizes.
class Quantised {
 public:
  Quantised(const Shape& shape, TokenId tokens) : shape_(shape), tokens_(tokens) {
    Random random(31);
    for (std::vector<q8_0>* side : {&keys_, &values_}) {
      const int dim = side == &keys_ ? shape.head_dim : shape.value_dim;
      side->resize(static_cast<std::size_t>(shape.kv_heads * tokens) *
                   static_cast<std::size_t>(dim / kQ8Block));
      for (q8_0& block : *side) {
        block.scale = to_fp16(static_cast<float>((1.0 + random.uniform()) / 127.0));
        for (std::int8_t& value : block.values) {
          value = static_cast<std::int8_t>(static_cast<int>(random.below(255)) - 127);
        }
      }
    }
    for (int i = 0; i < shape.query_heads * shape.head_dim; ++i) {
      query_.push_back(static_cast<float>(random.normal()));
    }
  }

  [[nodiscard]] StridedKeyValues<q8_0> source(bool token_major) const {
    return token_major
               ? *StridedKeyValues<q8_0>::token_major(keys_.data(), values_.data(), shape_, tokens_)
               : *StridedKeyValues<q8_0>::head_major(keys_.data(), values_.data(), shape_, tokens_);
  }
  [[nodiscard]] const std::vector<float>& query() const { return query_; }

 private:
  Shape shape_;
  TokenId tokens_;
  std::vector<q8_0> keys_;
  std::vector<q8_0> values_;
  std::vector<float> query_;
};

TEST_CASE_TEMPLATE("exact attention over q8_0 rows equals its definition in both layouts", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (const int dim : {32, 64, 96, 128, 576}) {
    const Shape shape{
        .query_heads = 6, .kv_heads = 2, .head_dim = dim, .value_dim = dim > 64 ? 64 : 32};
    const Quantised data(shape, 217);
    for (const bool token_major : {false, true}) {
      CAPTURE(dim);
      CAPTURE(token_major);
      const auto source = data.source(token_major);
      const Exact exact;
      const DecodePlan<> plan{.shape = shape, .sampler = &exact};
      Outputs outputs(shape);
      const Request<StridedKeyValues<q8_0>> request{.key_values = &source,
                                                    .query = data.query(),
                                                    .states = outputs.states,
                                                    .reports = outputs.reports};
      SerialExecutor executor;
      REQUIRE(decode_one<Ops>(executor, plan, request).ok());
      for (int h = 0; h < shape.query_heads; ++h) {
        const OracleState expected =
            oracle_attention(source,
                             {.data = data.query().data() + h * dim,
                              .kv_head = h / shape.group(),
                              .scale = static_cast<double>(plan.logit_scale())},
                             every_token({.begin = 0, .end = 217}));
        CHECK(relative_error(outputs.out(h), expected.out) < 1e-5);
        CHECK(std::fabs(static_cast<double>(outputs.lse(h)) - expected.lse) < 1e-5 * expected.lse);
      }
    }
  }
}

TEST_CASE("an index over q8_0 keys has the codes of the same numbers in float") {
  const Shape shape{.query_heads = 2, .kv_heads = 2, .head_dim = 64, .value_dim = 32};
  constexpr TokenId kTokens = 300;
  const Quantised data(shape, kTokens);
  const auto quantised = data.source(false);
  std::vector<float> keys;
  for (int h = 0; h < 2; ++h) {
    for (TokenId t = 0; t < kTokens; ++t) {
      for (int j = 0; j < 64; ++j) keys.push_back(scalar_at(quantised.key(h, t), j));
    }
  }
  const auto wide = StridedKeyValues<float>::head_major(
      keys.data(), keys.data(), {.query_heads = 2, .kv_heads = 2, .head_dim = 64, .value_dim = 64},
      kTokens);
  const auto family = SimHash::create({.dim = 64, .bits = 6, .tables = 20});
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  auto a = BucketTables<SimHash>::create(*family, {.kv_heads = 2});
  auto b = BucketTables<SimHash>::create(*family, {.kv_heads = 2});
  REQUIRE(a->build(backend, quantised, {.begin = 0, .end = kTokens}).ok());
  REQUIRE(b->build(backend, *wide, {.begin = 0, .end = kTokens}).ok());
  int different = 0;
  for (int table = 0; table < 20; ++table) {
    for (int code = 0; code < 64; ++code) {
      const auto ids_a = a->segment(0, 1).bucket(table, code);
      const auto ids_b = b->segment(0, 1).bucket(table, code);
      different += !std::equal(ids_a.begin(), ids_a.end(), ids_b.begin(), ids_b.end());
    }
  }
  CHECK(different == 0);
}

TEST_CASE("dimensions that are no whole blocks are refused for q8_0") {
  const q8_0 block{};
  const auto source = StridedKeyValues<q8_0>::head_major(
      &block, &block, {.query_heads = 1, .kv_heads = 1, .head_dim = 32, .value_dim = 33}, 1);
  CHECK(source.status().code() == ErrorCode::kInvalidArgument);
  CHECK(std::string(source.status().message())
            .find("value_dim 33 must be a multiple of the values' block of 32") !=
        std::string::npos);
}

}  // namespace

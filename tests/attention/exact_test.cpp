// SPDX-License-Identifier: Apache-2.0
// Exact attention equals attention by its definition, for every shape, layout and scalar type.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backends.hpp"
#include "magicpig/attention.hpp"
#include "oracle.hpp"
#include "problem.hpp"

namespace magicpig::test {
namespace {

// Logits are about N(0, query_scale^2) and come from float32 inner products: each is off by some
// 1e-7 times |q||k| * scale, which stays below 20 here, so weights and with them outputs and lse
// are right to a few 1e-6. Inputs are rounded to 16 bits before the oracle sees them.
constexpr double kTolerance = 1e-5;

void check_states(const OracleState& expected, std::span<const float> out, float lse,
                  double least_size = 0.0) {
  CHECK(relative_error(out, expected.out, least_size) <= kTolerance);
  if (std::isinf(expected.lse)) {
    CHECK(lse == kEmptyLse);
  } else {
    CHECK(std::fabs(static_cast<double>(lse) - expected.lse) <=
          kTolerance * std::fmax(1.0, std::fabs(expected.lse)));
  }
}

template <class Ops, class T>
void check_exact(const ProblemConfig& config) {
  CAPTURE(config.seed);
  CAPTURE(config.shape.head_dim);
  CAPTURE(config.shape.value_dim);
  CAPTURE(config.shape.query_heads);
  CAPTURE(config.tokens);
  CAPTURE(static_cast<int>(config.placement));
  const Problem<T> problem(config);
  const auto source = problem.source();
  const Exact exact;
  const DecodePlan<> plan{.shape = config.shape, .sampler = &exact};
  Outputs outputs(config.shape);
  SerialExecutor executor;
  const Status status = decode_one<Ops>(
      executor, plan, make_request<T, RangeIndex>(problem, source, nullptr, outputs));
  REQUIRE_MESSAGE(status.ok(), status.message());
  std::vector<OracleState> expected;
  double square = 0.0;
  for (int h = 0; h < config.shape.query_heads; ++h) {
    expected.push_back(oracle_attention(source,
                                        {.data = problem.query(h),
                                         .kv_head = h / config.shape.group(),
                                         .scale = static_cast<double>(plan.logit_scale())},
                                        every_token({.begin = 0, .end = config.tokens})));
    for (const double x : expected.back().out) square += x * x;
  }
  // In one dimension values may cancel to an output near 0: no smaller than the heads' mean size.
  const double mean_size = std::sqrt(square / config.shape.query_heads);
  for (int h = 0; h < config.shape.query_heads; ++h) {
    CAPTURE(h);
    check_states(expected[static_cast<std::size_t>(h)], outputs.out(h), outputs.lse(h), mean_size);
    CHECK(outputs.report(h).exact == config.tokens);
    CHECK(outputs.report(h).drawn == 0);
    CHECK(outputs.report(h).rows_read == 0);
    CHECK(outputs.report(h).indexed == 0);
  }
}

std::vector<int> dimensions() {
  std::vector<int> dims;
  for (int d = 1; d <= 66; ++d) dims.push_back(d);
  for (const int d : {80, 95, 96, 97, 112, 127, 128, 129, 160, 191, 192, 193, 255, 256, 257}) {
    dims.push_back(d);
  }
  return dims;
}

TEST_CASE_TEMPLATE_DEFINE("exact attention equals its definition for head_dim 1 to 257", Ops,
                          head_dims) {
  std::uint64_t seed = 100;
  for (const int d : dimensions()) {
    check_exact<Ops, float>(
        {.shape = {.query_heads = 4, .kv_heads = 2, .head_dim = d, .value_dim = d * 7 % 61 + 1},
         .tokens = 150,
         .seed = ++seed});
  }
}
TEST_CASE_TEMPLATE_APPLY(head_dims, Backends);

TEST_CASE_TEMPLATE_DEFINE("exact attention equals its definition for value_dim 1 to 257", Ops,
                          value_dims) {
  std::uint64_t seed = 300;
  for (const int d : dimensions()) {
    check_exact<Ops, float>(
        {.shape = {.query_heads = 3, .kv_heads = 1, .head_dim = d * 5 % 37 + 1, .value_dim = d},
         .tokens = 133,
         .seed = ++seed});
  }
}
TEST_CASE_TEMPLATE_APPLY(value_dims, Backends);

TEST_CASE_TEMPLATE_DEFINE("exact attention equals its definition for 1 to 32 heads per KV head",
                          Ops, groups) {
  for (int group = 1; group <= kMaxGroup; ++group) {
    check_exact<Ops, float>(
        {.shape = {.query_heads = 2 * group, .kv_heads = 2, .head_dim = 40, .value_dim = 33},
         .tokens = 200,
         .seed = 500 + static_cast<std::uint64_t>(group),
         .query_scale = 2.0});
  }
}
TEST_CASE_TEMPLATE_APPLY(groups, Backends);

TEST_CASE_TEMPLATE_DEFINE("exact attention equals its definition for 0 to 5000 tokens", Ops,
                          token_counts) {
  for (const TokenId tokens : {0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 255, 256, 257, 5000}) {
    check_exact<Ops, float>(
        {.shape = {.query_heads = 6, .kv_heads = 3, .head_dim = 24, .value_dim = 17},
         .tokens = tokens,
         .seed = 600 + static_cast<std::uint64_t>(tokens),
         .query_scale = 2.0});
  }
}
TEST_CASE_TEMPLATE_APPLY(token_counts, Backends);

TEST_CASE_TEMPLATE_DEFINE("exact attention equals its definition in every layout and scalar type",
                          Ops, layouts) {
  std::uint64_t seed = 700;
  for (const Placement placement : kPlacements) {
    for (const int d : {1, 3, 16, 31, 64, 129}) {
      ProblemConfig config{
          .shape = {.query_heads = 10, .kv_heads = 2, .head_dim = d, .value_dim = 130 - d},
          .tokens = 140,
          .placement = placement,
          .seed = ++seed};
      check_exact<Ops, float>(config);
      check_exact<Ops, fp16>(config);
      check_exact<Ops, bf16>(config);
      config.tokens = 1;
      check_exact<Ops, fp16>(config);
      config.tokens = 0;
      check_exact<Ops, bf16>(config);
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(layouts, Backends);

TEST_CASE_TEMPLATE_DEFINE("the plan's scale multiplies inner products", Ops, scales) {
  const ProblemConfig config{
      .shape = {.query_heads = 2, .kv_heads = 1, .head_dim = 20, .value_dim = 20}, .tokens = 77};
  const Problem<float> problem(config);
  const auto source = problem.source();
  const Exact exact;
  for (const float scale : {0.5F, -0.25F, 1e-20F}) {
    CAPTURE(scale);
    const DecodePlan<> plan{.shape = config.shape, .sampler = &exact, .scale = scale};
    Outputs outputs(config.shape);
    SerialExecutor executor;
    REQUIRE(decode_one<Ops>(executor, plan,
                            make_request<float, RangeIndex>(problem, source, nullptr, outputs))
                .ok());
    for (int h = 0; h < 2; ++h) {
      check_states(
          oracle_attention(
              source, {.data = problem.query(h), .kv_head = 0, .scale = static_cast<double>(scale)},
              every_token({.begin = 0, .end = 77})),
          outputs.out(h), outputs.lse(h));
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(scales, Backends);

TEST_CASE_TEMPLATE_DEFINE("logits of hundreds neither overflow nor vanish", Ops, large_logits) {
  // Logits beyond 88 overflow exp in float32, below -103 they vanish: only differences may count.
  const ProblemConfig config{
      .shape = {.query_heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8},
      .tokens = 300,
      .seed = 9};
  Problem<float> problem(config);
  for (std::size_t j = 0; j < 16; ++j) problem.query()[j] = j < 8 ? 300.0F : -300.0F;
  for (TokenId t = 0; t < 300; ++t) {
    for (int j = 0; j < 8; ++j) problem.key(0, t)[j] += 3.0F;  // mean logits of +-2500
  }
  const auto source = problem.source();
  const Exact exact;
  const DecodePlan<> plan{.shape = config.shape, .sampler = &exact};
  Outputs outputs(config.shape);
  SerialExecutor executor;
  REQUIRE(decode_one<Ops>(executor, plan,
                          make_request<float, RangeIndex>(problem, source, nullptr, outputs))
              .ok());
  for (int h = 0; h < 2; ++h) {
    const OracleState expected = oracle_attention(
        source,
        {.data = problem.query(h), .kv_head = 0, .scale = static_cast<double>(plan.logit_scale())},
        every_token({.begin = 0, .end = 300}));
    // A float32 logit of 1000s is off by up to 2^-24 of |q||k| scale (about 5000): 3e-4.
    CHECK(std::fabs(expected.lse) > 100.0);
    CHECK(std::fabs(static_cast<double>(outputs.lse(h)) - expected.lse) <= 1e-3);
    CHECK(relative_error(outputs.out(h), expected.out) <= 1e-3);
  }
}
TEST_CASE_TEMPLATE_APPLY(large_logits, Backends);

TEST_CASE("an empty index range leaves every token exact") {
  const ProblemConfig config{
      .shape = {.query_heads = 4, .kv_heads = 2, .head_dim = 16, .value_dim = 9}, .tokens = 50};
  const Problem<float> problem(config);
  const auto source = problem.source();
  const auto uniform = Uniform::create({.tokens = 1});
  const DecodePlan<Uniform> plan{.shape = config.shape, .sampler = &*uniform, .exact_below = 0};
  for (const TokenRange range :
       {TokenRange{}, TokenRange{7, 7}, TokenRange{50, 50}, TokenRange{60, 60}, TokenRange{9, 3}}) {
    CAPTURE(range.begin);
    const RangeIndex index(range, 2, 16);
    Outputs with_index(config.shape);
    Outputs without(config.shape);
    SerialExecutor executor;
    REQUIRE(decode_one<ScalarOps>(executor, plan, make_request(problem, source, &index, with_index))
                .ok());
    REQUIRE(decode_one<ScalarOps>(
                executor, plan, make_request<float, RangeIndex>(problem, source, nullptr, without))
                .ok());
    CHECK(same_bits(with_index, without));
    CHECK(with_index.report(0).exact == 50);
  }
}

TEST_CASE_TEMPLATE_DEFINE("the states of two halves merge to the state of the whole", Ops, merges) {
  // Both halves are right to 1e-5, and so is their merge.
  const ProblemConfig config{
      .shape = {.query_heads = 8, .kv_heads = 2, .head_dim = 32, .value_dim = 21},
      .tokens = 500,
      .seed = 77,
      .query_scale = 2.0};
  const Problem<float> problem(config);
  const auto whole = problem.source();
  const Exact exact;
  const DecodePlan<> plan{.shape = config.shape, .sampler = &exact};
  for (const TokenId cut : {0, 1, 250, 499, 500}) {
    CAPTURE(cut);
    const auto first = whole.first(cut);
    const auto second =
        *StridedKeyValues<float>::create({.keys = whole.key(0, cut),
                                          .values = whole.value(0, cut),
                                          .key_strides = {.head = 500 * 32 * 4, .token = 32 * 4},
                                          .value_strides = {.head = 500 * 21 * 4, .token = 21 * 4},
                                          .kv_heads = 2,
                                          .head_dim = 32,
                                          .value_dim = 21,
                                          .tokens = 500 - cut});
    Outputs a(config.shape);
    Outputs b(config.shape);
    SerialExecutor executor;
    REQUIRE(
        decode_one<Ops>(executor, plan, make_request<float, RangeIndex>(problem, first, nullptr, a))
            .ok());
    REQUIRE(decode_one<Ops>(executor, plan,
                            make_request<float, RangeIndex>(problem, second, nullptr, b))
                .ok());
    for (int h = 0; h < config.shape.query_heads; ++h) {
      AttentionState& state = a.states[static_cast<std::size_t>(h)];
      merge(state, b.states[static_cast<std::size_t>(h)]);
      check_states(oracle_attention(whole,
                                    {.data = problem.query(h),
                                     .kv_head = h / 4,
                                     .scale = static_cast<double>(plan.logit_scale())},
                                    every_token({.begin = 0, .end = 500})),
                   state.out, state.lse);
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(merges, Backends);

}  // namespace
}  // namespace magicpig::test

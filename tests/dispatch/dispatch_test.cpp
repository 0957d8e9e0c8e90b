// SPDX-License-Identifier: Apache-2.0
// The example that chooses its instruction set at run time, on every target that this processor
// has.
#include <doctest/doctest.h>
#include <hwy/targets.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cpu_supports.hpp"
#include "decode_dispatch.hpp"
#include "on_every_target.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "same_index.hpp"

namespace magicpig::test {
namespace {

constexpr TokenId kTokens = 600;
constexpr TokenRange kMiddle{.begin = 4, .end = 584};

struct Setup {
  Problem<bf16> problem;
  engine::Cache cache = problem.source();
  SimHash family;
  Collisions collisions = std::move(*Collisions::create(family, {.min_collisions = 2}));
  Exact every_token;
  engine::Index index =
      std::move(*engine::Index::create(family, {.kv_heads = 2, .seal_tokens = 1}));
  std::unique_ptr<ThreadPool> threads = std::move(*ThreadPool::create(2));

  explicit Setup(int value_dim)
      : problem(
            {.shape = {.query_heads = 10, .kv_heads = 2, .head_dim = 71, .value_dim = value_dim},
             .tokens = kTokens,
             .seed = 5,
             .key_offset = 0.5}),
        family(std::move(*SimHash::create({.dim = 71, .bits = 6, .tables = 30, .seed = 3}))) {
    CHECK(index.build(make_backend<ScalarOps>(*threads), cache, kMiddle).ok());
  }

  [[nodiscard]] engine::SampledPlan sampled() const {
    return {.shape = problem.shape(), .sampler = &collisions, .exact_below = 0};
  }
  [[nodiscard]] engine::ExactPlan exact() const {
    return {.shape = problem.shape(), .sampler = &every_token};
  }
  [[nodiscard]] engine::Request request(Outputs& outputs) const {
    return make_request(problem, cache, &index, outputs);
  }
  [[nodiscard]] std::vector<std::byte> workspace() const {
    return std::vector<std::byte>(workspace_bytes(sampled(), kTokens, threads->workers()));
  }

  void decode_sampled(Outputs& outputs) {
    const engine::Request requests[] = {request(outputs)};
    auto bytes = workspace();
    const Status status = engine::decode_sampled(sampled(), requests, bytes, *threads);
    CHECK_MESSAGE(status.ok(), status.message());
  }
  void decode_exact(Outputs& outputs) {
    const engine::Request requests[] = {request(outputs)};
    auto bytes = workspace();
    const Status status = engine::decode_exact(exact(), requests, bytes, *threads);
    CHECK_MESSAGE(status.ok(), status.message());
  }
};

// The promise across backends: outputs and lse within 1e-5.
void check_close(const Shape& shape, const Outputs& actual, const Outputs& expected) {
  for (int h = 0; h < shape.query_heads; ++h) {
    CAPTURE(h);
    const auto out = expected.out(h);
    CHECK(relative_error(actual.out(h), std::vector<double>(out.begin(), out.end())) <= 1e-5);
    CHECK(std::fabs(actual.lse(h) - expected.lse(h)) <= 1e-5F * std::fabs(expected.lse(h)));
  }
}

TEST_CASE("the processor's best target is the one chosen") {
  choose_by_processor();
  const std::string chosen = engine::target_name();
  CHECK(chosen == std::string(hwy::TargetName(hwy::SupportedAndGeneratedTargets().front())));
#if defined(__x86_64__)
  // What the processor says of itself, not what Highway makes of it.
  std::string expected = hwy::TargetName(HWY_STATIC_TARGET);
  if (__builtin_cpu_supports("ssse3")) expected = "SSSE3";
  if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("aes")) expected = "SSE4";
  if (cpu_supports("haswell")) expected = "AVX2";
  if (cpu_supports("skylake_avx512")) expected = "AVX3";
  CHECK(chosen == expected);
#endif
  for (std::int64_t left = HWY_TARGETS & ~hwy::SupportedTargets(); left != 0; left &= left - 1) {
    const std::string lacking = hwy::TargetName(left & -left);
    MESSAGE("SKIPPED: this processor lacks ", lacking, ": compiled, but NOT run");
  }
}

TEST_CASE("the target in use is the one that a test asks for") {
  on_every_target([] {
    CHECK(std::string(engine::target_name()) == hwy::TargetName(hwy::SupportedTargets()));
  });
}

TEST_CASE("on every target exact attention is that of ScalarOps") {
  Setup s(45);
  Outputs expected(s.problem.shape());
  REQUIRE(decode_one<ScalarOps>(*s.threads, s.exact(), s.request(expected)).ok());
  on_every_target([&] {
    Outputs outputs(s.problem.shape());
    s.decode_exact(outputs);
    check_close(s.problem.shape(), outputs, expected);
    CHECK(outputs.report(0).exact == kTokens);
  });
}

TEST_CASE("on every target sampled attention is that of ScalarOps") {
  Setup s(45);
  Outputs expected(s.problem.shape());
  REQUIRE(decode_one<ScalarOps>(*s.threads, s.sampled(), s.request(expected)).ok());
  CHECK(expected.report(0).drawn > 20);
  CHECK(expected.report(0).drawn < kMiddle.size() / 2);
  on_every_target([&] {
    Outputs outputs(s.problem.shape());
    s.decode_sampled(outputs);
    check_close(s.problem.shape(), outputs, expected);
    for (int h = 0; h < s.problem.shape().query_heads; ++h) {
      CHECK(outputs.report(h).drawn == expected.report(h).drawn);
      CHECK(outputs.report(h).rows_read == expected.report(h).rows_read);
    }
  });
}

TEST_CASE("on every target each head draws the tokens that it draws with ScalarOps") {
  // Values are rows of the identity, so coordinate t of an output is the weight of token t: not 0
  // where the token is exact or drawn.
  Setup s(kTokens);
  for (int kv_head = 0; kv_head < 2; ++kv_head) {
    for (TokenId t = 0; t < kTokens; ++t) {
      for (TokenId j = 0; j < kTokens; ++j) {
        s.problem.value(kv_head, t)[j] = to_bf16(j == t ? 1.0F : 0.0F);
      }
    }
  }
  Outputs expected(s.problem.shape());
  REQUIRE(decode_one<ScalarOps>(*s.threads, s.sampled(), s.request(expected)).ok());
  on_every_target([&] {
    Outputs outputs(s.problem.shape());
    s.decode_sampled(outputs);
    for (int h = 0; h < s.problem.shape().query_heads; ++h) {
      int tokens = 0;
      int different = 0;
      for (std::size_t t = 0; t < kTokens; ++t) {
        tokens += outputs.out(h)[t] != 0.0F;
        different += (outputs.out(h)[t] != 0.0F) != (expected.out(h)[t] != 0.0F);
      }
      CAPTURE(h);
      CHECK(different == 0);
      CHECK(tokens == outputs.report(h).drawn + kTokens - kMiddle.size());
    }
  });
}

TEST_CASE("on every target an index built, or built and appended to, is that of ScalarOps") {
  Setup s(8);
  on_every_target([&] {
    auto built = engine::Index::create(s.family, {.kv_heads = 2, .seal_tokens = 1});
    REQUIRE(engine::build_index(*built, s.cache, kMiddle, *s.threads).ok());
    const char* difference = index_difference(*built, s.index);
    CHECK_MESSAGE(difference == nullptr, difference);

    auto appended = engine::Index::create(s.family, {.kv_heads = 2, .seal_tokens = 1});
    auto expected = engine::Index::create(s.family, {.kv_heads = 2, .seal_tokens = 1});
    const TokenRange half{.begin = 4, .end = 300};
    REQUIRE(engine::build_index(*appended, s.cache, half, *s.threads).ok());
    REQUIRE(engine::append_to_index(*appended, s.cache, kMiddle.end, *s.threads).ok());
    const auto scalar = make_backend<ScalarOps>(*s.threads);
    REQUIRE(expected->build(scalar, s.cache, half).ok());
    REQUIRE(expected->append(scalar, s.cache, kMiddle.end).ok());
    difference = index_difference(*appended, *expected);
    CHECK_MESSAGE(difference == nullptr, difference);
  });
}

TEST_CASE("errors come through, with nothing written") {
  Setup s(45);
  on_every_target([&] {
    Outputs outputs(s.problem.shape());
    const engine::Request requests[] = {s.request(outputs)};
    const Status small = engine::decode_exact(s.exact(), requests, {}, *s.threads);
    CHECK(small.code() == ErrorCode::kWorkspaceTooSmall);
    CHECK(std::isnan(outputs.lse(0)));
    engine::Index index = std::move(*engine::Index::create(s.family, {.kv_heads = 2}));
    CHECK(
        engine::build_index(index, s.cache, {.begin = 0, .end = kTokens + 1}, *s.threads).code() ==
        ErrorCode::kInvalidArgument);
  });
}

}  // namespace
}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// A way of its own for each KV head: the draws of the plain samplers, head by head.
#include "magicpig/sample/per_head.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "allocations.hpp"
#include "backends.hpp"
#include "magicpig/attention.hpp"
#include "problem.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 8, .kv_heads = 4, .head_dim = 24, .value_dim = 8};
constexpr TokenId kTokens = 1500;
constexpr TokenRange kMiddle{.begin = 4, .end = 1436};
constexpr std::uint64_t kSeed = 3;
constexpr NoiseKey kNoise{.seed = 5, .step = 6, .layer = 7};

// Heads 0 and 1 have codes, 2 is uniform, 3 exact.
constexpr std::array<HeadSetting, 4> kProfile{
    {{.kind = HeadKind::kTrainedSignatures,
      .bits = 1,
      .budget = 0.1,
      .temperature = 0.7,
      .value_norms = false},
     {.kind = HeadKind::kSignatures, .bits = 3, .budget = 0.05, .certain = 0.3},
     {.kind = HeadKind::kUniform, .budget = 0.2},
     {}}};

Problem<float> make_problem() {
  return Problem<float>({.shape = kShape, .tokens = kTokens, .query_scale = 2.0});
}

// Everything of a profile, over tokens of a problem.
struct Profiled {
  explicit Profiled(const Problem<float>& problem, TokenRange range = kMiddle,
                    std::span<const HeadSetting> profile = kProfile)
      : backend(make_backend<ScalarOps>(executor)),
        quantisers(
            std::move(*HeadQuantisers::create(backend, problem.source(), kMiddle, profile, kSeed))),
        index(std::move(*PerHeadIndex::create(quantisers))),
        sampler(std::move(*PerHead::create(quantisers))) {
    REQUIRE(index.build(backend, problem.source(), range).ok());
  }
  Profiled(const Profiled&) = delete;

  SerialExecutor executor;
  CpuBackend<ScalarOps, SerialExecutor> backend;
  HeadQuantisers quantisers;
  PerHeadIndex index;
  PerHead sampler;
};

// Codes of all KV heads and the sampler of one of them.
template <class Q>
struct Plain {
  Plain(const Problem<float>& problem, Q made, int head)
      : quantiser(std::move(made)),
        index(std::move(*Signatures<Q>::create(
            quantiser, {.kv_heads = kShape.kv_heads,
                        .value_dim = setting(head).value_norms ? kShape.value_dim : 0}))),
        sampler(*Systematic::create(quantiser, {.budget = {.fraction = setting(head).budget},
                                                .temperature = setting(head).temperature,
                                                .certain = setting(head).certain})) {
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), kMiddle).ok());
  }
  Plain(const Plain&) = delete;
  static const HeadSetting& setting(int head) { return kProfile[static_cast<std::size_t>(head)]; }

  SerialExecutor executor;
  Q quantiser;
  Signatures<Q> index;
  Systematic sampler;
};

HadamardQuantiser random_codes() {
  return std::move(*HadamardQuantiser::create(kShape.head_dim, 3, kSeed));
}

ProductQuantiser trained_codes(const Problem<float>& problem) {
  SerialExecutor executor;
  return std::move(*ProductQuantiser::train(make_backend<ScalarOps>(executor), problem.source(),
                                            kMiddle, {.kv_heads = 4, .bits = 1, .seed = kSeed}));
}

bool same_draw(const Drawn& a, const Drawn& b) {
  return !a.tokens.empty() && a.tokens == b.tokens && a.members == b.members &&
         a.log_pi == b.log_pi;
}

// decode() with a plan of `sampler`, and whether it went well.
template <class Sampler, class IndexType>
Status decode_with(const Sampler& sampler, const Problem<float>& problem, const IndexType* index,
                   Outputs& outputs) {
  SerialExecutor executor;
  const auto source = problem.source();
  const DecodePlan<Sampler> plan{
      .shape = kShape, .sampler = &sampler, .layer = kNoise.layer, .exact_below = 0};
  return decode_one<ScalarOps>(
      executor, plan,
      make_request(problem, source, index, outputs, {.seed = kNoise.seed, .step = kNoise.step}));
}

// Output and lse of the query heads of one KV head.
bool same_head(const Outputs& a, const Outputs& b, int kv_head) {
  bool same = true;
  for (int g = kv_head * kShape.group(); g < (kv_head + 1) * kShape.group(); ++g) {
    same &= same_bits(a.lse(g), b.lse(g));
    for (std::size_t j = 0; j < a.out(g).size(); ++j) same &= same_bits(a.out(g)[j], b.out(g)[j]);
  }
  return same;
}

}  // namespace

TEST_SUITE("PerHead") {
  TEST_CASE("draws for each KV head what the plain sampler of its setting draws") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem);
    const auto drawn = [&](int h) {
      return draw_tokens(own.sampler, problem, own.index, kNoise, h);
    };
    const Plain<ProductQuantiser> trained(problem, trained_codes(problem), 0);
    CHECK(same_draw(drawn(0), draw_tokens(trained.sampler, problem, trained.index, kNoise, 0)));
    const Plain<HadamardQuantiser> random(problem, random_codes(), 1);
    CHECK(same_draw(drawn(1), draw_tokens(random.sampler, problem, random.index, kNoise, 1)));
    // Another head's noise, or another's keys, is another draw.
    CHECK(!same_draw(drawn(1), draw_tokens(random.sampler, problem, random.index, kNoise, 2)));
    const RangeIndex range(kMiddle, kShape.kv_heads, kShape.head_dim);
    const auto uniform = Uniform::create({.fraction = 0.2});
    CHECK(same_draw(drawn(2), draw_tokens(*uniform, problem, range, kNoise, 2)));
    const Drawn all = drawn(3);
    REQUIRE(all.tokens.size() == static_cast<std::size_t>(kMiddle.size()));
    CHECK(all.tokens.front() == kMiddle.begin);
    CHECK(all.tokens.back() == kMiddle.end - 1);
    for (const auto& log_pi : all.log_pi) CHECK(log_pi == std::vector(all.tokens.size(), 0.0F));
  }

  TEST_CASE("a mixed profile through decode() is the plain samplers' outputs, head by head") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem);
    Outputs mixed(kShape);
    REQUIRE(decode_with(own.sampler, problem, &own.index, mixed).ok());
    const Plain<ProductQuantiser> trained(problem, trained_codes(problem), 0);
    const Plain<HadamardQuantiser> random(problem, random_codes(), 1);
    const RangeIndex range(kMiddle, kShape.kv_heads, kShape.head_dim);
    Outputs other(kShape);
    REQUIRE(decode_with(trained.sampler, problem, &trained.index, other).ok());
    CHECK(same_head(mixed, other, 0));
    CHECK(!same_head(mixed, other, 1));
    REQUIRE(decode_with(random.sampler, problem, &random.index, other).ok());
    CHECK(same_head(mixed, other, 1));
    REQUIRE(decode_with(*Uniform::create({.fraction = 0.2}), problem, &range, other).ok());
    CHECK(same_head(mixed, other, 2));
    // Sums of 1,500 terms in another order: 100 roundings of what is of the order of 1.
    REQUIRE(decode_with(Exact(), problem, &range, other).ok());
    for (int g = 6; g < 8; ++g) {
      CHECK(mixed.lse(g) == doctest::Approx(other.lse(g)).epsilon(1e-5));
      for (std::size_t j = 0; j < mixed.out(g).size(); ++j) {
        CHECK(std::fabs(mixed.out(g)[j] - other.out(g)[j]) < 1e-5F);
      }
      CHECK(mixed.report(g).rows_read == kMiddle.size());
    }
  }

  TEST_CASE("decoding a profile allocates nothing") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem);
    Outputs outputs(kShape);
    SerialExecutor executor;
    const auto source = problem.source();
    const DecodePlan<PerHead> plan{.shape = kShape, .sampler = &own.sampler, .exact_below = 0};
    const auto request = make_request(problem, source, &own.index, outputs);
    std::vector<std::byte> workspace(workspace_bytes(plan, kTokens, 1));
    const std::int64_t before = allocation_count();
    const Status status =
        decode(make_backend<ScalarOps>(executor), plan, std::span(&request, 1), workspace);
    CHECK(allocation_count() == before);
    CHECK(status.ok());
  }

  TEST_CASE("all backends draw the same") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem);
    for (int h = 0; h < kShape.kv_heads; ++h) {
      const Drawn scalar = draw_tokens(own.sampler, problem, own.index, kNoise, h);
      CHECK(same_draw(scalar, draw_tokens<HighwayOps>(own.sampler, problem, own.index, kNoise, h)));
    }
  }

  TEST_CASE("appends and truncates as the indexes of its heads do") {
    const Problem<float> problem = make_problem();
    const TokenRange first{.begin = 4, .end = 500};
    Profiled own(problem, first);
    REQUIRE(own.index.append(own.backend, problem.source(), 1000).ok());
    REQUIRE(own.index.append(own.backend, problem.source(), 700).ok());
    CHECK(own.index.indexed() == TokenRange{4, 1000});
    REQUIRE(own.index.truncate(900).ok());
    CHECK(own.index.indexed() == TokenRange{4, 900});
    Plain<HadamardQuantiser> plain(problem, random_codes(), 1);
    REQUIRE(plain.index.build(own.backend, problem.source(), first).ok());
    REQUIRE(plain.index.append(own.backend, problem.source(), 900).ok());
    const auto drawn = [&] { return draw_tokens(own.sampler, problem, own.index, kNoise, 1); };
    CHECK(same_draw(drawn(), draw_tokens(plain.sampler, problem, plain.index, kNoise, 1)));
    CHECK(draw_tokens(own.sampler, problem, own.index, kNoise, 3).tokens.size() == 896);
    CHECK(!own.index.truncate(-1).ok());
    CHECK(own.index.indexed() == TokenRange{4, 900});
    REQUIRE(own.index.truncate(0).ok());
    CHECK(own.index.indexed().empty());
    Outputs outputs(kShape);
    CHECK(decode_with(own.sampler, problem, &own.index, outputs).ok());
    CHECK(outputs.report(0).exact == kTokens);
  }

  TEST_CASE("a key that is not finite leaves the index of every head as it was") {
    Problem<float> problem = make_problem();
    Profiled own(problem, {.begin = 4, .end = 800});
    const Drawn before = draw_tokens(own.sampler, problem, own.index, kNoise, 0);
    // Head 0 takes the tokens over before head 1 refuses them.
    problem.key(1, 1200)[0] = std::numeric_limits<float>::infinity();
    const Status status = own.index.append(own.backend, problem.source(), 1300);
    CHECK(status.code() == ErrorCode::kNonFinite);
    CHECK(std::string(status.message()).find("KV head 1 by itself") == 0);
    CHECK(own.index.indexed() == TokenRange{4, 800});
    CHECK(same_draw(before, draw_tokens(own.sampler, problem, own.index, kNoise, 0)));
    CHECK(!own.index.build(own.backend, problem.source(), kMiddle).ok());
    CHECK(own.index.indexed() == TokenRange{4, 800});
    REQUIRE(own.index.append(own.backend, problem.source(), 1100).ok());
    CHECK(own.index.indexed() == TokenRange{4, 1100});
  }

  TEST_CASE("reads of each head's index the bytes of its own codes") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem);
    CHECK(own.index.bytes_per_token(0) == 1 * 24 / 8 + 2);
    CHECK(own.index.bytes_per_token(1) == 3 * 24 / 8 + 4);
    CHECK(own.index.bytes_per_token(2) == 0);
    CHECK(own.index.bytes_per_token(3) == 0);
    CHECK(own.index.bytes() > 0);
    const std::array<HeadSetting, 4> none{};
    const Profiled exact(problem, kMiddle, none);
    CHECK(exact.index.bytes() == 0);
  }

  TEST_CASE("refuses profiles that no head can have") {
    const Problem<float> problem = make_problem();
    SerialExecutor executor;
    const auto message = [&](std::span<const HeadSetting> profile) {
      const auto made = HeadQuantisers::create(make_backend<ScalarOps>(executor), problem.source(),
                                               kMiddle, profile, kSeed);
      return std::string(made.status().message());
    };
    CHECK(message(std::span(kProfile).first(3)) ==
          "a profile of 3 KV heads does not fit keys of 4");
    const auto with = [&](const HeadSetting& setting) {
      auto profile = kProfile;
      profile[2] = setting;
      return message(profile);
    };
    const double nan = std::numeric_limits<double>::quiet_NaN();
    constexpr auto kCodes = HeadKind::kTrainedSignatures;
    CHECK(with({.kind = HeadKind::kUniform}) == "KV head 2: budget 0 must lie in (0, 1]");
    CHECK(with({.kind = kCodes, .bits = 1, .budget = 1.5}) ==
          "KV head 2: budget 1.5 must lie in (0, 1]");
    CHECK(!with({.kind = kCodes, .bits = 1, .budget = nan}).empty());
    CHECK(with({.kind = kCodes, .bits = 5, .budget = 0.1}) ==
          "KV head 2: bits 5 must lie in [1, 4]");
    CHECK(with({.kind = kCodes, .bits = 1, .budget = 0.1, .temperature = 9.0}) ==
          "KV head 2: temperature 9 must lie in [0, 4]");
    CHECK(with({.kind = kCodes, .bits = 1, .budget = 0.1, .certain = 1.0}) ==
          "KV head 2: certain 1 must lie in [0, 1)");
    CHECK(with({.kind = HeadKind::kUniform, .budget = 1.0}).empty());
  }

  TEST_CASE("decode refuses an index of other codes than the sampler's") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem);
    auto other = kProfile;
    other[1].bits = 2;
    const Profiled fewer(problem, kMiddle, other);
    other[1] = {};
    const Profiled without(problem, kMiddle, other);
    Outputs outputs(kShape);
    const Status bits = decode_with(own.sampler, problem, &fewer.index, outputs);
    CHECK(bits.code() == ErrorCode::kShapeMismatch);
    CHECK(std::string(bits.message()) ==
          "KV head 1: the sampler is made for 3 bits of 24 dimensions, the index has 2 of 24");
    const Status none = decode_with(own.sampler, problem, &without.index, outputs);
    CHECK(none.code() == ErrorCode::kShapeMismatch);
    CHECK(std::isnan(outputs.lse(0)));
  }
}

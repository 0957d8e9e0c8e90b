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

// Tables alone, signatures, tables of the same K and L beside a uniform part, exact.
constexpr std::array<HeadSetting, 4> kWithTables{
    {{.kind = HeadKind::kTables, .functions = 5, .tables = 20, .min_collisions = 2},
     kProfile[1],
     {.kind = HeadKind::kTables,
      .functions = 5,
      .tables = 20,
      .min_collisions = 3,
      .probe_radius = 1,
      .uniform_part = 0.02},
     {}}};

Problem<float> make_problem() {
  return Problem<float>({.shape = kShape, .tokens = kTokens, .query_scale = 2.0});
}

// Everything of a profile, over tokens of a problem.
struct Profiled {
  explicit Profiled(const Problem<float>& problem, TokenRange range = kMiddle,
                    std::span<const HeadSetting> profile = kProfile)
      : backend(make_backend<ScalarOps>(executor)),
        hashes(std::move(*HeadHashes::create(backend, problem.source(), kMiddle, profile, kSeed))),
        index(std::move(*PerHeadIndex::create(hashes))),
        sampler(std::move(*PerHead::create(hashes))) {
    REQUIRE(index.build(backend, problem.source(), range).ok());
  }
  Profiled(const Profiled&) = delete;

  SerialExecutor executor;
  CpuBackend<ScalarOps, SerialExecutor> backend;
  HeadHashes hashes;
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

// Tables of all KV heads, and the samplers of two of them.
struct PlainTables {
  explicit PlainTables(const Problem<float>& problem, TokenRange range = kMiddle)
      : planes(std::move(
            *SimHash::create({.dim = kShape.head_dim, .bits = 5, .tables = 20, .seed = kSeed}))),
        index(std::move(*BucketTables<SimHash>::create(planes, {.kv_heads = kShape.kv_heads}))),
        collisions(std::move(*Collisions::create(planes, {.min_collisions = 2}))),
        with_uniform(std::move(*Defensive<Collisions>::create(
            std::move(*Collisions::create(planes, {.min_collisions = 3, .probe_radius = 1})),
            {.fraction = 0.02}))) {
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  PlainTables(const PlainTables&) = delete;

  SerialExecutor executor;
  SimHash planes;
  BucketTables<SimHash> index;
  Collisions collisions;
  Defensive<Collisions> with_uniform;
};

// Probabilities that follow from inner products are rounded as each instantiation is compiled.
bool same_draw(const Drawn& a, const Drawn& b) {
  bool same = !a.tokens.empty() && a.tokens == b.tokens && a.members == b.members &&
              a.log_pi.size() == b.log_pi.size();
  for (std::size_t g = 0; g < a.log_pi.size() && same; ++g) {
    for (std::size_t i = 0; i < a.log_pi[g].size(); ++i) {
      same = same && std::fabs(a.log_pi[g][i] - b.log_pi[g][i]) < 1e-5F;
    }
  }
  return same;
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

// Whether output and lse of the query heads of one KV head are the same up to rounding, which the
// compiler does in another order for another sampler: 100 roundings of what is of the order of 1.
bool same_head(const Outputs& a, const Outputs& b, int kv_head) {
  bool same = true;
  for (int g = kv_head * kShape.group(); g < (kv_head + 1) * kShape.group(); ++g) {
    same &= std::fabs(a.lse(g) - b.lse(g)) < 1e-5F;
    for (std::size_t j = 0; j < a.out(g).size(); ++j) {
      same &= std::fabs(a.out(g)[j] - b.out(g)[j]) < 1e-5F;
    }
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
    REQUIRE(decode_with(Exact(), problem, &range, other).ok());
    CHECK(same_head(mixed, other, 3));
    for (int g = 6; g < 8; ++g) {
      CHECK(mixed.report(g).rows_read == kMiddle.size());
    }
  }

  TEST_CASE("draws for each KV head with tables what Collisions draw, and Defensive on them") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem, kMiddle, kWithTables);
    const PlainTables plain(problem);
    const auto drawn = [&](int h) {
      return draw_tokens(own.sampler, problem, own.index, kNoise, h);
    };
    const Drawn collisions = draw_tokens(plain.collisions, problem, plain.index, kNoise, 0);
    CHECK(collisions.tokens.size() < static_cast<std::size_t>(kMiddle.size()) / 2);
    CHECK(same_draw(drawn(0), collisions));
    CHECK(same_draw(drawn(2), draw_tokens(plain.with_uniform, problem, plain.index, kNoise, 2)));
    // Other keys, the collisions without the uniform part, or other noise of that, are other draws.
    CHECK(!same_draw(drawn(0), draw_tokens(plain.collisions, problem, plain.index, kNoise, 1)));
    CHECK(!same_draw(drawn(2), draw_tokens(plain.collisions, problem, plain.index, kNoise, 2)));
    const NoiseKey later{.seed = kNoise.seed, .step = kNoise.step + 1, .layer = kNoise.layer};
    CHECK(!same_draw(drawn(2), draw_tokens(plain.with_uniform, problem, plain.index, later, 2)));
    const Plain<HadamardQuantiser> codes(problem, random_codes(), 1);
    CHECK(same_draw(drawn(1), draw_tokens(codes.sampler, problem, codes.index, kNoise, 1)));
    CHECK(drawn(3).tokens.size() == static_cast<std::size_t>(kMiddle.size()));
  }

  TEST_CASE("tables beside signatures through decode() are the plain samplers' outputs") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem, kMiddle, kWithTables);
    const PlainTables plain(problem);
    Outputs mixed(kShape);
    REQUIRE(decode_with(own.sampler, problem, &own.index, mixed).ok());
    Outputs other(kShape);
    REQUIRE(decode_with(plain.collisions, problem, &plain.index, other).ok());
    CHECK(same_head(mixed, other, 0));
    CHECK(!same_head(mixed, other, 2));
    REQUIRE(decode_with(plain.with_uniform, problem, &plain.index, other).ok());
    CHECK(same_head(mixed, other, 2));
    const Plain<HadamardQuantiser> codes(problem, random_codes(), 1);
    REQUIRE(decode_with(codes.sampler, problem, &codes.index, other).ok());
    CHECK(same_head(mixed, other, 1));
  }

  TEST_CASE("tells the error of a head where its own sampler does") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem, kMiddle, kWithTables);
    Outputs outputs(kShape);
    REQUIRE(decode_with(own.sampler, problem, &own.index, outputs).ok());
    for (int g = 0; g < kShape.query_heads; ++g) {
      const int h = g / kShape.group();
      const bool tables = own.index.tables(h) != nullptr;
      const bool told = tables ? error_is_told<Collisions>() : true;
      CHECK(own.sampler.error_is_told(h) == told);
      CHECK(std::isnan(outputs.report(g).error_95) == !told);
    }
  }

  TEST_CASE("decoding a profile allocates nothing") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem);
    const Profiled with_tables(problem, kMiddle, kWithTables);
    Outputs outputs(kShape);
    SerialExecutor executor;
    const auto source = problem.source();
    for (const Profiled* profile : {&own, &with_tables}) {
      const DecodePlan<PerHead> plan{
          .shape = kShape, .sampler = &profile->sampler, .exact_below = 0};
      const auto request = make_request(problem, source, &profile->index, outputs);
      std::vector<std::byte> workspace(workspace_bytes(plan, kTokens, 1));
      const std::int64_t before = allocation_count();
      const Status status =
          decode(make_backend<ScalarOps>(executor), plan, std::span(&request, 1), workspace);
      CHECK(allocation_count() == before);
      CHECK(status.ok());
    }
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

  TEST_CASE("with tables takes over and forgets the same tokens for all heads") {
    const Problem<float> problem = make_problem();
    const TokenRange first{.begin = 4, .end = 300};
    Profiled own(problem, first, kWithTables);
    const auto covers = [&](TokenRange range) {
      return own.index.indexed() == range && own.index.tables(0)->indexed() == range &&
             own.index.signatures<HadamardQuantiser>(1)->indexed() == range &&
             own.index.tables(2)->indexed() == range;
    };
    // Tables take 1,024 tokens at a time: so do the others.
    REQUIRE(own.index.append(own.backend, problem.source(), 1323).ok());
    CHECK(covers(first));
    REQUIRE(own.index.append(own.backend, problem.source(), 1400).ok());
    CHECK(covers({4, 1324}));
    REQUIRE(own.index.truncate(1000).ok());
    CHECK(covers({4, 1000}));
    PlainTables plain(problem, first);
    REQUIRE(plain.index.append(own.backend, problem.source(), 1400).ok());
    REQUIRE(plain.index.truncate(1000).ok());
    const auto drawn = [&](int h) {
      return draw_tokens(own.sampler, problem, own.index, kNoise, h);
    };
    CHECK(same_draw(drawn(0), draw_tokens(plain.collisions, problem, plain.index, kNoise, 0)));
    CHECK(same_draw(drawn(2), draw_tokens(plain.with_uniform, problem, plain.index, kNoise, 2)));
    CHECK(drawn(3).tokens.size() == 996);
    REQUIRE(own.index.truncate(0).ok());
    CHECK(covers({4, 4}));
    Outputs outputs(kShape);
    CHECK(decode_with(own.sampler, problem, &own.index, outputs).ok());
    CHECK(outputs.report(0).exact == kTokens);
  }

  TEST_CASE("a key that is not finite leaves tables, too, as they were") {
    Problem<float> problem = make_problem();
    Profiled own(problem, {.begin = 4, .end = 300}, kWithTables);
    const Drawn before = draw_tokens(own.sampler, problem, own.index, kNoise, 0);
    problem.key(2, 1200)[0] = std::numeric_limits<float>::infinity();
    const Status status = own.index.append(own.backend, problem.source(), 1400);
    CHECK(status.code() == ErrorCode::kNonFinite);
    CHECK(std::string(status.message()).find("KV head 2 by itself") == 0);
    CHECK(own.index.tables(0)->indexed() == TokenRange{4, 300});
    CHECK(same_draw(before, draw_tokens(own.sampler, problem, own.index, kNoise, 0)));
    problem.key(2, 1200)[0] = 0.0F;
    REQUIRE(own.index.append(own.backend, problem.source(), 1400).ok());
    CHECK(own.index.indexed() == TokenRange{4, 1324});
  }

  TEST_CASE("keeps tables for the heads that ask, and planes once for those of one K and L") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem, kMiddle, kWithTables);
    CHECK(own.index.tables(1) == nullptr);
    CHECK(own.index.tables(3) == nullptr);
    CHECK(&own.hashes.hash(0) == &own.hashes.hash(2));
    const auto alone = [&](std::size_t h) {
      std::array<HeadSetting, 4> one{};
      one[h] = kWithTables[h];
      return Profiled(problem, kMiddle, one).index.bytes();
    };
    CHECK(own.index.bytes() == alone(0) + alone(1) + alone(2));
    const PlainTables plain(problem);
    CHECK(alone(0) + alone(2) == plain.index.bytes() / 2);
    for (int h : {0, 2, 3}) CHECK(own.index.bytes_per_token(h) == 0);
    auto other = kWithTables;
    other[2].functions = 6;
    const Profiled differ(problem, kMiddle, other);
    CHECK(&differ.hashes.hash(0) != &differ.hashes.hash(2));
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
      const auto made = HeadHashes::create(make_backend<ScalarOps>(executor), problem.source(),
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
    const auto tables = [&](int functions, int count, int t, int r, double uniform_part) {
      return with({.kind = HeadKind::kTables,
                   .functions = functions,
                   .tables = count,
                   .min_collisions = t,
                   .probe_radius = r,
                   .uniform_part = uniform_part});
    };
    CHECK(tables(0, 20, 2, 0, 0) == "KV head 2: functions (K) 0 must lie in [1, 15]");
    CHECK(tables(16, 20, 2, 0, 0) == "KV head 2: functions (K) 16 must lie in [1, 15]");
    CHECK(tables(5, 0, 2, 0, 0) == "KV head 2: tables (L) 0 must lie in [1, 1024]");
    CHECK(tables(5, 1025, 2, 0, 0) == "KV head 2: tables (L) 1025 must lie in [1, 1024]");
    CHECK(tables(5, 20, 0, 0, 0) == "KV head 2: min_collisions (t) 0 must lie in [1, 3]");
    CHECK(tables(5, 2, 3, 0, 0) == "KV head 2: min_collisions (t) 3 must lie in [1, 2]");
    CHECK(tables(5, 20, 2, -1, 0) == "KV head 2: probe_radius (r) -1 must lie in [0, 5]");
    CHECK(tables(5, 20, 2, 6, 0) == "KV head 2: probe_radius (r) 6 must lie in [0, 5]");
    CHECK(tables(5, 20, 2, 0, -0.1) == "KV head 2: uniform_part -0.1 must lie in [0, 1]");
    CHECK(tables(5, 20, 2, 0, 1.5) == "KV head 2: uniform_part 1.5 must lie in [0, 1]");
    CHECK(!tables(5, 20, 2, 0, nan).empty());
    CHECK(tables(15, 1, 1, 1, 1.0).empty());
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

  TEST_CASE("decode refuses an index of other tables than the sampler's") {
    const Problem<float> problem = make_problem();
    const Profiled own(problem, kMiddle, kWithTables);
    Outputs outputs(kShape);
    for (const std::size_t h : {std::size_t{0}, std::size_t{2}}) {
      auto other = kWithTables;
      other[h].tables = 19;
      const Profiled fewer(problem, kMiddle, other);
      CHECK(std::string(decode_with(own.sampler, problem, &fewer.index, outputs).message()) ==
            "KV head " + std::to_string(h) +
                ": the sampler is made for (K, L) = (5, 20), the index has (5, 19)");
      other[h] = kWithTables[1];
      const Profiled codes(problem, kMiddle, other);
      CHECK(std::string(decode_with(own.sampler, problem, &codes.index, outputs).message()) ==
            "KV head " + std::to_string(h) +
                ": the sampler and the index do not both have signatures");
      other[h] = {};
      const Profiled without(problem, kMiddle, other);
      CHECK(std::string(decode_with(own.sampler, problem, &without.index, outputs).message()) ==
            "KV head " + std::to_string(h) + ": the sampler and the index do not both have tables");
    }
    CHECK(std::isnan(outputs.lse(0)));
  }
}

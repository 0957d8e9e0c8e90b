// SPDX-License-Identifier: Apache-2.0
// What settings are measured to do, and the profiles that are made of it.
#include "magicpig/planner.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/core/executor.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "oracle.hpp"
#include "problem.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 4, .kv_heads = 2, .head_dim = 16, .value_dim = 8};
constexpr TokenId kTokens = 400;
constexpr TokenRange kMiddle{.begin = 4, .end = 380};
constexpr TokenId kSeen[] = {380, 391, 400};
using Source = StridedKeyValues<float>;
using Backend = CpuBackend<ScalarOps, SerialExecutor>;

// One of each kind.
constexpr HeadSetting kSettings[] = {
    {},
    {.kind = HeadKind::kUniform, .budget = 0.1},
    {.kind = HeadKind::kSignatures, .bits = 2, .budget = 0.1, .temperature = 0.9},
    {.kind = HeadKind::kSignatures, .bits = 2, .budget = 0.2, .temperature = 0.9},
    {.kind = HeadKind::kTrainedSignatures, .bits = 1, .budget = 0.1, .value_norms = false},
    {.kind = HeadKind::kTables, .functions = 4, .tables = 20, .min_collisions = 2},
    {.kind = HeadKind::kTables, .functions = 4, .tables = 20, .uniform_part = 0.05}};

// Three query rows, the second and third of which have other numbers than the problem's own.
struct Fixture {
  Fixture() {
    for (const float scale : {1.0F, -0.7F, 1.3F}) {
      for (const float x : problem.query()) queries.push_back(scale * x);
    }
  }
  [[nodiscard]] PlanSample<Source> sample() const {
    return {.shape = kShape,
            .key_values = &source,
            .indexed = kMiddle,
            .queries = queries,
            .seen = kSeen};
  }

  Problem<float> problem{{.shape = kShape, .tokens = kTokens, .query_scale = 1.5}};
  Source source = problem.source();
  std::vector<float> queries;
  SerialExecutor serial;
  Backend backend = make_backend<ScalarOps>(serial);
};

std::vector<HeadPoint> measure(Fixture& f, const MeasureConfig& config) {
  const PlanSample<Source> sample = f.sample();
  auto measurement = Measurement<Backend, Source>::create(f.backend, sample, config);
  REQUIRE(measurement.ok());
  std::vector<HeadPoint> points(2 * std::size(kSettings));
  int calls = 0;
  const Status status = measurement->run(kSettings, points, [&](int done, int of) {
    CHECK(done == ++calls);
    CHECK(of == static_cast<int>(std::size(kSettings)) * config.seeds);
  });
  CHECK_MESSAGE(status.ok(), status.message());
  CHECK(calls == static_cast<int>(std::size(kSettings)) * config.seeds);
  return points;
}

// What one setting does, one request at a time, against attention by its definition.
std::vector<HeadPoint> by_hand(Fixture& f, const HeadSetting& setting, int seeds,
                               std::uint64_t first_seed) {
  std::vector<HeadPoint> points(2);
  const std::vector<HeadSetting> profile(2, setting);
  for (int i = 0; i < seeds; ++i) {
    const std::uint64_t seed = first_seed + static_cast<std::uint64_t>(i);
    const auto hashes = HeadHashes::create(f.backend, f.source, kMiddle, profile, seed);
    auto index = PerHeadIndex::create(*hashes);
    REQUIRE(index->build(f.backend, f.source, kMiddle).ok());
    const auto sampler = PerHead::create(*hashes);
    const DecodePlan<PerHead> plan{.shape = kShape, .sampler = &*sampler, .exact_below = 0};
    for (std::uint32_t row = 0; row < 3; ++row) {
      const Source seen = f.source.first(kSeen[row]);
      const auto query = std::span<const float>(f.queries).subspan(row * 64, 64);
      Outputs outputs(kShape);
      const Request<Source, PerHeadIndex> request{.key_values = &seen,
                                                  .index = &*index,
                                                  .query = query,
                                                  .states = outputs.states,
                                                  .reports = outputs.reports,
                                                  .seed = seed,
                                                  .step = row};
      REQUIRE(decode_one<ScalarOps>(f.serial, plan, request).ok());
      for (int head = 0; head < 4; ++head) {
        const OracleState exact = oracle_attention(
            seen, {.data = query.data() + head * 16, .kv_head = head / 2, .scale = 0.25},
            every_token({.begin = 0, .end = seen.tokens()}));
        HeadPoint& point = points[static_cast<std::size_t>(head / 2)];
        point.error += relative_error(outputs.out(head), exact.out) / (6 * seeds);
        const std::int64_t around = (seen.tokens() - kMiddle.size()) * std::int64_t{(16 + 8) * 4};
        point.bytes +=
            static_cast<double>(outputs.report(head).bytes - around) / kMiddle.size() / (6 * seeds);
        point.index_bytes = index->bytes() / 2;
      }
    }
  }
  return points;
}

std::string refusal(PlanSample<Source> sample, const MeasureConfig& config = {}) {
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  return plan_profile(backend, sample, {}, {}, config).status().message();
}

TEST_SUITE("Planner") {
  TEST_CASE("errors and bytes are those of decode() against attention by its definition") {
    Fixture f;
    const std::vector<HeadPoint> points = measure(f, {.seeds = 2, .first_seed = 5});
    for (std::size_t s = 0; s < std::size(kSettings); ++s) {
      CAPTURE(s);
      const std::vector<HeadPoint> expected = by_hand(f, kSettings[s], 2, 5);
      for (std::size_t h = 0; h < 2; ++h) {
        const HeadPoint& point = points[h * std::size(kSettings) + s];
        // Exact outputs in float, with sums of 400 terms.
        CHECK(std::fabs(point.error - expected[h].error) < 1e-5);
        CHECK(point.bytes == doctest::Approx(expected[h].bytes));
        CHECK(point.index_bytes == expected[h].index_bytes);
        CHECK((point.error > 0.01) == (s > 0));
      }
    }
    CHECK(points[0].bytes == doctest::Approx((16 + 8) * 4));
  }

  TEST_CASE("settings that are none and points of another size are refused") {
    Fixture f;
    const PlanSample<Source> sample = f.sample();
    auto measurement = Measurement<Backend, Source>::create(f.backend, sample, {});
    REQUIRE(measurement.ok());
    const auto message = [&](std::span<const HeadSetting> settings, std::size_t count) {
      std::vector<HeadPoint> points(count);
      return std::string(measurement->run(settings, points, [](int, int) {}).message());
    };
    CHECK(message(kSettings, 13) == "13 points do not fit 7 settings of 2 KV heads");
    const HeadSetting bad{.kind = HeadKind::kUniform, .budget = 2.0};
    CHECK(message(std::span(&bad, 1), 2) == "KV head 0: budget 2 must lie in (0, 1]");
  }

  TEST_CASE("memory is told of the tokens that are planned for") {
    Fixture f;
    const std::vector<HeadPoint> points = measure(f, {.seeds = 1, .tokens = 100'000});
    // 25 segments of 4,096 tokens: 4 bytes of codes, a factor and a norm; centres and means.
    CHECK(points[2].index_bytes == 25 * 4096 * (4 + 2 + 2) + (16 + 8) * sizeof(float));
    // Two segments: offsets, ids and norms.
    CHECK(points[5].index_bytes == 20 * 2 * (100'000 + 2 * 17) + 4 * (100'000 + 16));
    CHECK(points[1].index_bytes == 0);
  }

  TEST_CASE("a plan keeps its goal, and more memory never reads more") {
    Fixture f;
    const PlanSample<Source> sample = f.sample();
    double last = 1e9;
    for (const std::size_t budget : {std::size_t{0}, std::size_t{40'000}, SIZE_MAX}) {
      const PlanGoal goal{.error = 0.3, .index_bytes = budget};
      const auto plan = plan_profile(f.backend, sample, goal, {.signatures = true}, {.seeds = 1});
      REQUIRE_MESSAGE(plan.ok(), plan.status().message());
      CHECK(plan->together.index_bytes <= budget);
      CHECK(plan->together.bytes <= last);
      last = plan->together.bytes;
      for (const HeadPoint& head : plan->heads.span()) CHECK(head.error <= goal.aim());
      // It is one that can be used.
      CHECK(HeadHashes::create(f.backend, f.source, kMiddle, plan->settings()).ok());
    }
    CHECK(last < 96.0);
    const auto exact = plan_profile(f.backend, sample, {.error = 0.0}, {}, {.seeds = 1});
    REQUIRE(exact.ok());
    for (const HeadSetting& head : exact->settings()) CHECK(head.kind == HeadKind::kExact);
  }

  TEST_CASE("only kinds that were asked for are tried") {
    const auto kinds = [](const PlanKinds& asked) {
      std::string found;
      const auto settings = PlanSettings::create(asked);
      REQUIRE(settings.ok());
      for (const HeadSetting& setting : settings->all()) {
        CHECK(check_head(setting, 0).ok());
        const char letter = "EURTH"[static_cast<int>(setting.kind)];
        if (found.empty() || found.back() != letter) found += letter;
      }
      return found;
    };
    CHECK(kinds({}) == "EUTH");
    CHECK(kinds({.uniform = false, .trained_signatures = false, .tables = false}) == "E");
    CHECK(kinds({.signatures = true, .trained_signatures = false}) == "EURH");
    CHECK(kinds({.signatures = true}) == "EURTRTRTRTH");
  }

  TEST_CASE("a sample that does not fit is refused, with what is wrong") {
    Fixture f;
    const auto with = [&](const auto& change) {
      PlanSample<Source> sample = f.sample();
      change(sample);
      return refusal(sample);
    };
    using Sample = PlanSample<Source>;
    CHECK(with([](Sample& s) { s.key_values = nullptr; }) == "the sample has no keys and values");
    CHECK(with([](Sample& s) { s.indexed = {.begin = 4, .end = 401}; }) ==
          "indexed [4, 401) must be some of the sample's 400 tokens");
    CHECK(with([](Sample& s) { s.indexed = {.begin = 4, .end = 4}; }) ==
          "indexed [4, 4) must be some of the sample's 400 tokens");
    CHECK(with([](Sample& s) { s.queries = s.queries.first(191); }) ==
          "191 query values and 3 numbers of tokens seen are not rows of 4 query heads of 16");
    CHECK(with([](Sample& s) { s.seen = s.seen.first(2); }) ==
          "192 query values and 2 numbers of tokens seen are not rows of 4 query heads of 16");
    CHECK(with([](Sample& s) { s.queries = {}; }).find("0 query values") == 0);
    CHECK(with([](Sample& s) { s.indexed.end = 390; }) ==
          "query row 0 sees 380 tokens, not from 390, which are indexed, to 400");
    CHECK(with([](Sample& s) { s.shape.kv_heads = 3; }).find("query_heads 4 must be") == 0);
    CHECK(with([](Sample& s) { s.shape.value_dim = 9; }).find("keys and values have") !=
          std::string::npos);
    CHECK(refusal(f.sample(), {.seeds = 0}) ==
          "seeds 0 must be at least 1, and tokens 0 not negative");
    f.queries[70] = NAN;
    CHECK(refusal(f.sample()) == "request 1: the query of head 0 is not finite");
    const auto goal = plan_profile(f.backend, f.sample(), {.margin = 2.0});
    CHECK(std::string(goal.status().message()) == "margin 2 must lie in [0, 1)");
  }

  TEST_CASE("settings that share no index with the hashes have no sampler") {
    Fixture f;
    const HeadSetting profile[] = {kSettings[2], kSettings[5]};
    const auto hashes = HeadHashes::create(f.backend, f.source, kMiddle, profile);
    REQUIRE(hashes.ok());
    const HeadSetting same[] = {kSettings[3], kSettings[6]};
    CHECK(PerHead::create(*hashes, same).ok());
    const HeadSetting other[] = {kSettings[3], kSettings[4]};
    CHECK(std::string(PerHead::create(*hashes, other).status().message()) ==
          "KV head 1: the setting asks for other codes or tables than the hashes make");
    CHECK(PerHead::create(*hashes, std::span(same).first(1)).status().code() ==
          ErrorCode::kShapeMismatch);
  }
}

}  // namespace

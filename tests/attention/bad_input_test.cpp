// SPDX-License-Identifier: Apache-2.0
// The rows of docs/errors.md, one test case each, named like the row.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "allocations.hpp"
#include "brute_force.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/oracle.hpp"
#include "magicpig/sample/top_k.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "same_index.hpp"

namespace magicpig::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr Shape kShape{.query_heads = 4, .kv_heads = 2, .head_dim = 16, .value_dim = 6};

using Source = StridedKeyValues<float>;
using Tables = BucketTables<SimHash>;
using TablesRequest = Request<Source, Tables>;

void check_error(const Status& status, ErrorCode code, const char* words) {
  CHECK(status.code() == code);
  CHECK_MESSAGE(std::string(status.message()).find(words) != std::string::npos,
                "message: ", std::string(status.message()), ", wanted: ", std::string(words));
}

template <class T>
void check_error(const Result<T>& result, ErrorCode code, const char* words) {
  CHECK_FALSE(result.ok());
  check_error(result.status(), code, words);
}

bool untouched(const Outputs& outputs) {
  bool same = true;
  for (const float x : outputs.values) same &= std::isnan(x);
  for (const AttentionState& state : outputs.states) same &= std::isnan(state.lse);
  for (const HeadReport& report : outputs.reports) same &= same_bits(report, HeadReport{});
  return same;
}

// An executor as a careless host might write it.
struct NoWorkers {
  [[nodiscard]] static int workers() { return 0; }
  template <class Body>
  void parallel_for(int tasks, const Body& body) {
    for (int task = 0; task < tasks; ++task) body(task, 0);
  }
};

// One request, its index and plan, all of them right until a test changes something.
struct Setup {
  Shape shape;
  Problem<float> problem;
  Source source;
  SimHash family;
  Tables index;
  Collisions sampler;
  DecodePlan<Collisions> plan;
  Outputs outputs;
  SerialExecutor executor;
  std::vector<std::byte> workspace;
  TablesRequest request;

  explicit Setup(const Shape& s = kShape, TokenId tokens = 200)
      : shape(s),
        problem({.shape = s, .tokens = tokens, .seed = 21, .key_offset = 0.3}),
        source(problem.source()),
        family(
            std::move(*SimHash::create({.dim = s.head_dim, .bits = 4, .tables = 10, .seed = 5}))),
        index(std::move(*Tables::create(
            family, {.kv_heads = s.kv_heads, .segment_tokens = 64, .seal_tokens = 1}))),
        sampler(std::move(*Collisions::create(family, {.min_collisions = 1}))),
        outputs(s) {
    CHECK(index.build(backend(), source, Window{}.middle(tokens)).ok());
    plan = {.shape = s, .sampler = &sampler, .exact_below = 0};
    workspace.resize(workspace_bytes(plan, tokens, 1));
    request = make_request(problem, source, &index, outputs);
  }
  Setup(const Setup&) = delete;
  Setup& operator=(const Setup&) = delete;

  CpuBackend<ScalarOps, SerialExecutor> backend() { return make_backend<ScalarOps>(executor); }

  Status run() { return decode(backend(), plan, std::span(&request, 1), workspace); }

  void check_refused(ErrorCode code, const char* words) {
    check_error(run(), code, words);
    CHECK(untouched(outputs));
  }
};

TEST_CASE("K or L out of range") {
  check_error(SimHash::create({.dim = 8, .bits = 0}), ErrorCode::kInvalidArgument,
              "bits (K) 0 must lie in [1, 15]");
  check_error(SimHash::create({.dim = 8, .bits = 16}), ErrorCode::kInvalidArgument,
              "bits (K) 16 must lie in [1, 15]");
  check_error(SimHash::create({.dim = 8, .tables = 0}), ErrorCode::kInvalidArgument,
              "tables (L) 0 must lie in [1, 1024]");
  check_error(SimHash::create({.dim = 8, .tables = 1025}), ErrorCode::kInvalidArgument,
              "tables (L) 1025 must lie in [1, 1024]");
  check_error(SimHash::create({.dim = 0}), ErrorCode::kInvalidArgument, "dim 0 must lie in");
  check_error(SimHash::create({.dim = kMaxDim + 1}), ErrorCode::kInvalidArgument,
              "dim 16385 must lie in [1, 16384]");
}

TEST_CASE("t or r out of range") {
  const auto family = SimHash::create({.dim = 8, .bits = 4, .tables = 2});
  for (const int t : {-1, 0, 3, 4}) {
    check_error(Collisions::create(*family, {.min_collisions = t}), ErrorCode::kInvalidArgument,
                "must lie in [1, 3] and not exceed L = 2");
  }
  for (const int r : {-1, 5}) {
    check_error(Collisions::create(*family, {.min_collisions = 1, .probe_radius = r}),
                ErrorCode::kInvalidArgument, "must lie in [0, K = 4]");
  }
}

TEST_CASE("a budget of nothing, below nothing, NaN, or above everything") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const Budget budget :
       {Budget{}, Budget{.fraction = -0.1}, Budget{.fraction = nan}, Budget{.fraction = 1.01},
        Budget{.fraction = std::numeric_limits<double>::infinity()}, Budget{.tokens = -1},
        Budget{.fraction = 0.5, .tokens = -1}}) {
    CAPTURE(budget.fraction);
    CAPTURE(budget.tokens);
    const char* words = "a budget needs tokens >= 1 or a fraction in (0, 1]";
    check_error(Uniform::create(budget), ErrorCode::kInvalidArgument, words);
    check_error(TopK<>::create(budget), ErrorCode::kInvalidArgument, words);
    check_error(OraclePoisson::create(budget), ErrorCode::kInvalidArgument, words);
    check_error(OracleMultinomial::create(budget), ErrorCode::kInvalidArgument, words);
    const auto family = SimHash::create({.dim = 8, .bits = 4, .tables = 2});
    check_error(Defensive<Collisions>::create(
                    std::move(*Collisions::create(*family, {.min_collisions = 1})), budget),
                ErrorCode::kInvalidArgument, words);
  }
}

TEST_CASE("a budget of more tokens than there are") {
  Setup s;
  const auto uniform = Uniform::create({.tokens = 1'000'000});
  const DecodePlan<Uniform> plan{.shape = kShape, .sampler = &*uniform, .exact_below = 0};
  REQUIRE(decode_one<ScalarOps>(s.executor, plan, s.request).ok());
  for (int h = 0; h < kShape.query_heads; ++h) {
    CHECK(s.outputs.report(h).drawn == s.index.indexed().size());
    CHECK(relative_error(s.outputs.out(h),
                         oracle_attention(s.source,
                                          {.data = s.problem.query(h),
                                           .kv_head = h / 2,
                                           .scale = static_cast<double>(plan.logit_scale())},
                                          every_token({.begin = 0, .end = 200}))
                             .out) <= 1e-5);
  }
}

TEST_CASE("segment_tokens, seal_tokens, seal_steps or kv_heads out of range") {
  const auto family = SimHash::create({.dim = 8, .bits = 4, .tables = 2});
  for (const int tokens : {0, 63, kMaxSegmentTokens + 1}) {
    check_error(Tables::create(*family, {.segment_tokens = tokens}), ErrorCode::kInvalidArgument,
                "must lie in [64, 65472]");
  }
  check_error(Tables::create(*family, {.seal_tokens = 0}), ErrorCode::kInvalidArgument,
              "seal_tokens 0 must be at least 1");
  for (const int steps : {0, 9}) {
    check_error(
        Tables::create(*family, {.seal_tokens = 8, .seal_steps = steps}),
        ErrorCode::kInvalidArgument,
        ("seal_steps " + std::to_string(steps) + " must lie in [1, seal_tokens 8]").c_str());
  }
  check_error(Tables::create(*family, {.kv_heads = 0}), ErrorCode::kInvalidArgument,
              "kv_heads 0 must lie in [1, 2^24)");
}

TEST_CASE("workers 0") {
  check_error(ThreadPool::create(0), ErrorCode::kInvalidArgument,
              "workers 0 must lie in [1, 1024]");
  check_error(ThreadPool::create(1025), ErrorCode::kInvalidArgument, "workers 1025");
  Setup s;
  NoWorkers none;
  check_error(decode(make_backend<ScalarOps>(none), s.plan, std::span(&s.request, 1), s.workspace),
              ErrorCode::kInvalidArgument, "workers 0 must be at least 1");
  CHECK(untouched(s.outputs));
  check_error(s.index.build(make_backend<ScalarOps>(none), s.source, {.begin = 0, .end = 100}),
              ErrorCode::kInvalidArgument, "workers 0 must be at least 1");
  CHECK(s.index.indexed() == Window{}.middle(200));
}

TEST_CASE("null or impossible keys and values") {
  const std::vector<float> rows(100);
  Source::Layout good{.keys = rows.data(),
                      .values = rows.data(),
                      .key_strides = {.head = 160, .token = 16},
                      .value_strides = {.head = 160, .token = 16},
                      .kv_heads = 2,
                      .head_dim = 4,
                      .value_dim = 4,
                      .tokens = 10};
  REQUIRE(Source::create(good).ok());
  Source::Layout bad = good;
  bad.keys = nullptr;
  check_error(Source::create(bad), ErrorCode::kInvalidArgument, "keys is null with 10 tokens");
  bad.tokens = 0;
  CHECK(Source::create(bad).ok());
  bad = good;
  bad.values = nullptr;
  check_error(Source::create(bad), ErrorCode::kInvalidArgument, "values is null with 10 tokens");
  bad = good;
  bad.tokens = -1;
  check_error(Source::create(bad), ErrorCode::kInvalidArgument, "tokens -1 must be at least 0");
  bad = good;
  bad.kv_heads = 0;
  check_error(Source::create(bad), ErrorCode::kInvalidArgument, "kv_heads 0");
  bad = good;
  bad.head_dim = 0;
  check_error(Source::create(bad), ErrorCode::kInvalidArgument, "head_dim 0");
  bad = good;
  bad.value_dim = kMaxDim + 1;
  check_error(Source::create(bad), ErrorCode::kInvalidArgument, "value_dim 16385");
  bad = good;
  bad.key_strides.token = 17;
  check_error(Source::create(bad), ErrorCode::kInvalidArgument, "no multiple of the scalar's 4");
}

TEST_CASE("strides and offsets beyond 32 bits") {
  // Only addresses are computed: 2^31 - 1 tokens of 64 KiB rows are never touched.
  const float somewhere = 0.0F;
  const TokenId tokens = std::numeric_limits<TokenId>::max();
  const Shape shape{.query_heads = 3, .kv_heads = 3, .head_dim = kMaxDim, .value_dim = kMaxDim};
  const auto address = [](const float* p) { return reinterpret_cast<std::uintptr_t>(p); };
  const auto base = address(&somewhere);
  const std::uint64_t row = kMaxDim * sizeof(float);
  const auto by_head = Source::head_major(&somewhere, &somewhere, shape, tokens);
  REQUIRE(by_head.ok());
  CHECK(address(by_head->key(2, tokens - 1)) - base == (3ULL * 0x7fffffffULL - 1) * row);
  CHECK(address(by_head->value(1, 7)) - base == (0x7fffffffULL + 7) * row);
  const auto by_token = Source::token_major(&somewhere, &somewhere, shape, tokens);
  REQUIRE(by_token.ok());
  CHECK(address(by_token->key(2, tokens - 1)) - base == (0x7ffffffeULL * 3 + 2) * row);
  const auto narrow = Source::create({.keys = &somewhere,
                                      .values = &somewhere,
                                      .key_strides = {.head = 4, .token = 4},
                                      .value_strides = {.head = std::int64_t{1} << 40, .token = 8},
                                      .kv_heads = 3,
                                      .head_dim = 1,
                                      .value_dim = 1,
                                      .tokens = tokens});
  REQUIRE(narrow.ok());
  CHECK(address(narrow->key(0, tokens - 1)) - base == 0x7ffffffeULL * 4);
  CHECK(address(narrow->value(2, tokens - 1)) - base == (2ULL << 40) + 0x7ffffffeULL * 8);

  const auto family = SimHash::create({.dim = 8, .bits = 1, .tables = 1});
  const auto sampler = Collisions::create(*family, {.min_collisions = 1});
  const DecodePlan<Collisions> plan{
      .shape = {.query_heads = 1, .kv_heads = 1, .head_dim = 8, .value_dim = 8},
      .sampler = &*sampler};
  // 8 bytes per token and worker.
  CHECK(workspace_bytes(plan, tokens, 64) > 64 * 8 * 0x7fffffffULL);
}

TEST_CASE("keys that do not fit the index") {
  Setup s;
  for (const Shape shape :
       {Shape{.query_heads = 4, .kv_heads = 2, .head_dim = 17, .value_dim = 6},
        Shape{.query_heads = 4, .kv_heads = 1, .head_dim = 16, .value_dim = 6}}) {
    const Problem<float> other({.shape = shape, .tokens = 200});
    check_error(s.index.build(s.backend(), other.source(), {.begin = 0, .end = 100}),
                ErrorCode::kShapeMismatch, "the index 2 of 16");
    check_error(s.index.append(s.backend(), other.source(), 200), ErrorCode::kShapeMismatch,
                "the index 2 of 16");
    CHECK(s.index.indexed() == Window{}.middle(200));
  }
}

TEST_CASE("a range outside the cache, or no range") {
  Setup s;
  check_error(s.index.build(s.backend(), s.source, {.begin = 0, .end = 201}),
              ErrorCode::kInvalidArgument, "cannot index up to token 201 of a cache of 200 tokens");
  check_error(s.index.append(s.backend(), s.source, 201), ErrorCode::kInvalidArgument,
              "cannot index up to token 201 of a cache of 200 tokens");
  check_error(s.index.append(s.backend(), s.source, std::numeric_limits<TokenId>::max()),
              ErrorCode::kInvalidArgument, "cannot index up to token 2147483647");
  check_error(s.index.build(s.backend(), s.source, {.begin = -1, .end = 10}),
              ErrorCode::kInvalidArgument, "[-1, 10) is not a range of tokens");
  check_error(s.index.build(s.backend(), s.source, {.begin = 11, .end = 10}),
              ErrorCode::kInvalidArgument, "[11, 10) is not a range of tokens");
  CHECK(s.index.indexed() == Window{}.middle(200));
  CHECK(s.index.append(s.backend(), s.source, -5).ok());
  CHECK(s.index.indexed() == Window{}.middle(200));
}

TEST_CASE("overlapping windows") {
  for (const Window window : {Window{.sink = 4, .local = 64}, Window{.sink = 100, .local = 0},
                              Window{.sink = 0, .local = 100}}) {
    for (const TokenId tokens : {0, 1, 3, 4, 5, 67, 68}) {
      CAPTURE(tokens);
      if (tokens > window.sink + window.local) continue;
      CHECK(window.middle(tokens) == TokenRange{window.sink, window.sink});
      Setup s(kShape, tokens);
      REQUIRE(s.index.build(s.backend(), s.source, window.middle(tokens)).ok());
      CHECK(s.index.indexed().empty());
      REQUIRE(s.run().ok());
      CHECK(s.outputs.report(0).exact == tokens);
      CHECK(s.outputs.report(0).indexed == 0);
    }
  }
}

TEST_CASE("a NaN or infinite key while indexing") {
  for (const float bad : {kNan, kInf, -kInf}) {
    Setup s;
    s.problem.key(1, 120)[3] = bad;
    check_error(s.index.build(s.backend(), s.source, {.begin = 0, .end = 200}),
                ErrorCode::kNonFinite, "the key of token 120, KV head 1 is not finite");
    CHECK(s.index.indexed() == Window{}.middle(200));
    REQUIRE(s.index.truncate(100).ok());
    check_error(s.index.append(s.backend(), s.source, 200), ErrorCode::kNonFinite,
                "the key of token 120, KV head 1 is not finite");
    CHECK(s.index.indexed() == TokenRange{4, 100});
    REQUIRE(s.index.build(s.backend(), s.source, {.begin = 0, .end = 120}).ok());
  }
  Setup s;  // finite, but not its length
  for (int j = 0; j < 16; ++j) s.problem.key(0, 50)[j] = 3e38F;
  CHECK(s.index.build(s.backend(), s.source, {.begin = 0, .end = 200}).code() ==
        ErrorCode::kNonFinite);
}

// Drawn by hand: which tokens and with which probability, for every head.
void check_against_brute_force(const Setup& s) {
  for (int h = 0; h < s.shape.query_heads; ++h) {
    CAPTURE(h);
    const OracleQuery query{.data = s.problem.query(h),
                            .kv_head = h / s.shape.group(),
                            .scale = static_cast<double>(s.plan.logit_scale())};
    std::vector<DrawnToken> drawn;
    for (const TokenDraw& d : BruteForce::draw<ScalarOps>(
             s.source, s.index, query, {.bits = 4, .tables = 10, .at_least = 1, .radius = 0})) {
      if (d.drawn) drawn.push_back({.token = d.token, .pi = d.pi, .factor = 1.0 / d.pi});
    }
    const ExpectedHead expected = expected_head(s.source, query, s.index.indexed(), drawn);
    CHECK(s.outputs.report(h).drawn == expected.drawn);
    CHECK(relative_error(s.outputs.out(h), expected.state.out) <= 1e-4);
    CHECK(static_cast<double>(s.outputs.lse(h)) ==
          doctest::Approx(expected.state.lse).epsilon(1e-4));
  }
}

TEST_CASE("a key at the centre") {
  Setup s;
  for (int h = 0; h < 2; ++h) {  // all keys the same: each is the mean of all
    for (TokenId t = 0; t < 200; ++t) {
      for (int j = 0; j < 16; ++j) s.problem.key(h, t)[j] = 0.25F * static_cast<float>(j - h);
    }
  }
  REQUIRE(s.index.build(s.backend(), s.source, {.begin = 4, .end = 136}).ok());
  for (int i = 0; i < s.index.indexed().size(); ++i) CHECK(s.index.norms(0)[i] == 0.0F);
  REQUIRE(s.run().ok());
  check_against_brute_force(s);
}

TEST_CASE("a query of zero") {
  Setup s;
  for (std::size_t j = 0; j < 32; ++j) s.problem.query()[j] = 0.0F;  // heads 0 and 1
  REQUIRE(s.run().ok());
  CHECK(s.outputs.report(0).drawn > 0);
  check_against_brute_force(s);
}

TEST_CASE("truncating beyond the end, or below zero") {
  Setup s;
  CHECK(s.index.truncate(136).ok());
  CHECK(s.index.truncate(std::numeric_limits<TokenId>::max()).ok());
  CHECK(s.index.indexed() == Window{}.middle(200));
  check_error(s.index.truncate(-1), ErrorCode::kInvalidArgument, "cannot truncate to -1 tokens");
  CHECK(s.index.indexed() == Window{}.middle(200));
  CHECK(s.index.truncate(2).ok());  // below indexed().begin
  CHECK(s.index.indexed().empty());
}

TEST_CASE("no memory for the index") {
  Setup s;
  fail_allocations_after(3);
  const Status status = s.index.build(s.backend(), s.source, {.begin = 0, .end = 200});
  fail_allocations_after(-1);
  check_error(status, ErrorCode::kOutOfMemory, "no memory to index 200 tokens");
  CHECK(s.index.indexed() == Window{}.middle(200));
  fail_allocations_after(0);
  const auto family = SimHash::create({.dim = 8});
  fail_allocations_after(-1);
  check_error(family, ErrorCode::kOutOfMemory, "no memory for 1500 planes of dimension 8");
}

TEST_CASE("query heads that do not divide, or more than 32 per KV head") {
  Setup s;
  for (const auto& heads :
       {std::pair{3, 2}, std::pair{33, 1}, std::pair{66, 2}, std::pair{1, 2}, std::pair{0, 1},
        std::pair{4, 0}, std::pair{-4, 2}, std::pair{-4, -2}}) {
    CAPTURE(heads.first);
    CAPTURE(heads.second);
    s.plan.shape.query_heads = heads.first;
    s.plan.shape.kv_heads = heads.second;
    s.check_refused(ErrorCode::kInvalidArgument, "must be 1 to 32 times kv_heads");
  }
}

TEST_CASE("dimensions of the plan out of range") {
  for (const int dim : {-1, 0, kMaxDim + 1}) {
    Setup s;
    s.plan.shape.head_dim = dim;
    s.check_refused(ErrorCode::kInvalidArgument, "must lie in [1, 16384]");
    s.plan.shape = kShape;
    s.plan.shape.value_dim = dim;
    s.check_refused(ErrorCode::kInvalidArgument, "must lie in [1, 16384]");
  }
}

TEST_CASE("no sampler, no keys and values") {
  Setup s;
  s.plan.sampler = nullptr;
  s.check_refused(ErrorCode::kInvalidArgument, "the plan has no sampler");
  Setup t;
  t.request.key_values = nullptr;
  t.check_refused(ErrorCode::kInvalidArgument, "request 0 has no keys and values");
}

TEST_CASE("a scale that is not finite") {
  for (const float scale : {kNan, kInf, -kInf}) {
    Setup s;
    s.plan.scale = scale;
    s.check_refused(ErrorCode::kNonFinite, "is not finite");
  }
}

TEST_CASE("keys and values that do not fit the plan") {
  for (int change = 0; change < 3; ++change) {
    Setup s;
    Shape shape = kShape;
    if (change == 0) shape.kv_heads = 1;
    if (change == 1) shape.head_dim = 15;
    if (change == 2) shape.value_dim = 7;
    const Problem<float> other({.shape = shape, .tokens = 200});
    const Source source = other.source();
    s.request.key_values = &source;
    s.check_refused(ErrorCode::kShapeMismatch, "request 0: keys and values have");
  }
}

TEST_CASE("sizes of query, states, outputs or reports") {
  const char* counts = "the plan needs 64, 4, and as many reports or none";
  Setup s;
  s.request.query = std::span(s.problem.query()).first(63);
  s.check_refused(ErrorCode::kShapeMismatch, counts);
  s.request.query = {};
  s.check_refused(ErrorCode::kShapeMismatch, counts);
  s.request.query = s.problem.query();
  s.request.states = std::span(s.outputs.states).first(3);
  s.check_refused(ErrorCode::kShapeMismatch, counts);
  s.request.states = s.outputs.states;
  s.request.reports = std::span(s.outputs.reports).first(3);
  s.check_refused(ErrorCode::kShapeMismatch, counts);
  s.request.reports = s.outputs.reports;
  const std::span<float> out = s.outputs.states[2].out;
  s.outputs.states[2].out = out.first(5);
  s.check_refused(ErrorCode::kShapeMismatch, "the output of head 2 has 5 values, not 6");
  s.outputs.states[2].out = {};
  s.check_refused(ErrorCode::kShapeMismatch, "the output of head 2 has 0 values, not 6");
  s.outputs.states[2].out = out;
  CHECK(s.run().ok());
}

TEST_CASE("an index that does not fit the plan or the sampler") {
  Setup s;
  const auto range = Uniform::create({.tokens = 5});
  const DecodePlan<Uniform> plan{.shape = kShape, .sampler = &*range, .exact_below = 0};
  for (const RangeIndex& index :
       {RangeIndex({.begin = 0, .end = 100}, 1, 16), RangeIndex({.begin = 0, .end = 100}, 2, 15)}) {
    Outputs outputs(kShape);
    check_error(
        decode_one<ScalarOps>(s.executor, plan, make_request(s.problem, s.source, &index, outputs)),
        ErrorCode::kShapeMismatch, "the plan 2 of 16");
    CHECK(untouched(outputs));
  }
  for (const auto& [bits, tables] : {std::pair{4, 11}, std::pair{5, 10}}) {
    const auto other = SimHash::create({.dim = 16, .bits = bits, .tables = tables});
    const auto sampler = Collisions::create(*other, {.min_collisions = 1});
    s.plan.sampler = &*sampler;
    s.workspace.resize(workspace_bytes(s.plan, 200, 1));
    s.check_refused(ErrorCode::kShapeMismatch, "the index has (4, 10)");
    const auto defensive = Defensive<Collisions>::create(
        std::move(*Collisions::create(*other, {.min_collisions = 1})), {.tokens = 3});
    const DecodePlan<Defensive<Collisions>> stacked{.shape = kShape, .sampler = &*defensive};
    check_error(decode_one<ScalarOps>(s.executor, stacked, s.request), ErrorCode::kShapeMismatch,
                "the index has (4, 10)");
    CHECK(untouched(s.outputs));
  }
}

TEST_CASE("an index that covers more than the cache") {
  Setup s;
  const Source shorter = s.source.first(135);  // the index ends at 136
  s.request.key_values = &shorter;
  s.check_refused(ErrorCode::kShapeMismatch,
                  "the index covers tokens [4, 136) of a cache of 135: truncate it with the cache");
  REQUIRE(s.index.truncate(135).ok());
  CHECK(s.run().ok());
  const RangeIndex negative({.begin = -1, .end = 100}, 2, 16);
  const auto uniform = Uniform::create({.tokens = 5});
  const DecodePlan<Uniform> plan{.shape = kShape, .sampler = &*uniform, .exact_below = 0};
  Outputs outputs(kShape);
  check_error(decode_one<ScalarOps>(s.executor, plan,
                                    make_request(s.problem, s.source, &negative, outputs)),
              ErrorCode::kShapeMismatch, "covers tokens [-1, 100)");
  CHECK(untouched(outputs));
}

TEST_CASE("a NaN or infinite query") {
  for (const float bad : {kNan, kInf, -kInf}) {
    Setup s;
    s.problem.query()[2 * 16 + 15] = bad;
    s.check_refused(ErrorCode::kNonFinite, "request 0: the query of head 2 is not finite");
  }
}

TEST_CASE("one bad request among good ones") {
  Setup s;
  Setup bad;
  bad.request.states = {};
  const TablesRequest batch[] = {s.request, bad.request};
  check_error(decode(s.backend(), s.plan, batch, s.workspace), ErrorCode::kShapeMismatch,
              "request 1: ");
  CHECK(untouched(s.outputs));
}

// Heads of the other KV head come out as if nothing had happened.
void check_other_head_right(Setup& s, Setup& good) {
  REQUIRE(good.run().ok());
  for (int h = 0; h < 2; ++h) {
    CHECK(same_bits(s.outputs.lse(h), good.outputs.lse(h)));
    for (std::size_t j = 0; j < 6; ++j) {
      CHECK(same_bits(s.outputs.out(h)[j], good.outputs.out(h)[j]));
    }
  }
}

TEST_CASE("a NaN or infinite key while decoding") {
  Setup good;
  // Token 1 is exact and token 60 drawn: by every head, with all buckets probed.
  const auto everything = Collisions::create(good.family, {.min_collisions = 1, .probe_radius = 4});
  good.plan.sampler = &*everything;
  for (const TokenId token : {1, 60}) {
    for (const float bad : {kNan, kInf}) {
      CAPTURE(token);
      CAPTURE(bad);
      Setup s;
      s.plan.sampler = &*everything;
      s.problem.key(1, token)[3] = bad;
      // With the infinity, so that the logit is +inf whatever the query's sign.
      for (int h = 2; h < 4; ++h) {
        float& q = s.problem.query()[static_cast<std::size_t>(h * 16 + 3)];
        q = std::fabs(q);
      }
      check_error(s.run(), ErrorCode::kNonFinite,
                  "request 0: the output of row 0, head 2 is not finite");
      check_other_head_right(s, good);
    }
  }
}

TEST_CASE("a key whose logit is -infinity") {
  Setup s;
  const Exact exact;
  const DecodePlan<> plan{.shape = kShape, .sampler = &exact};
  for (int h = 0; h < 2; ++h) {
    s.problem.query()[static_cast<std::size_t>(h * 16 + 3)] = 1.0F;
  }
  s.problem.key(0, 199)[3] = -kInf;
  REQUIRE(decode_one<ScalarOps>(s.executor, plan, s.request).ok());
  Outputs outputs(kShape);
  const Source shorter = s.source.first(199);
  REQUIRE(decode_one<ScalarOps>(
              s.executor, plan,
              make_request(s.problem, shorter, static_cast<RangeIndex*>(nullptr), outputs))
              .ok());
  for (int h = 0; h < 2; ++h) {
    CHECK(static_cast<double>(s.outputs.lse(h)) ==
          doctest::Approx(static_cast<double>(outputs.lse(h))).epsilon(1e-6));
    for (std::size_t j = 0; j < 6; ++j) {
      CHECK(static_cast<double>(s.outputs.out(h)[j]) ==
            doctest::Approx(static_cast<double>(outputs.out(h)[j])).epsilon(1e-5));
    }
  }
}

TEST_CASE("a NaN or infinite value while decoding") {
  Setup good;
  const auto everything = Collisions::create(good.family, {.min_collisions = 1, .probe_radius = 4});
  good.plan.sampler = &*everything;
  for (const TokenId token : {1, 60}) {
    for (const float bad : {kNan, kInf, -kInf}) {
      CAPTURE(token);
      CAPTURE(bad);
      Setup s;
      s.plan.sampler = &*everything;
      s.problem.value(1, token)[3] = bad;
      check_error(s.run(), ErrorCode::kNonFinite,
                  "request 0: the output of row 0, head 2 is not finite");
      check_other_head_right(s, good);
    }
  }
}

TEST_CASE("logits beyond float32") {
  Setup s;
  for (float& q : s.problem.query()) q = 3e38F;
  check_error(s.run(), ErrorCode::kNonFinite, "is not finite");
}

TEST_CASE("a workspace that is too small") {
  Setup s;
  const std::size_t needed = workspace_bytes(s.plan, s.index.indexed().size(), 1);
  s.workspace.resize(needed - 1);
  s.check_refused(ErrorCode::kWorkspaceTooSmall, ("need " + std::to_string(needed)).c_str());
  s.workspace.clear();
  s.check_refused(ErrorCode::kWorkspaceTooSmall, "the workspace has 0 bytes");
  s.workspace.resize(needed);
  CHECK(s.run().ok());
}

TEST_CASE("an empty cache") {
  Setup s(kShape, 0);
  REQUIRE(s.run().ok());
  for (int h = 0; h < kShape.query_heads; ++h) {
    CHECK(s.outputs.lse(h) == kEmptyLse);
    for (const float x : s.outputs.out(h)) CHECK(same_bits(x, 0.0F));
    CHECK(s.outputs.report(h).exact == 0);
  }
}

TEST_CASE("a cache of one token") {
  Setup s(kShape, 1);
  for (const TokenRange range : {TokenRange{0, 0}, TokenRange{1, 1}, TokenRange{0, 1}}) {
    CAPTURE(range.end);
    const RangeIndex index(range, 2, 16);
    const auto uniform = Uniform::create({.fraction = 0.01});
    const DecodePlan<Uniform> plan{.shape = kShape, .sampler = &*uniform, .exact_below = 0};
    REQUIRE(decode_one<ScalarOps>(s.executor, plan,
                                  make_request(s.problem, s.source, &index, s.outputs))
                .ok());
    for (int h = 0; h < kShape.query_heads; ++h) {
      for (std::size_t j = 0; j < 6; ++j) {
        CHECK(static_cast<double>(s.outputs.out(h)[j]) ==
              doctest::Approx(static_cast<double>(s.source.value(h / 2, 0)[j])).epsilon(1e-6));
      }
    }
  }
}

TEST_CASE("no requests at all") {
  Setup s;
  CHECK(decode(s.backend(), s.plan, std::span<const TablesRequest>(), std::span<std::byte>()).ok());
}

}  // namespace
}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// Soft caps, ALiBi, sinks, windows, hidden tokens and several query rows: exact attention equals
// its definition with them, and sums over drawn tokens have it for their mean.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "random.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr float kNone = -std::numeric_limits<float>::infinity();

// What a query row is asked with, beside its keys.
struct Terms {
  float soft_cap = 0.0F;
  std::vector<float> slopes = {};
  std::vector<float> sinks = {};
  std::vector<std::int32_t> positions = {};
  std::vector<std::uint64_t> hidden = {};
  TokenId first_visible = 0;

  [[nodiscard]] LogitTerms plan() const {
    return {.soft_cap = soft_cap, .alibi_slopes = slopes, .sink_logits = sinks};
  }
  template <class RequestType>
  void put(RequestType& request) const {
    request.first_visible = first_visible;
    request.hidden = hidden;
    request.positions = positions;
  }
  [[nodiscard]] bool hides(TokenId t) const {
    return t < first_visible ||
           (!hidden.empty() && (hidden[static_cast<std::size_t>(t / 64)] >> (t % 64) & 1U) != 0);
  }
  [[nodiscard]] double position(TokenId t) const {
    return positions.empty() ? t : positions[static_cast<std::size_t>(t)];
  }
};

// Attention of head h over tokens [0, end) by its definition, in double.
template <class Source>
OracleState define(const Source& source, const Shape& shape, const Terms& terms, const float* query,
                   int head, TokenId end) {
  const auto h = static_cast<std::size_t>(head);
  OracleState state;
  state.out.assign(static_cast<std::size_t>(shape.value_dim), 0.0);
  double sum = 0.0;
  const bool sink = !terms.sinks.empty() && terms.sinks[h] != kNone;
  double largest = sink ? static_cast<double>(terms.sinks[h]) : -1e300;
  std::vector<double> logits;
  for (TokenId t = 0; t < end; ++t) {
    double x = oracle_logit(source,
                            {.data = query,
                             .kv_head = head / shape.group(),
                             .scale = 1.0 / std::sqrt(static_cast<double>(shape.head_dim))},
                            t);
    const auto cap = static_cast<double>(terms.soft_cap);
    if (cap > 0.0) x = cap * std::tanh(x / cap);
    if (!terms.slopes.empty()) {
      x += static_cast<double>(terms.slopes[h]) * (terms.position(t) - terms.position(end - 1));
    }
    logits.push_back(x);
    if (!terms.hides(t)) largest = std::fmax(largest, x);
  }
  if (sink) sum += std::exp(static_cast<double>(terms.sinks[h]) - largest);
  for (TokenId t = 0; t < end; ++t) {
    if (terms.hides(t)) continue;
    const double weight = std::exp(logits[static_cast<std::size_t>(t)] - largest);
    sum += weight;
    const auto* value = source.value(head / shape.group(), t);
    for (std::size_t j = 0; j < state.out.size(); ++j) {
      state.out[j] += weight * static_cast<double>(scalar_at(value, static_cast<int>(j)));
    }
  }
  if (sum == 0.0) return state;
  for (double& x : state.out) x /= sum;
  state.lse = largest + std::log(sum);
  return state;
}

std::vector<std::uint64_t> hide_some(TokenId tokens, double share, std::uint64_t seed) {
  std::vector<std::uint64_t> words(static_cast<std::size_t>(mask_words(tokens)));
  Random random(seed);
  for (TokenId t = 0; t < tokens; ++t) {
    if (random.uniform() < share) words[static_cast<std::size_t>(t / 64)] |= 1ULL << (t % 64);
  }
  return words;
}

constexpr Shape kShape{.query_heads = 6, .kv_heads = 2, .head_dim = 24, .value_dim = 10};

// Queries [rows, query_heads, head_dim].
std::vector<float> queries_of(const Shape& shape, int rows, std::uint64_t seed, double scale) {
  std::vector<float> all(static_cast<std::size_t>(rows * shape.query_heads * shape.head_dim));
  Random random(seed);
  for (float& x : all) x = static_cast<float>(scale * random.normal());
  return all;
}

// The six of them one by one, and all at once.
std::vector<Terms> all_terms(const Shape& shape, TokenId tokens) {
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  Terms slopes;
  for (std::size_t h = 0; h < heads; ++h) {
    slopes.slopes.push_back(std::ldexp(1.0F, -static_cast<int>(h) - 3));
  }
  Terms placed = slopes;
  for (TokenId t = 0; t < tokens; ++t) placed.positions.push_back(3 * t / 2 + 1000 - t % 5);
  Terms sinks;
  for (std::size_t h = 0; h < heads; ++h) {
    sinks.sinks.push_back(h == 1 ? kNone : 6.0F - static_cast<float>(h));
  }
  const Terms capped{.soft_cap = 1.5F};
  const Terms window{.first_visible = tokens / 3};
  const Terms hidden{.hidden = hide_some(tokens, 0.3, 9)};
  Terms all = placed;
  all.soft_cap = 2.0F;
  all.sinks = sinks.sinks;
  all.first_visible = tokens / 4;
  all.hidden = hide_some(tokens, 0.2, 10);
  return {Terms{}, capped, slopes, placed, sinks, window, hidden, all};
}

template <class Ops>
void check_exact(TokenId tokens, int rows) {
  const Problem<float> problem({.shape = kShape, .tokens = tokens, .seed = 11});
  const auto source = problem.source();
  const auto queries = queries_of(kShape, rows, 12, 2.0);
  const Exact exact;
  SerialExecutor executor;
  Shape all_rows = kShape;
  all_rows.query_heads *= rows;
  int number = 0;
  for (const Terms& terms : all_terms(kShape, tokens)) {
    CAPTURE(tokens);
    CAPTURE(number);
    ++number;
    const DecodePlan<> plan{.shape = kShape, .sampler = &exact, .logits = terms.plan()};
    Outputs outputs(all_rows);
    auto request = make_request<float, RangeIndex>(problem, source, nullptr, outputs);
    request.query = queries;
    request.query_rows = rows;
    terms.put(request);
    std::vector<std::byte> workspace(
        workspace_bytes(plan, tokens, 1, static_cast<std::size_t>(rows)));
    const Status status =
        decode(make_backend<Ops>(executor), plan, std::span(&request, 1), workspace);
    REQUIRE_MESSAGE(status.ok(), status.message());
    for (int i = 0; i < all_rows.query_heads; ++i) {
      CAPTURE(i);
      const TokenId end = tokens - rows + i / kShape.query_heads + 1;
      const OracleState expected =
          define(source, kShape, terms, queries.data() + std::int64_t{i} * kShape.head_dim,
                 i % kShape.query_heads, end);
      CHECK(relative_error(outputs.out(i), expected.out) < 1e-5);
      if (std::isinf(expected.lse)) {
        CHECK(outputs.lse(i) == kEmptyLse);
      } else {
        CHECK(std::fabs(static_cast<double>(outputs.lse(i)) - expected.lse) < 1e-5);
      }
      TokenId seen = 0;
      for (TokenId t = 0; t < end; ++t) seen += terms.hides(t) ? 0 : 1;
      CHECK(outputs.report(i).exact == seen);
    }
  }
}

TEST_CASE_TEMPLATE(
    "exact attention with soft cap, ALiBi, sinks, window and hidden tokens equals its definition",
    Ops, magicpig::ScalarOps, magicpig::HighwayOps) {
  for (const TokenId tokens : {1, 2, 65, 400}) check_exact<Ops>(tokens, 1);
}

TEST_CASE("exact attention of several query rows equals its definition") {
  check_exact<HighwayOps>(130, 4);
  check_exact<HighwayOps>(16, 16);
  check_exact<HighwayOps>(20000, 2);  // several parts
}

TEST_CASE("a sink takes part where there is no token") {
  const Problem<float> problem({.shape = kShape, .tokens = 0});
  const auto source = problem.source();
  const std::vector<float> sinks(6, 2.5F);
  const Exact exact;
  const DecodePlan<> plan{.shape = kShape, .sampler = &exact, .logits = {.sink_logits = sinks}};
  Outputs outputs(kShape);
  SerialExecutor executor;
  REQUIRE(decode_one<ScalarOps>(executor, plan,
                                make_request<float, RangeIndex>(problem, source, nullptr, outputs))
              .ok());
  CHECK(outputs.lse(3) == 2.5F);
  for (const float x : outputs.out(3)) CHECK(x == 0.0F);
}

// Samplers over one problem. Where the draw is the planes', they are made anew for each seed.
constexpr Shape kSampled{.query_heads = 2, .kv_heads = 1, .head_dim = 16, .value_dim = 4};
constexpr TokenId kTokens = 500;
constexpr TokenRange kMiddle{.begin = 8, .end = 470};

struct ByUniform {
  template <class Use>
  static void run(const Problem<float>&, std::uint64_t, const Use& use) {
    const auto sampler = Uniform::create({.tokens = 60});
    use(*sampler, RangeIndex(kMiddle, kSampled.kv_heads, kSampled.head_dim));
  }
};

struct BySignatures {
  template <class Use>
  static void run(const Problem<float>& problem, std::uint64_t, const Use& use) {
    static const auto quantiser = HadamardQuantiser::create(kSampled.head_dim, 2, 3);
    static const auto sampler = Systematic::create(*quantiser, {.budget = {.tokens = 60}});
    static auto index = make(problem, *quantiser);
    use(*sampler, index);
  }
  static Signatures<HadamardQuantiser> make(const Problem<float>& problem,
                                            const HadamardQuantiser& quantiser) {
    auto index = Signatures<HadamardQuantiser>::create(quantiser, {.kv_heads = 1});
    SerialExecutor executor;
    CHECK(index->build(make_backend<ScalarOps>(executor), problem.source(), kMiddle).ok());
    return std::move(*index);
  }
};

struct ByTables {
  template <class Use>
  static void run(const Problem<float>& problem, std::uint64_t seed, const Use& use) {
    const auto family =
        SimHash::create({.dim = kSampled.head_dim, .bits = 5, .tables = 16, .seed = seed});
    const auto sampler = Defensive<Collisions>::create(
        std::move(*Collisions::create(*family, {.min_collisions = 1})), {.tokens = 24});
    auto index = BucketTables<SimHash>::create(*family, {.kv_heads = 1});
    SerialExecutor executor;
    CHECK(index->build(make_backend<ScalarOps>(executor), problem.source(), kMiddle).ok());
    use(*sampler, *index);
  }
};

// Estimated sums of each head and row over seeds, less the exact ones: the normaliser, and the
// values' first coordinate times it.
struct Sums {
  std::vector<Sample> normaliser;
  std::vector<Sample> numerator;

  void add(const Outputs& outputs, std::span<const OracleState> expected) {
    normaliser.resize(expected.size());
    numerator.resize(expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double drawn =
          std::exp(static_cast<double>(outputs.lse(static_cast<int>(i))) - expected[i].lse);
      normaliser[i].add(drawn);
      numerator[i].add(drawn * static_cast<double>(outputs.out(static_cast<int>(i))[0]) -
                       expected[i].out[0]);
    }
  }
  [[nodiscard]] double largest_z() const {
    double largest = 0.0;
    for (std::size_t i = 0; i < normaliser.size(); ++i) {
      largest = std::fmax(largest, std::fabs(normaliser[i].z(1.0)));
      largest = std::fmax(largest, std::fabs(numerator[i].z(0.0)));
    }
    return largest;
  }
};

template <class Method>
Sums sample_sums(const Terms& terms, const Terms& believed, int rows, int seeds) {
  static const Problem<float> problem(
      {.shape = kSampled, .tokens = kTokens, .seed = 31, .key_offset = 0.2});
  const auto source = problem.source();
  const auto queries = queries_of(kSampled, rows, 32, 1.5);
  Shape all_rows = kSampled;
  all_rows.query_heads *= rows;
  std::vector<OracleState> expected;
  for (int i = 0; i < all_rows.query_heads; ++i) {
    expected.push_back(define(source, kSampled, believed,
                              queries.data() + std::int64_t{i} * kSampled.head_dim,
                              i % kSampled.query_heads, kTokens - rows + i / 2 + 1));
  }
  Sums sums;
  SerialExecutor executor;
  std::vector<std::byte> workspace;
  for (int s = 0; s < seeds; ++s) {
    const auto seed = first_seed() + static_cast<std::uint64_t>(s);
    Method::run(problem, seed, [&](const auto& sampler, const auto& index) {
      using Sampler = std::remove_cvref_t<decltype(sampler)>;
      const DecodePlan<Sampler> plan{
          .shape = kSampled, .sampler = &sampler, .exact_below = 0, .logits = terms.plan()};
      Outputs outputs(all_rows);
      auto request = make_request(problem, source, &index, outputs, {.seed = seed});
      request.query = queries;
      request.query_rows = rows;
      terms.put(request);
      workspace.resize(workspace_bytes(plan, kTokens, 1, static_cast<std::size_t>(rows)));
      const Status status =
          decode(make_backend<TrialOps>(executor), plan, std::span(&request, 1), workspace);
      REQUIRE_MESSAGE(status.ok(), status.message());
      sums.add(outputs, expected);
    });
  }
  return sums;
}

template <class Method>
void check_unbiased(int seeds) {
  int number = 0;
  for (const Terms& terms : all_terms(kSampled, kTokens)) {
    CAPTURE(number);
    ++number;
    // |z| < 4.5 fails by chance with probability 6.8e-6: 4 sums of 8 terms, or 12.
    CHECK(sample_sums<Method>(terms, terms, 1, seeds).largest_z() < kZ);
  }
  const Terms all = all_terms(kSampled, kTokens).back();
  CHECK(sample_sums<Method>(all, all, 3, seeds).largest_z() < kZ);
}

TEST_CASE("sums are unbiased with caps, slopes, sinks, windows, hidden tokens and rows: uniform") {
  check_unbiased<ByUniform>(replications(1000));
}
TEST_CASE(
    "sums are unbiased with caps, slopes, sinks, windows, hidden tokens and rows: systematic") {
  check_unbiased<BySignatures>(replications(1000));
}
TEST_CASE("sums are unbiased with caps, slopes, sinks, windows, hidden tokens and rows: tables") {
  check_unbiased<ByTables>(replications(600));
}

TEST_CASE("sums are far off where a term, a window or a hidden token is forgotten") {
  for (const Terms& terms : all_terms(kSampled, kTokens)) {
    if (terms.plan().soft_cap == 0.0F && terms.slopes.empty() && terms.sinks.empty() &&
        terms.hidden.empty() && terms.first_visible == 0) {
      continue;
    }
    CHECK(sample_sums<BySignatures>(terms, Terms{}, 1, replications(400)).largest_z() > 2.0 * kZ);
  }
}

TEST_CASE("each of several query rows is the request of its own token, bit by bit") {
  const Problem<float> problem({.shape = kSampled, .tokens = kTokens, .seed = 41});
  const auto source = problem.source();
  constexpr int kRows = 5;
  const auto queries = queries_of(kSampled, kRows, 42, 1.0);
  const auto quantiser = HadamardQuantiser::create(kSampled.head_dim, 2, 3);
  const auto sampler = Systematic::create(*quantiser, {.budget = {.tokens = 60}});
  const auto index = BySignatures::make(problem, *quantiser);
  const DecodePlan<Systematic> plan{.shape = kSampled, .sampler = &*sampler, .exact_below = 0};
  Shape all_rows = kSampled;
  all_rows.query_heads *= kRows;
  for (const int workers : {1, 3}) {
    const auto pool = ThreadPool::create(workers);
    REQUIRE(pool.ok());
    Outputs together(all_rows);
    auto request = make_request(problem, source, &index, together, {.seed = 6, .step = 70});
    request.query = queries;
    request.query_rows = kRows;
    std::vector<std::byte> workspace(workspace_bytes(plan, kTokens, workers, kRows));
    REQUIRE(decode(make_backend<TrialOps>(**pool), plan, std::span(&request, 1), workspace).ok());
    const auto width = static_cast<std::size_t>(kSampled.query_heads * kSampled.head_dim);
    for (int row = 0; row < kRows; ++row) {
      CAPTURE(row);
      Outputs own(kSampled);
      const auto part = source.first(kTokens - kRows + row + 1);
      auto single = make_request(problem, part, &index, own,
                                 {.seed = 6, .step = 70 + static_cast<std::uint32_t>(row)});
      single.query = std::span(queries).subspan(static_cast<std::size_t>(row) * width, width);
      REQUIRE(decode(make_backend<TrialOps>(**pool), plan, std::span(&single, 1), workspace).ok());
      for (int h = 0; h < kSampled.query_heads; ++h) {
        const int i = row * kSampled.query_heads + h;
        CHECK(same_bits(own.lse(h), together.lse(i)));
        CHECK(same_bits(own.report(h), together.report(i)));
        for (std::size_t j = 0; j < own.out(h).size(); ++j) {
          CHECK(same_bits(own.out(h)[j], together.out(i)[j]));
        }
      }
    }
    CHECK(together.report(0).drawn > 0);
  }
}

TEST_CASE("a promise is about what is seen, and reads no more where it reads everything") {
  const Problem<float> problem({.shape = kSampled, .tokens = kTokens, .seed = 51});
  const auto source = problem.source();
  const auto uniform = Uniform::create({.tokens = 20});
  const RangeIndex index(kMiddle, 1, kSampled.head_dim);
  const DecodePlan<Uniform> plan{
      .shape = kSampled, .sampler = &*uniform, .exact_below = 0, .promise = {.epsilon = 1e-6}};
  Terms terms = all_terms(kSampled, kTokens)[6];  // hidden
  terms.first_visible = 100;
  Outputs outputs(kSampled);
  auto request = make_request(problem, source, &index, outputs);
  terms.put(request);
  SerialExecutor executor;
  REQUIRE(decode_one<TrialOps>(executor, plan, request).ok());
  for (int h = 0; h < kSampled.query_heads; ++h) {
    const OracleState expected = define(source, kSampled, terms, problem.query(h), h, kTokens);
    CHECK(relative_error(outputs.out(h), expected.out) < 1e-5);
    CHECK(outputs.report(h).promise == PromiseOutcome::kDense);
    CHECK(outputs.report(h).indexed == request.gone(0).present(kMiddle));
  }
}

TEST_CASE("TokenMask.joins_what_is_erased_hidden_and_outside") {
  constexpr TokenId kCount = 1000;
  const auto hidden = hide_some(kCount, 0.4, 77);
  const auto erased = hide_some(600, 0.3, 78);
  const auto in = [](const std::vector<std::uint64_t>& words, TokenId t) {
    const auto word = static_cast<std::size_t>(t / 64);
    return word < words.size() && (words[word] >> (t % 64) & 1U) != 0;
  };
  for (const TokenRange seen :
       {TokenRange{.begin = 0, .end = TokenMask::kEnd}, TokenRange{.begin = 63, .end = 129},
        TokenRange{.begin = 64, .end = 64}, TokenRange{.begin = 7, .end = 960}}) {
    const TokenMask mask{
        .erased = {.words = erased.data(), .count = static_cast<TokenId>(erased.size())},
        .hidden = {.words = hidden.data(), .count = static_cast<TokenId>(hidden.size())},
        .seen = seen};
    const auto gone = [&](TokenId t) {
      return !seen.contains(t) || in(erased, t) || in(hidden, t);
    };
    for (TokenId t = 0; t < kCount; ++t) CHECK(mask.has(t) == gone(t));
    for (const TokenId first : {0, 1, 63, 64, 65, 577, 900, 990}) {
      const std::uint64_t bits = mask.bits(first);
      for (TokenId i = 0; i < 64; ++i) CHECK(((bits >> i & 1U) != 0) == gone(first + i));
    }
    for (const TokenRange range :
         {TokenRange{.begin = 0, .end = 1000}, TokenRange{.begin = 1, .end = 64},
          TokenRange{.begin = 128, .end = 129}, TokenRange{.begin = 500, .end = 500},
          TokenRange{.begin = 959, .end = 1000}}) {
      TokenId count = 0;
      for (TokenId t = range.begin; t < range.end; ++t) count += gone(t) ? 1 : 0;
      CHECK(mask.count(range) == count);
      CHECK(mask.present(range) == range.size() - count);
    }
  }
  CHECK_FALSE(TokenMask{}.any());
  CHECK(TokenMask{.seen = {.begin = 1, .end = TokenMask::kEnd}}.any());
}

TEST_CASE("logit terms, rows and masks that do not fit are refused and nothing is written") {
  const Problem<float> problem({.shape = kShape, .tokens = 100, .seed = 61});
  const auto source = problem.source();
  const Exact exact;
  SerialExecutor executor;
  const std::vector<float> five(5, 0.5F);
  std::vector<float> six(6, 0.5F);
  const auto refused = [&](const LogitTerms& terms, const auto& change, const char* words) {
    const DecodePlan<> plan{.shape = kShape, .sampler = &exact, .logits = terms};
    Outputs outputs(kShape);
    auto request = make_request<float, RangeIndex>(problem, source, nullptr, outputs);
    change(request);
    const Status status = decode_one<ScalarOps>(executor, plan, request);
    CHECK_FALSE(status.ok());
    CHECK_MESSAGE(std::string(status.message()).find(words) != std::string::npos,
                  std::string(status.message()));
    for (const float x : outputs.values) CHECK(std::isnan(x));
  };
  const auto nothing = [](auto&) {};
  refused({.soft_cap = -1.0F}, nothing, "soft_cap -1 must be above 0");
  refused({.soft_cap = std::numeric_limits<float>::infinity()}, nothing, "soft_cap inf");
  refused({.alibi_slopes = five}, nothing, "5 alibi_slopes");
  refused({.sink_logits = five}, nothing, "5 sink_logits");
  six[4] = std::numeric_limits<float>::quiet_NaN();
  refused({.alibi_slopes = six}, nothing, "ALiBi slope of head 4");
  refused({.sink_logits = six}, nothing, "sink logit of head 4");
  six[4] = std::numeric_limits<float>::infinity();
  refused({.sink_logits = six}, nothing, "sink logit of head 4");
  refused(
      {}, [](auto& r) { r.query_rows = 0; }, "query_rows 0");
  refused(
      {}, [](auto& r) { r.query_rows = 101; }, "query_rows 101");
  refused(
      {}, [](auto& r) { r.query_rows = 2; }, "the plan needs 288, 12");
  refused(
      {}, [](auto& r) { r.first_visible = -1; }, "first_visible -1");
  const std::vector<std::uint64_t> word(1);
  refused(
      {}, [&](auto& r) { r.hidden = word; }, "needs 2 and 100");
  const std::vector<std::int32_t> positions(99);
  refused(
      {}, [&](auto& r) { r.positions = positions; }, "99 positions");
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// HeadReport::bytes equals what is counted by hand: rows, scans of codes, lookups in tables.
#include <doctest/doctest.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/sample/code_scores.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/uniform_tail.hpp"
#include "problem.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 6, .kv_heads = 2, .head_dim = 24, .value_dim = 10};
constexpr TokenId kTokens = 700;
constexpr TokenRange kRange{.begin = 4, .end = 690};
constexpr std::int64_t kKey = 24 * 2;
constexpr std::int64_t kRow = kKey + 10 * 2;  // of bf16
constexpr std::int64_t kExactTokens = kTokens - (690 - 4);

struct Fixture {
  Problem<bf16> problem{{.shape = kShape, .tokens = kTokens, .key_offset = 0.5}};
  Problem<bf16>::Source source = problem.source();
  RangeIndex range{kRange, kShape.kv_heads, kShape.head_dim};

  template <class Sampler, class IndexType>
  HeadReport report(const Sampler& sampler, const IndexType& index, int head = 0,
                    const Promise& promise = {}) const {
    SerialExecutor serial;
    Outputs outputs(kShape);
    const DecodePlan<Sampler> plan{
        .shape = kShape, .sampler = &sampler, .exact_below = 0, .promise = promise};
    REQUIRE(
        decode_one<ScalarOps>(serial, plan, make_request(problem, source, &index, outputs)).ok());
    const int first = head / kShape.group() * kShape.group();
    for (int h = first; h < first + kShape.group(); ++h) {
      CHECK(outputs.report(h).bytes == outputs.report(head).bytes);  // of the KV head
    }
    return outputs.report(head);
  }
};

TEST_CASE("bytes of exact attention, of uniform samples and of TopK are those of rows and keys") {
  const Fixture f;
  CHECK(f.report(Exact(), f.range).bytes == kTokens * kRow);
  const auto uniform = Uniform::create({.tokens = 50});
  REQUIRE(uniform.ok());
  CHECK(f.report(*uniform, f.range).bytes == (kExactTokens + 50) * kRow);
  const auto top = TopK<>::create({.tokens = 50});
  REQUIRE(top.ok());
  CHECK(f.report(*top, f.range).bytes == (kExactTokens + 50) * kRow + kRange.size() * kKey);
}

TEST_CASE("bytes of draws by signatures are those of all codes, factors and norms, and of rows") {
  const Fixture f;
  SerialExecutor serial;
  const auto quantiser = HadamardQuantiser::create(kShape.head_dim, 2, 7);
  REQUIRE(quantiser.ok());
  for (const bool norms : {true, false}) {
    auto index = Signatures<HadamardQuantiser>::create(
        *quantiser, {.kv_heads = 2, .value_dim = norms ? kShape.value_dim : 0});
    REQUIRE(index.ok());
    REQUIRE(index->build(make_backend<ScalarOps>(serial), f.source, kRange).ok());
    const std::int64_t codes = kRange.size() * (2 * 24 / 8 + 2);
    const std::int64_t scan = codes + (norms ? kRange.size() * 2 : 0);

    const auto draws = Systematic::create(*quantiser, {.budget = {.fraction = 0.1}});
    REQUIRE(draws.ok());
    const HeadReport drawn = f.report(*draws, *index);
    CHECK(drawn.rows_read > 0);
    CHECK(drawn.bytes == scan + (kExactTokens + drawn.rows_read) * kRow);

    // Every token: nothing has to be scanned.
    const auto all = Systematic::create(*quantiser, {.budget = {.fraction = 1.0}});
    REQUIRE(all.ok());
    CHECK(f.report(*all, *index).bytes == kTokens * kRow);

    // Scores of logits do without the norms of values.
    const auto top = TopK<CodeScores>::create({.tokens = 20}, CodeScores(*quantiser));
    REQUIRE(top.ok());
    CHECK(f.report(*top, *index).bytes == codes + (kExactTokens + 20) * kRow);

    // A promise reads rows and codes at every look.
    const auto poisson = Poisson::create(*quantiser, {.budget = {.fraction = 0.05}});
    REQUIRE(poisson.ok());
    const HeadReport kept = f.report(*poisson, *index, 0, {.epsilon = 1e-9, .dense_above = 0.3});
    REQUIRE(kept.promise == PromiseOutcome::kDense);
    REQUIRE(kept.looks > 0);
    // The last draw would have been of all tokens.
    CHECK(kept.bytes == (kTokens + kept.rows_reread) * kRow + kept.looks * scan);
    const auto half = Poisson::create(*quantiser, {.budget = {.fraction = 0.5}});
    REQUIRE(half.ok());
    const HeadReport dense = f.report(*half, *index, 0, {.epsilon = 0.5, .dense_above = 0.1});
    REQUIRE(dense.looks == 0);
    CHECK(dense.bytes == kTokens * kRow + scan);  // of the draw that was given up
  }
}

// Two offsets and the ids of each bucket that a head of the group visits, once.
std::int64_t lookups(const Fixture& f, const BucketTables<SimHash>& index, int kv_head,
                     int radius) {
  const SimHash& family = index.family();
  const auto hash = [&](const float* vector) {
    std::vector<Code> codes(static_cast<std::size_t>(family.tables()));
    std::vector<float> scratch(family.scratch_floats(1));
    family.hash<ScalarOps>(vector, 1, codes.data(), scratch.data());
    return codes;
  };
  std::set<std::pair<int, int>> visited;  // table and code
  for (int g = 0; g < kShape.group(); ++g) {
    const auto codes = hash(f.problem.query(kv_head * kShape.group() + g));
    for (int l = 0; l < family.tables(); ++l) {
      for (int code = 0; code < bucket_count(family.bits()); ++code) {
        const auto apart = static_cast<unsigned>(codes[static_cast<std::size_t>(l)] ^ code);
        if (std::popcount(apart) <= radius) visited.insert({l, code});
      }
    }
  }
  auto bytes = static_cast<std::int64_t>(visited.size()) * 4 * index.segment_count();
  std::vector<float> key(24);
  for (TokenId t = kRange.begin; t < kRange.end; ++t) {
    for (std::size_t j = 0; j < key.size(); ++j) {
      key[j] = to_float(f.source.key(kv_head, t)[j]) - index.centre(kv_head)[j];
    }
    const auto codes = hash(key.data());
    for (int l = 0; l < family.tables(); ++l) {
      bytes += visited.count({l, codes[static_cast<std::size_t>(l)]}) > 0 ? 2 : 0;
    }
  }
  return bytes;
}

TEST_CASE("bytes of draws from tables are those of the buckets visited, norms and rows") {
  const Fixture f;
  SerialExecutor serial;
  const auto family = SimHash::create({.dim = 24, .bits = 7, .tables = 20, .seed = 3});
  REQUIRE(family.ok());
  auto index = BucketTables<SimHash>::create(*family, {.kv_heads = 2, .segment_tokens = 256});
  REQUIRE(index.ok());
  REQUIRE(index->build(make_backend<ScalarOps>(serial), f.source, kRange).ok());
  for (const int radius : {0, 1}) {
    const auto make = [&] {
      return std::move(*Collisions::create(*family, {.min_collisions = 2, .probe_radius = radius}));
    };
    for (const int head : {0, 4}) {
      CAPTURE(radius);
      CAPTURE(head);
      const std::int64_t looked_up = lookups(f, *index, head / kShape.group(), radius);
      const std::int64_t exact = kExactTokens * kRow;
      const HeadReport drawn = f.report(make(), *index, head);
      CHECK(drawn.rows_read > 0);
      CHECK(drawn.bytes == looked_up + exact + drawn.rows_read * (kRow + 4));
      const auto both = Defensive<Collisions>::create(make(), {.tokens = 30});
      REQUIRE(both.ok());
      const HeadReport more = f.report(*both, *index, head);
      CHECK(more.rows_read > drawn.rows_read);
      CHECK(more.bytes == looked_up + exact + more.rows_read * (kRow + 4));
      // A tail knows its probabilities without the norms of keys.
      const auto tail = UniformTail<Collisions>::create(make(), {.tokens = 30});
      REQUIRE(tail.ok());
      const HeadReport kept = f.report(*tail, *index, head);
      CHECK(kept.bytes == looked_up + exact + kept.rows_read * kRow);
    }
  }
}

}  // namespace

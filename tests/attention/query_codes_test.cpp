// SPDX-License-Identifier: Apache-2.0
// Queries that were hashed elsewhere are drawn for as those that decode() hashes.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/index/hash_codes.hpp"
#include "magicpig/sample/per_head.hpp"
#include "magicpig/sample/soft_collisions.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/uniform_tail.hpp"
#include "magicpig/sample/vattention.hpp"
#include "problem.hpp"

namespace magicpig::test {
namespace {

constexpr Shape kShape{.query_heads = 6, .kv_heads = 2, .head_dim = 16, .value_dim = 5};
constexpr TokenId kTokens = 700;
constexpr int kRows = 3;
constexpr int kTables = 14;
constexpr std::size_t kAllHeads = kRows * 6;

using Source = StridedKeyValues<float>;
using Tables = BucketTables<SimHash>;

Shape all_rows() {
  Shape shape = kShape;
  shape.query_heads *= kRows;
  return shape;
}

// Three query rows over tables of segments, and the codes that their family has for the queries.
struct Setup {
  Problem<float> problem{{.shape = kShape, .tokens = kTokens, .seed = 31, .key_offset = 0.4}};
  Source source = problem.source();
  SimHash family =
      std::move(*SimHash::create({.dim = 16, .bits = 5, .tables = kTables, .seed = 12}));
  Tables index =
      std::move(*Tables::create(family, {.kv_heads = kShape.kv_heads, .segment_tokens = 256}));
  std::vector<float> queries;
  std::vector<Code> codes = std::vector<Code>(kAllHeads * kTables);
  SerialExecutor executor;

  Setup() {
    REQUIRE(index.build(make_backend<ScalarOps>(executor), source, {.begin = 4, .end = 640}).ok());
    Random random(32);
    std::vector<float> scratch(family.scratch_floats(1));
    for (std::size_t head = 0; head < kAllHeads; ++head) {
      for (int j = 0; j < 16; ++j) queries.push_back(static_cast<float>(random.normal()));
      family.hash<ScalarOps>(queries.data() + head * 16, 1, codes.data() + head * kTables,
                             scratch.data());
    }
  }
  Setup(const Setup&) = delete;

  template <class IndexType = Tables>
  [[nodiscard]] Request<Source, IndexType> request(const IndexType* over, Outputs& outputs,
                                                   std::span<const Code> given) const {
    auto made = make_request(problem, source, over, outputs, {.seed = 5, .step = 9});
    made.query = queries;
    made.query_rows = kRows;
    made.query_codes = given;
    return made;
  }

  // Three rows by a sampler, to `outputs`.
  template <class Sampler, class IndexType>
  [[nodiscard]] Status run(const Sampler& sampler, const IndexType* over, Outputs& outputs,
                           std::span<const Code> given) {
    const DecodePlan<Sampler> plan{.shape = kShape, .sampler = &sampler, .exact_below = 0};
    const auto one = request(over, outputs, given);
    std::vector<std::byte> workspace(workspace_bytes(plan, kTokens, 1, kRows));
    return decode(make_backend<ScalarOps>(executor), plan, std::span(&one, 1), workspace);
  }

  // With and without the codes of the queries.
  template <class Sampler>
  void check_same(const Sampler& sampler) {
    Outputs hashed(all_rows());
    Outputs given(all_rows());
    REQUIRE(run(sampler, &index, hashed, {}).ok());
    REQUIRE(run(sampler, &index, given, codes).ok());
    CHECK(same_bits(hashed, given));
    for (int h = 0; h < all_rows().query_heads; ++h) CHECK(given.report(h).drawn > 0);
  }

  // The codes of one query head say what it draws, and only it.
  template <class Sampler>
  void check_own(const Sampler& sampler) {
    Outputs expected(all_rows());
    REQUIRE(run(sampler, &index, expected, codes).ok());
    for (std::size_t head = 0; head < kAllHeads; ++head) {
      CAPTURE(head);
      // Those of the opposite direction.
      std::vector<Code> other = codes;
      for (std::size_t l = head * kTables; l < (head + 1) * kTables; ++l) other[l] ^= 31;
      Outputs outputs(all_rows());
      REQUIRE(run(sampler, &index, outputs, other).ok());
      for (std::size_t h = 0; h < kAllHeads; ++h) {
        const int at = static_cast<int>(h);
        if (h == head) {
          CHECK(std::abs(outputs.lse(at) - expected.lse(at)) > 1e-3F);
        } else if (h / 3 == head / 3) {
          // Of the same group: the same tokens, among others and so added up in another order.
          CHECK(outputs.report(at).drawn == expected.report(at).drawn);
          CHECK(std::abs(outputs.lse(at) - expected.lse(at)) < 1e-5F);
        } else {
          CHECK(same_bits(outputs.lse(at), expected.lse(at)));
        }
      }
    }
  }

  void check_refused(std::span<const Code> given, ErrorCode code, const char* words) {
    const auto sampler = Collisions::create(family, {});
    refuse(*sampler, &index, given, code, words);
    // Also where nothing is drawn.
    refuse(Exact{}, &index, given, code, words);
  }
  template <class Sampler, class IndexType>
  void refuse(const Sampler& sampler, const IndexType* over, std::span<const Code> given,
              ErrorCode code, const char* words) {
    Outputs outputs(all_rows());
    const Status status = run(sampler, over, outputs, given);
    CHECK(status.code() == code);
    CHECK_MESSAGE(std::string(status.message()).find(words) != std::string::npos,
                  "message: ", std::string(status.message()), ", wanted: ", std::string(words));
    for (const float x : outputs.values) CHECK(std::isnan(x));
  }
};

TEST_CASE("codes of queries change no bit of what decode makes of the queries") {
  Setup s;
  for (int t = 1; t <= 3; ++t) {
    for (int radius = 0; radius <= 1; ++radius) {
      s.check_same(*Collisions::create(s.family, {.min_collisions = t, .probe_radius = radius}));
    }
  }
  s.check_same(*Defensive<Collisions>::create(std::move(*Collisions::create(s.family, {})),
                                              {.fraction = 0.05}));
  s.check_same(*UniformTail<Collisions>::create(std::move(*Collisions::create(s.family, {})),
                                                {.fraction = 0.05}));
  // These look up nothing.
  s.check_same(*Uniform::create({.tokens = 40}));
  s.check_same(*VAttention<>::create({.epsilon = 0.2}));
}

TEST_CASE("codes of queries say what is drawn, each for its own row and head") {
  Setup s;
  s.check_own(*Collisions::create(s.family, {}));
  s.check_own(*Defensive<Collisions>::create(std::move(*Collisions::create(s.family, {})),
                                             {.fraction = 0.02}));
}

TEST_CASE("sizes of query codes, or one beyond the buckets") {
  Setup s;
  const char* counts = "18 heads in 14 tables need 252, or none";
  s.check_refused(std::span(s.codes).first(251), ErrorCode::kShapeMismatch, counts);
  s.check_refused(std::span(s.codes).first(84), ErrorCode::kShapeMismatch, counts);
  for (const Code bad : {Code{32}, Code{65535}}) {
    s.codes[17 * 14 + 13] = bad;
    s.check_refused(s.codes, ErrorCode::kInvalidArgument,
                    "request 0: the query of head 17 has code ");
    s.check_refused(s.codes, ErrorCode::kInvalidArgument, " in table 13, which has 32 buckets");
  }
  s.codes[17 * 14 + 13] = 31;
  Outputs outputs(all_rows());
  CHECK(s.run(*Collisions::create(s.family, {}), &s.index, outputs, s.codes).ok());
}

TEST_CASE("query codes without an index of hash tables") {
  Setup s;
  const char* words = "request 0: query codes are for an index of hash tables, and it has none";
  const auto code = ErrorCode::kInvalidArgument;
  const Tables* none = nullptr;
  s.refuse(*Collisions::create(s.family, {}), none, s.codes, code, words);
  const RangeIndex range({.begin = 4, .end = 640}, kShape.kv_heads, kShape.head_dim);
  s.refuse(*Uniform::create({.tokens = 40}), &range, s.codes, code, words);

  const auto quantiser = HadamardQuantiser::create(16, 2, 3);
  const auto signatures =
      Signatures<HadamardQuantiser>::create(*quantiser, {.kv_heads = 2, .value_dim = 5});
  const auto systematic = Systematic::create(*quantiser, {.budget = {.tokens = 40}});
  s.refuse(*systematic, &*signatures, s.codes, code, words);

  // Codes of keys, whose queries are not hashed.
  const auto soft = SoftCollisions<SimHash>::create(s.family);
  const auto ranked = TopK<SoftCollisions<SimHash>>::create({.tokens = 40}, *soft);
  const auto codes = HashCodes<SimHash>::create(s.family, {.kv_heads = 2, .value_dim = 5});
  REQUIRE(codes.ok());
  s.refuse(*ranked, &*codes, s.codes, code, words);

  // A family of its own for each KV head.
  const HeadSetting setting{
      .kind = HeadKind::kTables, .functions = 5, .tables = kTables, .min_collisions = 2};
  const HeadSetting profile[] = {setting, setting};
  const auto hashes = HeadHashes::create(make_backend<ScalarOps>(s.executor), s.source,
                                         {.begin = 4, .end = 640}, profile);
  REQUIRE(hashes.ok());
  const auto by_head = PerHead::create(*hashes);
  const auto heads = PerHeadIndex::create(*hashes, {});
  REQUIRE(heads.ok());
  s.refuse(*by_head, &*heads, s.codes, code, words);
}

}  // namespace
}  // namespace magicpig::test

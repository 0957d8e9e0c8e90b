// SPDX-License-Identifier: Apache-2.0
// Sampling by collisions: the drawn set against brute force over codes, and the union beside it.
#include "magicpig/sample/collision.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>
#include <vector>

#include "magicpig/estimate/rule.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/sample/defensive.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 6, .kv_heads = 2, .head_dim = 16, .value_dim = 4};
constexpr TokenRange kRange{.begin = 3, .end = 395};

struct Tables {
  Problem<float> problem{{.shape = kShape, .tokens = 400, .key_offset = 0.5}};
  Result<SimHash> family = SimHash::create({.dim = 16, .bits = 5, .tables = 12, .seed = 4});
  Result<BucketTables<SimHash>> index =
      BucketTables<SimHash>::create(*family, {.kv_heads = 2, .segment_tokens = 128});

  Tables() {
    SerialExecutor executor;
    REQUIRE(index.ok());
    REQUIRE(index->build(make_backend<ScalarOps>(executor), problem.source(), kRange).ok());
  }

  [[nodiscard]] std::vector<Code> codes(const float* vector) const {
    std::vector<Code> codes(12);
    std::vector<float> scratch(family->scratch_floats(1));
    family->hash<ScalarOps>(vector, 1, codes.data(), scratch.data());
    return codes;
  }

  [[nodiscard]] std::vector<float> centred(int kv_head, TokenId token) const {
    const auto source = problem.source();
    std::vector<float> key(16);
    for (std::size_t j = 0; j < 16; ++j) {
      key[j] = source.key(kv_head, token)[j] - index->centre(kv_head)[j];
    }
    return key;
  }

  [[nodiscard]] int collisions(int head, TokenId token, int radius) const {
    const auto key = codes(centred(head / 3, token).data());
    const auto query = codes(problem.query(head));
    int count = 0;
    for (std::size_t l = 0; l < key.size(); ++l) {
      count += std::popcount(static_cast<unsigned>(key[l] ^ query[l])) <= radius ? 1 : 0;
    }
    return count;
  }

  [[nodiscard]] double cosine(int head, TokenId token) const {
    const auto key = centred(head / 3, token);
    double dot = 0.0;
    double squares[2] = {};
    for (std::size_t j = 0; j < key.size(); ++j) {
      const auto k = static_cast<double>(key[j]);
      const auto q = static_cast<double>(problem.query(head)[j]);
      dot += k * q;
      squares[0] += k * k;
      squares[1] += q * q;
    }
    return dot / std::sqrt(squares[0] * squares[1]);
  }
};

TEST_CASE("Collisions.draw_the_tokens_that_brute_force_over_codes_finds") {
  const Tables tables;
  for (int t = 1; t <= 3; ++t) {
    for (int radius = 0; radius <= 2; ++radius) {
      const auto sampler =
          Collisions::create(*tables.family, {.min_collisions = t, .probe_radius = radius});
      REQUIRE(sampler.ok());
      for (int kv_head = 0; kv_head < 2; ++kv_head) {
        const Drawn drawn = draw_tokens(*sampler, tables.problem, *tables.index, {}, kv_head);
        CHECK(std::is_sorted(drawn.tokens.begin(), drawn.tokens.end()));
        for (int g = 0; g < 3; ++g) {
          std::vector<TokenId> expected;
          for (TokenId token = kRange.begin; token < kRange.end; ++token) {
            if (tables.collisions(3 * kv_head + g, token, radius) >= t) expected.push_back(token);
          }
          CHECK_FALSE(expected.empty());
          CHECK(drawn.of(g) == expected);
        }
        for (const std::uint32_t members : drawn.members) CHECK(members != 0);
      }
    }
  }
}

TEST_CASE("Collisions.report_the_probability_of_the_cosine_to_the_centred_key") {
  const Tables tables;
  for (int t = 1; t <= 3; ++t) {
    for (int radius = 0; radius <= 1; ++radius) {
      const auto sampler =
          Collisions::create(*tables.family, {.min_collisions = t, .probe_radius = radius});
      REQUIRE(sampler.ok());
      const Drawn drawn = draw_tokens(*sampler, tables.problem, *tables.index, {}, 1);
      for (int g = 0; g < 3; ++g) {
        for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
          const double cosine = tables.cosine(3 + g, drawn.tokens[i]);
          const double expected =
              log_at_least(t, 12, tables.family->table_collision(cosine, radius));
          // 1e-5 of interpolation, and a cosine computed in float: 1e-6 times a slope below 20.
          CHECK(std::abs(static_cast<double>(drawn.log_pi[static_cast<std::size_t>(g)][i]) -
                         expected) < 5e-5);
        }
      }
    }
  }
}

TEST_CASE("Collisions.draw_by_the_codes_that_are_given_instead_of_the_queries_own") {
  const Tables tables;
  const auto sampler = Collisions::create(*tables.family, {});
  const auto source = tables.problem.source();
  // KV head 1 with its own queries, and the codes of the other one's in the opposite order.
  std::vector<Code> codes;
  for (const int head : {2, 1, 0}) {
    for (const Code code : tables.codes(tables.problem.query(head))) codes.push_back(code);
  }
  const DrawInput<StridedKeyValues<float>, BucketTables<SimHash>> input{
      .key_values = source,
      .index = *tables.index,
      .kv_head = 1,
      .queries = {.data = tables.problem.query(3), .count = 3, .dim = 16},
      .noise = {},
      .query_codes = codes.data()};
  Arena counting;
  (void)sampler->carve(counting, {.group = 3, .tokens = kRange.size()});
  std::vector<std::byte> memory(counting.bytes_needed());
  Arena arena{std::span<std::byte>(memory)};
  auto scratch = sampler->carve(arena, {.group = 3, .tokens = kRange.size()});
  const auto drawn = sampler->draw<ScalarOps>(input, scratch);
  for (std::size_t g = 0; g < 3; ++g) {
    std::vector<TokenId> expected;
    for (TokenId token = kRange.begin; token < kRange.end; ++token) {
      const auto key = tables.codes(tables.centred(1, token).data());
      int collisions = 0;
      for (std::size_t l = 0; l < key.size(); ++l) {
        collisions += key[l] == codes[g * key.size() + l] ? 1 : 0;
      }
      if (collisions >= 2) expected.push_back(token);
    }
    std::vector<TokenId> own;
    for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
      if (((drawn.members[i] >> g) & 1U) != 0) own.push_back(drawn.tokens[i]);
    }
    CHECK_FALSE(expected.empty());
    CHECK(own == expected);
  }
}

TEST_CASE("Collisions.do_not_depend_on_the_noise_key") {
  const Tables tables;
  const auto sampler = Collisions::create(*tables.family, {});
  REQUIRE(sampler.ok());
  const Drawn first = draw_tokens(*sampler, tables.problem, *tables.index, {.seed = 1, .step = 1});
  const Drawn second = draw_tokens(*sampler, tables.problem, *tables.index, {.seed = 2, .step = 9});
  CHECK(first.tokens == second.tokens);
  CHECK(first.members == second.members);
}

TEST_CASE("Collisions.draw_everything_where_the_ball_holds_every_code") {
  const Tables tables;
  const auto sampler = Collisions::create(*tables.family, {.min_collisions = 3, .probe_radius = 5});
  REQUIRE(sampler.ok());
  const Drawn drawn = draw_tokens(*sampler, tables.problem, *tables.index);
  CHECK(static_cast<TokenId>(drawn.tokens.size()) == kRange.size());
  for (const auto& head : drawn.log_pi) {
    for (const float log_pi : head) CHECK(log_pi == 0.0F);
  }
}

TEST_CASE("Collisions.refuse_rules_outside_their_bounds") {
  const auto family = SimHash::create({.dim = 4, .bits = 3, .tables = 2});
  REQUIRE(family.ok());
  for (const CollisionConfig& config :
       {CollisionConfig{.min_collisions = 0}, CollisionConfig{.min_collisions = 4},
        CollisionConfig{.min_collisions = 3}, CollisionConfig{.probe_radius = -1},
        CollisionConfig{.probe_radius = 4}}) {
    const auto sampler = Collisions::create(*family, config);
    CHECK_FALSE(sampler.ok());
    CHECK(sampler.status().code() == ErrorCode::kInvalidArgument);
  }
}

TEST_CASE("Defensive.draws_the_union_of_both_samplers_with_the_members_right") {
  const Tables tables;
  auto collisions = Collisions::create(*tables.family, {.min_collisions = 3});
  const auto uniform = Uniform::create({.tokens = 40});
  REQUIRE(collisions.ok());
  REQUIRE(uniform.ok());
  const NoiseKey key{.seed = 5, .step = 6, .layer = 7};
  for (int kv_head = 0; kv_head < 2; ++kv_head) {
    const Drawn found = draw_tokens(*collisions, tables.problem, *tables.index, key, kv_head);
    const Drawn extra = draw_tokens(*uniform, tables.problem, *tables.index, key, kv_head);
    auto copy = Collisions::create(*tables.family, {.min_collisions = 3});
    const auto defensive = Defensive<Collisions>::create(std::move(*copy), {.tokens = 40});
    REQUIRE(defensive.ok());
    const Drawn both = draw_tokens(*defensive, tables.problem, *tables.index, key, kv_head);
    std::vector<TokenId> expected;
    std::set_union(found.tokens.begin(), found.tokens.end(), extra.tokens.begin(),
                   extra.tokens.end(), std::back_inserter(expected));
    CHECK(both.tokens == expected);
    CHECK(expected.size() > found.tokens.size());
    const double rho = 40.0 / kRange.size();
    for (int g = 0; g < 3; ++g) {
      std::vector<TokenId> own;
      const auto own_found = found.of(g);
      std::set_union(own_found.begin(), own_found.end(), extra.tokens.begin(), extra.tokens.end(),
                     std::back_inserter(own));
      CHECK(both.of(g) == own);
      for (std::size_t i = 0; i < both.tokens.size(); ++i) {
        const double cosine = tables.cosine(3 * kv_head + g, both.tokens[i]);
        const double u = std::exp(log_at_least(3, 12, tables.family->table_collision(cosine, 0)));
        const double expected_pi = u + rho - u * rho;
        // The error of log u, see above, and some roundings of expf and logf.
        CHECK(std::abs(static_cast<double>(both.log_pi[static_cast<std::size_t>(g)][i]) -
                       std::log(expected_pi)) < 5e-5);
      }
    }
  }
}

TEST_CASE("Defensive.adds_one_token_to_what_the_hash_finds_when_its_fraction_is_tiny") {
  const Tables tables;
  auto collisions = Collisions::create(*tables.family, {});
  REQUIRE(collisions.ok());
  const Drawn found = draw_tokens(*collisions, tables.problem, *tables.index);
  const auto defensive = Defensive<Collisions>::create(std::move(*collisions), {.fraction = 1e-9});
  REQUIRE(defensive.ok());
  const Drawn both = draw_tokens(*defensive, tables.problem, *tables.index);
  CHECK(std::includes(both.tokens.begin(), both.tokens.end(), found.tokens.begin(),
                      found.tokens.end()));
  CHECK(both.tokens.size() <= found.tokens.size() + 1);
}

TEST_CASE("Defensive.reads_everything_with_certainty_at_fraction_1") {
  const Tables tables;
  auto collisions = Collisions::create(*tables.family, {});
  REQUIRE(collisions.ok());
  const auto defensive = Defensive<Collisions>::create(std::move(*collisions), {.fraction = 1.0});
  REQUIRE(defensive.ok());
  const Drawn both = draw_tokens(*defensive, tables.problem, *tables.index);
  CHECK(static_cast<TokenId>(both.tokens.size()) == kRange.size());
  for (int g = 0; g < 3; ++g) {
    CHECK(static_cast<TokenId>(both.of(g).size()) == kRange.size());
    for (const float log_pi : both.log_pi[static_cast<std::size_t>(g)]) CHECK(log_pi == 0.0F);
  }
}

}  // namespace

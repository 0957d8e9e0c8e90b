// SPDX-License-Identifier: Apache-2.0
// Hash codes as they are: the same as those in tables, however they came in.
#include "magicpig/index/hash_codes.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/hash/simhash.hpp"
#include "problem.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 2, .kv_heads = 2, .head_dim = 6, .value_dim = 3};
using Codes = HashCodes<SimHash>;

SimHash make_family() {
  return std::move(*SimHash::create({.dim = 6, .bits = 5, .tables = 4, .seed = 7}));
}

// Codes and norms of all tokens: of KV head h, [token][table], and [token].
struct Content {
  std::vector<Code> codes;
  std::vector<float> norms;
  friend bool operator==(const Content&, const Content&) = default;
};
Content content(const Codes& index) {
  Content all;
  for (int h = 0; h < index.kv_heads(); ++h) {
    for (int s = 0; s < index.segment_count(); ++s) {
      for (int i = 0; i < index.segment_tokens(s); ++i) {
        for (int l = 0; l < 4; ++l) all.codes.push_back(index.codes(s, h, l)[i]);
        all.norms.push_back(index.value_norms(s, h)[i]);
      }
    }
  }
  return all;
}

TEST_CASE("HashCodes.are_those_of_the_family_for_each_key_centred_or_not") {
  SerialExecutor executor;
  const Problem<float> problem({.shape = kShape, .tokens = 5000, .key_offset = 1.0});
  const SimHash family = make_family();
  for (const bool centred : {false, true}) {
    auto index =
        std::move(*Codes::create(family, {.kv_heads = 2, .value_dim = 3, .centred = centred}));
    const TokenRange range{.begin = 7, .end = 4990};
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
    CHECK(index.segment_count() == 2);
    CHECK(index.segment_tokens(1) == 4983 - 4096);
    for (int h = 0; h < 2; ++h) {
      double centre[6] = {};
      for (TokenId t = range.begin; t < range.end && centred; ++t) {
        for (int j = 0; j < 6; ++j) {
          centre[j] += static_cast<double>(problem.source().key(h, t)[j]) / range.size();
        }
      }
      int unlike = 0;
      for (TokenId t = range.begin; t < range.end; ++t) {
        const TokenId at = t - range.begin;
        float key[6];
        for (int j = 0; j < 6; ++j) {
          key[j] = problem.source().key(h, t)[j] - static_cast<float>(centre[j]);
        }
        Code codes[4];
        float scratch[20];
        family.hash<ScalarOps>(key, 1, codes, scratch);
        for (int l = 0; l < 4; ++l) {
          unlike += codes[l] != index.codes(at / 4096, h, l)[at % 4096] ? 1 : 0;
        }
        double square = 0.0;
        for (int j = 0; j < 3; ++j) {
          const auto v = static_cast<double>(problem.source().value(h, t)[j]);
          square += v * v;
        }
        REQUIRE(static_cast<double>(index.value_norms(at / 4096, h)[at % 4096]) ==
                doctest::Approx(std::sqrt(square)).epsilon(1e-6));
      }
      // The mean is added up in another order here: a projection next to 0 may change sides.
      CHECK(unlike <= (centred ? 2 : 0));
    }
  }
}

TEST_CASE("HashCodes.follow_a_cache_that_grows_and_is_cut") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const Problem<float> problem({.shape = kShape, .tokens = 4200});
  const SimHash family = make_family();
  const HashCodesConfig config{.kv_heads = 2, .value_dim = 3};
  auto whole = std::move(*Codes::create(family, config));
  auto grown = std::move(*Codes::create(family, config));
  REQUIRE(whole.build(backend, problem.source(), {3, 4200}).ok());
  REQUIRE(grown.build(backend, problem.source(), {3, 3}).ok());
  for (const TokenId end : {4, 5, 70, 3000, 4098, 4099, 4100, 4200}) {
    REQUIRE(grown.append(backend, problem.source(), end).ok());
    CHECK(grown.indexed() == TokenRange{3, end});
  }
  CHECK(content(grown) == content(whole));
  for (const TokenId end : {4100, 4099, 4098, 17, 3}) {
    REQUIRE(grown.truncate(end).ok());
    CHECK(grown.indexed() == TokenRange{3, end});
    REQUIRE(grown.append(backend, problem.source(), 4200).ok());
    CHECK(content(grown) == content(whole));
  }
  CHECK(grown.append(backend, problem.source(), 100).ok());
  CHECK(grown.truncate(5000).ok());
  CHECK(grown.indexed() == TokenRange{3, 4200});
  CHECK(grown.truncate(-1).code() == ErrorCode::kInvalidArgument);
  CHECK(grown.truncate(0).ok());
  CHECK(grown.indexed().empty());
  // 2 L + 4 bytes per token in full segments, beside the centres.
  CHECK(whole.bytes() == 2 * 2 * 4096 * (2 * 4 + 4) + 2 * 6 * sizeof(float));
}

TEST_CASE("HashCodes.keep_what_they_had_when_rows_are_refused") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Problem<float> problem({.shape = kShape, .tokens = 100});
  const SimHash family = make_family();
  for (const bool centred : {false, true}) {
    auto index =
        std::move(*Codes::create(family, {.kv_heads = 2, .value_dim = 3, .centred = centred}));
    REQUIRE(index.build(backend, problem.source(), {0, 44}).ok());
    const Content before = content(index);
    const auto check_refused = [&](const char* words) {
      for (const bool append : {true, false}) {
        const Status status = append ? index.append(backend, problem.source(), 100)
                                     : index.build(backend, problem.source(), {0, 100});
        CHECK(status.code() == ErrorCode::kNonFinite);
        CHECK(std::string(status.message()) == words);
        CHECK(content(index) == before);
      }
    };
    const float key = problem.key(1, 60)[2];
    problem.key(1, 60)[2] = std::numeric_limits<float>::quiet_NaN();
    check_refused("the key of token 60, KV head 1 is not finite");
    problem.key(1, 60)[2] = key;
    const float value = problem.value(0, 70)[1];
    problem.value(0, 70)[1] = std::numeric_limits<float>::infinity();
    check_refused("the value of token 70, KV head 0 is not finite");
    problem.value(0, 70)[1] = value;
    CHECK(index.append(backend, problem.source(), 101).code() == ErrorCode::kInvalidArgument);
    const Problem<float> other(
        {.shape = {.query_heads = 2, .kv_heads = 2, .head_dim = 6, .value_dim = 4}, .tokens = 100});
    CHECK(index.append(backend, other.source(), 100).code() == ErrorCode::kShapeMismatch);
    CHECK(content(index) == before);
    CHECK(index.append(backend, problem.source(), 100).ok());
  }
  CHECK_FALSE(Codes::create(family, {.kv_heads = 0, .value_dim = 3}).ok());
  CHECK_FALSE(Codes::create(family, {.kv_heads = 1, .value_dim = 0}).ok());
}

}  // namespace

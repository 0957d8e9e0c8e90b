// SPDX-License-Identifier: Apache-2.0
// Rows that are appended to an index as they are written.
#include "magicpig/core/new_rows.hpp"

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "problem.hpp"
#include "same_index.hpp"

namespace magicpig::test {
namespace {

constexpr Shape kShape{.query_heads = 3, .kv_heads = 3, .head_dim = 12, .value_dim = 5};

// The rows of some tokens, [tokens, kv_heads, dim].
struct Rows {
  std::vector<float> keys;
  std::vector<float> values;

  Rows(const Problem<float>& problem, TokenRange tokens) {
    const auto source = problem.source();
    for (TokenId t = tokens.begin; t < tokens.end; ++t) {
      for (int h = 0; h < 3; ++h) {
        keys.insert(keys.end(), source.key(h, t), source.key(h, t) + 12);
        values.insert(values.end(), source.value(h, t), source.value(h, t) + 5);
      }
    }
  }
};

template <class Index>
void check_appended(Index grown, Index expected, TokenId step) {
  const Problem<float> problem({.shape = kShape, .tokens = 300});
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  REQUIRE(grown.build(backend, problem.source(), {.begin = 4, .end = 100}).ok());
  REQUIRE(expected.build(backend, problem.source(), {.begin = 4, .end = 100}).ok());
  for (TokenId t = 100; t < 300; t += step) {
    const Rows rows(problem, {.begin = t, .end = t + step});
    const auto written =
        StridedKeyValues<float>::token_major(rows.keys.data(), rows.values.data(), kShape, step);
    REQUIRE(written.ok());
    REQUIRE(grown.append(backend, NewRows(*written, t), t + step).ok());
  }
  REQUIRE(expected.append(backend, problem.source(), 300).ok());
  CHECK(index_difference(grown, expected) == nullptr);

  const NewRows late(problem.source(), 301);
  const Status status = grown.append(backend, late, 350);
  CHECK(status.code() == ErrorCode::kInvalidArgument);
  CHECK(std::string(status.message()) == "cannot read token 300 of rows that begin at token 301");
  CHECK(grown.rehash(backend, NewRows(problem.source(), 50), {.begin = 40, .end = 60}).code() ==
        ErrorCode::kInvalidArgument);
  CHECK(grown.recentre(backend, late).code() == ErrorCode::kInvalidArgument);
  CHECK(grown.drift(backend, late).status().code() == ErrorCode::kInvalidArgument);
  CHECK(grown.append(backend, NewRows(problem.source(), 300), 601).code() ==
        ErrorCode::kInvalidArgument);
  CHECK(index_difference(grown, expected) == nullptr);
}

TEST_CASE("an index appended from rows as they are written is the one appended from the cache") {
  const auto quantiser = HadamardQuantiser::create(12, 2, 1);
  const auto codes = [&] {
    return std::move(
        *Signatures<HadamardQuantiser>::create(*quantiser, {.kv_heads = 3, .value_dim = 5}));
  };
  check_appended(codes(), codes(), 1);
  check_appended(codes(), codes(), 50);
  const auto family = SimHash::create({.dim = 12, .bits = 4, .tables = 5, .seed = 1});
  const auto tables = [&](int seal) {
    return std::move(*BucketTables<SimHash>::create(
        *family, {.kv_heads = 3, .segment_tokens = 64, .seal_tokens = seal}));
  };
  check_appended(tables(1), tables(1), 1);
  check_appended(tables(50), tables(50), 50);
}

}  // namespace
}  // namespace magicpig::test

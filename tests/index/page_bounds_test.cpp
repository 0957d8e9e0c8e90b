// SPDX-License-Identifier: Apache-2.0
// Bounds of pages: what they are, how they follow a cache, and what they refuse.
#include "magicpig/index/page_bounds.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "problem.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 2, .kv_heads = 2, .head_dim = 5, .value_dim = 3};

// Whether every page's bounds hold for its keys, and as tightly as T can where they should.
template <class T, class Key>
void check_bounds(const PageBounds<T>& index, const Problem<Key>& problem, bool tight) {
  const TokenRange range = index.indexed();
  for (int h = 0; h < index.kv_heads(); ++h) {
    for (int p = 0; p < index.pages(); ++p) {
      for (int j = 0; j < index.dim(); ++j) {
        float low = std::numeric_limits<float>::infinity();
        float high = -low;
        const TokenId begin = range.begin + p * index.page();
        for (TokenId t = begin; t < range.end && t < begin + index.page(); ++t) {
          const float x = to_float(problem.source().key(h, t)[j]);
          low = std::min(low, x);
          high = std::max(high, x);
        }
        const float least = to_float(index.least(h, p)[j]);
        const float largest = to_float(index.largest(h, p)[j]);
        REQUIRE(least <= low);
        REQUIRE(largest >= high);
        if (!tight) continue;
        // A unit in the last place at most, of fp16 above its subnormals and bf16.
        const float step = std::is_same_v<T, Key>    ? 0.0F
                           : std::is_same_v<T, fp16> ? 0x1p-10F
                                                     : 0x1p-7F;
        REQUIRE(least >= low - std::max(std::fabs(low) * step, step * 0x1p-14F));
        REQUIRE(largest <= high + std::max(std::fabs(high) * step, step * 0x1p-14F));
      }
    }
  }
}

TEST_CASE_TEMPLATE("PageBounds.are_the_extremes_of_their_keys_rounded_outwards", T, float, fp16,
                   bf16) {
  SerialExecutor executor;
  const Problem<float> floats({.shape = kShape, .tokens = 150});
  const Problem<T> same({.shape = kShape, .tokens = 150});
  for (const int page : {1, 16, 64, 4096}) {
    auto index = std::move(*PageBounds<T>::create({.kv_heads = 2, .dim = 5, .page = page}));
    for (const TokenRange range : {TokenRange{0, 150}, {7, 135}, {3, 4}}) {
      REQUIRE(index.build(make_backend<ScalarOps>(executor), floats.source(), range).ok());
      CHECK(index.indexed() == range);
      CHECK(index.pages() == (range.size() + page - 1) / page);
      check_bounds(index, floats, true);
      REQUIRE(index.build(make_backend<ScalarOps>(executor), same.source(), range).ok());
      check_bounds(index, same, true);
    }
  }
}

TEST_CASE_TEMPLATE("PageBounds.hold_at_zero_and_at_the_ends_of_a_type", T, fp16, bf16) {
  SerialExecutor executor;
  Problem<float> problem({.shape = kShape, .tokens = 12});
  const float numbers[] = {0.0F,     -0.0F,     0x1p-149F, -0x1p-149F, 0x1p-25F, -0x1p-25F,
                           65503.5F, -65503.5F, 1.00001F,  -1.00001F,  0x1p-14F, -0x1p-14F};
  for (int h = 0; h < 2; ++h) {
    for (TokenId t = 0; t < 12; ++t) {
      for (int j = 0; j < 5; ++j) problem.key(h, t)[j] = numbers[t];
    }
  }
  auto index = std::move(*PageBounds<T>::create({.kv_heads = 2, .dim = 5, .page = 1}));
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 12}).ok());
  check_bounds(index, problem, true);
}

TEST_CASE("PageBounds.appended_token_by_token_are_those_built_at_once") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const Problem<float> problem({.shape = kShape, .tokens = 100});
  const PageBoundsConfig config{.kv_heads = 2, .dim = 5, .page = 8};
  auto whole = std::move(*PageBounds<fp16>::create(config));
  auto grown = std::move(*PageBounds<fp16>::create(config));
  REQUIRE(grown.build(backend, problem.source(), {3, 3}).ok());
  for (TokenId end = 4; end <= 100; ++end) {
    REQUIRE(grown.append(backend, problem.source(), end).ok());
    REQUIRE(whole.build(backend, problem.source(), {3, end}).ok());
    REQUIRE(grown.pages() == whole.pages());
    for (int h = 0; h < 2; ++h) {
      for (int p = 0; p < whole.pages(); ++p) {
        for (int j = 0; j < 2 * 5; ++j) REQUIRE(grown.least(h, p)[j] == whole.least(h, p)[j]);
      }
    }
  }
  CHECK(grown.append(backend, problem.source(), 50).ok());
  CHECK(grown.indexed() == TokenRange{3, 100});
}

TEST_CASE("PageBounds.truncated_stay_bounds_and_forget_whole_pages") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Problem<float> problem({.shape = kShape, .tokens = 100});
  auto index = std::move(*PageBounds<float>::create({.kv_heads = 2, .dim = 5, .page = 8}));
  REQUIRE(index.build(backend, problem.source(), {0, 100}).ok());
  REQUIRE(index.truncate(43).ok());
  CHECK(index.indexed() == TokenRange{0, 43});
  CHECK(index.pages() == 6);
  check_bounds(index, problem, false);
  // Other keys take the place of those that were forgotten.
  for (TokenId t = 43; t < 100; ++t) problem.key(1, t)[2] = 40.0F + static_cast<float>(t);
  REQUIRE(index.append(backend, problem.source(), 100).ok());
  check_bounds(index, problem, false);
  CHECK(index.largest(1, 6)[2] == 95.0F);  // of tokens 48 to 55, and of no key before
  CHECK(index.least(1, 6)[2] == 88.0F);

  CHECK(index.truncate(-1).code() == ErrorCode::kInvalidArgument);
  CHECK(index.truncate(1000).ok());
  CHECK(index.indexed() == TokenRange{0, 100});
  CHECK(index.truncate(0).ok());
  CHECK(index.indexed().empty());
  CHECK(index.pages() == 0);
}

TEST_CASE("PageBounds.keep_what_they_had_when_keys_are_refused") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Problem<float> problem({.shape = kShape, .tokens = 100});
  auto index = std::move(*PageBounds<fp16>::create({.kv_heads = 2, .dim = 5, .page = 8}));
  REQUIRE(index.build(backend, problem.source(), {0, 44}).ok());
  const auto check_refused = [&](ErrorCode code, const std::string& words) {
    const Status appended = index.append(backend, problem.source(), 100);
    CHECK(appended.code() == code);
    CHECK(std::string(appended.message()).find(words) != std::string::npos);
    CHECK(index.build(backend, problem.source(), {0, 100}).code() == code);
    CHECK(index.indexed() == TokenRange{0, 44});
    check_bounds(index, problem, true);
  };
  problem.key(1, 60)[2] = std::numeric_limits<float>::quiet_NaN();
  check_refused(ErrorCode::kNonFinite, "the key of token 60, KV head 1 is not finite");
  problem.key(1, 60)[2] = -std::numeric_limits<float>::infinity();
  check_refused(ErrorCode::kNonFinite, "the key of token 60, KV head 1 is not finite");
  problem.key(1, 60)[2] = 65505.0F;
  check_refused(ErrorCode::kInvalidArgument,
                "the key of token 60, KV head 1 has a coordinate beyond the 65504");
  problem.key(1, 60)[2] = 65504.0F;
  CHECK(index.append(backend, problem.source(), 100).ok());

  CHECK(index.append(backend, problem.source(), 101).code() == ErrorCode::kInvalidArgument);
  const Problem<float> other({.shape = {.head_dim = 4, .value_dim = 4}, .tokens = 100});
  CHECK(index.build(backend, other.source(), {0, 10}).code() == ErrorCode::kShapeMismatch);
  CHECK(index.build(backend, problem.source(), {5, 4}).code() == ErrorCode::kInvalidArgument);
  CHECK(index.indexed() == TokenRange{0, 100});
}

TEST_CASE("PageBounds.of_impossible_shapes_are_not_made") {
  CHECK_FALSE(PageBounds<>::create({.kv_heads = 0, .dim = 5}).ok());
  CHECK_FALSE(PageBounds<>::create({.dim = 0}).ok());
  CHECK_FALSE(PageBounds<>::create({.dim = kMaxDim + 1}).ok());
  CHECK_FALSE(PageBounds<>::create({.dim = 5, .page = 0}).ok());
  CHECK_FALSE(PageBounds<>::create({.dim = 5, .page = 4097}).ok());
}

TEST_CASE("PageBounds.hold_as_many_bytes_as_they_say") {
  SerialExecutor executor;
  const Problem<float> problem({.shape = kShape, .tokens = 160});
  auto index = std::move(*PageBounds<fp16>::create({.kv_heads = 2, .dim = 5, .page = 16}));
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 160}).ok());
  CHECK(static_cast<double>(index.bytes()) == PageBounds<fp16>::bytes_per_token(5, 16) * 160 * 2);
}

}  // namespace

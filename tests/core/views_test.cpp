// SPDX-License-Identifier: Apache-2.0
// StridedKeyValues: every layout reads the scalars that it names, and bad layouts are refused.
#include "magicpig/core/views.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace magicpig;

constexpr Shape kShape{.query_heads = 6, .kv_heads = 3, .head_dim = 5, .value_dim = 4};
constexpr TokenId kTokens = 7;

// A number that tells where it belongs.
float mark(int what, int head, int token, int j) {
  return static_cast<float>(1000 * what + 100 * head + 10 * token + j);
}

template <class Place>
std::vector<float> marked(int what, int dim, const Place& place) {
  std::vector<float> array(static_cast<std::size_t>(3 * kTokens * dim));
  for (int h = 0; h < 3; ++h) {
    for (int t = 0; t < kTokens; ++t) {
      for (int j = 0; j < dim; ++j) {
        array[static_cast<std::size_t>(place(h, t) * dim + j)] = mark(what, h, t, j);
      }
    }
  }
  return array;
}

int wrong_scalars(const StridedKeyValues<float>& source) {
  int wrong = 0;
  for (int h = 0; h < 3; ++h) {
    for (TokenId t = 0; t < source.tokens(); ++t) {
      for (int j = 0; j < 5; ++j) wrong += source.key(h, t)[j] != mark(1, h, t, j);
      for (int j = 0; j < 4; ++j) wrong += source.value(h, t)[j] != mark(2, h, t, j);
    }
  }
  return wrong;
}

TEST_CASE("head-major, token-major and reversed arrays read the same rows") {
  const auto head_major = [](int h, int t) { return h * kTokens + t; };
  const auto token_major = [](int h, int t) { return t * 3 + h; };
  SUBCASE("head-major") {
    const std::vector<float> keys = marked(1, 5, head_major);
    const std::vector<float> values = marked(2, 4, head_major);
    const auto source =
        StridedKeyValues<float>::head_major(keys.data(), values.data(), kShape, kTokens);
    REQUIRE(source.ok());
    CHECK(wrong_scalars(*source) == 0);
  }
  SUBCASE("token-major") {
    const std::vector<float> keys = marked(1, 5, token_major);
    const std::vector<float> values = marked(2, 4, token_major);
    const auto source =
        StridedKeyValues<float>::token_major(keys.data(), values.data(), kShape, kTokens);
    REQUIRE(source.ok());
    CHECK(wrong_scalars(*source) == 0);
  }
  SUBCASE("keys with heads and tokens backwards, values with tokens backwards") {
    const std::vector<float> keys =
        marked(1, 5, [](int h, int t) { return (2 - h) * kTokens + kTokens - 1 - t; });
    const std::vector<float> values =
        marked(2, 4, [](int h, int t) { return h * kTokens + kTokens - 1 - t; });
    const auto source = StridedKeyValues<float>::create(
        {.keys = keys.data() + (3 * kTokens - 1) * 5,
         .values = values.data() + (kTokens - 1) * 4,
         .key_strides = {.head = -kTokens * 5 * 4, .token = -5 * 4},
         .value_strides = {.head = kTokens * 4 * 4, .token = -4 * 4},
         .kv_heads = 3,
         .head_dim = 5,
         .value_dim = 4,
         .tokens = kTokens});
    REQUIRE(source.ok());
    CHECK(wrong_scalars(*source) == 0);
  }
}

TEST_CASE("keys and values may interleave, and heads may share rows") {
  // Per token: 5 of key, 4 of value, 3 unused; the same row for every head.
  std::vector<float> memory(static_cast<std::size_t>(kTokens * 12));
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i);
  const auto source = StridedKeyValues<float>::create({.keys = memory.data(),
                                                       .values = memory.data() + 5,
                                                       .key_strides = {.head = 0, .token = 48},
                                                       .value_strides = {.head = 0, .token = 48},
                                                       .kv_heads = 2,
                                                       .head_dim = 5,
                                                       .value_dim = 4,
                                                       .tokens = kTokens});
  REQUIRE(source.ok());
  CHECK(source->key(0, 3) == memory.data() + 36);
  CHECK(source->key(1, 3) == memory.data() + 36);
  CHECK(source->value(1, 6) == memory.data() + 77);
}

TEST_CASE("16-bit rows are found at odd multiples of their size") {
  std::vector<bf16> memory(1 + 2 * 3);
  const auto source = StridedKeyValues<bf16>::create({.keys = memory.data() + 1,
                                                      .values = memory.data() + 1,
                                                      .key_strides = {.head = 0, .token = 6},
                                                      .value_strides = {.head = 0, .token = 6},
                                                      .head_dim = 3,
                                                      .value_dim = 3,
                                                      .tokens = 2});
  REQUIRE(source.ok());
  CHECK(source->key(0, 1) == memory.data() + 4);
}

TEST_CASE("offsets beyond 4 GiB do not wrap") {
  // Nothing is read: only where the row would lie.
  alignas(float) static const std::byte anchor[4] = {};
  const auto* base = reinterpret_cast<const float*>(anchor);
  constexpr std::int64_t kStride = std::int64_t{1} << 14;
  const auto source = StridedKeyValues<float>::create({.keys = base,
                                                       .values = base,
                                                       .key_strides = {.head = 0, .token = kStride},
                                                       .value_strides = {.head = 4, .token = 0},
                                                       .kv_heads = 1 << 20,
                                                       .head_dim = 1,
                                                       .value_dim = 1,
                                                       .tokens = 1 << 24});
  REQUIRE(source.ok());
  const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  CHECK(at(source->key(0, 1 << 20)) - at(base) == (std::uint64_t{1} << 34));
}

TEST_CASE("a view of the first tokens sees the same rows and never more than there are") {
  const std::vector<float> array(3 * kTokens * 5);
  const auto source = StridedKeyValues<float>::head_major(
      array.data(), array.data(), {.kv_heads = 3, .head_dim = 5, .value_dim = 5}, kTokens);
  REQUIRE(source.ok());
  const StridedKeyValues<float> first = source->first(3);
  CHECK(first.tokens() == 3);
  CHECK(first.key(2, 2) == source->key(2, 2));
  CHECK(source->first(kTokens + 1).tokens() == kTokens);
  CHECK(source->first(0).tokens() == 0);
  CHECK(source->kv_heads() == 3);
  CHECK(source->head_dim() == 5);
  CHECK(source->value_dim() == 5);
}

StridedKeyValues<float>::Layout good_layout() {
  static const float memory[64] = {};
  return {.keys = memory,
          .values = memory,
          .key_strides = {.head = 16, .token = 16},
          .value_strides = {.head = 16, .token = 16},
          .kv_heads = 1,
          .head_dim = 4,
          .value_dim = 4,
          .tokens = 2};
}

template <class Change>
std::string refusal(const Change& change) {
  StridedKeyValues<float>::Layout layout = good_layout();
  change(layout);
  const auto source = StridedKeyValues<float>::create(layout);
  if (source.ok()) return "accepted";
  CHECK(source.status().code() == ErrorCode::kInvalidArgument);
  return source.status().message();
}

TEST_CASE("bad layouts are refused with the value and its bound") {
  using Layout = StridedKeyValues<float>::Layout;
  CHECK(refusal([](Layout&) {}) == "accepted");
  CHECK(refusal([](Layout& l) { l.tokens = -1; }) ==
        "tokens -1 must be at least 0 and kv_heads 1 at least 1");
  CHECK(refusal([](Layout& l) { l.kv_heads = 0; }) ==
        "tokens 2 must be at least 0 and kv_heads 0 at least 1");
  CHECK(refusal([](Layout& l) { l.head_dim = 0; }) ==
        "head_dim 0 and value_dim 4 must lie in [1, 16384]");
  CHECK(refusal([](Layout& l) { l.head_dim = kMaxDim + 1; }) ==
        "head_dim 16385 and value_dim 4 must lie in [1, 16384]");
  CHECK(refusal([](Layout& l) { l.value_dim = -3; }) ==
        "head_dim 4 and value_dim -3 must lie in [1, 16384]");
  CHECK(refusal([](Layout& l) { l.value_dim = kMaxDim + 1; }) ==
        "head_dim 4 and value_dim 16385 must lie in [1, 16384]");
  CHECK(refusal([](Layout& l) { l.head_dim = l.value_dim = kMaxDim; }) == "accepted");
  CHECK(refusal([](Layout& l) { l.keys = nullptr; }) == "keys is null with 2 tokens");
  CHECK(refusal([](Layout& l) { l.values = nullptr; }) == "values is null with 2 tokens");
  CHECK(refusal([](Layout& l) { l.key_strides.head = 18; }) ==
        "key_strides.head: 18 bytes are no multiple of the scalar's 4");
  CHECK(refusal([](Layout& l) { l.key_strides.token = -15; }) ==
        "key_strides.token: -15 bytes are no multiple of the scalar's 4");
  CHECK(refusal([](Layout& l) { l.value_strides.head = 1; }) ==
        "value_strides.head: 1 bytes are no multiple of the scalar's 4");
  CHECK(refusal([](Layout& l) { l.value_strides.token = 2; }) ==
        "value_strides.token: 2 bytes are no multiple of the scalar's 4");
}

TEST_CASE("an empty cache needs no memory") {
  const auto source = StridedKeyValues<fp16>::head_major(nullptr, nullptr, kShape, 0);
  REQUIRE(source.ok());
  CHECK(source->tokens() == 0);
}

TEST_CASE("keys and values may be of different types, each with strides and blocks of its own") {
  std::vector<q8_0> keys(2 * 3);
  std::vector<fp16> values(2 * 3 * 7);
  const auto source = StridedKeyValues<q8_0, fp16>::token_major(
      keys.data(), values.data(), {.kv_heads = 2, .head_dim = 32, .value_dim = 7}, 3);
  REQUIRE(source.ok());
  CHECK(source->key(1, 2) == keys.data() + 5);
  CHECK(source->value(1, 2) == values.data() + 5 * 7);
  const auto partial = StridedKeyValues<q8_0, fp16>::token_major(
      keys.data(), values.data(), {.kv_heads = 2, .head_dim = 48, .value_dim = 7}, 3);
  REQUIRE(!partial.ok());
  CHECK(std::string(partial.status().message()) ==
        "head_dim 48 must be a multiple of the keys' block of 32");
  static_assert(KeyValueSource<StridedKeyValues<q8_0, fp16>>);
}

TEST_CASE("the views model the concept for every scalar") {
  static_assert(KeyValueSource<StridedKeyValues<float>>);
  static_assert(KeyValueSource<StridedKeyValues<fp16>>);
  static_assert(KeyValueSource<StridedKeyValues<bf16>>);
  CHECK(sizeof(StridedKeyValues<float>) <= 64);  // cheap to copy: one cache line
}

}  // namespace

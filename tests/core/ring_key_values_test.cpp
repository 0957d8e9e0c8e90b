// SPDX-License-Identifier: Apache-2.0
// RingKeyValues: tokens are in the slots that they were written to, before and after the ring is
// full.
#include "magicpig/core/ring_key_values.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "marked_rows.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr int kHeads = 2;
constexpr int kKey = 5;
constexpr int kValue = 4;
constexpr TokenId kCapacity = 13;

// As gemma.cpp has them: [slots, kv_heads, key then value].
struct Ring {
  explicit Ring(TokenId tokens) : memory(kCapacity * kHeads * (kKey + kValue)) {
    for (TokenId t = 0; t < tokens; ++t) {
      for (int h = 0; h < kHeads; ++h) {
        float* row = memory.data() + (t % kCapacity * kHeads + h) * (kKey + kValue);
        put_mark(row, kKey, mark(false, h, t));
        put_mark(row + kKey, kValue, mark(true, h, t));
      }
    }
    const ByteStrides strides{.head = (kKey + kValue) * 4, .token = kHeads * (kKey + kValue) * 4};
    layout = {.keys = memory.data(),
              .values = memory.data() + kKey,
              .key_strides = strides,
              .value_strides = strides,
              .capacity = kCapacity,
              .kv_heads = kHeads,
              .head_dim = kKey,
              .value_dim = kValue,
              .tokens = tokens};
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  std::vector<float> memory;
  RingKeyValues<float>::Layout layout;
};

TEST_CASE("the newest tokens of a ring are all there, under both numberings") {
  for (const TokenId tokens : {0, 1, 5, 12, 13, 14, 25, 26, 27, 200}) {
    CAPTURE(tokens);
    const Ring ring(tokens);
    const auto source = RingKeyValues<float>::create(ring.layout);
    REQUIRE(source.ok());
    const TokenId oldest = tokens < kCapacity ? 0 : tokens - kCapacity;
    CHECK(source->first_token() == oldest);
    CHECK(source->tokens() == tokens);
    int wrong = 0;
    for (int h = 0; h < kHeads; ++h) {
      for (TokenId t = oldest; t < tokens; ++t) {
        wrong += source->key(h, t)[0] != mark(false, h, t);
        wrong += source->value(h, t)[kValue - 1] != mark(true, h, t);
      }
    }
    CHECK(wrong == 0);
    const RingKeyValues<float> newest = source->newest();
    CHECK(newest.tokens() == tokens - oldest);
    CHECK(newest.first_token() == 0);
    CHECK(wrong_rows(newest, oldest) == 0);
    if (newest.tokens() > 0) {
      CHECK(wrong_rows(newest.newest(), oldest) == 0);
      CHECK(wrong_rows(newest, oldest + 1) > 0);  // another number is noticed
    }
  }
}

TEST_CASE("an older token reads the row that has taken its slot") {
  const Ring ring(20);
  const auto source = RingKeyValues<float>::create(ring.layout);
  REQUIRE(source.ok());
  CHECK(source->key(1, 3) == source->key(1, 3 + kCapacity));
  CHECK(source->key(1, 3)[0] == mark(false, 1, 3 + kCapacity));
}

TEST_CASE("tokens near the largest id are no trouble") {
  Ring ring(0);
  ring.layout.tokens = std::numeric_limits<TokenId>::max();
  ring.layout.capacity = ring.layout.tokens - 5;
  const auto source = RingKeyValues<float>::create(ring.layout);
  REQUIRE(source.ok());
  CHECK(source->first_token() == 5);
  const RingKeyValues<float> newest = source->newest();
  CHECK(newest.tokens() == ring.layout.capacity);
  CHECK(newest.key(0, newest.tokens() - 1) == source->key(0, 4));
}

template <class Change>
std::string refusal(const Change& change) {
  const Ring ring(3);
  RingKeyValues<float>::Layout layout = ring.layout;
  change(layout);
  const auto source = RingKeyValues<float>::create(layout);
  if (source.ok()) return "accepted";
  CHECK(source.status().code() == ErrorCode::kInvalidArgument);
  return source.status().message();
}

TEST_CASE("bad rings are refused with the field, the value and its bound") {
  using Layout = RingKeyValues<float>::Layout;
  CHECK(refusal([](Layout&) {}) == "accepted");
  CHECK(refusal([](Layout& l) { l.capacity = 0; }) == "capacity 0 must be at least 1");
  CHECK(refusal([](Layout& l) { l.capacity = -2; }) == "capacity -2 must be at least 1");
  CHECK(refusal([](Layout& l) { l.keys = nullptr; }) == "keys is null with 3 tokens");
  CHECK(refusal([](Layout& l) { l.tokens = -3; }) ==
        "tokens -3 must be at least 0 and kv_heads 2 at least 1");
  CHECK(refusal([](Layout& l) { l.key_strides.token = 1; }) ==
        "key_strides.token: 1 bytes are no multiple of the scalar's 4");
  CHECK(refusal([](Layout& l) { l.value_strides.head = 6; }) ==
        "value_strides.head: 6 bytes are no multiple of the scalar's 4");
}

TEST_CASE("rings are trivially copyable sources") {
  static_assert(KeyValueSource<RingKeyValues<bf16>>);
  static_assert(std::is_trivially_copyable_v<RingKeyValues<bf16, float>>);
}

}  // namespace

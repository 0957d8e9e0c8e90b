// SPDX-License-Identifier: Apache-2.0
// ListedKeyValues: each token is read from the pool row that its id names, and bad ids are refused.
#include "magicpig/core/listed_key_values.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "magicpig/core/first_tokens.hpp"
#include "marked_rows.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr int kHeads = 3;
constexpr int kKey = 5;
constexpr int kValue = 4;
constexpr TokenId kTokens = 40;
constexpr std::int64_t kRows = 101;

// Token t in row 7 t + 3 modulo the prime number of rows.
template <class Id>
struct Pool {
  Pool() : keys(kRows * kHeads * kKey), values(kRows * kHeads * kValue) {
    for (TokenId t = 0; t < kTokens; ++t) {
      const std::int64_t row = (7 * t + 3) % kRows;
      ids.push_back(static_cast<Id>(row));
      for (int h = 0; h < kHeads; ++h) {
        put_mark(keys.data() + (row * kHeads + h) * kKey, kKey, mark(false, h, t));
        put_mark(values.data() + (row * kHeads + h) * kValue, kValue, mark(true, h, t));
      }
    }
  }
  [[nodiscard]] typename ListedKeyValues<float, float, Id>::Layout layout() const {
    return {.keys = keys.data(),
            .values = values.data(),
            .key_strides = {.head = kKey * 4, .token = kHeads * kKey * 4},
            .value_strides = {.head = kValue * 4, .token = kHeads * kValue * 4},
            .ids = ids,
            .pool_rows = kRows,
            .kv_heads = kHeads,
            .head_dim = kKey,
            .value_dim = kValue};
  }

  std::vector<float> keys;
  std::vector<float> values;
  std::vector<Id> ids;
};

TEST_CASE_TEMPLATE("tokens are read from the rows of their ids", Id, std::int32_t, std::int64_t) {
  Pool<Id> pool;
  using Source = ListedKeyValues<float, float, Id>;
  const auto source = Source::create(pool.layout());
  REQUIRE(source.ok());
  CHECK(source->tokens() == kTokens);
  CHECK(wrong_rows(*source) == 0);
  CHECK(FirstTokens(*source, 9).tokens() == 9);
  CHECK(wrong_rows(FirstTokens(*source, 9)) == 0);
  CHECK(FirstTokens(*source, kTokens + 1).tokens() == kTokens);
  pool.ids[8] = pool.ids[7];  // a wrong id is noticed, in all heads
  const auto wrong = Source::create(pool.layout());
  REQUIRE(wrong.ok());
  CHECK(wrong_rows(*wrong) == 4 * kHeads);
}

TEST_CASE("offsets beyond 4 GiB do not wrap") {
  // Nothing is read: only where the row would lie.
  alignas(float) static const std::byte anchor[4] = {};
  const std::int64_t ids[] = {std::int64_t{1} << 33};
  const auto* base = reinterpret_cast<const float*>(anchor);
  const auto source =
      ListedKeyValues<float, float, std::int64_t>::create({.keys = base,
                                                           .values = base,
                                                           .key_strides = {.head = 4, .token = 4},
                                                           .value_strides = {.head = 4, .token = 4},
                                                           .ids = ids,
                                                           .pool_rows = std::int64_t{1} << 34,
                                                           .head_dim = 1,
                                                           .value_dim = 1});
  REQUIRE(source.ok());
  const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  CHECK(at(source->key(0, 0)) - at(base) == std::uint64_t{1} << 35);
}

template <class Change>
std::string refusal(const Change& change) {
  Pool<std::int32_t> pool;
  ListedKeyValues<float>::Layout layout = pool.layout();
  change(layout, pool.ids);
  const auto source = ListedKeyValues<float>::create(layout);
  if (source.ok()) return "accepted";
  CHECK(source.status().code() == ErrorCode::kInvalidArgument);
  return source.status().message();
}

TEST_CASE("bad lists are refused with the field, the value and its bound") {
  using Layout = ListedKeyValues<float>::Layout;
  using Ids = std::vector<std::int32_t>;
  CHECK(refusal([](Layout&, Ids&) {}) == "accepted");
  CHECK(refusal([](Layout&, Ids& ids) { ids[2] = -1; }) ==
        "ids[2] = -1 must lie in [0, pool_rows = 101)");
  CHECK(refusal([](Layout&, Ids& ids) { ids[39] = 101; }) ==
        "ids[39] = 101 must lie in [0, pool_rows = 101)");
  CHECK(refusal([](Layout& l, Ids&) { l.pool_rows = 0; }) ==
        "ids[0] = 3 must lie in [0, pool_rows = 0)");
  CHECK(refusal([](Layout& l, Ids&) { l.keys = nullptr; }) == "keys is null with 40 tokens");
  CHECK(refusal([](Layout& l, Ids&) { l.kv_heads = 0; }) ==
        "tokens 40 must be at least 0 and kv_heads 0 at least 1");
  CHECK(refusal([](Layout& l, Ids&) { l.key_strides.head = 5; }) ==
        "key_strides.head: 5 bytes are no multiple of the scalar's 4");
  CHECK(refusal([](Layout& l, Ids&) { l.value_strides.token = 2; }) ==
        "value_strides.token: 2 bytes are no multiple of the scalar's 4");
  // The size alone is looked at.
  const std::int32_t id = 0;
  CHECK(refusal([&](Layout& l, Ids&) {
          l.ids = {&id, std::size_t{1} << 31};
        }) == "2147483648 ids are 2^31 or more");
}

TEST_CASE("no ids are an empty cache, which needs no memory") {
  const auto source = ListedKeyValues<bf16>::create({.head_dim = 8, .value_dim = 8});
  REQUIRE(source.ok());
  CHECK(source->tokens() == 0);
}

TEST_CASE("listed views are trivially copyable sources") {
  static_assert(KeyValueSource<ListedKeyValues<q8_0, fp16, std::int64_t>>);
  static_assert(std::is_trivially_copyable_v<ListedKeyValues<float>>);
}

}  // namespace

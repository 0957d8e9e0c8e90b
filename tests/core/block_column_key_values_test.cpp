// SPDX-License-Identifier: Apache-2.0
// BlockColumnKeyValues: keys are gathered from the columns of their pages, values read where they
// lie; and the readers that copy rows.
#include "magicpig/core/block_column_key_values.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "magicpig/core/first_tokens.hpp"
#include "magicpig/core/one_head.hpp"
#include "magicpig/core/row_reader.hpp"

namespace {

using namespace magicpig;

constexpr int kHeads = 2;
constexpr int kKey = 6;
constexpr int kValue = 5;
constexpr int kPage = 4;
constexpr TokenId kTokens = 11;
constexpr std::int64_t kPages = 5;

// A number that tells where it belongs.
float mark(bool value, int head, TokenId token, int j) {
  return static_cast<float>((value ? 10000 : 0) + 1000 * head + 10 * token + j);
}

// Pools as vLLM has them, with tokens on pages 3, 0 and 4.
struct Pools {
  Pools() : keys(kPages * kHeads * kPage * kKey), values(kPages * kHeads * kPage * kValue) {
    for (int h = 0; h < kHeads; ++h) {
      for (TokenId t = 0; t < kTokens; ++t) {
        const int place = table[static_cast<std::size_t>(t / kPage)] * kHeads + h;
        const int slot = t % kPage;
        for (int j = 0; j < kKey; ++j) {
          keys[static_cast<std::size_t>((place * kKey + j) * kPage + slot)] = mark(false, h, t, j);
        }
        for (int j = 0; j < kValue; ++j) {
          values[static_cast<std::size_t>((place * kPage + slot) * kValue + j)] =
              mark(true, h, t, j);
        }
      }
    }
  }
  [[nodiscard]] BlockColumnKeyValues<float>::Layout layout() const {
    return {.keys = keys.data(),
            .values = values.data(),
            .block_table = table,
            .physical_pages = kPages,
            .page_tokens = kPage,
            .kv_heads = kHeads,
            .head_dim = kKey,
            .value_dim = kValue,
            .tokens = kTokens};
  }

  std::vector<std::int32_t> table = {3, 0, 4};
  std::vector<float> keys;
  std::vector<float> values;
};

// Scalars that are not those of their token, read through the helpers that take any source.
template <class Source>
int wrong_scalars(const Source& source, int first_head = 0) {
  KeyReader<Source> keys(source);
  ValueReader<Source> values(source);
  REQUIRE(keys.reserve(2, 3));
  REQUIRE(values.reserve(2, 3));
  int wrong = 0;
  for (int h = 0; h < source.kv_heads(); ++h) {
    for (TokenId t = 0; t < source.tokens(); ++t) {
      const float* key = keys.row(h, t, t % 2, t % 3);
      const float* value = values.row(h, t, t % 2, t % 3);
      for (int j = 0; j < kKey; ++j) wrong += key[j] != mark(false, first_head + h, t, j);
      for (int j = 0; j < kValue; ++j) wrong += value[j] != mark(true, first_head + h, t, j);
      keys.prefetch(h, t);
      values.prefetch(h, t);
    }
  }
  return wrong;
}

TEST_CASE("keys are gathered from columns, values read in rows") {
  Pools pools;
  const auto source = BlockColumnKeyValues<float>::dense(pools.layout());
  REQUIRE(source.ok());
  CHECK(wrong_scalars(*source) == 0);
  CHECK(FirstTokens(*source, 5).tokens() == 5);
  CHECK(wrong_scalars(FirstTokens(*source, 5)) == 0);
  CHECK(wrong_scalars(OneHead(*source, 1), 1) == 0);
  BlockColumnKeyValues<float>::Layout layout = pools.layout();
  layout.key_strides = {.page = kHeads * kKey * kPage * 4, .head = kKey * kPage * 4};
  layout.value_strides = {.page = kHeads * kPage * kValue * 4, .head = kPage * kValue * 4};
  const auto created = BlockColumnKeyValues<float>::create(layout);
  REQUIRE(created.ok());
  CHECK(wrong_scalars(*created) == 0);
}

TEST_CASE("a wrong page and a wrong stride are noticed") {
  Pools pools;
  pools.table[1] = 1;
  const auto page = BlockColumnKeyValues<float>::dense(pools.layout());
  REQUIRE(page.ok());
  CHECK(wrong_scalars(*page) == kHeads * kPage * (kKey + kValue));
  pools.table[1] = 0;
  BlockColumnKeyValues<float>::Layout layout = pools.layout();
  layout.key_strides = {.page = kHeads * kKey * kPage * 4, .head = kKey * 4};
  layout.value_strides = {.page = kHeads * kPage * kValue * 4, .head = kPage * kValue * 4};
  const auto stride = BlockColumnKeyValues<float>::create(layout);
  REQUIRE(stride.ok());
  CHECK(wrong_scalars(*stride) > 0);
}

TEST_CASE("values may be of a type in blocks") {
  const std::vector<fp16> keys(kPages * kPage * 32);
  const std::vector<q8_0> values(kPages * kPage * 2);
  const std::int32_t table[] = {2};
  const auto source = BlockColumnKeyValues<fp16, q8_0>::dense({.keys = keys.data(),
                                                               .values = values.data(),
                                                               .block_table = table,
                                                               .physical_pages = kPages,
                                                               .page_tokens = kPage,
                                                               .head_dim = 32,
                                                               .value_dim = 64,
                                                               .tokens = 3});
  REQUIRE(source.ok());
  CHECK(source->value(0, 1) == values.data() + 2 * (2 * kPage + 1));
}

TEST_CASE("readers of rows that lie in memory take no memory and give their addresses") {
  const std::vector<float> rows(24);
  const auto source = StridedKeyValues<float>::head_major(
      rows.data(), rows.data(), {.kv_heads = 2, .head_dim = 4, .value_dim = 4}, 3);
  REQUIRE(source.ok());
  KeyReader<StridedKeyValues<float>> keys(*source);
  static_assert(!decltype(keys)::kCopies);
  CHECK(keys.reserve(1 << 20, 1 << 30));
  CHECK(keys.row(1, 2, 100, 100) == source->key(1, 2));
  static_assert(RowCopies::of<StridedKeyValues<float>>(64, 64).key == 0);
  static_assert(RowCopies::of<BlockColumnKeyValues<bf16>>(64, 64).key == 128);
  static_assert(RowCopies::of<BlockColumnKeyValues<bf16>>(65, 64).key == 192);
  static_assert(RowCopies::of<BlockColumnKeyValues<bf16>>(64, 64).value == 0);
}

template <class Change>
std::string refusal(const Change& change) {
  const Pools pools;
  BlockColumnKeyValues<float>::Layout layout = pools.layout();
  change(layout);
  const auto source = BlockColumnKeyValues<float>::dense(layout);
  if (source.ok()) return "accepted";
  CHECK(source.status().code() == ErrorCode::kInvalidArgument);
  return source.status().message();
}

TEST_CASE("bad pages are refused with the field, the value and its bound") {
  using Layout = BlockColumnKeyValues<float>::Layout;
  CHECK(refusal([](Layout&) {}) == "accepted");
  CHECK(refusal([](Layout& l) { l.physical_pages = 4; }) ==
        "block_table[2] = 4 must lie in [0, physical_pages = 4)");
  CHECK(refusal([](Layout& l) { l.page_tokens = 3; }) ==
        "page_tokens 3 must be a power of 2 in [1, 1048576]");
  CHECK(refusal([](Layout& l) { l.tokens = 13; }) ==
        "block_table has 3 entries, 13 tokens on pages of 4 need 4");
  CHECK(refusal([](Layout& l) { l.kv_heads = 1 << 24; }) == "kv_heads 16777216 must be below 2^24");
  CHECK(refusal([](Layout& l) { l.values = nullptr; }) == "values is null with 11 tokens");
  BlockColumnKeyValues<float>::Layout layout = Pools().layout();
  layout.key_strides.head = 2;
  const auto source = BlockColumnKeyValues<float>::create(layout);
  REQUIRE(!source.ok());
  CHECK(std::string(source.status().message()) ==
        "key_strides.head: 2 bytes are no multiple of the scalar's 4");
}

TEST_CASE("column views are trivially copyable sources of copied keys") {
  using Source = BlockColumnKeyValues<bf16>;
  static_assert(KeyValueSource<Source> && !AddressableKeys<Source> && AddressableValues<Source>);
  static_assert(KeyValueSource<OneHead<Source>> && !AddressableKeys<OneHead<Source>>);
  static_assert(std::is_trivially_copyable_v<Source>);
}

}  // namespace

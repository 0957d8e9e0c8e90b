// SPDX-License-Identifier: Apache-2.0
// PagedKeyValues: pages of any order read the rows that they hold, and bad tables are refused.
#include "magicpig/core/paged_key_values.hpp"

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
constexpr TokenId kTokens = 75;

// Where an engine puts pages: float offsets of the key and the value row of (page, head, slot).
struct Format {
  const char* name;
  PageStrides keys;    // in floats
  PageStrides values;  // likewise
  std::int64_t values_at;
};

// A pool of `pages` pages, and what `kTokens` tokens on the pages of `table` leave in it.
std::vector<float> filled(const Format& format, int page_tokens, std::int64_t pages,
                          const std::vector<std::int32_t>& table) {
  std::vector<float> memory(
      static_cast<std::size_t>(pages * page_tokens * kHeads * (kKey + kValue)));
  for (int h = 0; h < kHeads; ++h) {
    for (TokenId t = 0; t < kTokens; ++t) {
      const std::int64_t page = table[static_cast<std::size_t>(t / page_tokens)];
      const auto at = [&](const PageStrides& s) {
        return page * s.page + h * s.head + t % page_tokens * s.token;
      };
      put_mark(memory.data() + at(format.keys), kKey, mark(false, h, t));
      put_mark(memory.data() + format.values_at + at(format.values), kValue, mark(true, h, t));
    }
  }
  return memory;
}

PageStrides bytes_of(const PageStrides& floats) {
  return {.page = floats.page * 4, .head = floats.head * 4, .token = floats.token * 4};
}

TEST_CASE("pages in any order and format give each token its own row") {
  for (const int page : {1, 16, 32, 64, 128}) {
    const std::int64_t pages = (kTokens + page - 1) / page + 3;
    const std::int64_t keys = std::int64_t{pages} * page * kHeads * kKey;
    const Format formats[] = {
        {"HND, keys and values apart",
         {page * kHeads * kKey, page * kKey, kKey},
         {page * kHeads * kValue, page * kValue, kValue},
         keys},
        {"NHD, keys and values apart",
         {page * kHeads * kKey, kKey, kHeads * kKey},
         {page * kHeads * kValue, kValue, kHeads * kValue},
         keys},
        {"NHD, values behind the keys of each page",
         {page * kHeads * (kKey + kValue), kKey, kHeads * kKey},
         {page * kHeads * (kKey + kValue), kValue, kHeads * kValue},
         page * kHeads * kKey},
        {"values next to keys",
         {page * kHeads * (kKey + kValue), kKey + kValue, kHeads * (kKey + kValue)},
         {page * kHeads * (kKey + kValue), kKey + kValue, kHeads * (kKey + kValue)},
         kKey}};
    std::vector<std::int32_t> table;  // backwards, then what is neither read nor checked
    for (auto p = static_cast<std::int32_t>(pages - 1); p >= 2; --p) table.push_back(p);
    table.push_back(-7);
    for (const Format& format : formats) {
      CAPTURE(page);
      CAPTURE(format.name);
      const std::vector<float> memory = filled(format, page, pages, table);
      const auto source = PagedKeyValues<float>::create({.keys = memory.data(),
                                                         .values = memory.data() + format.values_at,
                                                         .key_strides = bytes_of(format.keys),
                                                         .value_strides = bytes_of(format.values),
                                                         .block_table = table,
                                                         .physical_pages = pages,
                                                         .page_tokens = page,
                                                         .kv_heads = kHeads,
                                                         .head_dim = kKey,
                                                         .value_dim = kValue,
                                                         .tokens = kTokens});
      REQUIRE(source.ok());
      CHECK(wrong_rows(*source) == 0);
      CHECK(FirstTokens(*source, 20).tokens() == 20);
      CHECK(wrong_rows(FirstTokens(*source, 20)) == 0);
      CHECK(FirstTokens(*source, kTokens + 1).tokens() == kTokens);
    }
  }
}

PagedKeyValues<float>::Layout good_layout() {
  static const float memory[512] = {};
  static const std::int32_t table[] = {1, 0, 1};
  return {.keys = memory,
          .values = memory,
          .key_strides = {.page = 64, .head = 16, .token = 16},
          .value_strides = {.page = 64, .head = 16, .token = 16},
          .block_table = table,
          .physical_pages = 2,
          .page_tokens = 4,
          .kv_heads = 1,
          .head_dim = 4,
          .value_dim = 4,
          .tokens = 10};
}

TEST_CASE("a physical page may occur twice") {
  const auto source = PagedKeyValues<float>::create(good_layout());
  REQUIRE(source.ok());
  CHECK(source->key(0, 1) == source->key(0, 9));
  CHECK(source->value(0, 1) == source->value(0, 9));
  CHECK(source->key(0, 1) != source->key(0, 5));
}

TEST_CASE("wrong strides and wrong entries are seen by the tests above") {
  const Format format{"NHD", {8 * 15, 5, 15}, {8 * 12, 4, 12}, 12 * 8 * 15};
  const std::vector<std::int32_t> table = {3, 1, 4, 11, 5, 9, 2, 6, 0, 7};
  const std::vector<float> memory = filled(format, 8, 12, table);
  std::vector<std::int32_t> other = table;
  other[2] = 8;
  const PagedKeyValues<float>::Layout good{.keys = memory.data(),
                                           .values = memory.data() + format.values_at,
                                           .key_strides = bytes_of(format.keys),
                                           .value_strides = bytes_of(format.values),
                                           .block_table = table,
                                           .physical_pages = 12,
                                           .page_tokens = 8,
                                           .kv_heads = kHeads,
                                           .head_dim = kKey,
                                           .value_dim = kValue,
                                           .tokens = kTokens};
  const auto wrong = [](const PagedKeyValues<float>::Layout& layout) {
    const auto source = PagedKeyValues<float>::create(layout);
    return source.ok() ? wrong_rows(*source) : -1;
  };
  CHECK(wrong(good) == 0);
  PagedKeyValues<float>::Layout bad = good;
  bad.key_strides.token = 5 * 4;
  CHECK(wrong(bad) > 0);
  bad = good;
  bad.value_strides.head = 3 * 4;  // smaller, so that nothing outside is read
  CHECK(wrong(bad) > 0);
  bad = good;
  bad.block_table = other;
  CHECK(wrong(bad) == 2 * 2 * kHeads * 8);
}

TEST_CASE("offsets beyond 4 GiB do not wrap") {
  // Nothing is read: only where the row would lie.
  alignas(float) static const std::byte anchor[4] = {};
  static const std::int32_t table[] = {1 << 24};
  PagedKeyValues<float>::Layout layout = good_layout();
  layout.keys = reinterpret_cast<const float*>(anchor);
  layout.key_strides.page = std::int64_t{1} << 12;
  layout.block_table = table;
  layout.physical_pages = (1 << 24) + 1;
  layout.tokens = 1;
  const auto source = PagedKeyValues<float>::create(layout);
  REQUIRE(source.ok());
  const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  CHECK(at(source->key(0, 0)) - at(anchor) == std::uint64_t{1} << 36);
}

template <class Change>
std::string refusal(const Change& change) {
  PagedKeyValues<float>::Layout layout = good_layout();
  change(layout);
  const auto source = PagedKeyValues<float>::create(layout);
  if (source.ok()) return "accepted";
  CHECK(source.status().code() == ErrorCode::kInvalidArgument);
  return source.status().message();
}

TEST_CASE("bad pages are refused with the field, the value and its bound") {
  using Layout = PagedKeyValues<float>::Layout;
  static const std::int32_t negative[] = {1, -1, 1};
  CHECK(refusal([](Layout&) {}) == "accepted");
  CHECK(refusal([](Layout& l) { l.tokens = 12; }) == "accepted");
  CHECK(refusal([](Layout& l) { l.tokens = 13; }) ==
        "block_table has 3 entries, 13 tokens on pages of 4 need 4");
  CHECK(refusal([](Layout& l) { l.physical_pages = 1; }) ==
        "block_table[0] = 1 must lie in [0, physical_pages = 1)");
  CHECK(refusal([](Layout& l) { l.block_table = negative; }) ==
        "block_table[1] = -1 must lie in [0, physical_pages = 2)");
  CHECK(refusal([](Layout& l) { l.page_tokens = 0; }) ==
        "page_tokens 0 must be a power of 2 in [1, 1048576]");
  CHECK(refusal([](Layout& l) { l.page_tokens = 12; }) ==
        "page_tokens 12 must be a power of 2 in [1, 1048576]");
  CHECK(refusal([](Layout& l) { l.page_tokens = 1 << 21; }) ==
        "page_tokens 2097152 must be a power of 2 in [1, 1048576]");
  CHECK(refusal([](Layout& l) { l.page_tokens = 1 << 20; }) == "accepted");
  CHECK(refusal([](Layout& l) { l.key_strides.page = 62; }) ==
        "key_strides.page: 62 bytes are no multiple of the scalar's 4");
  CHECK(refusal([](Layout& l) { l.value_strides.token = 2; }) ==
        "value_strides.token: 2 bytes are no multiple of the scalar's 4");
  CHECK(refusal([](Layout& l) { l.values = nullptr; }) == "values is null with 10 tokens");
  CHECK(refusal([](Layout& l) { l.head_dim = 0; }) ==
        "head_dim 0 and value_dim 4 must lie in [1, 16384]");
}

TEST_CASE("an empty cache needs neither memory nor pages") {
  const auto source =
      PagedKeyValues<fp16>::create({.kv_heads = 2, .head_dim = 8, .value_dim = 8, .tokens = 0});
  REQUIRE(source.ok());
  CHECK(source->tokens() == 0);
}

TEST_CASE("paged views are trivially copyable sources") {
  static_assert(KeyValueSource<PagedKeyValues<q8_0, fp16>>);
  static_assert(std::is_trivially_copyable_v<PagedKeyValues<float>>);
}

}  // namespace

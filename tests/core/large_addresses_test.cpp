// SPDX-License-Identifier: Apache-2.0
// Where rows are found in caches of more than 2^31 and 2^32 scalars, in address space that is
// reserved and, but for a few pages, not there.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "magicpig/core/block_column_key_values.hpp"
#include "magicpig/core/ggml_key_values.hpp"
#include "magicpig/core/listed_key_values.hpp"
#include "magicpig/core/paged_key_values.hpp"
#include "magicpig/core/ring_key_values.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using namespace magicpig;

constexpr int kHeads = 4;
constexpr int kDim = 128;
constexpr TokenId kMost = INT32_MAX;  // tokens
constexpr Shape kShape{
    .query_heads = kHeads, .kv_heads = kHeads, .head_dim = kDim, .value_dim = kDim};
// By hand: 128 scalars of f32, bf16 and q4_0.
template <class T>
constexpr std::int64_t kRow = 0;
template <>
constexpr std::int64_t kRow<float> = 512;
template <>
constexpr std::int64_t kRow<bf16> = 256;
template <>
constexpr std::int64_t kRow<q4_0> = 72;

// Address space that nothing lies in.
class Reserved {
 public:
  explicit Reserved(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
#if defined(__linux__)
    void* at =
        ::mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    base_ = at == MAP_FAILED ? nullptr : static_cast<std::byte*>(at);
#endif
    if (base_ == nullptr) MESSAGE("NOT tested: ", bytes, " bytes of addresses cannot be reserved");
  }
  ~Reserved() {
#if defined(__linux__)
    if (base_ != nullptr) ::munmap(base_, bytes_);
#endif
  }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;

  [[nodiscard]] bool ok() const { return base_ != nullptr; }
  template <class T>
  [[nodiscard]] const T* at(std::int64_t bytes) const {
    return reinterpret_cast<const T*>(base_ + bytes);
  }
  // Makes memory of the pages of [begin, end); false where there is none.
  [[nodiscard]] bool open(std::int64_t begin, std::int64_t end) {
#if defined(__linux__)
    constexpr std::int64_t kPage = 65536;  // a multiple of every page that machines have
    const std::int64_t first = begin / kPage * kPage;
    const std::int64_t size = (end - first + kPage - 1) / kPage * kPage;
    return ::mprotect(base_ + first, static_cast<std::size_t>(size), PROT_READ | PROT_WRITE) == 0;
#else
    return begin == end;
#endif
  }
  [[nodiscard]] std::byte* bytes() { return base_; }

 private:
  std::size_t bytes_;
  std::byte* base_ = nullptr;
};

// The first tokens, those around the 2^31st and 2^32nd scalar of all heads and of one, and the
// last.
std::vector<TokenId> places(TokenId tokens) {
  std::vector<TokenId> found{0, 1, 2, tokens - 1};
  for (const TokenId t : {1 << 22, 1 << 23, 1 << 24, 1 << 25}) {
    for (const TokenId near : {t - 1, t, t + 1}) {
      if (near < tokens) found.push_back(near);
    }
  }
  return found;
}

// Whether keys and values are at key_at(h, t) and value_at(h, t) bytes from `base`.
template <class Source, class KeyAt, class ValueAt>
void check_rows(const Source& source, const Reserved& base, const KeyAt& key_at,
                const ValueAt& value_at) {
  using K = typename Source::KeyScalar;
  using V = typename Source::ValueScalar;
  for (const TokenId t : places(source.tokens())) {
    for (const int h : {0, kHeads - 1}) {
      CAPTURE(t);
      CAPTURE(h);
      CHECK(source.key(h, t) == base.at<K>(key_at(h, t)));
      CHECK(source.value(h, t) == base.at<V>(value_at(h, t)));
    }
  }
}

TEST_CASE_TEMPLATE("strides reach the last row of 2^31 - 1 tokens", T, float, bf16, q4_0) {
  constexpr std::int64_t kAll = std::int64_t{kMost} * kHeads * kRow<T>;  // keys, or values
  const Reserved memory(2 * kAll);
  if (!memory.ok()) return;
  const auto* keys = memory.at<T>(0);
  const auto* values = memory.at<T>(kAll);
  const auto token_major = StridedKeyValues<T>::token_major(keys, values, kShape, kMost);
  REQUIRE(token_major.ok());
  const auto nhd = [](int h, std::int64_t t) { return (t * kHeads + h) * kRow<T>; };
  check_rows(*token_major, memory, nhd, [&](int h, TokenId t) { return kAll + nhd(h, t); });
  const auto head_major = StridedKeyValues<T>::head_major(keys, values, kShape, kMost);
  REQUIRE(head_major.ok());
  const auto hnd = [](int h, std::int64_t t) { return (std::int64_t{h} * kMost + t) * kRow<T>; };
  check_rows(*head_major, memory, hnd, [&](int h, TokenId t) { return kAll + hnd(h, t); });
  // One by hand: row (3, 2^31 - 2) is number 8,589,934,587 of 256 bytes.
  if (sizeof(T) == sizeof(bf16)) {
    CHECK(token_major->key(3, kMost - 1) == memory.at<T>(2199023254272));
  }
  // Of ggml the second of two sequences, in the addresses of both.
  const auto tensor = [](const T* data) {
    return GgmlTensor{
        .data = data,
        .type = kGgmlType<T>,
        .ne = {kDim, kMost / 2, kHeads, 2},
        .nb = {sizeof(T), kHeads * kRow<T>, kRow<T>, std::int64_t{kMost / 2} * kHeads * kRow<T>}};
  };
  const auto ggml = ggml_key_values<T, T>(tensor(keys), tensor(values), 1);
  REQUIRE(ggml.ok());
  const auto cell = [&](int h, std::int64_t t) { return nhd(h, kMost / 2 + t); };
  check_rows(*ggml, memory, cell, [&](int h, TokenId t) { return kAll + cell(h, t); });
}

TEST_CASE_TEMPLATE("pages reach the last row of 2^31 - 1 tokens", T, float, bf16, q4_0) {
  constexpr std::int64_t kPage = 1 << 16;
  constexpr std::int64_t kPages = std::int64_t{1} << 15;
  constexpr std::int64_t kAll = kPages * kPage * kHeads * kRow<T>;
  const Reserved memory(2 * kAll);
  if (!memory.ok()) return;
  std::vector<std::int32_t> table;  // backwards
  for (std::int64_t i = kPages - 1; i >= 0; --i) table.push_back(static_cast<std::int32_t>(i));
  constexpr PageStrides kStrides{
      .page = kPage * kHeads * kRow<T>, .head = kPage * kRow<T>, .token = kRow<T>};
  const auto paged = PagedKeyValues<T>::create({.keys = memory.at<T>(0),
                                                .values = memory.at<T>(kAll),
                                                .key_strides = kStrides,
                                                .value_strides = kStrides,
                                                .block_table = table,
                                                .physical_pages = kPages,
                                                .page_tokens = kPage,
                                                .kv_heads = kHeads,
                                                .head_dim = kDim,
                                                .value_dim = kDim,
                                                .tokens = kMost});
  REQUIRE(paged.ok());
  const auto at = [](int h, std::int64_t t) {
    return (((kPages - 1 - t / kPage) * kHeads + h) * kPage + t % kPage) * kRow<T>;
  };
  check_rows(*paged, memory, at, [&](int h, TokenId t) { return kAll + at(h, t); });
}

TEST_CASE("physical pages beyond the 2^31st row are found") {
  // 64 tokens on pages at the end of a pool of 2^31 - 1 pages.
  constexpr std::int64_t kPageBytes = 16 * kHeads * 72;
  constexpr std::int64_t kPages = INT32_MAX;
  const Reserved memory(kPages * kPageBytes);
  if (!memory.ok()) return;
  const std::vector<std::int32_t> table{INT32_MAX - 1, 1 << 30, 1 << 27, 0};
  constexpr PageStrides kStrides{.page = kPageBytes, .head = 72, .token = kHeads * 72};
  const auto paged = PagedKeyValues<q4_0>::create({.keys = memory.at<q4_0>(0),
                                                   .values = memory.at<q4_0>(0),
                                                   .key_strides = kStrides,
                                                   .value_strides = kStrides,
                                                   .block_table = table,
                                                   .physical_pages = kPages,
                                                   .page_tokens = 16,
                                                   .kv_heads = kHeads,
                                                   .head_dim = kDim,
                                                   .value_dim = kDim,
                                                   .tokens = 64});
  REQUIRE(paged.ok());
  for (TokenId t = 0; t < 64; ++t) {
    const std::int64_t page = table[static_cast<std::size_t>(t / 16)];
    CHECK(paged->key(2, t) == memory.at<q4_0>((page * 16 + t % 16) * 288 + 144));
    CHECK(paged->value(2, t) == paged->key(2, t));
  }
}

TEST_CASE_TEMPLATE("rings reach the last slot of 2^31 - 1", T, float, bf16, q4_0) {
  constexpr std::int64_t kAll = std::int64_t{kMost} * kHeads * kRow<T>;
  const Reserved memory(2 * kAll);
  if (!memory.ok()) return;
  constexpr ByteStrides kStrides{.head = kRow<T>, .token = kHeads * kRow<T>};
  const auto ring = [&](TokenId capacity) {
    return RingKeyValues<T>::create({.keys = memory.at<T>(0),
                                     .values = memory.at<T>(kAll),
                                     .key_strides = kStrides,
                                     .value_strides = kStrides,
                                     .capacity = capacity,
                                     .kv_heads = kHeads,
                                     .head_dim = kDim,
                                     .value_dim = kDim,
                                     .tokens = kMost});
  };
  const auto row = [](int h, std::int64_t slot) { return (slot * kHeads + h) * kRow<T>; };
  REQUIRE(ring(kMost).ok());
  check_rows(*ring(kMost), memory, row, [&](int h, TokenId t) { return kAll + row(h, t); });
  // It has gone round: token i of newest() is in slot (2^31 - 1 + i) % capacity.
  constexpr TokenId kSlots = (1 << 30) + 77;
  const auto round = [&](int h, TokenId t) {
    return row(h, (std::int64_t{kMost} - kSlots + t) % kSlots);
  };
  REQUIRE(ring(kSlots).ok());
  check_rows(ring(kSlots)->newest(), memory, round,
             [&](int h, TokenId t) { return kAll + round(h, t); });
}

TEST_CASE_TEMPLATE("lists reach the last row of pools of 2^31 - 1 and of 2^34", Id, std::int32_t,
                   std::int64_t) {
  constexpr std::int64_t kRows = sizeof(Id) == 4 ? std::int64_t{INT32_MAX} : std::int64_t{1} << 34;
  constexpr std::int64_t kAll = kRows * kHeads * 72;
  const Reserved memory(2 * kAll);
  if (!memory.ok()) return;
  const std::vector<Id> ids{static_cast<Id>(kRows - 1), 0, static_cast<Id>(kRows / 2), 1 << 25};
  constexpr ByteStrides kStrides{.head = 72, .token = kHeads * 72};
  const auto listed = ListedKeyValues<q4_0, q4_0, Id>::create({.keys = memory.at<q4_0>(0),
                                                               .values = memory.at<q4_0>(kAll),
                                                               .key_strides = kStrides,
                                                               .value_strides = kStrides,
                                                               .ids = ids,
                                                               .pool_rows = kRows,
                                                               .kv_heads = kHeads,
                                                               .head_dim = kDim,
                                                               .value_dim = kDim});
  REQUIRE(listed.ok());
  const auto at = [&](int h, TokenId t) {
    return (std::int64_t{ids[static_cast<std::size_t>(t)]} * kHeads + h) * 72;
  };
  check_rows(*listed, memory, at, [&](int h, TokenId t) { return kAll + at(h, t); });
}

TEST_CASE_TEMPLATE("columns are read to the last of 2^31 - 1 tokens", T, float, bf16) {
  constexpr int kPage = 1 << 16;
  constexpr std::int64_t kPages = std::int64_t{1} << 15;
  constexpr std::int64_t kBlock = kPage * kRow<T>;  // of a page and KV head
  constexpr std::int64_t kAll = kPages * kHeads * kBlock;
  Reserved memory(2 * kAll);
  if (!memory.ok()) return;
  std::vector<std::int32_t> table;
  for (std::int64_t i = kPages - 1; i >= 0; --i) table.push_back(static_cast<std::int32_t>(i));
  const auto columns = BlockColumnKeyValues<T>::dense({.keys = memory.at<T>(0),
                                                       .values = memory.at<T>(kAll),
                                                       .block_table = table,
                                                       .physical_pages = kPages,
                                                       .page_tokens = kPage,
                                                       .kv_heads = kHeads,
                                                       .head_dim = kDim,
                                                       .value_dim = kDim,
                                                       .tokens = kMost});
  REQUIRE(columns.ok());
  const auto block = [](int h, std::int64_t t) {
    return ((kPages - 1 - t / kPage) * kHeads + h) * kBlock;
  };
  const int h = kHeads - 1;
  for (const TokenId t : places(kMost)) {
    CAPTURE(t);
    CHECK(columns->value(h, t) == memory.at<T>(kAll + block(h, t) + t % kPage * kRow<T>));
    const auto bits = [](int j) { return static_cast<unsigned char>(3 * j + 1); };
    for (std::int64_t j = 0; j < kDim; ++j) {
      const std::int64_t at = block(h, t) + (j * kPage + t % kPage) * std::int64_t{sizeof(T)};
      REQUIRE(memory.open(at, at + std::int64_t{sizeof(T)}));
      memory.bytes()[at] = std::byte{bits(static_cast<int>(j))};
    }
    T key[kDim];
    columns->read_key(h, t, key);
    bool same = true;
    for (int j = 0; j < kDim; ++j) {
      const T copied = key[j];
      same &= *reinterpret_cast<const unsigned char*>(&copied) == bits(j);
    }
    CHECK(same);
  }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Indexes come back from their blobs bit by bit, and no blob that is not one changes an index.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "allocations.hpp"
#include "magicpig/attention.hpp"
#include "problem.hpp"
#include "random.hpp"
#include "reseal.hpp"
#include "same_index.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 4, .kv_heads = 2, .head_dim = 12, .value_dim = 6};

struct Codes {
  using Index = Signatures<HadamardQuantiser>;
  HadamardQuantiser maker = std::move(*HadamardQuantiser::create(12, 2, 5));
  HadamardQuantiser other = std::move(*HadamardQuantiser::create(12, 2, 6));
  static Index make(const HadamardQuantiser& quantiser, int value_dim = 6, int kv_heads = 2) {
    return std::move(*Index::create(quantiser, {.kv_heads = kv_heads, .value_dim = value_dim}));
  }
  [[nodiscard]] std::size_t estimate(TokenId tokens) const {
    return Index::estimate_bytes(maker.shape(), {.kv_heads = 2, .value_dim = 6}, tokens);
  }
};

struct Tables {
  using Index = BucketTables<SimHash>;
  SimHash maker = std::move(*SimHash::create({.dim = 12, .bits = 4, .tables = 5, .seed = 5}));
  SimHash other = std::move(*SimHash::create({.dim = 12, .bits = 4, .tables = 5, .seed = 6}));
  static Index make(const SimHash& family, int segment_tokens = 128, int kv_heads = 2) {
    return std::move(*Index::create(
        family, {.kv_heads = kv_heads, .segment_tokens = segment_tokens, .seal_tokens = 1}));
  }
  [[nodiscard]] std::size_t estimate(TokenId tokens) const {
    return Index::estimate_bytes(maker, {.kv_heads = 2, .segment_tokens = 128}, tokens);
  }
};

template <class Kind>
struct Setting {
  Kind kind;
  Problem<float> problem;
  SerialExecutor executor;

  explicit Setting(TokenId tokens)
      : problem({.shape = kShape, .tokens = tokens, .key_offset = 0.4}) {}

  [[nodiscard]] typename Kind::Index build(TokenRange range) {
    auto index = Kind::make(kind.maker);
    CHECK(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
    return index;
  }
};

template <class Index>
std::vector<std::byte> save(const Index& index) {
  std::vector<std::byte> bytes(index.saved_bytes());
  CHECK(index.save(bytes).ok());
  return bytes;
}

template <class Index>
void check_same(const Index& a, const Index& b) {
  const char* difference = index_difference(a, b);
  CHECK_MESSAGE(difference == nullptr, std::string(difference != nullptr ? difference : ""));
  CHECK(a.erased().count(a.indexed()) == b.erased().count(b.indexed()));
}

template <class Index>
void check_refused(Index& index, std::span<const std::byte> bytes, const char* words) {
  const auto before = save(index);
  const Status status = index.load(bytes);
  CHECK(status.code() == ErrorCode::kBadBlob);
  CHECK_MESSAGE(std::string(status.message()).find(words) != std::string::npos,
                std::string(status.message()), ", wanted ", std::string(words));
  CHECK(save(index) == before);
}

TEST_CASE_TEMPLATE("an index comes back from its blob and goes on as if it had never left", Kind,
                   Codes, Tables) {
  for (const TokenRange range :
       {TokenRange{.begin = 3, .end = 3}, TokenRange{.begin = 0, .end = 1},
        TokenRange{.begin = 4, .end = 260}, TokenRange{.begin = 7, .end = 5000}}) {
    CAPTURE(range.end);
    Setting<Kind> s(5100);
    auto index = s.build(range);
    if (range.size() > 100) {
      REQUIRE(index.erase(std::vector<TokenId>{range.begin, range.begin + 70, range.end - 1}).ok());
    }
    const auto blob = save(index);
    auto loaded = s.build({.begin = 1, .end = 50});
    const Status status = loaded.load(blob);
    REQUIRE_MESSAGE(status.ok(), std::string(status.message()));
    check_same(index, loaded);
    CHECK(loaded.erased().has(range.begin) == index.erased().has(range.begin));
    CHECK(save(loaded) == blob);
    // Both go on alike.
    for (auto* one : {&index, &loaded}) {
      REQUIRE(one->append(make_backend<ScalarOps>(s.executor), s.problem.source(), range.end + 90)
                  .ok());
    }
    check_same(index, loaded);
    for (auto* one : {&index, &loaded}) REQUIRE(one->truncate(range.begin + range.size() / 2).ok());
    check_same(index, loaded);
  }
}

TEST_CASE_TEMPLATE("an index takes the bytes that were estimated before", Kind, Codes, Tables) {
  for (const TokenId tokens : {0, 1, 127, 128, 129, 4096, 4097, 5000}) {
    CAPTURE(tokens);
    Setting<Kind> s(5000);
    CHECK(s.build({.begin = 0, .end = tokens}).bytes() == s.kind.estimate(tokens));
  }
}

TEST_CASE_TEMPLATE("any changed byte is found, and the index stays as it was", Kind, Codes,
                   Tables) {
  Setting<Kind> s(300);
  auto index = s.build({.begin = 2, .end = 200});
  const auto good = save(s.build({.begin = 4, .end = 290}));
  Random random(3);
  for (int i = 0; i < 200; ++i) {
    auto bytes = good;
    const auto at =
        static_cast<std::size_t>(i < 40 ? i : random.below(static_cast<int>(bytes.size())));
    bytes[at] ^= static_cast<std::byte>(1 << random.below(8));
    CAPTURE(at);
    check_refused(index, bytes, "blob: ");
  }
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{39}, std::size_t{40}, good.size() - 1}) {
    check_refused(index, std::span(good).first(size), "blob: ");
  }
}

// Overwrites bytes of a blob whose checksum is then right again: someone means it.
template <class T>
std::vector<std::byte> tampered(std::vector<std::byte> bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
  reseal(bytes);
  return bytes;
}

constexpr std::size_t kFirst = sizeof(BlobHeader);
constexpr std::size_t kRange = kFirst + 16;    // kv_heads, one more number, the fingerprint
constexpr std::size_t kCentres = kRange + 16;  // begin, end, erased words, of which there are none

TEST_CASE("signatures refuse blobs of others and such as cannot be") {
  Setting<Codes> s(300);
  auto index = s.build({.begin = 2, .end = 200});
  const auto good = save(s.build({.begin = 4, .end = 290}));
  check_refused(index, save(Tables::make(Tables{}.maker)), "kind is 2, wanted is 1");
  check_refused(index, save(Codes::make(s.kind.other)), "quantiser is");
  check_refused(index, save(Codes::make(s.kind.maker, 0)), "value_dim is 0, wanted is 6");
  check_refused(index, save(Codes::make(s.kind.maker, 6, 3)), "kv_heads is 3, wanted is 2");
  check_refused(index, tampered(good, kRange, -1), "begin -1 is out of bounds");
  check_refused(index, tampered(good, kRange + 4, 3), "end 3 is out of bounds");
  check_refused(index, tampered(good, kRange + 4, INT32_MAX), "end 2147483647 is out of bounds");
  // As many tokens, but later than signatures end.
  check_refused(index, tampered(tampered(good, kRange, INT32_MAX - 286), kRange + 4, INT32_MAX),
                "end 2147483647 is out of bounds");
  check_refused(index, tampered(good, kRange + 4, 1 << 30), "codes: 1073741820 times");
  check_refused(index, tampered(good, kRange + 4, 289), "blob: ");
  check_refused(index, tampered(good, kRange + 8, std::uint64_t{7}), "erased words 7");
  check_refused(index, tampered(good, kRange + 8, ~std::uint64_t{0}), "erased words -1");
  check_refused(index, tampered(good, kCentres, 0x7fc00000), "centre 0 is out of bounds");
  // Three blocks of codes of one KV head, then its factors, then its norms.
  const std::size_t factors = kCentres + 2 * (12 + 6) * 4 + 3 * 64 * 8;
  CHECK(index.rows_per_block() == 8);
  check_refused(index, tampered(good, factors, std::uint16_t{0x7f80}), "factor 0 is out of bounds");
  check_refused(index, tampered(good, factors + 2, std::uint16_t{0x8000}), "factor 1");
  check_refused(index, tampered(good, factors + 286 * 2, std::int16_t{2049}), "value norm 2049");
  std::vector<std::byte> small(index.saved_bytes() - 1);
  CHECK(index.save(small).code() == ErrorCode::kWorkspaceTooSmall);
}

TEST_CASE("erased tokens outside an index are refused") {
  Setting<Codes> s(300);
  auto index = s.build({.begin = 70, .end = 200});
  REQUIRE(index.erase(std::vector<TokenId>{80}).ok());
  const auto good = save(index);
  check_refused(index, tampered(good, kRange + 16, std::uint64_t{1}), "erased tokens 2");
}

TEST_CASE("tables refuse blobs of others and such as cannot be") {
  Setting<Tables> s(300);
  auto index = s.build({.begin = 2, .end = 200});
  const auto good = save(s.build({.begin = 4, .end = 290}));
  check_refused(index, save(Codes::make(Codes{}.maker)), "kind is 1, wanted is 2");
  check_refused(index, save(Tables::make(s.kind.other)), "family is");
  check_refused(index, save(Tables::make(s.kind.maker, 64)), "segment_tokens is 64, wanted is 128");
  check_refused(index, save(Tables::make(s.kind.maker, 128, 1)), "kv_heads is 1, wanted is 2");
  check_refused(index, tampered(good, kRange + 4, 1 << 30), "tables: 1073741820 times");
  const std::size_t norms = kCentres + 2 * 12 * 4;
  check_refused(index, tampered(good, norms, -1.0F), "norm 0 is out of bounds");
  const std::size_t ids = norms + 2 * 286 * 4;
  check_refused(index, tampered(good, ids, std::uint16_t{128}), "table 0 is out of bounds");
  std::uint16_t second = 0;
  std::memcpy(&second, good.data() + ids + 2, 2);
  check_refused(index, tampered(good, ids, second), "table 0 is out of bounds");
  const std::size_t offsets = ids + 5 * 128 * 2;
  check_refused(index, tampered(good, offsets, std::uint16_t{1}), "table 0 is out of bounds");
  check_refused(index, tampered(good, offsets + 16 * 2, std::uint16_t{127}), "table 0");
  check_refused(index, tampered(good, offsets + 2, std::uint16_t{65535}), "table 0");
}

TEST_CASE_TEMPLATE("no memory while loading leaves the index as it was", Kind, Codes, Tables) {
  Setting<Kind> s(300);
  auto index = s.build({.begin = 2, .end = 200});
  REQUIRE(index.erase(std::vector<TokenId>{9}).ok());
  const auto blob = save(index);
  auto loaded = s.build({.begin = 5, .end = 90});
  const auto before = save(loaded);
  int failures = 0;
  for (bool done = false; !done; ++failures) {
    fail_allocations_after(failures);
    const Status status = loaded.load(blob);
    fail_allocations_after(-1);
    done = status.ok();
    if (done) break;
    CHECK(status.code() == ErrorCode::kOutOfMemory);
    CHECK(save(loaded) == before);
  }
  CHECK(failures > 4);
  CHECK(save(loaded) == blob);
}

}  // namespace

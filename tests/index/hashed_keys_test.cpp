// SPDX-License-Identifier: Apache-2.0
// Bucket tables made from hashes are those made from the keys, to the byte.
#include "magicpig/index/hashed_keys.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "allocations.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/hash/rademacher.hpp"
#include "problem.hpp"

namespace magicpig::test {
namespace {

constexpr int kHeads = 2;
constexpr int kDim = 20;
constexpr TokenId kTokens = 500;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

using Tables = BucketTables<SimHash>;

template <class Family>
std::vector<std::byte> blob_of(const BucketTables<Family>& index) {
  std::vector<std::byte> blob(index.saved_bytes());
  CHECK(index.save(blob).ok());
  return blob;
}

struct NoWorkers {
  [[nodiscard]] static int workers() { return 0; }
  template <class Body>
  void parallel_for(int, const Body&) {}
};

// Codes and norms of a range, as a host makes them that has nothing but a family and centres.
struct Hashes {
  TokenRange tokens;
  std::vector<Code> codes;   // [kv_heads, tables, tokens]
  std::vector<float> norms;  // [kv_heads, tokens]
  std::vector<float> centres;

  template <class Family, class Source>
  Hashes(const Family& family, const Source& source, TokenRange range,
         std::span<const float> subtracted)
      : tokens(range), centres(subtracted.begin(), subtracted.end()) {
    const auto tables = static_cast<std::size_t>(family.tables());
    const auto count = static_cast<std::size_t>(range.size());
    codes.resize(kHeads * tables * count);
    norms.resize(kHeads * count);
    std::vector<float> centred(kDim);
    std::vector<float> scratch(family.scratch_floats(1));
    std::vector<Code> own(tables);
    for (std::size_t h = 0; h < kHeads; ++h) {
      for (std::size_t t = 0; t < count; ++t) {
        const auto* key = source.key(static_cast<int>(h), range.begin + static_cast<TokenId>(t));
        double square = 0.0;
        for (std::size_t j = 0; j < kDim; ++j) {
          centred[j] = to_float(key[j]) - centres[h * kDim + j];
          square += static_cast<double>(centred[j]) * static_cast<double>(centred[j]);
        }
        norms[h * count + t] = static_cast<float>(std::sqrt(square));
        family.template hash<ScalarOps>(centred.data(), 1, own.data(), scratch.data());
        for (std::size_t l = 0; l < tables; ++l) codes[(h * tables + l) * count + t] = own[l];
      }
    }
  }

  [[nodiscard]] HashedKeys view() const {
    return {.tokens = tokens,
            .codes = codes.data(),
            .norms = norms.data(),
            .centres = {.keys = centres}};
  }
};

// Keys with their index in segments of 64 tokens, and what to make others with.
struct Setup {
  SerialExecutor serial;
  CpuBackend<ScalarOps, SerialExecutor> backend = make_backend<ScalarOps>(serial);
  Problem<fp16> problem{{.shape = {.query_heads = 2, .kv_heads = 2, .head_dim = 20, .value_dim = 3},
                         .tokens = kTokens,
                         .seed = 8,
                         .key_offset = 0.7}};
  StridedKeyValues<fp16> source = problem.source();
  SimHash family;

  explicit Setup(int bits = 5, int tables = 9)
      : family(
            std::move(*SimHash::create({.dim = kDim, .bits = bits, .tables = tables, .seed = 6}))) {
  }
  Setup(const Setup&) = delete;

  [[nodiscard]] Tables make(int seal_tokens = 1, int seal_steps = 1) const {
    return std::move(*Tables::create(family, {.kv_heads = kHeads,
                                              .segment_tokens = 64,
                                              .seal_tokens = seal_tokens,
                                              .seal_steps = seal_steps}));
  }
  [[nodiscard]] Tables built(TokenRange range, int seal_tokens = 1, int seal_steps = 1) const {
    Tables index = make(seal_tokens, seal_steps);
    CHECK(index.build(backend, source, range).ok());
    return index;
  }
  [[nodiscard]] Hashes hashes(TokenRange range, const Tables& centred_like) const {
    return Hashes(family, source, range, centred_like.centres().keys);
  }
};

TEST_CASE("HashedKeys.build_the_index_of_their_keys") {
  for (const auto& [bits, tables] : {std::pair{1, 1}, std::pair{5, 9}, std::pair{15, 2}}) {
    const Setup s(bits, tables);
    for (const TokenRange range : {TokenRange{0, 1}, TokenRange{4, 67}, TokenRange{4, 68},
                                   TokenRange{4, 69}, TokenRange{0, 500}}) {
      CAPTURE(range.begin);
      CAPTURE(range.end);
      const Tables expected = s.built(range);
      const Hashes hashes = s.hashes(range, expected);
      // Over an index of something else.
      Tables index = s.built({.begin = 100, .end = 300});
      REQUIRE(index.build(s.backend, hashes.view()).ok());
      CHECK(index.indexed() == range);
      CHECK(blob_of(index) == blob_of(expected));
      const auto pool = std::move(*ThreadPool::create(3));
      REQUIRE(index.build(make_backend<ScalarOps>(*pool), hashes.view()).ok());
      CHECK(blob_of(index) == blob_of(expected));
      CHECK(index.bytes() == expected.bytes());
    }
  }
}

TEST_CASE("HashedKeys.may_be_of_any_family_and_centres") {
  const Setup s;
  const auto family = RademacherHash::create({.dim = kDim, .bits = 6, .tables = 7, .seed = 3});
  REQUIRE(family.ok());
  std::vector<float> centres(kHeads * kDim);
  for (std::size_t i = 0; i < centres.size(); ++i) centres[i] = 0.1F * static_cast<float>(i);
  const TokenRange range{.begin = 9, .end = 310};
  const Hashes hashes(*family, s.source, range, centres);
  auto index = BucketTables<RademacherHash>::create(*family, {.kv_heads = kHeads});
  auto expected = BucketTables<RademacherHash>::create(*family, {.kv_heads = kHeads});
  REQUIRE(expected->build(s.backend, s.source, range, {.keys = centres}).ok());
  REQUIRE(index->build(s.backend, hashes.view()).ok());
  CHECK(blob_of(*index) == blob_of(*expected));
}

TEST_CASE("HashedKeys.are_appended_in_any_steps_and_truncated") {
  const Setup s;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    Tables plain = s.built({.begin = 3, .end = 80});
    // Blocks of tokens are not waited for.
    Tables index = s.built({.begin = 3, .end = 80}, 1024);
    for (TokenId end = 80; end < kTokens;) {
      const TokenId begin = end;
      end = std::min(kTokens, begin + random.between(1, 150));
      Hashes hashes = s.hashes({.begin = begin, .end = end}, plain);
      hashes.centres.clear();  // not looked at
      REQUIRE(index.append(s.backend, hashes.view()).ok());
      REQUIRE(plain.append(s.backend, s.source, end).ok());
      CHECK(index.indexed() == TokenRange{3, end});
      CHECK(blob_of(index) == blob_of(plain));
      if (random.between(0, 3) != 0) continue;
      end -= random.between(1, end - begin);
      REQUIRE(index.truncate(end).ok());
      REQUIRE(plain.truncate(end).ok());
      CHECK(blob_of(index) == blob_of(plain));
    }
  }
}

TEST_CASE("HashedKeys.and_keys_may_be_appended_in_turn") {
  const Setup s;
  Tables plain = s.built({.begin = 0, .end = 70});
  Tables index = s.make();
  REQUIRE(index.build(s.backend, s.hashes({.begin = 0, .end = 70}, plain).view()).ok());
  REQUIRE(index.append(s.backend, s.source, 150).ok());
  REQUIRE(index.append(s.backend, s.hashes({.begin = 150, .end = 333}, plain).view()).ok());
  auto fork = index.fork();
  REQUIRE(fork.ok());
  REQUIRE(fork->append(s.backend, s.hashes({.begin = 333, .end = 400}, plain).view()).ok());
  REQUIRE(plain.append(s.backend, s.source, 333).ok());
  CHECK(blob_of(index) == blob_of(plain));
  REQUIRE(index.append(s.backend, s.source, 400).ok());
  REQUIRE(plain.append(s.backend, s.source, 400).ok());
  CHECK(blob_of(index) == blob_of(plain));
  CHECK(blob_of(*fork) == blob_of(plain));
}

TEST_CASE("HashedKeys.take_the_place_of_a_block_under_way") {
  const Setup s;
  Tables plain = s.built({.begin = 4, .end = 100});
  Tables index = s.built({.begin = 4, .end = 100}, 40, 16);
  for (TokenId end = 140; end < 145; ++end) REQUIRE(index.append(s.backend, s.source, end).ok());
  REQUIRE(index.indexed().end == 100);
  // What is refused, and nothing at all, leave the block under way.
  const std::size_t under_way = index.bytes();
  CHECK_FALSE(index.append(s.backend, s.hashes({.begin = 101, .end = 120}, plain).view()).ok());
  CHECK(index.append(s.backend, HashedKeys{.tokens = {.begin = 100, .end = 100}}).ok());
  CHECK(index.bytes() == under_way);
  REQUIRE(index.append(s.backend, s.hashes({.begin = 100, .end = 103}, plain).view()).ok());
  REQUIRE(plain.append(s.backend, s.source, 103).ok());
  CHECK(index.bytes() < under_way);
  CHECK(blob_of(index) == blob_of(plain));
  // Blocks are counted from there.
  for (TokenId end = 145; index.indexed().end == 103 && end < 170; ++end) {
    REQUIRE(index.append(s.backend, s.source, end).ok());
  }
  REQUIRE(plain.append(s.backend, s.source, 143).ok());
  CHECK(blob_of(index) == blob_of(plain));
}

TEST_CASE("HashedKeys.of_no_token_are_an_empty_build_and_no_change") {
  const Setup s;
  Tables index = s.built({.begin = 4, .end = 100});
  Tables expected = s.built({.begin = 4, .end = 100});
  CHECK(index.append(s.backend, HashedKeys{.tokens = {.begin = 7, .end = 7}}).ok());
  CHECK(blob_of(index) == blob_of(expected));
  REQUIRE(index.build(s.backend, HashedKeys{.tokens = {.begin = 70, .end = 70}}).ok());
  REQUIRE(expected.build(s.backend, s.source, {.begin = 70, .end = 70}).ok());
  CHECK(index.indexed() == TokenRange{70, 70});
  CHECK(blob_of(index) == blob_of(expected));
  // It has no centre.
  const Tables other = s.built({.begin = 0, .end = 50});
  const Status status = index.append(s.backend, s.hashes({.begin = 70, .end = 90}, other).view());
  CHECK(status.code() == ErrorCode::kInvalidArgument);
  CHECK(std::string(status.message()) ==
        "cannot append hashed keys [70, 90) to an index of [70, 70)");
  REQUIRE(index.append(s.backend, s.source, 90).ok());
  REQUIRE(expected.append(s.backend, s.source, 90).ok());
  CHECK(blob_of(index) == blob_of(expected));
}

// Hashes of [100, 300) to append and to build with, and what an index says to them.
struct Refusal {
  Setup s;
  Tables index = s.built({.begin = 4, .end = 100});
  std::vector<std::byte> before = blob_of(index);
  Hashes hashes = s.hashes({.begin = 100, .end = 300}, index);

  void check(const Status& status, ErrorCode code, const char* words) {
    CHECK(status.code() == code);
    CHECK_MESSAGE(std::string(status.message()).find(words) != std::string::npos,
                  "message: ", std::string(status.message()), ", wanted: ", std::string(words));
    CHECK(blob_of(index) == before);
  }
  void refused(const HashedKeys& keys, ErrorCode code, const char* words) {
    check(index.append(s.backend, keys), code, words);
    check(index.build(s.backend, keys), code, words);
  }
};

TEST_CASE("hashed keys that are none") {
  Refusal r;
  HashedKeys keys = r.hashes.view();
  keys.codes = nullptr;
  r.refused(keys, ErrorCode::kInvalidArgument, "hashed keys [100, 300) have no codes");
  keys = r.hashes.view();
  keys.norms = nullptr;
  r.refused(keys, ErrorCode::kInvalidArgument, "hashed keys [100, 300) have no norms");
  for (const TokenRange range : {TokenRange{-1, 100}, TokenRange{100, 99}}) {
    keys = r.hashes.view();
    keys.tokens = range;
    r.refused(keys, ErrorCode::kInvalidArgument, "is not a range of tokens");
  }
  NoWorkers none;
  const auto backend = make_backend<ScalarOps>(none);
  r.check(r.index.append(backend, r.hashes.view()), ErrorCode::kInvalidArgument,
          "workers 0 must be at least 1");
  r.check(r.index.build(backend, r.hashes.view()), ErrorCode::kInvalidArgument,
          "workers 0 must be at least 1");
}

TEST_CASE("a code beyond the buckets, or a norm that is none") {
  Refusal r;
  // Of KV head 1, token 110 in table 8 and a later one in table 0: the first token is named.
  for (const Code code : {Code{32}, Code{65535}}) {
    r.hashes.codes[(9 + 8) * 200 + 10] = r.hashes.codes[9 * 200 + 11] = code;
    r.refused(r.hashes.view(), ErrorCode::kInvalidArgument,
              "a code of token 110, KV head 1 is not below the 32 buckets of a table");
  }
  r.hashes.codes[0] = 32;
  r.refused(r.hashes.view(), ErrorCode::kInvalidArgument, "a code of token 100, KV head 0 is");
  for (const float norm : {kNan, kInf, -kInf, -1e-30F}) {
    CAPTURE(norm);
    r.hashes.norms[200 + 199] = norm;
    r.refused(r.hashes.view(),
              std::isfinite(norm) ? ErrorCode::kInvalidArgument : ErrorCode::kNonFinite,
              "of token 299, KV head 1 must be finite and not negative");
  }
  r.hashes = r.s.hashes({.begin = 100, .end = 300}, r.index);
  r.hashes.codes.back() = 31;
  r.hashes.norms.back() = 0.0F;
  CHECK(r.index.append(r.s.backend, r.hashes.view()).ok());
}

TEST_CASE("hashed keys that begin elsewhere than the index ends") {
  Refusal r;
  for (const TokenId begin : {0, 4, 99, 101}) {
    HashedKeys keys = r.hashes.view();
    keys.tokens = {.begin = begin, .end = begin + 200};
    r.check(r.index.append(r.s.backend, keys), ErrorCode::kInvalidArgument,
            "to an index of [4, 100)");
  }
}

TEST_CASE("hashed keys with centres of other sizes, or not finite") {
  Refusal r;
  r.hashes.centres[33] = kNan;
  r.check(r.index.build(r.s.backend, r.hashes.view()), ErrorCode::kNonFinite,
          "a centre has nan for a coordinate");
  r.hashes.centres.pop_back();
  r.check(r.index.build(r.s.backend, r.hashes.view()), ErrorCode::kShapeMismatch,
          "centres have 39 floats for keys and 0 for values, the index 40 and 0");
  r.hashes.centres.resize(40);
  HashedKeys keys = r.hashes.view();
  keys.centres.values = r.hashes.centres;
  r.check(r.index.build(r.s.backend, keys), ErrorCode::kShapeMismatch, "40 for values");
}

TEST_CASE("running out of memory over hashed keys leaves the index as it was") {
  for (const bool append : {true, false}) {
    Refusal r;
    int failures = 0;
    for (;; ++failures) {
      fail_allocations_after(failures);
      const Status status = append ? r.index.append(r.s.backend, r.hashes.view())
                                   : r.index.build(r.s.backend, r.hashes.view());
      fail_allocations_after(-1);
      if (status.ok()) break;
      r.check(status, ErrorCode::kOutOfMemory, "no memory");
    }
    CHECK(failures > 10);
    CHECK(blob_of(r.index) != r.before);
  }
}

}  // namespace
}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// The index of a profile follows a living cache: erased tokens of every head, forks, changes that
// are refused, blobs. Random scripts of changes are in lifecycle_test.cpp.
#include "magicpig/index/per_head_index.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "allocations.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/core/new_rows.hpp"
#include "magicpig/sample/per_head.hpp"
#include "problem.hpp"
#include "random.hpp"
#include "reseal.hpp"
#include "same_index.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 10, .kv_heads = 5, .head_dim = 12, .value_dim = 6};
constexpr TokenId kTokens = 400;
constexpr TokenRange kMiddle{.begin = 4, .end = 350};

constexpr std::array<HeadSetting, 5> kProfile{
    {{.kind = HeadKind::kTrainedSignatures,
      .bits = 1,
      .budget = 0.1,
      .temperature = 0.7,
      .value_norms = false},
     {.kind = HeadKind::kSignatures, .bits = 2, .budget = 0.2},
     {.kind = HeadKind::kTables, .functions = 4, .tables = 9, .min_collisions = 1},
     {.kind = HeadKind::kUniform, .budget = 0.3},
     {}}};

struct Subject {
  explicit Subject(std::span<const HeadSetting> profile = kProfile, TokenRange range = kMiddle,
                   std::uint64_t seed = 3)
      : backend(make_backend<ScalarOps>(executor)),
        hashes(std::move(*HeadHashes::create(backend, problem.source(), {0, 300}, profile, seed))),
        sampler(std::move(*PerHead::create(hashes))),
        index(std::move(*PerHeadIndex::create(hashes, kConfig))) {
    CHECK(index.build(backend, problem.source(), range).ok());
  }
  Subject(const Subject&) = delete;

  [[nodiscard]] Status decode(Outputs& outputs) {
    const DecodePlan<PerHead> plan{.shape = kShape, .sampler = &sampler, .exact_below = 0};
    const auto source = problem.source();
    return decode_one<ScalarOps>(executor, plan,
                                 make_request(problem, source, &index, outputs, {.seed = 5}));
  }

  static constexpr PerHeadIndexConfig kConfig{.segment_tokens = 128, .seal_tokens = 1};

  Problem<float> problem{{.shape = kShape, .tokens = kTokens, .key_offset = 0.4}};
  SerialExecutor executor;
  CpuBackend<ScalarOps, SerialExecutor> backend;
  HeadHashes hashes;
  PerHead sampler;
  PerHeadIndex index;
};

void check_same(const PerHeadIndex& a, const PerHeadIndex& b) {
  const char* difference = index_difference(a, b);
  CHECK_MESSAGE(difference == nullptr, std::string(difference != nullptr ? difference : ""));
}

std::vector<std::byte> save(const PerHeadIndex& index) {
  std::vector<std::byte> bytes(index.saved_bytes());
  CHECK(index.save(bytes).ok());
  return bytes;
}

void check_refused(PerHeadIndex& index, std::span<const std::byte> bytes, const char* words) {
  const auto before = save(index);
  const Status status = index.load(bytes);
  CHECK(status.code() == ErrorCode::kBadBlob);
  CHECK_MESSAGE(std::string(status.message()).find(words) != std::string::npos,
                std::string(status.message()), ", wanted ", std::string(words));
  CHECK(save(index) == before);
}

// Overwrites bytes of a blob whose checksum is then right again: someone means it.
template <class T>
std::vector<std::byte> tampered(std::vector<std::byte> bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
  reseal(bytes);
  return bytes;
}

}  // namespace

TEST_SUITE("PerHeadIndex") {
  TEST_CASE("tokens that were erased are gone for every head, also for those without an index") {
    Subject s;
    Outputs before(kShape);
    REQUIRE(s.decode(before).ok());
    std::vector<TokenId> gone;
    for (TokenId t = 10; t < 340; t += 3) gone.push_back(t);
    REQUIRE(s.index.erase(gone).ok());
    REQUIRE(s.index.erase(std::vector<TokenId>{13, 10}).ok());  // again: nothing changes
    const auto count = static_cast<TokenId>(gone.size());
    CHECK(s.index.erased().count(kMiddle) == count);
    CHECK(s.index.indexed() == kMiddle);
    // Rows that nobody may read.
    for (const TokenId t : gone) {
      for (int h = 0; h < kShape.kv_heads; ++h) {
        s.problem.key(h, t)[1] = std::numeric_limits<float>::quiet_NaN();
        s.problem.value(h, t)[1] = std::numeric_limits<float>::quiet_NaN();
      }
    }
    Outputs after(kShape);
    REQUIRE(s.decode(after).ok());
    for (int g = 0; g < kShape.query_heads; ++g) {
      CAPTURE(g);
      CHECK(std::isfinite(after.lse(g)));
      CHECK(std::all_of(after.out(g).begin(), after.out(g).end(),
                        [](float x) { return std::isfinite(x); }));
      CHECK(before.report(g).indexed == kMiddle.size());
      CHECK(after.report(g).indexed == kMiddle.size() - count);
    }
    // The head that is read whole reads what is left.
    CHECK(after.report(8).rows_read == kMiddle.size() - count);
    CHECK(before.report(8).rows_read == kMiddle.size());

    // They stay so, and their rows unread, through all that follows.
    const std::size_t bits = s.index.bytes();
    REQUIRE(s.index.rehash(s.backend, s.problem.source(), {.begin = 4, .end = 200}).ok());
    REQUIRE(s.index.recentre(s.backend, s.problem.source()).ok());
    CHECK(s.index.drift(s.backend, s.problem.source()).ok());
    REQUIRE(s.index.append(s.backend, s.problem.source(), 390).ok());
    CHECK(s.index.erased().count({.begin = 0, .end = 390}) == count);
    REQUIRE(s.index.truncate(200).ok());
    CHECK(s.index.erased().count({.begin = 0, .end = 390}) == (200 - 10 + 2) / 3);
    Outputs again(kShape);
    for (const TokenId t : gone) {
      if (t < 200) continue;
      for (int h = 0; h < kShape.kv_heads; ++h) {
        s.problem.key(h, t)[1] = 0.0F;
        s.problem.value(h, t)[1] = 0.0F;
      }
    }
    REQUIRE(s.decode(again).ok());
    CHECK(std::isfinite(again.lse(0)));
    CHECK(std::isfinite(again.lse(6)));
    CHECK(s.index.bytes() < bits);
    s.index.clear();
    CHECK(s.index.indexed() == TokenRange{});
    CHECK_FALSE(s.index.erased().any());
    REQUIRE(s.index.append(s.backend, NewRows(s.problem.source(), 0), 9).ok());
    CHECK(s.index.indexed() == TokenRange{0, 9});
  }

  TEST_CASE("each head's own index is the one that has followed alone") {
    Subject s;
    const auto source = s.problem.source();
    const auto& random = std::get<HadamardQuantiser>(s.hashes.hash(1));
    auto codes = std::move(*Signatures<HadamardQuantiser>::create(random, {.value_dim = 6}));
    const auto& planes = std::get<SimHash>(s.hashes.hash(2));
    auto tables = std::move(
        *BucketTables<SimHash>::create(planes, {.segment_tokens = 128, .seal_tokens = 1}));
    const auto on_all = [&](const auto& change) {
      CHECK(change(s.index, source).ok());
      CHECK(change(codes, OneHead(source, 1)).ok());
      CHECK(change(tables, OneHead(source, 2)).ok());
      CHECK(index_difference(codes, *s.index.signatures<HadamardQuantiser>(1)) == nullptr);
      CHECK(index_difference(tables, *s.index.tables(2)) == nullptr);
      CHECK(erasure_difference(codes, s.index) == nullptr);
    };
    on_all([&](auto& index, const auto& from) { return index.build(s.backend, from, {4, 300}); });
    on_all([](auto& index, const auto&) {
      return index.erase(std::vector<TokenId>{70, 9, 299, 71});
    });
    on_all([&](auto& index, const auto& from) { return index.append(s.backend, from, 380); });
    for (TokenId t = 50; t < 150; ++t) {
      for (int h = 0; h < kShape.kv_heads; ++h) s.problem.key(h, t)[3] -= 2.5F;
    }
    on_all([&](auto& index, const auto& from) {
      return index.rehash(s.backend, from, {.begin = 50, .end = 150});
    });
    const auto drift = s.index.drift(s.backend, source);
    const auto of_codes = codes.drift(s.backend, OneHead(source, 1));
    const auto of_tables = tables.drift(s.backend, OneHead(source, 2));
    const auto of_trained =
        s.index.signatures<ProductQuantiser>(0)->drift(s.backend, OneHead(source, 0));
    REQUIRE((drift.ok() && of_codes.ok() && of_tables.ok() && of_trained.ok()));
    CHECK(*drift == std::max({*of_codes, *of_tables, *of_trained}));
    CHECK(*drift > 0.1);
    on_all([&](auto& index, const auto& from) { return index.recentre(s.backend, from); });
    CHECK(*s.index.drift(s.backend, source) < 1e-5);
    on_all([](auto& index, const auto&) { return index.truncate(100); });
    on_all([&](auto& index, const auto& from) { return index.append(s.backend, from, 350); });
  }

  TEST_CASE("a fork shares what it does not change") {
    Subject s;
    const Subject same;
    CHECK(s.index.shared_bytes() == 0);
    auto fork = s.index.fork();
    REQUIRE(fork.ok());
    check_same(*fork, s.index);
    CHECK(fork->shared_bytes() > s.index.bytes() - 1000);
    CHECK(fork->shared_bytes() == s.index.shared_bytes());
    REQUIRE(fork->append(s.backend, s.problem.source(), 360).ok());
    // Of the tables the segments before the last are shared still.
    CHECK(fork->tables(2)->segment(0, 0).shared_bytes() == fork->tables(2)->segment(0, 0).bytes());
    CHECK(fork->tables(2)->segment(2, 0).shared_bytes() == 0);
    REQUIRE(fork->erase(std::vector<TokenId>{7}).ok());
    REQUIRE(fork->truncate(300).ok());
    REQUIRE(fork->rehash(s.backend, s.problem.source(), {.begin = 100, .end = 200}).ok());
    check_same(s.index, same.index);
    CHECK_FALSE(s.index.erased().any());
    s.index.clear();
    CHECK(fork->shared_bytes() == 0);
    CHECK(fork->indexed() == TokenRange{4, 300});
  }

  TEST_CASE("changes that are refused leave every head as it was, and name the one that refused") {
    Subject s;
    const Subject same;
    REQUIRE(s.index.erase(std::vector<TokenId>{7}).ok());
    const auto before = save(s.index);
    const float kept = s.problem.key(2, 120)[2];
    s.problem.key(2, 120)[2] = std::numeric_limits<float>::infinity();
    const auto source = s.problem.source();
    const auto check_not_finite = [&](const Status& status) {
      CHECK(status.code() == ErrorCode::kNonFinite);
      CHECK(std::string(status.message()).find("KV head 2 by itself: ") == 0);
      CHECK(save(s.index) == before);
    };
    check_not_finite(s.index.rehash(s.backend, source, {.begin = 100, .end = 130}));
    check_not_finite(s.index.recentre(s.backend, source));
    check_not_finite(s.index.drift(s.backend, source).status());
    check_not_finite(s.index.build(s.backend, source, kMiddle));
    check_not_finite(s.index.build(s.backend, source, kMiddle, same.index));
    s.problem.key(2, 120)[2] = kept;

    const auto check_invalid = [&](const Status& status, const char* words) {
      CHECK(status.code() == ErrorCode::kInvalidArgument);
      CHECK(std::string(status.message()) == words);
      CHECK(save(s.index) == before);
    };
    check_invalid(s.index.erase(std::vector<TokenId>{50, 350}),
                  "cannot erase token 350 of an index of [4, 350)");
    check_invalid(s.index.rehash(s.backend, source, {.begin = 3, .end = 9}),
                  "cannot rehash [3, 9) of an index of [4, 350)");
    check_invalid(s.index.truncate(-1), "cannot truncate to -1 tokens");
    check_invalid(s.index.append(s.backend, NewRows(source, 360), 370),
                  "cannot read token 350 of rows that begin at token 360");
    check_invalid(s.index.rehash(s.backend, NewRows(source, 30), {.begin = 20, .end = 40}),
                  "cannot read token 20 of rows that begin at token 30");
    check_invalid(s.index.drift(s.backend, NewRows(source, 30)).status(),
                  "cannot read token 4 of rows that begin at token 30");

    // Centres of another profile, and of the same.
    std::array<HeadSetting, 5> other = kProfile;
    std::swap(other[1], other[2]);
    const Subject swapped(other);
    const Status status = s.index.build(s.backend, source, kMiddle, swapped.index);
    CHECK(status.code() == ErrorCode::kShapeMismatch);
    CHECK(std::string(status.message()).find("KV head 1 by itself: ") == 0);
    CHECK(save(s.index) == before);
    REQUIRE(s.index.build(s.backend, source, {.begin = 90, .end = 300}, same.index).ok());
    CHECK(same_floats(s.index.tables(2)->centre(0), same.index.tables(2)->centre(0), 12));
    CHECK(same_floats(s.index.signatures<ProductQuantiser>(0)->centre(0),
                      same.index.signatures<ProductQuantiser>(0)->centre(0), 12));
  }

  TEST_CASE("a truncation of what forks share is all or nothing, too") {
    std::array<HeadSetting, 5> profile = kProfile;
    profile[1] = profile[3] = kProfile[2];  // two of three tables are copied before the last fails
    Subject s(profile);
    const Subject same(profile);
    const auto fork = s.index.fork();
    REQUIRE(fork.ok());
    int failures = 0;
    for (bool done = false; !done; ++failures) {
      fail_allocations_after(failures);
      const Status status = s.index.truncate(200);
      fail_allocations_after(-1);
      done = status.ok();
      if (done) break;
      CHECK(status.code() == ErrorCode::kOutOfMemory);
      check_same(s.index, same.index);
    }
    CHECK(failures > 6);
    CHECK(s.index.indexed() == TokenRange{4, 200});
    check_same(*fork, same.index);
    // By itself again, it needs no memory.
    fail_allocations_after(0);
    CHECK((s.index.shared_bytes() != 0 || s.index.truncate(150).ok()));
    fail_allocations_after(-1);
  }

  TEST_CASE("it takes the bytes that were estimated before") {
    for (const TokenId tokens : {0, 1, 127, 128, 129, 400}) {
      CAPTURE(tokens);
      Subject s(kProfile, {.begin = 0, .end = tokens});
      CHECK(s.index.bytes() == PerHeadIndex::estimate_bytes(s.hashes, Subject::kConfig, tokens));
    }
    constexpr std::array<HeadSetting, 5> kNone{};
    Subject exact(kNone);
    CHECK(PerHeadIndex::estimate_bytes(exact.hashes, Subject::kConfig, kTokens) == 0);
    CHECK(exact.index.bytes() == 0);
    REQUIRE(exact.index.erase(std::vector<TokenId>{9}).ok());
    CHECK(exact.index.bytes() == (350 / 64 + 1) * 8);
  }

  TEST_CASE("it comes back from its blob and goes on as if it had never left") {
    for (const TokenRange range :
         {TokenRange{.begin = 3, .end = 3}, TokenRange{.begin = 0, .end = 1},
          TokenRange{.begin = 7, .end = 300}}) {
      CAPTURE(range.end);
      Subject s(kProfile, range);
      if (range.size() > 100) {
        REQUIRE(s.index.erase(std::vector<TokenId>{range.begin, 70, range.end - 1}).ok());
      }
      const auto blob = save(s.index);
      auto loaded = std::move(*PerHeadIndex::create(s.hashes, Subject::kConfig));
      const Status status = loaded.load(blob);
      REQUIRE_MESSAGE(status.ok(), std::string(status.message()));
      check_same(s.index, loaded);
      CHECK(save(loaded) == blob);
      Subject again(kProfile, {.begin = 9, .end = 30});  // with hashes of its own, made alike
      CHECK(again.index.load(blob).ok());
      CHECK(save(again.index) == blob);
      for (auto* one : {&s.index, &loaded}) {
        REQUIRE(one->append(s.backend, s.problem.source(), range.end + 90).ok());
        REQUIRE(one->truncate(range.begin + range.size() / 2 + 20).ok());
      }
      check_same(s.index, loaded);
    }
  }

  TEST_CASE("it refuses blobs of others and such as cannot be") {
    Subject s(kProfile, {.begin = 2, .end = 200});
    Subject good_one;
    REQUIRE(good_one.index.erase(std::vector<TokenId>{9, 200}).ok());
    const auto good = save(good_one.index);
    const auto of = [](std::size_t head, const HeadSetting& setting) {
      auto profile = kProfile;
      profile[head] = setting;
      return save(Subject(profile).index);
    };
    check_refused(s.index, of(1, {.kind = HeadKind::kSignatures, .bits = 3, .budget = 0.2}),
                  "the profile of KV head 1: blob: bits is 3, wanted is 2");
    check_refused(s.index, of(4, kProfile[3]),
                  "the profile of KV head 4: blob: kind is 1, wanted is 0");
    check_refused(s.index, of(3, {.kind = HeadKind::kUniform, .budget = 0.25}),
                  "the profile of KV head 3: blob: budget is 0.25, wanted is 0.3");
    check_refused(s.index, save(Subject(kProfile, kMiddle, 4).index),
                  "KV head 0 by itself: blob: quantiser is");
    std::vector<std::byte> own(s.index.tables(2)->saved_bytes());
    REQUIRE(s.index.tables(2)->save(own).ok());
    check_refused(s.index, own, "blob: kind is 2, wanted is 4");

    constexpr std::size_t kFirst = sizeof(BlobHeader);
    constexpr std::size_t kErased = kFirst + 4 + 16;  // kv_heads, begin, end, erased words
    constexpr std::size_t kHead = kErased + 6 * 8;
    constexpr std::size_t kSetting = 7 * 4 + 4 * 8;
    check_refused(s.index, tampered(good, kFirst, 4), "kv_heads is 4, wanted is 5");
    check_refused(s.index, tampered(good, kFirst + 4, -1), "begin -1 is out of bounds");
    check_refused(s.index, tampered(good, kFirst + 8, 349), "KV head 0 by itself: blob: end 350");
    check_refused(s.index, tampered(good, kErased, std::uint64_t{1} << 10 | 1U << 11),
                  "KV head 0 by itself: blob: erased tokens 2");
    check_refused(s.index, tampered(good, kErased, std::uint64_t{0}), "erased tokens 2");
    check_refused(s.index, tampered(good, kHead + kSetting, ~std::uint64_t{0}), "blob: index: ");
    check_refused(s.index, tampered(good, kHead + kSetting, std::uint64_t{3}),
                  "KV head 0 by itself: blob: 3 bytes are fewer than the header's 40");
    Random random(3);
    for (int i = 0; i < 60; ++i) {
      auto bytes = good;
      bytes[static_cast<std::size_t>(random.below(static_cast<int>(bytes.size())))] ^= std::byte{4};
      check_refused(s.index, bytes, "blob: ");
    }
    for (const std::size_t size : {std::size_t{0}, std::size_t{40}, good.size() - 1}) {
      check_refused(s.index, std::span(good).first(size), "blob: ");
    }
    std::vector<std::byte> small(s.index.saved_bytes() - 1);
    CHECK(s.index.save(small).code() == ErrorCode::kWorkspaceTooSmall);
  }

  TEST_CASE("no memory while it is loaded leaves it as it was") {
    Subject s;
    REQUIRE(s.index.erase(std::vector<TokenId>{9}).ok());
    const auto blob = save(s.index);
    Subject other(kProfile, {.begin = 5, .end = 90});
    auto loaded = std::move(*PerHeadIndex::create(s.hashes, Subject::kConfig));
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
    CHECK(failures > 12);
    CHECK(save(loaded) == blob);
  }
}

// SPDX-License-Identifier: Apache-2.0
// Bucket tables hold what brute force says, however they came to hold it.
#include "magicpig/index/bucket_tables.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "allocations.hpp"
#include "backends.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/core/new_rows.hpp"
#include "problem.hpp"
#include "same_index.hpp"

namespace magicpig::test {
namespace {

constexpr Shape kShape{.query_heads = 2, .kv_heads = 2, .head_dim = 20, .value_dim = 3};

using Tables = BucketTables<SimHash>;

SimHash make_family(int bits = 5, int tables = 9) {
  return std::move(*SimHash::create({.dim = 20, .bits = bits, .tables = tables, .seed = 6}));
}

Tables make_index(const SimHash& family, int segment_tokens = 64, int seal_tokens = 1) {
  return std::move(*Tables::create(
      family, {.kv_heads = 2, .segment_tokens = segment_tokens, .seal_tokens = seal_tokens}));
}

template <class T>
Problem<T> make_problem(TokenId tokens, std::uint64_t seed = 3) {
  return Problem<T>({.shape = kShape, .tokens = tokens, .seed = seed, .key_offset = 0.7});
}

void check_same(const Tables& actual, const Tables& expected) {
  const char* difference = index_difference(actual, expected);
  CHECK_MESSAGE(difference == nullptr,
                "indexes differ in: ", std::string(difference == nullptr ? "" : difference));
}

// Every id of every bucket against the code of its token's centred key; every norm.
template <class Ops, class Source>
void check_content(const Tables& index, const Source& source) {
  const SimHash& family = index.family();
  std::vector<float> scratch(family.scratch_floats(1));
  std::vector<float> centred(20);
  std::vector<Code> codes(static_cast<std::size_t>(family.tables()));
  int misplaced = 0;
  int unsorted = 0;
  int wrong_norms = 0;
  for (int h = 0; h < 2; ++h) {
    TokenId counted = 0;
    for (int s = 0; s < index.segment_count(); ++s) {
      const Segment& segment = index.segment(s, h);
      for (int id = 0; id < segment.tokens(); ++id, ++counted) {
        const TokenId token = index.segment_begin(s) + id;
        double square = 0.0;
        for (int j = 0; j < 20; ++j) {
          const auto at = static_cast<std::size_t>(j);
          centred[at] = to_float(source.key(h, token)[j]) - index.centre(h)[j];
          square += static_cast<double>(centred[at]) * static_cast<double>(centred[at]);
        }
        const auto norm = static_cast<double>(index.norms(h)[token - index.indexed().begin]);
        wrong_norms += std::fabs(norm - std::sqrt(square)) <= 1e-6 * norm ? 0 : 1;
        family.hash<Ops>(centred.data(), 1, codes.data(), scratch.data());
        for (int table = 0; table < family.tables(); ++table) {
          const auto bucket = segment.bucket(table, codes[static_cast<std::size_t>(table)]);
          misplaced += std::count(bucket.begin(), bucket.end(), id) == 1 ? 0 : 1;
        }
      }
      for (int table = 0; table < family.tables(); ++table) {
        std::size_t ids = 0;
        for (int code = 0; code < bucket_count(family.bits()); ++code) {
          const auto bucket = segment.bucket(table, code);
          unsorted += std::is_sorted(bucket.begin(), bucket.end()) ? 0 : 1;
          ids += bucket.size();
        }
        CHECK(ids == static_cast<std::size_t>(segment.tokens()));
      }
    }
    CHECK(counted == index.indexed().size());
  }
  CHECK(misplaced == 0);
  CHECK(unsorted == 0);
  CHECK(wrong_norms == 0);
}

TEST_CASE_TEMPLATE_DEFINE("build puts every token into the bucket of its code in every table", Ops,
                          building) {
  SerialExecutor executor;
  const auto backend = make_backend<Ops>(executor);
  for (const auto& [bits, tables] : {std::pair{1, 1}, std::pair{5, 9}, std::pair{15, 2}}) {
    const SimHash family = make_family(bits, tables);
    for (const TokenRange range : {TokenRange{0, 1}, TokenRange{0, 300}, TokenRange{4, 67},
                                   TokenRange{4, 68}, TokenRange{4, 69}, TokenRange{299, 300}}) {
      CAPTURE(range.begin);
      CAPTURE(range.end);
      const auto problem = make_problem<bf16>(300);
      Tables index = make_index(family);
      REQUIRE(index.build(backend, problem.source(), range).ok());
      CHECK(index.indexed() == range);
      CHECK(index.segment_count() == (range.size() + 63) / 64);
      check_content<Ops>(index, problem.source());
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(building, Backends);

TEST_CASE("the centre is the mean of the keys") {
  SerialExecutor executor;
  const auto problem = make_problem<float>(500);
  const SimHash family = make_family();
  Tables index = make_index(family);
  const auto source = problem.source();
  REQUIRE(index.build(make_backend<ScalarOps>(executor), source, {.begin = 10, .end = 490}).ok());
  for (int h = 0; h < 2; ++h) {
    for (int j = 0; j < 20; ++j) {
      double sum = 0.0;
      for (TokenId t = 10; t < 490; ++t) sum += static_cast<double>(source.key(h, t)[j]);
      CHECK(index.centre(h)[j] == static_cast<float>(sum / 480));
    }
  }
}

// Rebuilds [begin, end) with the centre that `index` has: the first tokens that made the centre
// are built, the others appended at once.
template <class Backend, class Source>
Tables rebuilt(const Backend& backend, const SimHash& family, const Source& source,
               const TokenRange& centre_range, TokenId end) {
  Tables index = make_index(family);
  CHECK(index.build(backend, source, centre_range).ok());
  CHECK(index.append(backend, source, end).ok());
  CHECK(index.truncate(end).ok());
  return index;
}

TEST_CASE_TEMPLATE_DEFINE("appending in any steps equals a rebuild with the same centre", Ops,
                          appending) {
  SerialExecutor executor;
  const auto backend = make_backend<Ops>(executor);
  const SimHash family = make_family();
  const auto problem = make_problem<fp16>(700);
  const auto source = problem.source();
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    const int seal = std::vector<int>{1, 2, 7, 64, 100, 1024}[static_cast<std::size_t>(seed % 6)];
    const TokenRange first{.begin = random.between(0, 10), .end = random.between(11, 150)};
    Tables index = make_index(family, 64, seal);
    REQUIRE(index.build(backend, source, first).ok());
    TokenId expected_end = first.end;
    for (TokenId end = first.end; end < 700;) {
      end = std::min(700, end + random.between(0, 90));
      // What a view of a growing cache shows.
      REQUIRE(index.append(backend, source.first(end), end).ok());
      expected_end += (end - expected_end) / seal * seal;
      CHECK(index.indexed() == TokenRange{first.begin, expected_end});
      check_same(index, rebuilt(backend, family, source, first, expected_end));
    }
  }
}
TEST_CASE_TEMPLATE_APPLY(appending, Backends);

TEST_CASE("truncating anywhere equals a rebuild with the same centre") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const SimHash family = make_family();
  const auto problem = make_problem<float>(400);
  const auto source = problem.source();
  const TokenRange all{.begin = 3, .end = 400};
  for (TokenId end = 4; end <= 400; end += end % 64 > 60 || end % 64 < 7 ? 1 : 13) {
    CAPTURE(end);
    Tables index = make_index(family);
    REQUIRE(index.build(backend, source, all).ok());
    REQUIRE(index.truncate(end).ok());
    CHECK(index.indexed() == TokenRange{3, end});
    Tables expected = make_index(family);
    REQUIRE(expected.build(backend, source, all).ok());
    // One by one, the slow way down.
    for (TokenId t = 399; t >= end; --t) REQUIRE(expected.truncate(t).ok());
    check_same(index, expected);
    check_content<ScalarOps>(index, source);
    // And what was truncated may come again.
    REQUIRE(index.append(backend, source, 400).ok());
    REQUIRE(expected.build(backend, source, all).ok());
    check_same(index, expected);
  }
}

TEST_CASE("an index truncated to nothing makes its centre anew") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const SimHash family = make_family();
  const auto problem = make_problem<float>(300);
  const auto source = problem.source();
  for (const TokenId end : {0, 3, 5}) {
    CAPTURE(end);
    Tables index = make_index(family);
    REQUIRE(index.build(backend, source, {.begin = 5, .end = 300}).ok());
    REQUIRE(index.truncate(end).ok());
    CHECK(index.indexed() == TokenRange{5, 5});
    CHECK(index.segment_count() == 0);
    REQUIRE(index.append(backend, source, 120).ok());
    Tables fresh = make_index(family);
    REQUIRE(fresh.build(backend, source, {.begin = 5, .end = 120}).ok());
    check_same(index, fresh);
  }
}

TEST_CASE("an empty build says where appending starts, even beyond a short cache") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const SimHash family = make_family();
  const auto problem = make_problem<float>(200);
  const auto source = problem.source();
  const Window window;
  Tables index = make_index(family);
  REQUIRE(index.build(backend, source.first(1), window.middle(1)).ok());
  CHECK(index.indexed() == TokenRange{4, 4});
  for (TokenId tokens = 1; tokens <= 200; ++tokens) {
    REQUIRE(index.append(backend, source.first(tokens), window.middle(tokens).end).ok());
    CHECK(index.indexed() == window.middle(tokens));
  }
}

TEST_CASE("truncating at or beyond the end changes nothing") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const SimHash family = make_family();
  const auto problem = make_problem<float>(100);
  Tables index = make_index(family);
  Tables same = make_index(family);
  REQUIRE(index.build(backend, problem.source(), {.begin = 0, .end = 90}).ok());
  REQUIRE(same.build(backend, problem.source(), {.begin = 0, .end = 90}).ok());
  for (const TokenId end : {90, 91, 100, 5000, std::numeric_limits<TokenId>::max()}) {
    CHECK(index.truncate(end).ok());
    check_same(index, same);
  }
  CHECK(index.truncate(-1).code() == ErrorCode::kInvalidArgument);
  check_same(index, same);
}

TEST_CASE_TEMPLATE_DEFINE("any number of threads builds the same index", Ops, build_threads) {
  SerialExecutor executor;
  const SimHash family = make_family();
  const auto problem = make_problem<float>(900);
  const auto source = problem.source();
  Tables expected = make_index(family, 640);
  REQUIRE(expected.build(make_backend<Ops>(executor), source, {.begin = 4, .end = 500}).ok());
  REQUIRE(expected.append(make_backend<Ops>(executor), source, 891).ok());
  for (const int workers : {1, 2, 3, 7}) {
    CAPTURE(workers);
    const auto pool = ThreadPool::create(workers);
    REQUIRE(pool.ok());
    Tables index = make_index(family, 640);
    REQUIRE(index.build(make_backend<Ops>(**pool), source, {.begin = 4, .end = 500}).ok());
    REQUIRE(index.append(make_backend<Ops>(**pool), source, 891).ok());
    check_same(index, expected);
  }
}
TEST_CASE_TEMPLATE_APPLY(build_threads, Backends);

TEST_CASE("a build or append that fails leaves the index as it was") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const SimHash family = make_family();
  const auto good = make_problem<float>(300);
  Tables index = make_index(family);
  Tables same = make_index(family);
  REQUIRE(index.build(backend, good.source(), {.begin = 2, .end = 200}).ok());
  REQUIRE(same.build(backend, good.source(), {.begin = 2, .end = 200}).ok());
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity(), 3e38F}) {
    CAPTURE(bad);
    auto spoiled = make_problem<float>(300);
    // 3e38 in every coordinate is finite, but its norm is not.
    for (int j = bad == 3e38F ? 0 : 19; j < 20; ++j) spoiled.key(1, 270)[j] = bad;
    const auto source = spoiled.source();
    const Status appended = index.append(backend, source, 300);
    CHECK(appended.code() == ErrorCode::kNonFinite);
    CHECK(std::string(appended.message()) == "the key of token 270, KV head 1 is not finite");
    check_same(index, same);
    const Status built = index.build(backend, source, {.begin = 2, .end = 300});
    CHECK(built.code() == ErrorCode::kNonFinite);
    CHECK(std::string(built.message()).find("token 270, KV head 1") != std::string::npos);
    check_same(index, same);
  }
  CHECK(index.append(backend, good.source(), 301).code() == ErrorCode::kInvalidArgument);
  CHECK(index.build(backend, good.source(), {.begin = 0, .end = 301}).code() ==
        ErrorCode::kInvalidArgument);
  CHECK(index.build(backend, good.source(), {.begin = -1, .end = 30}).code() ==
        ErrorCode::kInvalidArgument);
  CHECK(index.build(backend, good.source(), {.begin = 31, .end = 30}).code() ==
        ErrorCode::kInvalidArgument);
  const Problem<float> narrow(
      {.shape = {.query_heads = 2, .kv_heads = 2, .head_dim = 19, .value_dim = 3}, .tokens = 300});
  const Problem<float> wide(
      {.shape = {.query_heads = 3, .kv_heads = 3, .head_dim = 20, .value_dim = 3}, .tokens = 300});
  for (const auto* other : {&narrow, &wide}) {
    CHECK(index.append(backend, other->source(), 300).code() == ErrorCode::kShapeMismatch);
    CHECK(index.build(backend, other->source(), {.begin = 0, .end = 10}).code() ==
          ErrorCode::kShapeMismatch);
  }
  check_same(index, same);
  REQUIRE(index.append(backend, good.source(), 300).ok());
  REQUIRE(same.append(backend, good.source(), 300).ok());
  check_same(index, same);
}

TEST_CASE("running out of memory anywhere leaves the index as it was") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const SimHash family = make_family();
  const auto problem = make_problem<float>(300);
  const auto source = problem.source();
  Tables index = make_index(family);
  Tables same = make_index(family);
  REQUIRE(index.build(backend, source, {.begin = 0, .end = 100}).ok());
  REQUIRE(same.build(backend, source, {.begin = 0, .end = 100}).ok());
  int failures = 0;
  for (bool done = false; !done; ++failures) {
    fail_allocations_after(failures);
    const Status status = index.build(backend, source, {.begin = 0, .end = 250});
    fail_allocations_after(-1);
    done = status.ok();
    if (done) break;
    CHECK(status.code() == ErrorCode::kOutOfMemory);
    check_same(index, same);
  }
  CHECK(failures > 10);
  REQUIRE(index.build(backend, source, {.begin = 0, .end = 100}).ok());
  failures = 0;
  for (bool done = false; !done; ++failures) {
    fail_allocations_after(failures);
    const Status status = index.append(backend, source, 300);
    fail_allocations_after(-1);
    done = status.ok();
    if (done) break;
    CHECK(status.code() == ErrorCode::kOutOfMemory);
    check_same(index, same);
  }
  CHECK(failures > 10);
  REQUIRE(same.append(backend, source, 300).ok());
  check_same(index, same);
}

TEST_CASE("bytes counts ids, offsets, norms and centres") {
  SerialExecutor executor;
  const SimHash family = make_family(4, 9);
  const auto problem = make_problem<float>(300);
  Tables index = make_index(family, 64);
  CHECK(index.bytes() == 2 * 20 * sizeof(float));
  const std::int64_t before = allocation_count();
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {.begin = 0, .end = 300})
              .ok());
  CHECK(allocation_count() > before);
  // Per token and head 2 L of ids and 4 of norm; per segment (5 of them) and head 2 L (2^K + 1).
  CHECK(index.bytes() == 2 * (300 * (2 * 9 + 4) + 5 * (2 * 9 * (16 + 1)) + 20 * sizeof(float)));
}

std::size_t advised_bytes = 0;

void add_bytes(void*, std::size_t bytes) noexcept { advised_bytes += bytes; }

TEST_CASE("every array of ids, offsets and norms is shown to the memory advice") {
  advised_bytes = 0;
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  const auto problem = make_problem<float>(400);
  const auto source = problem.source();
  const SimHash family = make_family();
  const BucketTablesConfig config{
      .kv_heads = 2, .segment_tokens = 64, .seal_tokens = 1, .memory_advice = add_bytes};
  Tables index = std::move(*Tables::create(family, config));
  CHECK(advised_bytes == 0);
  REQUIRE(index.build(backend, source, {.begin = 4, .end = 260}).ok());
  const std::size_t centres = 2 * 20 * sizeof(float);
  CHECK(advised_bytes == index.bytes() - centres);
  // 4 full segments stay as they are; what is new are 2 segments and the norms of 1.5 times as
  // many.
  advised_bytes = 0;
  REQUIRE(index.append(backend, source, 340).ok());
  std::size_t fresh = 2 * (336 + 168) * sizeof(float);
  for (int h = 0; h < 2; ++h) fresh += index.segment(4, h).bytes() + index.segment(5, h).bytes();
  CHECK(advised_bytes == fresh);
  Tables plain = make_index(family);
  REQUIRE(plain.build(backend, source, {.begin = 4, .end = 260}).ok());
  REQUIRE(plain.append(backend, source, 340).ok());
  check_same(index, plain);
}

// Tables (5, 9) of tokens [4, 100), with blocks of 40 that up to 16 appends seal, beside some whose
// blocks are sealed at once.
struct Spread {
  SerialExecutor serial;
  CpuBackend<ScalarOps, SerialExecutor> backend = make_backend<ScalarOps>(serial);
  Problem<float> problem = Problem<float>({.shape = kShape, .tokens = 400, .key_offset = 0.7});
  SimHash family = make_family();
  Tables index = make(16);
  Tables plain = make(1);

  Spread() {
    for (Tables* one : {&index, &plain}) {
      REQUIRE(one->build(backend, problem.source(), {.begin = 4, .end = 100}).ok());
    }
  }
  Spread(const Spread&) = delete;

  [[nodiscard]] Tables make(int seal_steps) const {
    return std::move(*Tables::create(
        family,
        {.kv_heads = 2, .segment_tokens = 64, .seal_tokens = 40, .seal_steps = seal_steps}));
  }
  [[nodiscard]] Status append(TokenId end) { return index.append(backend, problem.source(), end); }
  // Appends token by token from `end` until more is indexed; how many appends that takes.
  int seal_from(TokenId end) {
    const TokenId before = index.indexed().end;
    int calls = 0;
    while (index.indexed().end == before && calls < 99) REQUIRE(append(end + calls++).ok());
    return calls;
  }
  void check_same_as_plain(TokenId end) {
    REQUIRE(plain.append(backend, problem.source(), end).ok());
    check_same(index, plain);
  }
};

TEST_CASE("a block is sealed by as many appends as the config says") {
  Spread s;
  const std::size_t before = s.index.bytes();
  for (TokenId end = 101; end < 140; ++end) REQUIRE(s.append(end).ok());
  CHECK(s.index.bytes() == before);
  REQUIRE(s.append(140).ok());
  const std::size_t under_way = s.index.bytes();
  CHECK(under_way > before);
  auto fork = s.index.fork();
  REQUIRE(fork.ok());
  CHECK(fork->bytes() < under_way);
  const auto pool = std::move(*ThreadPool::create(3));
  REQUIRE(s.index.append(make_backend<ScalarOps>(*pool), s.problem.source(), 141).ok());
  CHECK(s.index.indexed().end == 100);
  const int calls = 2 + s.seal_from(142);
  CHECK(calls > 8);
  CHECK(calls <= 16);
  CHECK(s.index.indexed().end == 140);
  s.check_same_as_plain(140);
  // What was replaced is given back by the next ones, and the fork goes on by itself.
  for (TokenId end = 160; end < 166; ++end) REQUIRE(s.append(end).ok());
  CHECK(s.index.bytes() == s.plain.bytes());
  s.index = std::move(*fork);
  CHECK(s.seal_from(140) == calls);
  check_same(s.index, s.plain);
  REQUIRE(s.append(185).ok());
  s.index.clear();
  CHECK(s.index.bytes() == s.make(1).bytes());
}

TEST_CASE("a second block, or the first of an empty index, is sealed at once") {
  Spread s;
  REQUIRE(s.append(150).ok());
  CHECK(s.index.indexed().end == 100);
  REQUIRE(s.append(183).ok());
  CHECK(s.index.indexed().end == 180);
  s.check_same_as_plain(180);
  REQUIRE(s.index.truncate(0).ok());
  REQUIRE(s.append(50).ok());
  CHECK(s.index.indexed() == TokenRange{4, 44});
}

TEST_CASE("tokens of a block under way that are taken back or changed are hashed anew") {
  Spread s;
  for (TokenId end = 140; end < 148; ++end) REQUIRE(s.append(end).ok());
  for (TokenId t = 120; t < 140; ++t) s.problem.key(1, t)[3] += 4.0F;
  REQUIRE(s.index.truncate(120).ok());
  CHECK(s.index.indexed().end == 100);
  CHECK(s.seal_from(140) > 8);
  s.check_same_as_plain(140);
  // The same by an append that ends before.
  for (TokenId end = 180; end < 188; ++end) REQUIRE(s.append(end).ok());
  for (TokenId t = 150; t < 180; ++t) s.problem.key(0, t)[2] -= 3.0F;
  REQUIRE(s.append(150).ok());
  CHECK(s.seal_from(180) > 8);
  s.check_same_as_plain(180);
  // And by a change of what is indexed already.
  for (TokenId end = 220; end < 228; ++end) REQUIRE(s.append(end).ok());
  for (TokenId t = 170; t < 220; ++t) s.problem.key(0, t)[7] -= 3.0F;
  for (Tables* one : {&s.index, &s.plain}) {
    REQUIRE(one->rehash(s.backend, s.problem.source(), {.begin = 170, .end = 180}).ok());
  }
  CHECK(s.seal_from(220) > 8);
  s.check_same_as_plain(220);
}

TEST_CASE("a block under way that fails is begun anew, and nothing has changed") {
  Spread s;
  for (TokenId end = 140; end < 148; ++end) REQUIRE(s.append(end).ok());
  const NewRows rows(s.problem.source(), 120);
  CHECK(std::string(s.index.append(s.backend, rows, 148).message()) ==
        "cannot read token 100 of rows that begin at token 120");
  s.problem.key(1, 139)[5] = std::numeric_limits<float>::quiet_NaN();
  Status status;
  for (TokenId end = 148; status.ok() && end < 170; ++end) status = s.append(end);
  CHECK(status.code() == ErrorCode::kNonFinite);
  CHECK(std::string(status.message()) == "the key of token 139, KV head 1 is not finite");
  check_same(s.index, s.plain);
  s.problem.key(1, 139)[5] = 0.5F;
  int failures = 0;
  for (;; ++failures) {
    fail_allocations_after(failures);
    status = Status();
    for (TokenId end = 140; status.ok() && s.index.indexed().end == 100; ++end) {
      status = s.append(end);
    }
    fail_allocations_after(-1);
    if (status.ok()) break;
    CHECK(status.code() == ErrorCode::kOutOfMemory);
    check_same(s.index, s.plain);
  }
  CHECK(failures > 5);
  s.check_same_as_plain(140);
}

TEST_CASE("the documented 308.7 bytes per token at (10, 150) in full segments") {
  const double per_token = 2.0 * 150 + 4 + 2.0 * 150 * (1024 + 1) / kMaxSegmentTokens;
  CHECK(per_token == doctest::Approx(308.7).epsilon(2e-4));
  Segment segment;
  REQUIRE(segment.allocate(150, bucket_count(10), kMaxSegmentTokens));
  CHECK(static_cast<double>(segment.bytes()) / kMaxSegmentTokens + 4 ==
        doctest::Approx(per_token).epsilon(1e-12));
}

}  // namespace
}  // namespace magicpig::test

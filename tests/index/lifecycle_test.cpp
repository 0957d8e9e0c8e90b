// SPDX-License-Identifier: Apache-2.0
// Indexes that follow a living cache: random scripts of every change, forks that share segments,
// erased tokens, and changes that memory fails.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "allocations.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/per_head.hpp"
#include "problem.hpp"
#include "random.hpp"
#include "same_index.hpp"

namespace magicpig::test {
namespace {

constexpr int kDim = 8;
constexpr int kHeads = 2;
constexpr Shape kShape{
    .query_heads = 2 * kHeads, .kv_heads = kHeads, .head_dim = kDim, .value_dim = 4};

using Source = StridedKeyValues<float>;

// The rows of one request, which grow and change in place.
struct Cache {
  std::vector<float> keys;    // [tokens, kHeads, kDim]
  std::vector<float> values;  // [tokens, kHeads, 4]

  [[nodiscard]] TokenId tokens() const {
    return static_cast<TokenId>(keys.size() / (kHeads * kDim));
  }
  void grow(TokenId tokens, Random& random) {
    while (keys.size() < static_cast<std::size_t>(tokens) * kHeads * kDim) {
      keys.push_back(static_cast<float>(random.normal() + 0.7));
    }
    while (values.size() < static_cast<std::size_t>(tokens) * kHeads * 4) {
      values.push_back(static_cast<float>(random.normal()));
    }
  }
  void change(TokenRange range, Random& random) {
    for (std::int64_t i = std::int64_t{range.begin} * kHeads * kDim;
         i < std::int64_t{range.end} * kHeads * kDim; ++i) {
      keys[static_cast<std::size_t>(i)] = static_cast<float>(2.0 * random.normal() - 0.3);
    }
  }
  [[nodiscard]] float* key(int kv_head, TokenId token) {
    return keys.data() + (std::int64_t{token} * kHeads + kv_head) * kDim;
  }
  [[nodiscard]] Source source() const {
    return *Source::token_major(keys.data(), values.data(), kShape, tokens());
  }
};

// What the two indexes are made of and drawn from by.
struct TablesKind {
  using Index = BucketTables<SimHash>;
  using Sampler = Collisions;
  static constexpr bool kSeals = true;

  SimHash family = std::move(*SimHash::create({.dim = kDim, .bits = 3, .tables = 6, .seed = 5}));
  Sampler sampler = std::move(*Collisions::create(family, {.min_collisions = 1}));
  int seal = 1;

  [[nodiscard]] Index make() const {
    return std::move(
        *Index::create(family, {.kv_heads = kHeads, .segment_tokens = 64, .seal_tokens = seal}));
  }
  // What differs first among the tokens that were not erased.
  static const char* difference(const Index& a, const Index& b) {
    const TokenMask gone = a.erased();
    for (int h = 0; h < a.kv_heads(); ++h) {
      if (!same_floats(a.centre(h), b.centre(h), kDim)) return "centre";
      for (TokenId i = 0; i < a.indexed().size(); ++i) {
        if (gone.has(a.indexed().begin + i)) continue;
        if (!same_bits(a.norms(h)[i], b.norms(h)[i])) return "norms";
      }
      for (int s = 0; s < a.segment_count(); ++s) {
        for (int table = 0; table < 6; ++table) {
          for (int code = 0; code < 8; ++code) {
            if (ids(a, s, h, table, code) != ids(b, s, h, table, code)) return "buckets";
          }
        }
      }
    }
    return nullptr;
  }

 private:
  static std::vector<int> ids(const Index& index, int s, int h, int table, int code) {
    std::vector<int> found;
    for (const std::uint16_t id : index.segment(s, h).bucket(table, code)) {
      if (!index.erased().has(index.segment_begin(s) + id)) found.push_back(id);
    }
    return found;
  }
};

// The same, with blocks that several appends seal.
struct SpreadKind : TablesKind {
  static constexpr bool kSpreads = true;

  [[nodiscard]] Index make() const {
    return std::move(*Index::create(family, {.kv_heads = kHeads,
                                             .segment_tokens = 64,
                                             .seal_tokens = seal,
                                             .seal_steps = std::min(seal, 7)}));
  }
};
template <class Kind>
constexpr bool kSpreads = requires {
  Kind::kSpreads;
};

struct CodesKind {
  using Index = Signatures<HadamardQuantiser>;
  using Sampler = Systematic;
  static constexpr bool kSeals = false;

  HadamardQuantiser quantiser = std::move(*HadamardQuantiser::create(kDim, 2, 5));
  Sampler sampler = *Systematic::create(quantiser, {.budget = {.fraction = 0.2}});
  int seal = 1;

  [[nodiscard]] Index make() const {
    return std::move(*Index::create(quantiser, {.kv_heads = kHeads, .value_dim = 4}));
  }
  template <class Q>
  static const char* difference(const Signatures<Q>& a, const Signatures<Q>& b) {
    for (int h = 0; h < a.kv_heads(); ++h) {
      if (!same_floats(a.centre(h), b.centre(h), kDim)) return "centre";
      for (int s = 0; s < a.segment_count(); ++s) {
        const SignatureSegment& x = a.segment(s, h);
        const SignatureSegment& y = b.segment(s, h);
        if (x.largest_factor != y.largest_factor) return "largest factor";
        for (int t = 0; t < a.segment_tokens(s); ++t) {
          if (a.erased().has(a.indexed().begin + s * kSignatureSegment + t)) continue;
          if (x.factors.data()[t] != y.factors.data()[t]) return "factors";
          if (x.value_norms.data()[t] != y.value_norms.data()[t]) return "value norms";
          const CodePlace place = CodePlace::of(t % kSignatureBlock);
          for (int r = 0; r < a.rows_per_block(); ++r) {
            const std::int64_t at =
                (std::int64_t{t / kSignatureBlock} * a.rows_per_block() + r) * 64;
            if (code_bits(x.codes.data() + at, place) != code_bits(y.codes.data() + at, place)) {
              return "codes";
            }
          }
        }
      }
    }
    return nullptr;
  }
};

// A profile of signatures and tables, or of trained signatures and nothing.
template <bool kTables>
struct ProfileKind {
  using Index = PerHeadIndex;
  using Sampler = PerHead;
  static constexpr bool kSeals = kTables;

  HeadHashes hashes = make_hashes();
  Sampler sampler = std::move(*PerHead::create(hashes));
  int seal = 1;

  [[nodiscard]] Index make() const {
    return std::move(*Index::create(hashes, {.segment_tokens = 64, .seal_tokens = seal}));
  }
  static const char* difference(const Index& a, const Index& b) {
    const auto of_head = [](const auto* x, const auto* y, const auto& compare) -> const char* {
      if (x == nullptr) return nullptr;
      const char* found = compare(*x, *y);
      return found != nullptr ? found : erasure_difference(*x, *y);
    };
    const char* found = nullptr;
    for (int h = 0; h < kHeads && found == nullptr; ++h) {
      if (kTables) {
        found =
            h == 0 ? of_head(a.signatures<HadamardQuantiser>(0), b.signatures<HadamardQuantiser>(0),
                             CodesKind::difference<HadamardQuantiser>)
                   : of_head(a.tables(1), b.tables(1), TablesKind::difference);
      } else {
        found = of_head(a.signatures<ProductQuantiser>(h), b.signatures<ProductQuantiser>(h),
                        CodesKind::difference<ProductQuantiser>);
      }
    }
    return found;
  }

 private:
  static HeadHashes make_hashes() {
    constexpr HeadSetting kBoth[] = {
        {.kind = HeadKind::kSignatures, .bits = 2, .budget = 0.2},
        {.kind = HeadKind::kTables, .functions = 3, .tables = 6, .min_collisions = 1}};
    constexpr HeadSetting kCodes[] = {
        {.kind = HeadKind::kTrainedSignatures, .bits = 1, .budget = 0.2},
        {.kind = HeadKind::kUniform, .budget = 0.3}};
    Random random(17);
    Cache sample;
    sample.grow(64, random);
    SerialExecutor serial;
    return std::move(*HeadHashes::create(make_backend<ScalarOps>(serial), sample.source(),
                                         {.begin = 0, .end = 64}, kTables ? kBoth : kCodes, 5));
  }
};
using ProfileOfBoth = ProfileKind<true>;
using ProfileOfCodes = ProfileKind<false>;

// What build() takes to make an index with the centres of `index`.
template <class Index>
decltype(auto) centres_of(const Index& index) {
  if constexpr (requires { index.centres(); }) {
    return index.centres();
  } else {
    return (index);
  }
}

template <class Kind, class Index>
void check_decodes_alike(const Kind& kind, const Cache& cache, const Index& a, const Index& b,
                         Random& random) {
  std::vector<float> query(static_cast<std::size_t>(kShape.query_heads) * kDim);
  for (float& q : query) q = static_cast<float>(random.normal());
  const auto source = cache.source();
  const DecodePlan<typename Kind::Sampler> plan{
      .shape = kShape, .sampler = &kind.sampler, .exact_below = 0};
  SerialExecutor executor;
  Outputs outputs(kShape);
  Outputs expected(kShape);
  for (const auto& [index, to] : {std::pair{&a, &outputs}, std::pair{&b, &expected}}) {
    const Request<Source, Index> request{.key_values = &source,
                                         .index = index,
                                         .query = query,
                                         .states = to->states,
                                         .reports = to->reports,
                                         .seed = 3};
    CHECK(decode_one<ScalarOps>(executor, plan, request).ok());
  }
  // Erased tokens are still in buckets, not in the same ones, and looked over there.
  for (Outputs* each : {&outputs, &expected}) {
    for (HeadReport& report : each->reports) report.bytes = Kind::kSeals ? 0 : report.bytes;
  }
  CHECK(same_bits(outputs, expected));
  CHECK(outputs.report(0).indexed <= a.indexed().size() - a.erased().count(a.indexed()));
}

// One request: its cache, its index, and what the index should be.
template <class Kind>
struct Live {
  Cache cache;
  typename Kind::Index index;
  TokenRange range = {};
  std::vector<bool> erased = {};  // by token
  TokenId asked = 0;              // what was appended last, not all of which may be indexed

  [[nodiscard]] std::vector<TokenId> erased_ids() const {
    std::vector<TokenId> ids;
    for (TokenId t = range.begin; t < range.end; ++t) {
      if (erased[static_cast<std::size_t>(t)]) ids.push_back(t);
    }
    return ids;
  }
};

template <class Kind>
class Script {
 public:
  explicit Script(std::uint64_t seed) : random_(seed) {
    most_ = random_.below(12) == 0 ? kSignatureSegment + 300 : 260;
    kind_.seal = Kind::kSeals ? std::vector<int>{1, 3, 50}[static_cast<std::size_t>(seed % 3)] : 1;
    live_.push_back({.cache = {}, .index = kind_.make()});
    grow(live_[0], 40);
  }

  void run(int operations) {
    for (int i = 0; i < operations; ++i) {
      step();
      if (i % 20 == 19) {
        for (auto& live : live_) check(live);
      }
    }
  }

 private:
  void step() {
    auto& live = live_[static_cast<std::size_t>(random_.below(static_cast<int>(live_.size())))];
    switch (random_.below(17)) {
      case 0:
        return build(live);
      case 1:
        return truncate(live);
      case 2:
      case 3:
        return erase(live);
      case 4:
      case 5:
        return fork(live);
      case 6:
        return drop();
      case 7:
      case 8:
        return rehash(live);
      case 9:
        return recentre(live);
      case 10:
        return random_.below(6) == 0 ? clear(live) : append(live, 1);
      case 11:
        return append(live, random_.between(1, most_ / 3));
      case 12:
        return reload(live);
      default:
        return append(live, random_.between(1, 4));
    }
  }

  void grow(Live<Kind>& live, TokenId tokens) {
    live.cache.grow(tokens, random_);
    live.erased.resize(static_cast<std::size_t>(live.cache.tokens()));
  }

  // New rows for tokens that were erased and are taken over again.
  void renew(Live<Kind>& live, TokenRange range) {
    for (TokenId t = range.begin; t < range.end; ++t) {
      if (!std::isfinite(live.cache.key(1, t)[2])) {
        live.cache.change({.begin = t, .end = t + 1}, random_);
      }
    }
  }

  void build(Live<Kind>& live) {
    renew(live, {.begin = 0, .end = live.cache.tokens()});
    const TokenId begin = random_.between(0, 5);
    const TokenId end = random_.between(begin, live.cache.tokens());
    REQUIRE(live.index.build(backend(), live.cache.source(), {.begin = begin, .end = end}).ok());
    live.range = {.begin = begin, .end = end};
    live.asked = end;
    std::fill(live.erased.begin(), live.erased.end(), false);
  }

  void append(Live<Kind>& live, TokenId tokens) {
    const TokenId end = (kSpreads<Kind> ? live.asked : live.range.end) + tokens;
    if (end > most_) return;
    grow(live, end);
    renew(live, {.begin = live.range.end, .end = live.cache.tokens()});
    REQUIRE(live.index.append(backend(), live.cache.source(), end).ok());
    if (kSpreads<Kind>) {
      live.asked = end;
      tokens = live.index.indexed().end - live.range.end;
      CHECK((tokens >= 0 && tokens % kind_.seal == 0));
      CHECK(end - live.index.indexed().end < 2 * kind_.seal);
    }
    live.range.end += tokens / kind_.seal * kind_.seal;
  }

  void truncate(Live<Kind>& live) {
    const TokenId end = random_.between(0, live.range.end + 3);
    REQUIRE(live.index.truncate(end).ok());
    live.asked = std::min(live.asked, std::max(end, live.range.begin));
    if (end >= live.range.end) return;
    live.range.end = std::max(end, live.range.begin);
    std::fill(live.erased.begin() + live.range.end, live.erased.end(), false);
  }

  void erase(Live<Kind>& live) {
    if (live.range.empty()) return;
    std::vector<TokenId> ids;
    const int count = random_.below(10) == 0 ? live.range.size() : random_.between(1, 8);
    for (int i = 0; i < count; ++i) {
      ids.push_back(random_.between(live.range.begin, live.range.end - 1));
    }
    REQUIRE(live.index.erase(ids).ok());
    for (const TokenId t : ids) {
      live.erased[static_cast<std::size_t>(t)] = true;
      // The host may give the row to anyone.
      live.cache.key(1, t)[2] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  void fork(Live<Kind>& live) {
    if (live_.size() == 4) return;
    auto other = live.index.fork();
    REQUIRE(other.ok());
    Live<Kind> copy{.cache = live.cache,
                    .index = std::move(*other),
                    .range = live.range,
                    .erased = live.erased,
                    .asked = live.asked};
    live_.push_back(std::move(copy));
  }

  // From its own blob, over whatever there is.
  void reload(Live<Kind>& live) {
    std::vector<std::byte> blob(live.index.saved_bytes());
    REQUIRE(live.index.save(blob).ok());
    auto loaded = kind_.make();
    if (random_.below(2) == 0) {
      REQUIRE(loaded.build(backend(), live.cache.source(), {.begin = 0, .end = 0}).ok());
    }
    const Status status = loaded.load(blob);
    REQUIRE_MESSAGE(status.ok(), std::string(status.message()));
    live.index = std::move(loaded);
  }

  void drop() {
    if (live_.size() > 1)
      live_.erase(live_.begin() + random_.below(static_cast<int>(live_.size())));
  }

  // The rows of tokens that are erased stay as they are: nobody may read them.
  void rehash(Live<Kind>& live) {
    const TokenId begin = random_.between(live.range.begin, live.range.end);
    const TokenRange range{.begin = begin, .end = random_.between(begin, live.range.end)};
    for (TokenId t = range.begin; t < range.end; ++t) {
      if (!live.erased[static_cast<std::size_t>(t)]) {
        live.cache.change({.begin = t, .end = t + 1}, random_);
      }
    }
    REQUIRE(live.index.rehash(backend(), live.cache.source(), range).ok());
  }

  void recentre(Live<Kind>& live) {
    const auto source = live.cache.source();
    const auto before = live.index.drift(backend(), source);
    REQUIRE(before.ok());
    REQUIRE(live.index.recentre(backend(), source).ok());
    const auto after = live.index.drift(backend(), source);
    REQUIRE(after.ok());
    CHECK(*after <= *before);
    CHECK(*after < 1e-5);  // the centre is in float
  }

  void clear(Live<Kind>& live) {
    live.index.clear();
    live.range = {};
    live.asked = 0;
    live.cache = {};
    live.erased.clear();
    grow(live, 40);
    CHECK(live.index.shared_bytes() == 0);
  }

  // Against an index built at once from the rows as they are, with the centre that there is.
  void check(Live<Kind>& live) {
    REQUIRE(live.index.indexed() == live.range);
    const std::vector<TokenId> gone = live.erased_ids();
    CHECK(live.index.erased().count(live.range) == static_cast<TokenId>(gone.size()));
    for (const TokenId t : gone) CHECK(live.index.erased().has(t));
    if (live.range.empty()) return;
    Cache whole = live.cache;  // a build reads the rows of erased tokens, too: any will do
    for (const TokenId t : gone) whole.change({.begin = t, .end = t + 1}, random_);
    auto rebuilt = kind_.make();
    REQUIRE(rebuilt.build(backend(), whole.source(), live.range, centres_of(live.index)).ok());
    REQUIRE(rebuilt.erase(gone).ok());
    const char* difference = Kind::difference(live.index, rebuilt);
    CHECK_MESSAGE(difference == nullptr, std::string(difference == nullptr ? "" : difference));
    // Rows of erased tokens and of those behind the index, which nothing may attend to, stay NaN.
    if (random_.below(3) == 0 && live.cache.tokens() == live.range.end) {
      check_decodes_alike(kind_, live.cache, live.index, rebuilt, random_);
    }
  }

  auto backend() { return make_backend<ScalarOps>(serial_); }

  Random random_;
  Kind kind_;
  TokenId most_;
  SerialExecutor serial_;
  std::vector<Live<Kind>> live_;
};

// In all, over scripts of 100 operations each; MAGICPIG_TEST_OPERATIONS asks for more.
int operations() {
  const char* text = std::getenv("MAGICPIG_TEST_OPERATIONS");
  return text != nullptr ? std::atoi(text) : 40000;
}

TEST_CASE_TEMPLATE("after any script of changes an index is the one built at once", Kind,
                   TablesKind, SpreadKind, CodesKind, ProfileOfBoth, ProfileOfCodes) {
  const int scripts = operations() / 200;
  std::int64_t before = 0;
  for (int seed = 1; seed <= scripts; ++seed) {
    CAPTURE(seed);
    Script<Kind>(static_cast<std::uint64_t>(seed)).run(100);
    if (seed == 1) before = outstanding_allocations();  // doctest has what it keeps
  }
  CHECK(outstanding_allocations() == before);
}

template <class Kind>
struct Subject {
  Kind kind;
  Cache cache;
  typename Kind::Index index = kind.make();
  SerialExecutor serial;

  Subject(TokenId tokens, TokenId indexed) {
    Random random(9);
    cache.grow(tokens, random);
    REQUIRE(
        index.build(make_backend<ScalarOps>(serial), cache.source(), {.begin = 3, .end = indexed})
            .ok());
  }
};

TEST_CASE_TEMPLATE("a fork shares what it does not change", Kind, TablesKind, CodesKind) {
  Subject<Kind> s(2 * kSignatureSegment + 400, 2 * kSignatureSegment + 300);
  const auto backend = make_backend<ScalarOps>(s.serial);
  CHECK(s.index.shared_bytes() == 0);
  auto fork = s.index.fork();
  REQUIRE(fork.ok());
  const std::size_t shared = s.index.shared_bytes();
  CHECK(shared > s.index.bytes() - 1000);
  CHECK(fork->shared_bytes() == shared);
  CHECK(index_difference(*fork, s.index) == nullptr);
  const auto* first = &s.index.segment(0, 0);
  CHECK(first != &fork->segment(0, 0));
  REQUIRE(fork->append(backend, s.cache.source(), 2 * kSignatureSegment + 301).ok());
  // The last segment is its own now, all others are not.
  const int last = s.index.segment_count() - 1;
  for (int h = 0; h < kHeads; ++h) {
    CHECK(fork->segment(last, h).shared_bytes() == 0);
    CHECK(s.index.segment(last, h).shared_bytes() == 0);
    for (int number = 0; number < last; ++number) {
      CHECK(fork->segment(number, h).shared_bytes() == fork->segment(number, h).bytes());
    }
  }
  REQUIRE(s.index.truncate(100).ok());
  REQUIRE(fork->truncate(2 * kSignatureSegment + 300).ok());
  Subject<Kind> same(2 * kSignatureSegment + 400, 2 * kSignatureSegment + 300);
  CHECK(index_difference(*fork, same.index) == nullptr);
  s.index = s.kind.make();
  CHECK(fork->shared_bytes() == 0);
  fork->clear();
  CHECK(fork->bytes() <= s.index.bytes());
}

TEST_CASE_TEMPLATE("forks are read, changed and dropped on threads of their own", Kind, TablesKind,
                   CodesKind, ProfileOfBoth) {
  Subject<Kind> s(700, 500);
  constexpr int kThreads = 8;
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    auto own = s.index.fork();
    REQUIRE(own.ok());
    threads.emplace_back([&, i, fork = std::move(*own)]() mutable {
      SerialExecutor serial;
      const auto backend = make_backend<ScalarOps>(serial);
      bool good = true;
      for (int round = 0; round < 20; ++round) {
        auto again = s.index.fork();  // of the one that all threads read
        auto mine = fork.fork();
        good &= again.ok() && mine.ok();
        const std::vector<TokenId> ids{10 + i, 400 + round};
        good &= fork.append(backend, s.cache.source(), 501 + round).ok();
        good &= fork.erase(ids).ok();
        good &= mine->truncate(90 + i).ok();
        good &= mine->append(backend, s.cache.source(), 520).ok();
        good &= again->rehash(backend, s.cache.source(), {.begin = 100, .end = 140}).ok();
        good &= index_difference(*again, s.index) == nullptr;
        if (round % 7 == 6) fork = std::move(*again);
      }
      right.fetch_add(good ? 1 : 0);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right.load() == kThreads);
  CHECK(s.index.shared_bytes() == 0);
  Subject<Kind> same(700, 500);
  CHECK(index_difference(s.index, same.index) == nullptr);
}

TEST_CASE_TEMPLATE("a fork is appended to on another thread while its index is decoded from", Kind,
                   TablesKind, CodesKind) {
  Subject<Kind> s(900, 500);
  const auto source = s.cache.source();
  const DecodePlan<typename Kind::Sampler> plan{
      .shape = kShape, .sampler = &s.kind.sampler, .exact_below = 0};
  const std::vector<float> query(static_cast<std::size_t>(kShape.query_heads) * kDim, 0.3F);
  const auto decoded = [&](Outputs& outputs) {
    const Request<Source, typename Kind::Index> request{.key_values = &source,
                                                        .index = &s.index,
                                                        .query = query,
                                                        .states = outputs.states,
                                                        .reports = outputs.reports};
    return decode_one<ScalarOps>(s.serial, plan, request).ok();
  };
  Outputs before(kShape);
  REQUIRE(decoded(before));
  auto fork = s.index.fork();
  REQUIRE(fork.ok());
  bool sealed = false;
  std::thread thread([&] {
    SerialExecutor serial;
    sealed = fork->append(make_backend<ScalarOps>(serial), source, 900).ok();
  });
  for (int step = 0; step < 50; ++step) {
    Outputs outputs(kShape);
    CHECK(decoded(outputs));
    CHECK(same_bits(outputs, before));
  }
  thread.join();
  REQUIRE(sealed);
  s.index = std::move(*fork);
  CHECK(s.index.indexed().end == 900);
  CHECK(s.index.shared_bytes() == 0);
}

// change(index) again and again with one more allocation that succeeds, until it does.
template <class Index, class Change>
int failures_of(Index& index, const Index& same, const Change& change) {
  for (int failures = 0;; ++failures) {
    fail_allocations_after(failures);
    const Status status = change(index);
    fail_allocations_after(-1);
    if (status.ok()) return failures;
    CHECK(status.code() == ErrorCode::kOutOfMemory);
    CHECK(index_difference(index, same) == nullptr);
    CHECK(index.erased().count(index.indexed()) == same.erased().count(same.indexed()));
  }
}

TEST_CASE_TEMPLATE("changes that run out of memory leave index and forks as they were", Kind,
                   TablesKind, CodesKind, ProfileOfBoth) {
  Subject<Kind> s(700, 500);
  const Subject<Kind> same(700, 500);
  const auto backend = make_backend<ScalarOps>(s.serial);
  const auto source = s.cache.source();
  using Index = typename Kind::Index;
  const auto fork = s.index.fork();  // makes every change a copy
  REQUIRE(fork.ok());
  CHECK(failures_of(s.index, same.index, [](Index& index) { return index.fork().status(); }) > 2);
  auto a = s.index.fork();
  CHECK(failures_of(*a, same.index,
                    [&](Index& index) { return index.append(backend, source, 600); }) > 3);
  auto b = s.index.fork();
  CHECK(failures_of(*b, same.index, [&](Index& index) {
          return index.rehash(backend, source, {.begin = 50, .end = 300});
        }) > 5);
  auto c = s.index.fork();
  CHECK(failures_of(*c, same.index, [&](Index& index) { return index.recentre(backend, source); }) >
        5);
  auto d = s.index.fork();
  CHECK(failures_of(*d, same.index, [&](Index& index) {
          return index.erase(std::vector<TokenId>{7, 8});
        }) >= 1);
  auto e = s.index.fork();
  const int truncations =
      failures_of(*e, same.index, [](Index& index) { return index.truncate(450); });
  CHECK((truncations > 0) == Kind::kSeals);  // signatures are cut in place
  CHECK(index_difference(*fork, same.index) == nullptr);
  CHECK(index_difference(s.index, same.index) == nullptr);
}

TEST_CASE_TEMPLATE("a rehash or a centre of keys that are not finite is refused", Kind, TablesKind,
                   CodesKind) {
  Subject<Kind> s(300, 300);
  Subject<Kind> same(300, 300);
  const auto backend = make_backend<ScalarOps>(s.serial);
  const float kept = s.cache.key(1, 120)[2];
  s.cache.key(1, 120)[2] = std::numeric_limits<float>::infinity();
  const Status status = s.index.rehash(backend, s.cache.source(), {.begin = 100, .end = 130});
  CHECK(status.code() == ErrorCode::kNonFinite);
  CHECK(std::string(status.message()) == "the key of token 120, KV head 1 is not finite");
  CHECK(s.index.recentre(backend, s.cache.source()).code() == ErrorCode::kNonFinite);
  CHECK(s.index.drift(backend, s.cache.source()).status().code() == ErrorCode::kNonFinite);
  CHECK(index_difference(s.index, same.index) == nullptr);
  // Erased, it is nobody's business.
  REQUIRE(s.index.erase(std::vector<TokenId>{120, 100, 120}).ok());
  CHECK(s.index.erased().count(s.index.indexed()) == 2);
  CHECK(s.index.rehash(backend, s.cache.source(), {.begin = 100, .end = 130}).ok());
  CHECK(s.index.rehash(backend, s.cache.source(), {.begin = 120, .end = 121}).ok());
  CHECK(s.index.recentre(backend, s.cache.source()).ok());
  CHECK(s.index.drift(backend, s.cache.source()).ok());
  s.cache.key(1, 120)[2] = kept;

  for (const TokenId bad : {2, 300, -1}) {
    const Status refused = s.index.erase(std::vector<TokenId>{50, bad});
    CHECK(refused.code() == ErrorCode::kInvalidArgument);
    CHECK(std::string(refused.message()) ==
          "cannot erase token " + std::to_string(bad) + " of an index of [3, 300)");
    CHECK_FALSE(s.index.erased().has(50));
  }
  for (const TokenRange bad : {TokenRange{2, 5}, TokenRange{10, 301}, TokenRange{20, 19}}) {
    const Status refused = s.index.rehash(backend, s.cache.source(), bad);
    CHECK(refused.code() == ErrorCode::kInvalidArgument);
    CHECK(std::string(refused.message()).find("cannot rehash [") == 0);
  }
  std::vector<float> keys(kHeads * kDim);
  std::vector<float> values(s.index.centres().values.size());
  CHECK(s.index.build(backend, s.cache.source(), {3, 9}, {.keys = keys, .values = values}).ok());
  CHECK(s.index.build(backend, s.cache.source(), {3, 9}, Centres{}).code() ==
        ErrorCode::kShapeMismatch);
  keys[3] = std::numeric_limits<float>::quiet_NaN();
  CHECK(s.index.build(backend, s.cache.source(), {3, 9}, {.keys = keys, .values = values}).code() ==
        ErrorCode::kNonFinite);
}

TEST_CASE_TEMPLATE("drift is the distance of mean and centre in units of the keys' own", Kind,
                   TablesKind, CodesKind) {
  Subject<Kind> s(300, 300);
  const auto backend = make_backend<ScalarOps>(s.serial);
  CHECK(*s.index.drift(backend, s.cache.source()) < 1e-5);
  Random random(4);
  s.cache.change({.begin = 100, .end = 300}, random);
  double largest = 0.0;
  for (int h = 0; h < kHeads; ++h) {
    double mean[kDim] = {};
    double square = 0.0;
    for (TokenId t = 3; t < 300; ++t) {
      for (int j = 0; j < kDim; ++j) {
        const double off = static_cast<double>(s.cache.key(h, t)[j] - s.index.centre(h)[j]);
        mean[j] += off / 297;
        square += off * off / 297;
      }
    }
    double off = 0.0;
    for (const double m : mean) off += m * m;
    largest = std::max(largest, std::sqrt(off / square));
  }
  CHECK(*s.index.drift(backend, s.cache.source()) == doctest::Approx(largest));
  CHECK(largest > 0.1);
  REQUIRE(s.index.recentre(backend, s.cache.source()).ok());
  auto fresh = s.kind.make();
  REQUIRE(fresh.build(backend, s.cache.source(), {.begin = 3, .end = 300}).ok());
  CHECK(index_difference(s.index, fresh) == nullptr);
}

}  // namespace
}  // namespace magicpig::test

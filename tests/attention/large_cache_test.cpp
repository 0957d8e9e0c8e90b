// SPDX-License-Identifier: Apache-2.0
// Caches whose tokens, rows, scalars and bytes are more than 31 bits count: how much memory is
// asked for, windows that end with the last token there can be, and, where it is asked for, a cache
// of more than 2^31 scalars that is there.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "brute_force.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/core/ring_key_values.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "random.hpp"
#include "row_batch.hpp"
#include "same_index.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

using Codes = Signatures<HadamardQuantiser>;
using Tables = BucketTables<SimHash>;

constexpr TokenId kMost = INT32_MAX;

// One decode step of one request.
struct Step {
  explicit Step(const Shape& of) : shape(of) {
    Random random(8);
    query.resize(static_cast<std::size_t>(shape.query_heads * shape.head_dim));
    for (float& x : query) x = static_cast<float>(random.normal());
  }

  template <class Sampler, class Source, class IndexType>
  Status decode_from(const Sampler& sampler, const Source& source, const IndexType* index,
                     TokenId first_visible, Outputs& outputs) const {
    const DecodePlan<Sampler> plan{.shape = shape, .sampler = &sampler, .exact_below = 0};
    const TokenId seen = source.tokens() - first_visible;
    const Request<Source, IndexType> request{.key_values = &source,
                                             .index = index,
                                             .query = query,
                                             .states = outputs.states,
                                             .reports = outputs.reports,
                                             .seed = 3,
                                             .step = 4,
                                             .first_visible = first_visible};
    std::vector<std::byte> workspace(workspace_bytes<Source>(plan, seen, 1));
    SerialExecutor serial;
    return decode(make_backend<ScalarOps>(serial), plan,
                  std::span<const Request<Source, IndexType>>(&request, 1), workspace);
  }

  template <class Sampler, class Source, class IndexType>
  DrawnCandidates drawn(const Sampler& sampler, const Source& source, const IndexType& index,
                        int kv_head) const {
    const int group = shape.group();
    const float* own = query.data() + std::int64_t{kv_head} * group * shape.head_dim;
    return draw_candidates<ScalarOps>(
        sampler, DrawInput<Source, IndexType>{
                     .key_values = source,
                     .index = index,
                     .kv_head = kv_head,
                     .queries = {.data = own, .count = group, .dim = shape.head_dim},
                     .noise = {.seed = 3, .step = 4}});
  }

  Shape shape;
  std::vector<float> query;
};

void check_ok(const Status& status) { CHECK_MESSAGE(status.ok(), std::string(status.message())); }

// Whether a is b with every token `shift` further on; of a the tokens from `first` on.
bool shifted(const DrawnCandidates& a, const DrawnCandidates& b, TokenId shift, TokenId first = 0) {
  const auto begin = std::lower_bound(a.tokens.begin(), a.tokens.end(), first) - a.tokens.begin();
  const auto skipped = static_cast<std::size_t>(begin);
  if (b.tokens.empty() || a.tokens.size() - skipped != b.tokens.size()) return false;
  for (std::size_t i = 0; i < b.tokens.size(); ++i) {
    if (a.tokens[skipped + i] != b.tokens[i] + shift) return false;
    if (a.members[skipped + i] != b.members[i]) return false;
  }
  return true;
}

bool same_outputs(const Outputs& a, const Outputs& b) {
  bool same = true;
  for (std::size_t i = 0; i < a.values.size(); ++i) same &= same_bits(a.values[i], b.values[i]);
  for (std::size_t h = 0; h < a.states.size(); ++h) {
    same &= same_bits(a.states[h].lse, b.states[h].lse) && a.reports[h].drawn == b.reports[h].drawn;
  }
  return same;
}

struct Samplers {
  explicit Samplers(int dim)
      : quantiser(std::move(*HadamardQuantiser::create(dim, 2, 5))),
        systematic(*Systematic::create(quantiser, {.budget = {.fraction = 0.02}})),
        poisson(*Poisson::create(quantiser, {.budget = {.fraction = 0.02}})),
        uniform(*Uniform::create({.fraction = 0.02})),
        family(std::move(*SimHash::create({.dim = dim, .bits = 4, .tables = 10, .seed = 6}))),
        collisions(std::move(*Collisions::create(family, {.min_collisions = 2}))) {}
  Samplers(const Samplers&) = delete;
  Samplers& operator=(const Samplers&) = delete;

  HadamardQuantiser quantiser;
  Systematic systematic;
  Poisson poisson;
  Uniform uniform;
  SimHash family;
  Collisions collisions;
};

TEST_CASE("bytes of indexes of 2^31 tokens are those counted by hand") {
  // 64 KV heads, 4 bits of 128 dimensions: 64 + 2 bytes a token, 2 for the norm of its value.
  constexpr QuantiserShape kShape{.dim = 128, .bits = 4, .rows = 128};
  static_assert(Codes::kMaxTokens == 2147479552);
  CHECK(Codes::estimate_bytes(kShape, {.kv_heads = 64, .value_dim = 128}, Codes::kMaxTokens) ==
        std::size_t{2147479552} * 64 * 68 + 64 * 256 * 4);
  // (10, 150), 64 KV heads: 32,801 segments of 65,472 tokens hold the 2^31 - 1.
  const auto family = SimHash::create({.dim = 128, .bits = 10, .tables = 150, .seed = 1});
  REQUIRE(family.ok());
  CHECK(Tables::estimate_bytes(*family, {.kv_heads = 64}, kMost) ==
        std::size_t{64} * (300 * (std::size_t{2147483647} + std::size_t{32801} * 1025) +
                           4 * (std::size_t{2147483647} + 128)));
  CHECK(32800 * std::int64_t{65472} < kMost);
  CHECK(32801 * std::int64_t{65472} >= kMost);
}

// Bytes of workspace are a constant and so many for every 8,192 tokens.
template <class Sampler>
void check_workspace(const Sampler& sampler, std::int64_t per_token) {
  const Shape shape{.query_heads = 64, .kv_heads = 16, .head_dim = 128, .value_dim = 128};
  const DecodePlan<Sampler> plan{.shape = shape, .sampler = &sampler};
  const auto bytes = [&](TokenId tokens) {
    return static_cast<std::int64_t>(workspace_bytes(plan, tokens, 3));
  };
  constexpr TokenId kPart = 8192;
  constexpr TokenId kSome = 1 << 20;
  const std::int64_t slope = bytes(kSome + kPart) - bytes(kSome);
  CHECK(slope >= 3 * per_token * kPart);  // and the sums of each part of each head
  constexpr TokenId kLast = kMost - (kPart - 1);
  CHECK(bytes(kLast) == bytes(kSome) + slope * ((kLast - kSome) / kPart));
  CHECK(bytes(kMost) >= bytes(kLast) + 3 * per_token * (kPart - 1) - 64);
  CHECK(bytes(kMost) <= bytes(kLast) + slope);
}

TEST_CASE("bytes of workspace for 2^31 - 1 tokens grow as for fewer") {
  const Samplers samplers(128);
  check_workspace(Exact(), 0);
  check_workspace(samplers.systematic, 4 + 4);
  check_workspace(samplers.poisson, 4 + 4);
  check_workspace(samplers.uniform, 4);
  check_workspace(samplers.collisions, 4 + 4 + 2 * 4);
}

// A ring of so many slots that has gone round until `tokens` were written.
constexpr TokenId kSlots = 5003;
using Ring = RingKeyValues<bf16>;

// The same rows as tokens of small numbers and as the last that there can be.
template <class Sampler, class MakeIndex>
void check_last_window(const Step& step, const Ring& last, const Ring& first,
                       const Sampler& sampler, const MakeIndex& make_index, bool by_rank = true) {
  const TokenId shift = last.tokens() - first.tokens();
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  auto far = make_index();
  auto near = make_index();
  const TokenRange range{.begin = first.tokens() - 4000, .end = first.tokens()};
  const TokenId half = range.begin + 1000;
  check_ok(near.build(backend, first, {range.begin, half}));
  check_ok(near.append(backend, first, range.end));
  check_ok(far.build(backend, last, {range.begin + shift, half + shift}));
  check_ok(far.append(backend, last, range.end + shift));
  REQUIRE(far.indexed() == TokenRange{range.begin + shift, range.end + shift});
  for (int h = 0; h < step.shape.kv_heads; ++h) {
    const DrawnCandidates found = step.drawn(sampler, last, far, h);
    CHECK(std::is_sorted(found.tokens.begin(), found.tokens.end()));
    REQUIRE(!found.tokens.empty());
    CHECK(found.tokens.front() >= range.begin + shift);
    CHECK(found.tokens.back() - shift < range.end);
    const DrawnCandidates expected = step.drawn(sampler, first, near, h);
    CHECK(shifted(found, expected, shift) == by_rank);
    CHECK(!shifted(found, expected, shift - 1));
  }
  Outputs outputs(step.shape);
  Outputs expected(step.shape);
  check_ok(step.decode_from(sampler, last, &far, range.begin + shift - 100, outputs));
  check_ok(step.decode_from(sampler, first, &near, range.begin - 100, expected));
  CHECK(same_outputs(outputs, expected) == by_rank);
}

TEST_CASE("the last window of 2^31 - 1 tokens is drawn from as the first") {
  const Shape shape{.query_heads = 4, .kv_heads = 2, .head_dim = 64, .value_dim = 64};
  const Step step(shape);
  const Samplers samplers(shape.head_dim);
  Random random(2);
  std::vector<bf16> keys(static_cast<std::size_t>(kSlots) * 2 * 64);
  std::vector<bf16> values(keys.size());
  fill_row(random, keys.data(), static_cast<int>(keys.size()));
  fill_row(random, values.data(), static_cast<int>(values.size()));
  const auto ring = [&](TokenId tokens) {
    return *Ring::create({.keys = keys.data(),
                          .values = values.data(),
                          .key_strides = {.head = 128, .token = 256},
                          .value_strides = {.head = 128, .token = 256},
                          .capacity = kSlots,
                          .kv_heads = 2,
                          .head_dim = 64,
                          .value_dim = 64,
                          .tokens = tokens});
  };
  const auto same_slots = [](TokenId tokens) { return tokens % kSlots + kSlots; };
  const auto codes = [&] {
    return std::move(*Codes::create(samplers.quantiser, {.kv_heads = 2, .value_dim = 64}));
  };
  const auto tables = [&] {
    return std::move(
        *Tables::create(samplers.family, {.kv_heads = 2, .segment_tokens = 700, .seal_tokens = 1}));
  };
  const Ring last = ring(kMost);
  const Ring first = ring(same_slots(kMost));
  const Ring last_codes = ring(Codes::kMaxTokens);
  const Ring first_codes = ring(same_slots(Codes::kMaxTokens));
  check_last_window(step, last_codes, first_codes, samplers.systematic, codes);
  // Its noise is by the numbers of tokens.
  check_last_window(step, last_codes, first_codes, samplers.poisson, codes, false);
  check_last_window(step, last_codes, first_codes, samplers.uniform, codes);
  check_last_window(step, last, first, samplers.collisions, tables);
  check_last_window(step, last, first, samplers.uniform, tables);

  Outputs outputs(shape);
  Outputs expected(shape);
  const RangeIndex* none = nullptr;
  check_ok(step.decode_from(Exact(), last, none, kMost - 4500, outputs));
  check_ok(step.decode_from(Exact(), first, none, first.tokens() - 4500, expected));
  CHECK(same_outputs(outputs, expected));
  // One token fewer.
  check_ok(step.decode_from(Exact(), first, none, first.tokens() - 4499, expected));
  CHECK(!same_outputs(outputs, expected));
}

// 4 KV heads of 128 dimensions: 2,252,800,000 scalars of keys in 4.5e9 bytes, and as many of values
// in 1.3e9; more than 2^31 of each, and than 2^32 bytes of keys. Rows are those of two small pools,
// so that sums over all of them are known; as many pool rows as a prime number, so that an address
// that is off by a power of 2 finds another row.
class LargeCache {
 public:
  using Source = StridedKeyValues<bf16, q4_0>;
  static constexpr TokenId kTokens = 4400000;
  static constexpr Shape kShape{.query_heads = 8, .kv_heads = 4, .head_dim = 128, .value_dim = 128};
  static constexpr int kPool = 8191;
  static_assert(std::int64_t{kTokens} * 4 * 128 > std::int64_t{1} << 31);
  static_assert(std::int64_t{kTokens} * 4 * 128 * 2 > std::int64_t{1} << 32);

  LargeCache() {
    Random random(1);
    keys_.resize(kPool * 128);
    values_.resize(kPool * 4);
    for (int i = 0; i < kPool; ++i) {
      fill_row(random, keys_.data() + i * 128, 128);
      fill_row(random, values_.data() + i * 4, 128);
    }
  }
  LargeCache(const LargeCache&) = delete;
  LargeCache& operator=(const LargeCache&) = delete;

  [[nodiscard]] static int pool_row(int h, std::int64_t t) {
    return static_cast<int>((5 * t + 4099 * h) % kPool);
  }
  [[nodiscard]] const bf16* pool_key(int i) const { return keys_.data() + i * 128; }
  [[nodiscard]] const q4_0* pool_value(int i) const { return values_.data() + i * 4; }

  // Tokens [begin, kTokens) as a cache of their own.
  struct Rows {
    Buffer<bf16> keys;
    Buffer<q4_0> values;
    TokenId tokens = 0;
    [[nodiscard]] Source source() const {
      return *Source::token_major(keys.data(), values.data(), kShape, tokens);
    }
  };
  [[nodiscard]] bool make(TokenId begin, Rows& rows) const {
    rows.tokens = kTokens - begin;
    const auto heads = static_cast<std::size_t>(rows.tokens) * 4;
    if (!rows.keys.resize(heads * 128) || !rows.values.resize(heads * 4)) return false;
    bf16* key = rows.keys.data();
    q4_0* value = rows.values.data();
    for (TokenId t = begin; t < kTokens; ++t) {
      for (int h = 0; h < 4; ++h, key += 128, value += 4) {
        std::memcpy(key, pool_key(pool_row(h, t)), 256);
        std::memcpy(value, pool_value(pool_row(h, t)), 72);
      }
    }
    return true;
  }

  // Attention of a query over all tokens, in double: each pool row as often as it occurs.
  [[nodiscard]] OracleState attention(const float* query, int h) const {
    std::vector<double> times(kPool);
    for (TokenId t = 0; t < kTokens; ++t) times[static_cast<std::size_t>(pool_row(h, t))] += 1.0;
    OracleState state;
    state.out.resize(128);
    double sum = 0.0;
    for (int i = 0; i < kPool; ++i) {
      double dot = 0.0;
      for (int j = 0; j < 128; ++j) {
        dot += static_cast<double>(query[j]) * static_cast<double>(scalar_at(pool_key(i), j));
      }
      const double weight =
          times[static_cast<std::size_t>(i)] * std::exp(dot / std::sqrt(128.0) - 10.0);
      sum += weight;
      for (int j = 0; j < 128; ++j) {
        state.out[static_cast<std::size_t>(j)] +=
            weight * static_cast<double>(scalar_at(pool_value(i), j));
      }
    }
    for (double& x : state.out) x /= sum;
    state.lse = std::log(sum) + 10.0;
    return state;
  }

 private:
  std::vector<bf16> keys_;
  std::vector<q4_0> values_;
};

// Seconds since the last call.
class Watch {
 public:
  std::string lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    return std::to_string(seconds) + " s";
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

TEST_CASE("a cache of more than 2^31 scalars is indexed, drawn from and attended to") {
  if (std::getenv("MAGICPIG_TEST_LARGE") == nullptr) {
    MESSAGE("NOT run: set MAGICPIG_TEST_LARGE=1 where 7 GiB of memory are free");
    return;
  }
  constexpr TokenId kTokens = LargeCache::kTokens;
  constexpr TokenId kFirst = kTokens - 140000;  // of the tokens that the small cache holds
  constexpr TokenId kSink = 4;
  constexpr int kTimes = 537;  // that each pool row of a head is indexed
  constexpr TokenId kEnd = kSink + kTimes * LargeCache::kPool;  // of the indexed tokens
  const LargeCache cache;
  LargeCache::Rows all;
  LargeCache::Rows few;
  Watch watch;
  REQUIRE(cache.make(0, all));
  REQUIRE(cache.make(kFirst, few));
  MESSAGE("written in ", watch.lap());
  const LargeCache::Source large = all.source();
  const LargeCache::Source small = few.source();
  const Shape& shape = LargeCache::kShape;
  const Step step(shape);
  const Samplers samplers(shape.head_dim);
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  const auto window = [](TokenId begin) {
    return TokenRange{.begin = begin - kFirst, .end = kEnd - kFirst};
  };

  std::vector<OracleState> whole;
  for (int head = 0; head < shape.query_heads; ++head) {
    whole.push_back(
        cache.attention(step.query.data() + head * shape.head_dim, head / shape.group()));
  }
  const auto error = [&](const Outputs& outputs, int head) {
    return relative_error(outputs.out(head), whole[static_cast<std::size_t>(head)].out);
  };

  Outputs outputs(shape);
  Outputs expected(shape);
  SUBCASE("exactly") {
    const RangeIndex* none = nullptr;
    check_ok(step.decode_from(Exact(), large, none, 0, outputs));
    for (int head = 0; head < shape.query_heads; ++head) {
      CHECK(error(outputs, head) < 1e-5);
      CHECK(std::fabs(outputs.lse(head) - whole[static_cast<std::size_t>(head)].lse) < 1e-5);
      CHECK(outputs.report(head).exact == kTokens);
    }
    MESSAGE("exact attention in ", watch.lap());
    check_ok(step.decode_from(Exact(), large, none, kTokens - 1000, outputs));
    check_ok(step.decode_from(Exact(), small, none, small.tokens() - 1000, expected));
    CHECK(same_outputs(outputs, expected));
    check_ok(step.decode_from(Exact(), small, none, small.tokens() - 999, expected));
    CHECK(!same_outputs(outputs, expected));
  }
  SUBCASE("by signatures") {
    const SignaturesConfig config{.kv_heads = 4, .value_dim = 128};
    Codes codes = std::move(*Codes::create(samplers.quantiser, config));
    check_ok(codes.build(backend, large, {kSink, kTokens / 2}));
    check_ok(codes.append(backend, large, kEnd));
    MESSAGE("signatures in ", watch.lap(), ", ", codes.bytes(), " bytes");
    REQUIRE(codes.indexed() == TokenRange{kSink, kEnd});
    CHECK(codes.bytes() == Codes::estimate_bytes(samplers.quantiser.shape(), config, kEnd - kSink));
    // The last segments are those of an index over the small cache, made with the same centres.
    const int first = (kFirst - kSink) / kSignatureSegment + 1;
    const TokenId begin = kSink + first * kSignatureSegment;
    Codes own = std::move(*Codes::create(samplers.quantiser, config));
    check_ok(own.build(backend, small, window(begin), codes.centres()));
    REQUIRE(own.segment_count() == codes.segment_count() - first);
    for (int s = 0; s < own.segment_count(); ++s) {
      for (int h = 0; h < 4; ++h) {
        CHECK(segment_difference(codes.segment(first + s, h), own.segment(s, h),
                                 own.segment_tokens(s), own.rows_per_block()) == nullptr);
      }
    }
    CHECK(segment_difference(codes.segment(first, 0), own.segment(1, 0), kSignatureSegment,
                             own.rows_per_block()) != nullptr);
    // So are draws from an index over the last tokens alone, and attention to them.
    Codes last = std::move(*Codes::create(samplers.quantiser, config));
    check_ok(last.build(backend, large, {begin, kEnd}, codes.centres()));
    for (int h = 0; h < 4; ++h) {
      CHECK(shifted(step.drawn(samplers.systematic, large, last, h),
                    step.drawn(samplers.systematic, small, own, h), kFirst));
    }
    check_ok(step.decode_from(samplers.systematic, large, &last, begin - 100, outputs));
    check_ok(step.decode_from(samplers.systematic, small, &own, begin - kFirst - 100, expected));
    CHECK(same_outputs(outputs, expected));
    watch.lap();
    check_ok(step.decode_from(samplers.systematic, large, &codes, 0, outputs));
    MESSAGE("attention to ", outputs.report(0).drawn, " tokens in ", watch.lap());
    for (int head = 0; head < shape.query_heads; ++head) {
      const HeadReport& report = outputs.report(head);
      CHECK(report.drawn > 80000);
      CHECK(report.drawn < 96000);
      CHECK(report.indexed == kEnd - kSink);
      CHECK(std::fabs(report.alarm) < 5.0F);
      // An output from other rows would be off by more than its length.
      CHECK(error(outputs, head) < 1.5 * static_cast<double>(report.error_95));
      CHECK(report.error_95 < 0.5F);
    }
  }
  SUBCASE("by tables") {
    const BucketTablesConfig config{.kv_heads = 4, .seal_tokens = 1};
    Tables tables = std::move(*Tables::create(samplers.family, config));
    check_ok(tables.build(backend, large, {kSink, kTokens / 2}));
    check_ok(tables.append(backend, large, kEnd));
    MESSAGE("tables in ", watch.lap(), ", ", tables.bytes(), " bytes");
    REQUIRE(tables.indexed() == TokenRange{kSink, kEnd});
    const int first = (kFirst - kSink) / kMaxSegmentTokens + 1;
    const TokenId begin = tables.segment_begin(first);
    Tables own = std::move(*Tables::create(samplers.family, config));
    check_ok(own.build(backend, small, window(begin), tables.centres()));
    REQUIRE(own.segment_count() == tables.segment_count() - first);
    for (int h = 0; h < 4; ++h) {
      CHECK(same_floats(tables.norms(h) + (begin - kSink), own.norms(h), own.indexed().size()));
      for (int s = 0; s < own.segment_count(); ++s) {
        CHECK(same_segment(tables.segment(first + s, h), own.segment(s, h), 10, 16));
      }
      // A token collides or does not, whatever lies before it.
      CHECK(shifted(step.drawn(samplers.collisions, large, tables, h),
                    step.drawn(samplers.collisions, small, own, h), kFirst, begin));
    }
    CHECK(!same_segment(tables.segment(first - 1, 0), own.segment(0, 0), 10, 16));
    // Tokens with the same key are drawn together: attention to what is drawn of all tokens is
    // that of the first with each key, but for the sum of weights.
    Tables once = std::move(*Tables::create(samplers.family, config));
    constexpr TokenId kOnce = kSink + LargeCache::kPool;
    check_ok(once.build(backend, large, {kSink, kOnce}, tables.centres()));
    watch.lap();
    check_ok(step.decode_from(samplers.collisions, large.first(kEnd), &tables, kSink, outputs));
    MESSAGE("attention to ", outputs.report(0).drawn, " tokens in ", watch.lap());
    check_ok(step.decode_from(samplers.collisions, large.first(kOnce), &once, kSink, expected));
    for (int head = 0; head < shape.query_heads; ++head) {
      CAPTURE(head);
      const HeadReport& report = outputs.report(head);
      CHECK(report.indexed == kEnd - kSink);
      CHECK(report.exact == 0);
      CHECK(report.drawn == kTimes * expected.report(head).drawn);
      CHECK(expected.report(head).drawn > 100);
      const std::vector<double> out(expected.out(head).begin(), expected.out(head).end());
      CHECK(relative_error(outputs.out(head), out) < 1e-4);
      CHECK(std::fabs(outputs.lse(head) - expected.lse(head) - std::log(float{kTimes})) < 1e-4F);
    }
  }
}

}  // namespace

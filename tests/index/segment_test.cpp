// SPDX-License-Identifier: Apache-2.0
// A segment holds the ids of its tokens by bucket, in any order of filling, merging and truncating.
#include "magicpig/index/segment.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "random.hpp"

namespace magicpig::test {
namespace {

// Codes of a segment's tokens, one table after the other.
struct Model {
  int tables = 1;
  int buckets = 2;
  int tokens = 0;
  std::vector<Code> codes;  // [tables, tokens]
};

Model random_model(Random& random, int tables, int buckets, int tokens) {
  Model model{.tables = tables, .buckets = buckets, .tokens = tokens, .codes = {}};
  for (int i = 0; i < tables * tokens; ++i) {
    // Half of the codes fall into one bucket: full and empty ones both occur.
    model.codes.push_back(
        static_cast<Code>(random.below(2) == 0 ? buckets / 2 : random.below(buckets)));
  }
  return model;
}

// The ids that each bucket of a table must hold.
std::vector<std::vector<std::uint16_t>> buckets_of(const Model& model, int table) {
  std::vector<std::vector<std::uint16_t>> ids(static_cast<std::size_t>(model.buckets));
  for (int i = 0; i < model.tokens; ++i) {
    ids[model.codes[static_cast<std::size_t>(table * model.tokens + i)]].push_back(
        static_cast<std::uint16_t>(i));
  }
  return ids;
}

void check_segment(const Segment& segment, const Model& model) {
  REQUIRE(segment.tokens() == model.tokens);
  for (int table = 0; table < model.tables; ++table) {
    CAPTURE(table);
    int wrong = 0;
    const auto buckets = buckets_of(model, table);
    for (int code = 0; code < model.buckets; ++code) {
      const auto& expected = buckets[static_cast<std::size_t>(code)];
      const auto actual = segment.bucket(table, code);
      wrong += std::equal(actual.begin(), actual.end(), expected.begin(), expected.end()) ? 0 : 1;
    }
    CHECK(wrong == 0);
  }
}

// `old` with the tokens of `model` from old.tokens() on appended.
Segment extended(const Segment& old, const Model& model) {
  Segment segment;
  CHECK(segment.allocate(model.tables, model.buckets, model.tokens));
  const int fresh = model.tokens - old.tokens();
  for (int table = model.tables - 1; table >= 0; --table) {
    const Code* codes = model.codes.data() + table * model.tokens + old.tokens();
    // Exactly the fresh codes, so that reading others is an error that a sanitizer sees.
    const std::vector<Code> only(codes, codes + fresh);
    segment.fill_table(table, old, only.data());
  }
  return segment;
}

Model first(const Model& model, int tokens) {
  Model part{.tables = model.tables, .buckets = model.buckets, .tokens = tokens, .codes = {}};
  for (int table = 0; table < model.tables; ++table) {
    const auto begin = model.codes.begin() + table * model.tokens;
    part.codes.insert(part.codes.end(), begin, begin + tokens);
  }
  return part;
}

TEST_CASE("filling a table sorts ids by bucket, ascending within one") {
  Random random(1);
  for (const int buckets : {2, 4, 64, 32768}) {
    for (const int tokens : {1, 2, 63, 64, 65, 500}) {
      CAPTURE(buckets);
      CAPTURE(tokens);
      const Model model = random_model(random, buckets > 1000 ? 2 : 5, buckets, tokens);
      check_segment(extended(Segment(), model), model);
    }
  }
}

TEST_CASE("a full segment keeps all ids and offsets in 16 bits") {
  Random random(2);
  for (const int buckets : {2, 256}) {
    const Model model = random_model(random, 1, buckets, kMaxSegmentTokens);
    check_segment(extended(Segment(), model), model);
    Model same = model;  // every token in the last bucket
    for (Code& code : same.codes) code = static_cast<Code>(buckets - 1);
    check_segment(extended(Segment(), same), same);
  }
}

TEST_CASE("old tokens and new ones merge into the segment of both") {
  Random random(3);
  for (int repetition = 0; repetition < 50; ++repetition) {
    CAPTURE(repetition);
    const Model model = random_model(random, random.between(1, 4), 1 << random.between(1, 6), 200);
    Segment segment;
    for (int tokens = 0; tokens < 200;) {
      tokens = std::min(200, tokens + random.between(1, 90));
      segment = extended(segment, first(model, tokens));
    }
    check_segment(segment, model);
  }
}

TEST_CASE("truncating drops exactly the tokens from there on") {
  Random random(4);
  const Model model = random_model(random, 3, 16, 150);
  for (const int kept : {0, 1, 2, 64, 149, 150}) {
    CAPTURE(kept);
    Segment segment = extended(Segment(), model);
    segment.truncate(kept);
    check_segment(segment, first(model, kept));
  }
}

TEST_CASE("any order of truncating and appending gives the segment of what is left") {
  for (std::uint64_t seed = 10; seed < 60; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    const int tables = random.between(1, 3);
    const int buckets = 1 << random.between(1, 5);
    Model now{.tables = tables, .buckets = buckets, .tokens = 0, .codes = {}};
    Segment segment = extended(Segment(), now);
    for (int step = 0; step < 12; ++step) {
      if (random.below(2) == 0) {
        const int kept = random.between(0, now.tokens);
        segment.truncate(kept);
        now = first(now, kept);
      } else {
        const Model more = random_model(random, tables, buckets, random.between(1, 80));
        Model both{
            .tables = tables, .buckets = buckets, .tokens = now.tokens + more.tokens, .codes = {}};
        for (int table = 0; table < tables; ++table) {
          for (const Model* part : {&std::as_const(now), &more}) {
            const auto begin = part->codes.begin() + table * part->tokens;
            both.codes.insert(both.codes.end(), begin, begin + part->tokens);
          }
        }
        segment = extended(segment, both);
        now = both;
      }
      check_segment(segment, now);
    }
  }
}

TEST_CASE("a segment takes 2 L (tokens + buckets + 1) bytes") {
  Segment segment;
  CHECK(segment.bytes() == 0);
  CHECK(segment.tokens() == 0);
  REQUIRE(segment.allocate(7, 32, 100));
  CHECK(segment.bytes() == 2 * 7 * (100 + 32 + 1));
}

}  // namespace
}  // namespace magicpig::test

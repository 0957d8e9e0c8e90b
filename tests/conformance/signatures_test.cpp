// SPDX-License-Identifier: Apache-2.0
// What every model of SignatureOps must do: the very bits of ScalarSignatureOps, which is held
// against plain formulas here.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "backends.hpp"
#include "guarded.hpp"
#include "magicpig/cpu/scalar_signatures.hpp"
#include "magicpig/hash/levels.hpp"
#include "random.hpp"
#include "row_batch.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr int kLowest = -32768 + 256;
constexpr int kHighest = 16384 + 4096;
constexpr std::int16_t kUntouched = 12345;

// An array for reading whose first or last byte lies at a page that must not be touched, or which
// begins `shift` elements behind an aligned address.
template <class T>
class Placed {
 public:
  Placed(const std::vector<T>& content, int shift, Guard guard)
      : array_(content.size() + static_cast<std::size_t>(shift), guard), shift_(shift) {
    if (!content.empty()) std::memcpy(data(), content.data(), content.size() * sizeof(T));
  }
  [[nodiscard]] T* data() { return array_.data() + shift_; }

 private:
  GuardedArray<T> array_;
  int shift_;
};

template <class T>
std::vector<T> copy(const T* from, std::size_t count) {
  return std::vector<T>(from, from + count);
}

// How partial sums are made; those of any eight rows come to 255 at most in all of them.
enum class SumKind { kAnything, kOneRowOf255, kEight255, kConstant255, kZero };
constexpr int kSumKinds = 5;
enum class FactorKind { kUsual, kAnything, kZero, kTiny, kLargest, kNoScale, kBeyondLargest };
constexpr int kFactorKinds = 7;

struct CodesConfig {
  int rows = 2;
  int group = 1;
  int blocks = 1;
  bool norms = false;
  SumKind sums = SumKind::kAnything;
  FactorKind factors = FactorKind::kUsual;
};

// Everything that score_codes() reads.
struct Codes {
  Codes(const CodesConfig& c, Random& random) : config(c) {
    const auto tokens = static_cast<std::size_t>(c.blocks) * kSignatureBlock;
    make_codes(random);
    make_factors(random);
    for (std::size_t i = 0; c.norms && i < tokens; ++i) {
      const int kind = random.below(8);
      const int limit = kind == 0 ? -8192 : kind == 1 ? 8192 : random.between(-8192, 8192);
      norms.push_back(static_cast<std::int16_t>(limit));
    }
    sums.resize(static_cast<std::size_t>(c.rows * c.group * 16));
    for (int g = 0; g < c.group; ++g) {
      make_sums(g, random);
      make_middle(g, random);
      const int kind = random.below(6);
      const int multiplier = kind == 0   ? 8192
                             : kind == 1 ? -8192
                             : kind == 2 ? random.between(-3, 3)
                                         : random.between(-8192, 8192);
      multipliers.push_back(static_cast<std::int16_t>(multiplier));
    }
  }

  [[nodiscard]] std::uint8_t& sum(int row, int g, int bits) {
    return sums[static_cast<std::size_t>((row * config.group + g) * 16 + bits)];
  }

  CodesConfig config;
  std::vector<std::uint8_t> codes;
  std::vector<bf16> factors;
  std::vector<std::int16_t> norms;
  float factor_scale = 0.0F;
  std::vector<std::uint8_t> sums;
  std::vector<std::int16_t> middles;
  std::vector<std::int16_t> units;
  std::vector<std::int16_t> multipliers;

 private:
  // Some rows are all of one code.
  void make_codes(Random& random) {
    for (int row = 0; row < config.blocks * config.rows; ++row) {
      const int kind = random.below(8);
      const int bits = random.below(256);
      for (int i = 0; i < 64; ++i) {
        const int byte = kind == 0 ? bits : kind == 1 ? 255 : kind == 2 ? 0 : random.below(256);
        codes.push_back(static_cast<std::uint8_t>(byte));
      }
    }
  }

  void make_factors(Random& random) {
    float largest = 0.0F;
    for (int i = 0; i < config.blocks * kSignatureBlock; ++i) {
      std::uint16_t bits = static_cast<std::uint16_t>(0x3f00 + random.below(0x180));  // .5 to 4
      if (random.below(16) == 0) bits = 0;
      switch (config.factors) {
        case FactorKind::kAnything:  // finite: up to 0x7f7f
          bits = static_cast<std::uint16_t>(random.below(0x7f80));
          break;
        case FactorKind::kZero:
          bits = 0;
          break;
        case FactorKind::kTiny:  // subnormal ones too
          bits = static_cast<std::uint16_t>(random.below(0x180));
          break;
        case FactorKind::kLargest:
          bits = random.below(2) == 0 ? 0x7f7f : 0x7f00;
          break;
        default:
          break;
      }
      factors.push_back(bf16{bits});
      largest = std::max(largest, to_float(factors.back()));
    }
    factor_scale = largest > 0.0F ? std::min(32767.0F / largest, 3e38F) : 0.0F;
    if (config.factors == FactorKind::kNoScale) factor_scale = 0.0F;
    // The largest float: what is cut off behind the last token may have any factor.
    if (config.factors == FactorKind::kBeyondLargest) {
      factor_scale = random.below(2) == 0 ? std::numeric_limits<float>::max() : 3.0F * factor_scale;
    }
  }

  void make_sums(int g, Random& random) {
    for (int first = 0; first < config.rows; first += 8) {
      const int count = std::min(8, config.rows - first);
      int left = 255;
      const int chosen = random.below(count);
      for (int i = 0; i < count; ++i) {
        int most = 255 / count;
        if (config.sums == SumKind::kAnything) most = random.below(left + 1);
        if (config.sums == SumKind::kOneRowOf255) most = i == chosen ? 255 : 0;
        if (config.sums == SumKind::kEight255 && i + 1 == count) most = left;
        if (config.sums == SumKind::kConstant255 && i + 1 == count) most = left;
        if (config.sums == SumKind::kZero) most = 0;
        left -= most;
        const int highest = random.below(16);
        for (int bits = 0; bits < 16; ++bits) {
          const bool full = config.sums == SumKind::kConstant255 || bits == highest;
          sum(first + i, g, bits) = static_cast<std::uint8_t>(full ? most : random.below(most + 1));
        }
      }
    }
  }

  // |sum - middle| * unit < 2^15 for all sums that there may be.
  void make_middle(int g, Random& random) {
    int least = 0;
    int most = 0;
    for (int row = 0; row < config.rows; ++row) {
      const std::uint8_t* first = &sum(row, g, 0);
      least += *std::min_element(first, first + 16);
      most += *std::max_element(first, first + 16);
    }
    const int kind = random.below(6);
    int middle = (least + most) / 2;
    if (kind == 0) middle = least;
    if (kind == 1) middle = most;
    if (kind == 2) middle = 0;
    if (kind == 3) middle = std::min(32767, least + 32767);
    if (kind == 4) middle = random.between(least, most);
    const int furthest = std::max({1, most - middle, middle - least});
    const int unit = random.below(2) == 0 ? 32767 / furthest : random.between(1, 32767 / furthest);
    middles.push_back(static_cast<std::int16_t>(middle));
    units.push_back(static_cast<std::int16_t>(unit));
  }
};

// Where the arrays of one call lie.
struct Lie {
  int shift = 0;  ///< elements
  Guard guard = Guard::kBehind;
};

// The scores, [group, stride], with what was not written between and behind them.
template <class Ops>
std::vector<std::int16_t> scores_of(const Codes& c, const Lie& lie, int gap) {
  const int n = c.config.blocks * kSignatureBlock;
  const std::int64_t stride = n + gap;
  Placed<std::uint8_t> codes(c.codes, lie.shift, lie.guard);
  Placed<bf16> factors(c.factors, lie.shift, lie.guard);
  Placed<std::int16_t> norms(c.norms, lie.shift, lie.guard);
  Placed<std::uint8_t> sums(c.sums, lie.shift, lie.guard);
  Placed<std::int16_t> middles(c.middles, lie.shift, lie.guard);
  Placed<std::int16_t> units(c.units, lie.shift, lie.guard);
  Placed<std::int16_t> multipliers(c.multipliers, lie.shift, lie.guard);
  const std::vector<std::int16_t> untouched(
      static_cast<std::size_t>(stride * (c.config.group - 1) + n), kUntouched);
  Placed<std::int16_t> scores(untouched, lie.shift, lie.guard);
  CodeBlocks blocks{.codes = codes.data(),
                    .factors = factors.data(),
                    .norms = c.config.norms ? norms.data() : nullptr,
                    .blocks = c.config.blocks,
                    .rows = c.config.rows,
                    .factor_scale = c.factor_scale};
  // Those wanted soon make no difference: fewer than these, or none.
  CodeBlocks next = blocks;
  next.blocks = c.config.blocks / 2;
  const CodeBlocks none;
  blocks.next = gap % 3 == 0 ? nullptr : gap % 3 == 1 ? &next : &none;
  Ops::score_codes(blocks,
                   {.sums = sums.data(),
                    .middles = middles.data(),
                    .units = units.data(),
                    .multipliers = multipliers.data(),
                    .group = c.config.group},
                   {.data = scores.data(), .stride = stride});
  return copy(scores.data(), untouched.size());
}

constexpr int kRows[] = {2, 4, 6, 8, 10, 32, 64, 96, 128, 258};
constexpr int kGroups[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 32};

// body(config) for rows and groups of all sizes, with everything else changing beside them.
template <class Body>
void for_each_config(const Body& body) {
  int number = 0;
  for (const int rows : kRows) {
    for (const int group : kGroups) {
      for (int repetition = 0; repetition < 3; ++repetition) {
        const int blocks = rows * group <= 128 ? 1 + number % 9 : 1 + number % 2;
        body(CodesConfig{.rows = rows,
                         .group = group,
                         .blocks = blocks,
                         .norms = number % 2 == 1,
                         .sums = static_cast<SumKind>(number / 2 % kSumKinds),
                         .factors = static_cast<FactorKind>(number / 3 % kFactorKinds)});
        ++number;
      }
    }
  }
}

TEST_CASE_TEMPLATE("score_codes gives the oracle's bits and leaves what is between its rows", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 401;
  CAPTURE(kSeed);
  Random random(kSeed);
  for_each_config([&](const CodesConfig& config) {
    CAPTURE(config.rows);
    CAPTURE(config.group);
    CAPTURE(config.blocks);
    CAPTURE(config.norms);
    CAPTURE(static_cast<int>(config.sums));
    CAPTURE(static_cast<int>(config.factors));
    const Codes codes(config, random);
    const int gap = random.below(2) * random.below(70);
    CHECK(scores_of<Ops>(codes, {}, gap) == scores_of<ScalarSignatureOps>(codes, {}, gap));
  });
}

TEST_CASE_TEMPLATE("score_codes takes few rows and groups of every size by any number of blocks",
                   Ops, MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 402;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (int blocks = 1; blocks <= 9; ++blocks) {
    for (int group = 1; group <= 9; ++group) {
      for (const int rows : {2, 8, 14, 16, 18}) {
        CAPTURE(blocks);
        CAPTURE(group);
        CAPTURE(rows);
        const Codes codes({.rows = rows,
                           .group = group,
                           .blocks = blocks,
                           .norms = random.below(2) == 0,
                           .sums = static_cast<SumKind>(random.below(kSumKinds)),
                           .factors = static_cast<FactorKind>(random.below(kFactorKinds))},
                          random);
        CHECK(scores_of<Ops>(codes, {}, 1) == scores_of<ScalarSignatureOps>(codes, {}, 1));
      }
    }
  }
}

TEST_CASE_TEMPLATE("score_codes stays within its arrays and takes any alignment", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 403;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int rows : {2, 6, 8, 10, 32}) {
    for (const int group : {1, 2, 3, 4, 5, 8, 9}) {
      for (const int blocks : {1, 2, 3}) {
        CAPTURE(rows);
        CAPTURE(group);
        CAPTURE(blocks);
        const Codes codes({.rows = rows, .group = group, .blocks = blocks, .norms = blocks != 2},
                          random);
        const auto expected = scores_of<ScalarSignatureOps>(codes, {}, 0);
        for (const Guard guard : {Guard::kBefore, Guard::kBehind}) {
          CHECK(scores_of<Ops>(codes, {.guard = guard}, 0) == expected);
        }
        for (const int shift : {1, 3, 7}) {
          CHECK(scores_of<Ops>(codes, {.shift = shift, .guard = Guard::kBefore}, 0) == expected);
        }
      }
    }
  }
}

constexpr int kCounts[] = {128, 256, 384, 512, 640, 1024, 1152};

std::int16_t random_score(Random& random) {
  const int kind = random.below(12);
  if (kind == 0) return kLowest;
  if (kind == 1) return kHighest;
  if (kind == 2) return static_cast<std::int16_t>(random.between(-2, 2));
  return static_cast<std::int16_t>(random.between(kLowest, kHighest));
}

std::vector<std::int16_t> random_scores(int n, Random& random) {
  std::vector<std::int16_t> scores;
  for (int i = 0; i < n; ++i) scores.push_back(random_score(random));
  return scores;
}

// Rows of scores, [group, n + gap], with an offset for each.
struct Addends {
  int n = 0;
  int gap = 0;
  std::vector<std::int16_t> scores;
  std::vector<std::int16_t> offsets;
};

// Scores, and scores less their offset, lie in the range. Most of the latter are near the first
// row's, to which end the differences run through [-60, 60]; some are as far apart as can be.
Addends make_addends(int n, int group, Random& random) {
  constexpr int kOffsets[] = {0, 1, -1, 16, -10240, 10448, 20000, -20000, 32767, -32768};
  Addends a;
  a.n = n;
  a.gap = random.below(2) * random.below(70);
  std::vector<int> first;
  for (int g = 0; g < group; ++g) {
    const int kind = random.below(20);
    const int offset = kind < 10 ? kOffsets[kind] : random.between(-10448, 10448);
    a.offsets.push_back(static_cast<std::int16_t>(offset));
    const int least = std::max(kLowest, kLowest + offset);
    const int most = std::min(kHighest, kHighest + offset);
    for (int i = 0; i < n; ++i) {
      const int place = random.below(10);
      int score = random.between(least, most);
      if (place == 0) score = least;
      if (place == 1) score = most;
      if (g == 0) first.push_back(score - offset);
      const int near = first[static_cast<std::size_t>(i)] + offset + i % 121 - 60;
      if (g > 0 && place > 3) score = std::clamp(near, least, most);
      a.scores.push_back(static_cast<std::int16_t>(score));
    }
    a.scores.resize(a.scores.size() + static_cast<std::size_t>(g + 1 < group ? a.gap : 0));
  }
  return a;
}

template <class Ops>
std::vector<std::int16_t> sum_of(const Addends& a, const Lie& lie = {}) {
  Placed<std::int16_t> scores(a.scores, lie.shift, lie.guard);
  Placed<std::int16_t> offsets(a.offsets, lie.shift, lie.guard);
  const std::vector<std::int16_t> untouched(static_cast<std::size_t>(a.n), kUntouched);
  Placed<std::int16_t> to(untouched, lie.shift, lie.guard);
  Ops::combine_scores({.data = scores.data(), .stride = a.n + a.gap}, a.n,
                      static_cast<int>(a.offsets.size()), offsets.data(), to.data());
  return copy(to.data(), untouched.size());
}

TEST_CASE_TEMPLATE("combine_scores gives the oracle's bits over the range of scores and offsets",
                   Ops, MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 404;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int group : kGroups) {
    for (const int n : kCounts) {
      CAPTURE(group);
      CAPTURE(n);
      const Addends a = make_addends(n, group, random);
      const auto expected = sum_of<ScalarSignatureOps>(a);
      CHECK(sum_of<Ops>(a) == expected);
      for (const int shift : {0, 1, 5}) {
        CHECK(sum_of<Ops>(a, {.shift = shift, .guard = Guard::kBefore}) == expected);
      }
    }
  }
}

TEST_CASE_TEMPLATE("largest_score finds the largest in any place", Ops, MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 405;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int n : kCounts) {
    CAPTURE(n);
    std::vector<std::int16_t> content(static_cast<std::size_t>(n), kLowest);
    Placed<std::int16_t> scores(content, 0, Guard::kBehind);
    CHECK(Ops::largest_score(scores.data(), n) == kLowest);
    int wrong = 0;
    for (int i = 0; i < n; ++i) {
      for (const std::int16_t largest : {std::int16_t{kLowest + 1}, std::int16_t{kHighest}}) {
        scores.data()[i] = largest;
        wrong += Ops::largest_score(scores.data(), n) != largest;
      }
      scores.data()[i] = kLowest;
    }
    CHECK(wrong == 0);
    for (const int shift : {0, 1, 5}) {
      const auto random_content = random_scores(n, random);
      Placed<std::int16_t> shifted(random_content, shift, Guard::kBefore);
      CHECK(Ops::largest_score(shifted.data(), n) ==
            *std::max_element(random_content.begin(), random_content.end()));
    }
  }
}

constexpr int kTaus[] = {-32767, -32700, -32512, -20000, -1000, -1,    0,
                         1,      340,    5000,   16000,  20479, 20480, 20737};
constexpr int kLongest[] = {-1, 0, 1, 15, 16, 17, 100, 254, 255};

// Where certainty begins, from tau on: nowhere but at tau for those above it.
constexpr int kCertainFrom[] = {-300, -256, -17, -1, 70000};

// body(rule) for every tau, longest and certain_from.
template <class Body>
void for_each_rule(const Body& body) {
  for (const int tau : kTaus) {
    for (const int longest : kLongest) {
      for (const int from : kCertainFrom) {
        CAPTURE(tau);
        CAPTURE(longest);
        CAPTURE(from);
        body(ScoreRule{
            .tau = static_cast<std::int16_t>(tau),
            .longest = static_cast<std::int16_t>(longest),
            .certain_from = static_cast<std::int16_t>(std::clamp(tau + from, -32768, 32767))});
      }
    }
  }
}

// In terms of neither first_certain() nor gap().
bool is_certain(const ScoreRule& rule, int score) {
  return rule.longest < 0 || score >= rule.tau || score >= rule.certain_from;
}

// Most of them within 270 below tau and 10 above it.
std::vector<std::int16_t> scores_around(const ScoreRule& rule, int n, Random& random) {
  std::vector<std::int16_t> scores = random_scores(n, random);
  for (std::int16_t& score : scores) {
    if (random.below(4) == 0) continue;
    score = static_cast<std::int16_t>(
        std::clamp(rule.tau + random.between(-270, 10), kLowest, kHighest));
  }
  return scores;
}

TEST_CASE_TEMPLATE("expected gives the oracle's number for every rule", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 406;
  CAPTURE(kSeed);
  Random random(kSeed);
  for_each_rule([&](const ScoreRule& rule) {
    for (const int n : {128, 384, 1152}) {
      CAPTURE(n);
      const int shift = random.below(4);
      Placed<std::int16_t> scores(scores_around(rule, n, random), shift,
                                  shift == 0 ? Guard::kBehind : Guard::kBefore);
      CHECK(Ops::expected(scores.data(), n, rule) ==
            ScalarSignatureOps::expected(scores.data(), n, rule));
    }
  });
}

TEST_CASE_TEMPLATE("expected gives every gap its units", Ops, MAGICPIG_TEST_BACKENDS) {
  for (const int tau : {-32000, 0, 20480}) {
    const ScoreRule rule{.tau = static_cast<std::int16_t>(tau), .longest = 255};
    for (int gap = -3; gap < 300; ++gap) {
      const int score = tau - 1 - gap;
      if (score < kLowest || score > kHighest) continue;
      CAPTURE(tau);
      CAPTURE(gap);
      const std::vector<std::int16_t> scores(128, static_cast<std::int16_t>(score));
      CHECK(Ops::expected(scores.data(), 128, rule) ==
            std::uint64_t{128} * ScoreRule::units(std::clamp(gap, -1, 255)));
    }
  }
}

TEST_CASE_TEMPLATE("expected adds up more than 32 bits hold", Ops, MAGICPIG_TEST_BACKENDS) {
  const int n = 3 << 16;
  const std::vector<std::int16_t> scores(static_cast<std::size_t>(n), 5);
  const auto tokens = static_cast<std::uint64_t>(n);
  CHECK(Ops::expected(scores.data(), n, {.tau = 5}) == tokens << 16);
  CHECK(Ops::expected(scores.data(), n, {.tau = 6}) == tokens * (31 << 11));
}

// What a draw leaves: its bits, and the tracks after it.
struct Left {
  std::vector<std::uint64_t> drawn;
  std::vector<std::uint16_t> tracks;

  bool operator==(const Left&) const = default;
};

// One draw; what `drawn` held before must not matter.
template <class Ops>
Left systematic(const std::vector<std::int16_t>& content, const ScoreRule& rule,
                const std::vector<std::uint16_t>& start, const Lie& lie = {}) {
  Placed<std::int16_t> scores(content, lie.shift, lie.guard);
  Placed<std::uint16_t> tracks(start, lie.shift, lie.guard);
  Placed<std::uint64_t> drawn(std::vector<std::uint64_t>(content.size() / 64, 0xa5a55a5aa5a55a5aU),
                              lie.shift, lie.guard);
  Ops::draw_systematic(scores.data(), static_cast<int>(content.size()), rule, tracks.data(),
                       drawn.data());
  return {.drawn = copy(drawn.data(), content.size() / 64), .tracks = copy(tracks.data(), 8)};
}

std::vector<std::uint16_t> random_tracks(Random& random) {
  std::vector<std::uint16_t> tracks;
  for (int i = 0; i < kSystematicTracks; ++i) {
    const int kind = random.below(6);
    const int start = kind == 0 ? 0 : kind == 1 ? 65535 : random.below(65536);
    tracks.push_back(static_cast<std::uint16_t>(start));
  }
  return tracks;
}

TEST_CASE_TEMPLATE("draw_systematic gives the oracle's bits and tracks for every rule", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 407;
  CAPTURE(kSeed);
  Random random(kSeed);
  for_each_rule([&](const ScoreRule& rule) {
    for (const int n : {128, 384, 1152}) {
      CAPTURE(n);
      const auto scores = scores_around(rule, n, random);
      const auto tracks = random_tracks(random);
      const int shift = random.below(4);
      const Lie lie{.shift = shift, .guard = shift == 0 ? Guard::kBehind : Guard::kBefore};
      CHECK(systematic<Ops>(scores, rule, tracks, lie) ==
            systematic<ScalarSignatureOps>(scores, rule, tracks));
    }
  });
}

TEST_CASE_TEMPLATE("draw_systematic carries its tracks from call to call", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 408;
  CAPTURE(kSeed);
  Random random(kSeed);
  const ScoreRule rule{.tau = 100, .longest = 255};
  for (int chain = 0; chain < 20; ++chain) {
    std::vector<std::int16_t> all;
    const auto start = random_tracks(random);
    Left in_parts{.drawn = {}, .tracks = start};
    for (int call = 0; call < 6; ++call) {
      const auto scores = scores_around(rule, 128 * random.between(1, 5), random);
      const Left left = systematic<Ops>(scores, rule, in_parts.tracks);
      in_parts.drawn.insert(in_parts.drawn.end(), left.drawn.begin(), left.drawn.end());
      in_parts.tracks = left.tracks;
      all.insert(all.end(), scores.begin(), scores.end());
    }
    CHECK(in_parts == systematic<ScalarSignatureOps>(all, rule, start));
    CHECK(in_parts == systematic<Ops>(all, rule, start));
  }
}

template <class Ops>
std::vector<std::uint64_t> poisson(const std::vector<std::int16_t>& content, const ScoreRule& rule,
                                   const std::vector<std::uint16_t>& numbers, const Lie& lie = {}) {
  Placed<std::int16_t> scores(content, lie.shift, lie.guard);
  Placed<std::uint16_t> noise(numbers, lie.shift, lie.guard);
  Placed<std::uint64_t> drawn(std::vector<std::uint64_t>(content.size() / 64, 0xa5a55a5aa5a55a5aU),
                              lie.shift, lie.guard);
  Ops::draw_poisson(scores.data(), static_cast<int>(content.size()), rule, noise.data(),
                    drawn.data());
  return copy(drawn.data(), content.size() / 64);
}

TEST_CASE_TEMPLATE("draw_poisson gives the oracle's bits for every rule", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 409;
  CAPTURE(kSeed);
  Random random(kSeed);
  for_each_rule([&](const ScoreRule& rule) {
    for (const int n : {128, 384, 1152}) {
      CAPTURE(n);
      const auto scores = scores_around(rule, n, random);
      std::vector<std::uint16_t> noise;
      for (const std::int16_t score : scores) {
        // Half of them at the border.
        const auto units = static_cast<int>(ScoreRule::units(rule.gap(score)));
        const int kind = random.below(8);
        int number = random.below(65536);
        if (kind < 3) number = std::clamp(units + kind - 1, 0, 65535);
        if (kind == 3) number = 0;
        if (kind == 4) number = 65535;
        noise.push_back(static_cast<std::uint16_t>(number));
      }
      const int shift = random.below(4);
      const Lie lie{.shift = shift, .guard = shift == 0 ? Guard::kBehind : Guard::kBefore};
      CHECK(poisson<Ops>(scores, rule, noise, lie) ==
            poisson<ScalarSignatureOps>(scores, rule, noise));
    }
  });
}

TEST_CASE_TEMPLATE("draws take what is certain whatever the noise, and only by its units the rest",
                   Ops, MAGICPIG_TEST_BACKENDS) {
  const ScoreRule rule{.tau = 10, .longest = 255};
  for (int gap = -2; gap <= 256; ++gap) {
    CAPTURE(gap);
    const std::vector<std::int16_t> scores(128, static_cast<std::int16_t>(9 - gap));
    const std::uint32_t units = ScoreRule::units(std::clamp(gap, -1, 255));
    const auto drawn = [&](std::uint32_t noise) {
      const auto number = static_cast<std::uint16_t>(noise);
      const auto bits = poisson<Ops>(scores, rule, std::vector<std::uint16_t>(128, number));
      REQUIRE(bits[0] == bits[1]);
      REQUIRE((bits[0] == 0 || bits[0] == ~std::uint64_t{0}));
      return bits[0] != 0;
    };
    CHECK(drawn(0));
    CHECK(drawn(units - 1));
    if (gap >= 0) CHECK_FALSE(drawn(units));
    CHECK(drawn(65535) == (gap < 0));
    // 16 tokens of each track, from 0 and from the end of its range.
    for (const std::uint16_t start : {std::uint16_t{0}, std::uint16_t{65535}}) {
      const Left left = systematic<Ops>(scores, rule, std::vector<std::uint16_t>(8, start));
      const std::uint32_t sum = gap < 0 ? 0 : 16 * units;
      const std::uint32_t expected = gap < 0 ? 16 : (start + sum) >> 16;
      CHECK(std::popcount(left.drawn[0]) + std::popcount(left.drawn[1]) ==
            static_cast<int>(8 * expected));
      CHECK(left.tracks == std::vector<std::uint16_t>(8, static_cast<std::uint16_t>(start + sum)));
    }
  }
}

constexpr int kLaneDims[] = {1, 3, 8, 31, 32, 65, 72, 96, 128, 257};

// Rows of T in lanes, among them some of extreme values and, where wanted, some not finite.
template <class T>
struct LaneRows {
  LaneRows(int dim, Random& random) {
    for (int l = 0; l < kRotationLanes; ++l) {
      std::vector<T> row(row_elements<T>(dim));
      fill_row(random, row.data(), dim);
      const float large = std::is_same_v<T, q4_0>   ? 7.0F
                          : std::is_same_v<T, q8_0> ? 127.0F
                                                    : 60000.0F;
      if (l % 5 == 1) put_scalar(row.data(), random.below(dim), l == 1 ? 0.0F : large);
      if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
        if (l == 2) put_scalar(row.data(), dim - 1, 3e38F);
        if (l == 3) put_scalar(row.data(), random.below(dim), 1e-40F);
      }
      rows.push_back(
          std::make_unique<Placed<T>>(row, l % 3, l % 3 == 0 ? Guard::kBehind : Guard::kBefore));
      pointers.push_back(rows.back()->data());
    }
    for (int j = 0; j < dim; ++j) centre.push_back(random_scalar(random));
  }

  std::vector<std::unique_ptr<Placed<T>>> rows;
  std::vector<const T*> pointers;
  std::vector<float> centre;
};

// Bits, so that zeros differ by their sign.
struct Centred {
  bool operator==(const Centred&) const = default;
  std::vector<std::uint32_t> x;
  std::vector<std::uint32_t> largest;
};

template <class Ops, class T>
Centred centred(LaneRows<T>& lanes, int dim, int shift) {
  const auto size = static_cast<std::size_t>(dim) * kRotationLanes;
  Placed<float> centre(lanes.centre, shift, Guard::kBehind);
  Placed<float> to(std::vector<float>(size), shift, Guard::kBehind);
  Centred result{.x = std::vector<std::uint32_t>(size),
                 .largest = std::vector<std::uint32_t>(kRotationLanes)};
  Ops::centre_lanes(lanes.pointers.data(), centre.data(), dim, to.data(), result.largest.data());
  std::memcpy(result.x.data(), to.data(), size * sizeof(float));
  return result;
}

template <class T, class Body>
void for_each_lane_rows(Random& random, const Body& body) {
  for (const int dim : kLaneDims) {
    if (!fits<T>(dim)) continue;
    CAPTURE(dim);
    LaneRows<T> lanes(dim, random);
    body(lanes, dim);
  }
}

// function.operator()<T>() for each type of scalar.
template <class Function>
void for_each_scalar(const Function& function) {
  function.template operator()<float>();
  function.template operator()<fp16>();
  function.template operator()<bf16>();
  function.template operator()<q8_0>();
  function.template operator()<q4_0>();
}

TEST_CASE_TEMPLATE("centre_lanes gives the oracle's bits and stays within its rows", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 414;
  CAPTURE(kSeed);
  Random random(kSeed);
  for_each_scalar([&]<class T>() {
    for_each_lane_rows<T>(random, [&](LaneRows<T>& lanes, int dim) {
      for (const int shift : {0, 1}) {
        CHECK(centred<Ops>(lanes, dim, shift) == centred<ScalarSignatureOps>(lanes, dim, 0));
      }
    });
  });
}

TEST_CASE_TEMPLATE("centre_lanes tells which lanes are not finite", Ops, MAGICPIG_TEST_BACKENDS) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Random random(415);
  for_each_scalar([&]<class T>() {
    for_each_lane_rows<T>(random, [&](LaneRows<T>& lanes, int dim) {
      const float odd[] = {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()};
      const int wrong = random.below(kRotationLanes);
      T* row = lanes.rows[static_cast<std::size_t>(wrong)]->data();
      for (const int j : {0, dim / 2, dim - 1}) {
        const std::vector<T> before(row, row + row_elements<T>(dim));
        put_scalar(row, j, odd[random.below(3)]);
        const Centred result = centred<Ops>(lanes, dim, 0);
        for (int l = 0; l < kRotationLanes; ++l) {
          CHECK((result.largest[static_cast<std::size_t>(l)] >= 0x7f800000U) == (l == wrong));
        }
        std::copy(before.begin(), before.end(), row);
      }
    });
  });
}

TEST_CASE_TEMPLATE("squared_distance gives the oracle's bits", Ops, MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 416;
  CAPTURE(kSeed);
  Random random(kSeed);
  for_each_scalar([&]<class T>() {
    for_each_lane_rows<T>(random, [&](LaneRows<T>& lanes, int dim) {
      for (const T* row : lanes.pointers) {
        const float* centre = lanes.centre.data();
        CHECK(Ops::squared_distance(row, centre, dim) ==
              ScalarSignatureOps::squared_distance(row, centre, dim));
      }
    });
  });
}

std::vector<std::int32_t> random_lanes(int n, int bits, Random& random) {
  std::vector<std::int32_t> x;
  for (int i = 0; i < n * kRotationLanes; ++i) {
    const int kind = random.below(8);
    const int most = (1 << bits) - 1;
    x.push_back(kind == 0 ? most : kind == 1 ? -most : kind == 2 ? 0 : random.between(-most, most));
  }
  return x;
}

TEST_CASE_TEMPLATE("scale_lanes gives the oracle's integers up to 2^30", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 417;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int n : kLaneDims) {
    CAPTURE(n);
    const auto scaled = [&]<class Own>(const std::vector<float>& x, const std::vector<float>& by) {
      std::vector<std::int32_t> to(x.size());
      Own::scale_lanes(x.data(), by.data(), n, to.data());
      return to;
    };
    std::vector<float> powers;
    for (int l = 0; l < kRotationLanes; ++l)
      powers.push_back(l == 3 ? 0.0F : std::exp2(5.0F * static_cast<float>(l % 6)));
    std::vector<float> x;
    for (int i = 0; i < n * kRotationLanes; ++i) {
      const float one =
          random.below(8) == 0 ? 0x1.fffffep-1F : static_cast<float>(random.uniform());
      const float power = powers[static_cast<std::size_t>(i % kRotationLanes)];
      const float most = power == 0.0F ? 1e30F : 0x1p30F / power;
      x.push_back((random.below(2) == 0 ? -one : one) * std::min(most, 0x1.fffffep29F / power));
    }
    CHECK(scaled.template operator()<Ops>(x, powers) ==
          scaled.template operator()<ScalarSignatureOps>(x, powers));
  }
}

TEST_CASE_TEMPLATE("transform_lanes gives the oracle's integers for every count, stride and shift",
                   Ops, MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 418;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int stride : {1, 2, 3, 36, 100}) {
    for (int steps = 1; steps <= 10; ++steps) {
      for (const int shift : {0, 1, (steps + 1) / 2}) {
        CAPTURE(stride);
        CAPTURE(steps);
        CAPTURE(shift);
        const int count = stride << steps;
        std::vector<std::int32_t> signs;
        for (int j = 0; j < count; ++j) signs.push_back(-random.below(2));
        const LaneTransform transform{
            .signs = signs.data(), .count = count, .stride = stride, .shift = shift};
        const auto content = random_lanes(count, 30 - steps, random);
        Placed<std::int32_t> x(content, steps % 2, Guard::kBehind);
        std::vector<std::int32_t> expected = content;
        ScalarSignatureOps::transform_lanes(transform, expected.data());
        Ops::transform_lanes(transform, x.data());
        CHECK(copy(x.data(), content.size()) == expected);
      }
    }
  }
}

TEST_CASE_TEMPLATE("square_lanes adds up squares of 60 bits", Ops, MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 419;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int n : kLaneDims) {
    CAPTURE(n);
    const auto x = random_lanes(n, n < 8 ? 30 : 26, random);
    std::vector<std::int64_t> squares(kRotationLanes);
    std::vector<std::int64_t> expected(kRotationLanes);
    Ops::square_lanes(x.data(), n, squares.data());
    ScalarSignatureOps::square_lanes(x.data(), n, expected.data());
    CHECK(squares == expected);
  }
}

// What quantise_lanes() leaves; the rest of the rows included.
struct Quantised {
  bool operator==(const Quantised&) const = default;
  std::vector<std::uint8_t> block;
  std::vector<std::int32_t> sums;
};

template <class Ops, int kBits>
Quantised quantised(const std::vector<std::int32_t>& x, const std::vector<std::int32_t>& bounds,
                    const std::vector<std::uint16_t>& wanted, int place, int shift) {
  const int n = static_cast<int>(x.size()) / kRotationLanes;
  const auto rows = static_cast<std::size_t>(kBits * n / 4);
  Quantised result{.block = std::vector<std::uint8_t>(rows * 64, 0xa5),
                   .sums = std::vector<std::int32_t>(std::size_t{kBits} * kRotationLanes)};
  Placed<std::uint8_t> block(result.block, 0, place == 0 ? Guard::kBefore : Guard::kBehind);
  Ops::template quantise_lanes<kBits>(
      x.data(), n, bounds.data(),
      {.words = block.data() + place, .wanted = wanted.data(), .shift = shift}, result.sums.data());
  result.block = copy(block.data(), rows * 64);
  return result;
}

template <class Ops, int kBits>
void check_quantised(Random& random) {
  for (const int n : {4, 8, 72, 128, 264}) {
    for (const int place : {0, 32}) {
      for (const int shift : {0, 4, 8, 12}) {
        CAPTURE(kBits);
        CAPTURE(n);
        CAPTURE(place);
        CAPTURE(shift);
        auto x = random_lanes(n, 20, random);
        constexpr int kBounds = (1 << kBits) / 2 - 1;
        std::vector<std::int32_t> bounds;
        for (int b = 0; b < kBounds; ++b) {
          for (int l = 0; l < kRotationLanes; ++l) bounds.push_back((b << 17) + l * 100 - 1);
        }
        // Some at a bound or beside it.
        for (std::size_t i = 0; i < x.size() && kBounds > 0; i += 3) {
          const auto l = i % kRotationLanes;
          const int bound =
              bounds[static_cast<std::size_t>(random.below(kBounds)) * kRotationLanes + l];
          x[i] = (random.below(2) == 0 ? bound : -bound) + random.between(-1, 1);
        }
        const int first = random.below(2) * random.below(kRotationLanes);
        const int last = random.below(2) == 0 ? kRotationLanes : random.between(first, 16);
        std::vector<std::uint16_t> wanted;
        for (int l = 0; l < kRotationLanes; ++l) {
          wanted.push_back(static_cast<std::uint16_t>(l >= first && l < last ? 15 << shift : 0));
        }
        CHECK(quantised<Ops, kBits>(x, bounds, wanted, place, shift) ==
              quantised<ScalarSignatureOps, kBits>(x, bounds, wanted, place, shift));
      }
    }
  }
}

TEST_CASE_TEMPLATE("quantise_lanes gives the oracle's codes and sums and leaves other bits", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 420;
  CAPTURE(kSeed);
  Random random(kSeed);
  check_quantised<Ops, 1>(random);
  check_quantised<Ops, 2>(random);
  check_quantised<Ops, 3>(random);
  check_quantised<Ops, 4>(random);
}

std::vector<std::int16_t> random_shorts(std::size_t count, int most, Random& random) {
  std::vector<std::int16_t> x;
  for (std::size_t i = 0; i < count; ++i) {
    const int kind = random.below(8);
    const int limit = kind == 0 ? most : kind == 1 ? -most : random.between(-most, most);
    x.push_back(static_cast<std::int16_t>(kind == 2 ? 0 : limit));
  }
  return x;
}

TEST_CASE_TEMPLATE("pair_lanes gives the oracle's pairs and leaves what is between them", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 422;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int n : {0, 1, 2, 3, 17, 64}) {
    for (const int stride : {2 * kRotationLanes, 4 * kRotationLanes, 2 * kRotationLanes + 5}) {
      for (const bool both : {false, true}) {
        CAPTURE(n);
        CAPTURE(stride);
        CAPTURE(both);
        auto content = random_lanes(n, 15, random);
        auto others = random_lanes(n, 15, random);
        for (std::int32_t& x : content) x = random.below(16) == 0 ? -32768 : x;
        for (std::int32_t& x : others) x = random.below(16) == 0 ? -32768 : x;
        const auto pairs = [&]<class Own>(int shift) {
          Placed<std::int32_t> first(content, shift, Guard::kBehind);
          Placed<std::int32_t> second(others, shift, Guard::kBehind);
          const std::vector<std::int16_t> untouched(
              static_cast<std::size_t>(std::max(0, (n - 1) * stride + 2 * kRotationLanes)),
              kUntouched);
          Placed<std::int16_t> to(untouched, shift, Guard::kBehind);
          Own::pair_lanes(first.data(), both ? second.data() : nullptr, n, stride, to.data());
          return copy(to.data(), untouched.size());
        };
        const auto expected = pairs.template operator()<ScalarSignatureOps>(0);
        CHECK(pairs.template operator()<Ops>(0) == expected);
        CHECK(pairs.template operator()<Ops>(1) == expected);
      }
    }
  }
}

// What project_lanes() makes of x [n / 2, kRotationLanes, 2].
template <class Ops>
std::vector<std::int32_t> projected(const std::vector<std::int16_t>& entries, int n,
                                    const std::vector<std::int16_t>& content, int shift,
                                    const Lie& lie = {}) {
  Placed<std::int16_t> matrix(entries, lie.shift, lie.guard);
  Placed<std::int16_t> x(content, lie.shift, lie.guard);
  const std::vector<std::int32_t> untouched(static_cast<std::size_t>(n) * kRotationLanes);
  Placed<std::int32_t> y(untouched, lie.shift, lie.guard);
  Ops::project_lanes(matrix.data(), n, x.data(), shift, y.data());
  return copy(y.data(), untouched.size());
}

constexpr int kProjected[] = {2, 4, 6, 8, 10, 14, 16, 22, 64, 66, 128, 256};

TEST_CASE_TEMPLATE("project_lanes gives the oracle's bits for every size and shift", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 423;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int n : kProjected) {
    const auto size = static_cast<std::size_t>(n);
    for (const int shift : {0, 1, 14, 15}) {
      CAPTURE(n);
      CAPTURE(shift);
      // Sums of n products and what rounds them stay below 2^31.
      const int most = std::min(32767, ((1 << 30) / n) >> 15);
      const auto wide = random_shorts(size * size, 32767, random);
      const auto few = random_shorts(size * kRotationLanes, most, random);
      const auto expected = projected<ScalarSignatureOps>(wide, n, few, shift);
      for (const Guard guard : {Guard::kBefore, Guard::kBehind}) {
        CHECK(projected<Ops>(wide, n, few, shift, {.guard = guard}) == expected);
      }
      CHECK(projected<Ops>(wide, n, few, shift, {.shift = 1, .guard = Guard::kBefore}) == expected);
      const auto small = random_shorts(size * size, most, random);
      const auto large = random_shorts(size * kRotationLanes, 32767, random);
      CHECK(projected<Ops>(small, n, large, shift) ==
            projected<ScalarSignatureOps>(small, n, large, shift));
    }
  }
}

TEST_CASE_TEMPLATE("project_lanes takes the largest products that there may be", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  // -2^15 times -2^15 once, or 2^15 - 1 twice, with nothing beside them.
  for (const int n : {2, 16, 64}) {
    for (const int at : {0, n - 1}) {
      CAPTURE(n);
      CAPTURE(at);
      const auto size = static_cast<std::size_t>(n);
      std::vector<std::int16_t> matrix(size * size, -32768);
      std::vector<std::int16_t> x(size * kRotationLanes);
      for (int l = 0; l < kRotationLanes; ++l) {
        const int pair = at / 2 * kRotationLanes + l;
        x[static_cast<std::size_t>(2 * pair + at % 2)] = l % 2 == 0 ? -32768 : 32767;
      }
      CHECK(projected<Ops>(matrix, n, x, 15) == projected<ScalarSignatureOps>(matrix, n, x, 15));
      CHECK(projected<Ops>(matrix, n, x, 0)[0] == 1 << 30);
      for (int l = 0; l < kRotationLanes; ++l) {
        const auto first = static_cast<std::size_t>(2 * (at / 2 * kRotationLanes + l));
        x[first] = x[first + 1] = l % 2 == 0 ? -32767 : 32767;
      }
      matrix.assign(size * size, 32767);
      CHECK(projected<Ops>(matrix, n, x, 0) == projected<ScalarSignatureOps>(matrix, n, x, 0));
      CHECK(projected<Ops>(matrix, n, x, 0)[1] == 2 * 32767 * 32767);
    }
  }
}

// What nearest_lanes() reads but for where the codes go.
struct NearestInput {
  int rows = 0;
  int pairs = 1;
  std::vector<std::int16_t> values;
  std::vector<std::int32_t> half_norms;
  std::vector<std::int16_t> y;
};

// In three rows of four some centroids are those of another number again: of as near ones the first
// is wanted. For `most` up to 18,000 scores stay below 2^31.
NearestInput make_nearest(int rows, int pairs, int most, Random& random) {
  NearestInput input{.rows = rows, .pairs = pairs, .values = {}, .half_norms = {}, .y = {}};
  const auto per_row = static_cast<std::size_t>(rows) * static_cast<std::size_t>(pairs) * 2;
  input.values = random_shorts(per_row * 16, most, random);
  input.y = random_shorts(per_row * kRotationLanes, most, random);
  for (int i = 0; i < rows * 16; ++i) {
    const std::int16_t* own = &input.values[static_cast<std::size_t>(i * pairs * 2)];
    std::int64_t norm = 0;
    for (int j = 0; j < 2 * pairs; ++j) norm += std::int64_t{own[j]} * own[j];
    input.half_norms.push_back(static_cast<std::int32_t>(norm / 2));
  }
  for (int row = 0; row < rows; ++row) {
    const int kind = row % 4;
    for (int c = 1; kind != 0 && c < 16; ++c) {
      const int other = random.below(c);
      if (kind == 1 && random.below(2) == 0) continue;
      const auto at = static_cast<std::size_t>(row * 16 + c);
      const auto from = static_cast<std::size_t>(row * 16 + (kind == 3 ? 0 : other));
      input.half_norms[at] = input.half_norms[from];
      for (std::size_t j = 0; j < static_cast<std::size_t>(2 * pairs); ++j) {
        const auto width = static_cast<std::size_t>(2 * pairs);
        input.values[at * width + j] = input.values[from * width + j];
      }
    }
  }
  return input;
}

// What nearest_lanes() leaves; the rest of the rows included.
struct NearestOutput {
  bool operator==(const NearestOutput&) const = default;
  std::vector<std::uint8_t> block;
  std::vector<std::int32_t> dots;
};

template <class Ops>
NearestOutput nearest(const NearestInput& input, const std::vector<std::uint16_t>& wanted,
                      int place, int bits, const Lie& lie = {}) {
  Placed<std::int16_t> values(input.values, lie.shift, lie.guard);
  Placed<std::int32_t> half_norms(input.half_norms, lie.shift, lie.guard);
  Placed<std::int16_t> y(input.y, lie.shift, lie.guard);
  NearestOutput result{
      .block = std::vector<std::uint8_t>(static_cast<std::size_t>(input.rows) * 64, 0xa5),
      .dots = std::vector<std::int32_t>(kRotationLanes, 7)};
  Placed<std::uint8_t> block(result.block, 0, place == 0 ? Guard::kBefore : Guard::kBehind);
  Placed<std::int32_t> dots(result.dots, lie.shift, lie.guard);
  Ops::nearest_lanes({.values = values.data(),
                      .half_norms = half_norms.data(),
                      .rows = input.rows,
                      .pairs = input.pairs},
                     y.data(),
                     {.words = block.data() + place, .wanted = wanted.data(), .shift = bits},
                     dots.data());
  result.block = copy(block.data(), result.block.size());
  result.dots = copy(dots.data(), result.dots.size());
  return result;
}

TEST_CASE_TEMPLATE("nearest_lanes gives the oracle's codes and sums and leaves other bits", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  constexpr std::uint64_t kSeed = 424;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int pairs : {1, 2}) {
    for (const int rows : {1, 2, 3, 7, 32, 64, 127}) {
      for (const int place : {0, 32}) {
        for (const int bits : {0, 4, 8, 12}) {
          CAPTURE(pairs);
          CAPTURE(rows);
          CAPTURE(place);
          CAPTURE(bits);
          // Few values make many scores alike, large ones scores of nearly 2^31.
          const int kind = random.below(3);
          const int most = kind == 0 ? 3 : kind == 1 ? 200 : 18000;
          const NearestInput input = make_nearest(rows, pairs, most, random);
          const int first = random.below(2) * random.below(kRotationLanes);
          const int last = random.below(2) == 0 ? kRotationLanes : random.between(first, 16);
          std::vector<std::uint16_t> wanted;
          for (int l = 0; l < kRotationLanes; ++l) {
            wanted.push_back(static_cast<std::uint16_t>(l >= first && l < last ? 15 << bits : 0));
          }
          const auto expected = nearest<ScalarSignatureOps>(input, wanted, place, bits);
          for (const Lie& lie : {Lie{}, Lie{.shift = 1, .guard = Guard::kBefore}}) {
            CHECK(nearest<Ops>(input, wanted, place, bits, lie) == expected);
          }
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("nearest_lanes finds the nearest centroid in any place", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (int code = 0; code < 16; ++code) {
    CAPTURE(code);
    const auto place = static_cast<std::size_t>(code);
    NearestInput input{.rows = 1,
                       .pairs = 1,
                       .values = std::vector<std::int16_t>(32, -3),
                       .half_norms = std::vector<std::int32_t>(16, 900),
                       .y = std::vector<std::int16_t>(2 * kRotationLanes, 1000)};
    // Of two that are as near, the first; of products below 0, the larger.
    input.half_norms[place] = 899;
    for (const std::int16_t least : {std::int16_t{1000}, std::int16_t{-1000}}) {
      input.y.assign(input.y.size(), least);
      const auto result = nearest<Ops>(input, std::vector<std::uint16_t>(kRotationLanes, 15), 0, 0);
      for (int l = 0; l < kRotationLanes; ++l) {
        CHECK((result.block[static_cast<std::size_t>(2 * l)] & 15) == code);
        CHECK(result.dots[static_cast<std::size_t>(l)] == (least > 0 ? -1500 : 1500));
      }
    }
  }
}

// From here on the oracle itself, by formulas that share nothing with it.

// (a b + 2^14) >> 15: to the nearest, halves up.
double rounded_product(double a, double b) { return std::floor((a * b + 16384.0) / 32768.0); }

// The layout as it is told: 32 tokens after 32 in even and odd bytes, lower halves before upper.
int bits_of(const Codes& c, int block, int row, int token) {
  const int byte = 2 * (token % 32) + (token % 64 < 32 ? 0 : 1);
  const int both = c.codes[static_cast<std::size_t>((block * c.config.rows + row) * 64 + byte)];
  return token < 64 ? both % 16 : both / 16;
}

TEST_CASE("the oracle's score_codes is the formula that SignatureOps states") {
  constexpr std::uint64_t kSeed = 410;
  CAPTURE(kSeed);
  Random random(kSeed);
  Worst worst;
  for_each_config([&](CodesConfig config) {
    if (config.rows * config.group > 300) return;
    Codes c(config, random);
    const auto scores = scores_of<ScalarSignatureOps>(c, {}, 0);
    for (int g = 0; g < config.group; ++g) {
      const auto head = static_cast<std::size_t>(g);
      for (int i = 0; i < config.blocks * kSignatureBlock; ++i) {
        const auto token = static_cast<std::size_t>(i);
        double sum = -c.middles[head];
        for (int row = 0; row < config.rows; ++row) {
          sum += c.sum(row, g, bits_of(c, i / kSignatureBlock, row, i % kSignatureBlock));
        }
        // A product of 8 and 24 bits is exact in double and so rounds to float but once.
        const double exact = wide(to_float(c.factors[token])) * wide(c.factor_scale);
        const double share = exact < 32767.0
                                 ? std::min(32767.0, std::floor(wide(static_cast<float>(exact))))
                                 : 32767.0;
        REQUIRE(std::abs(sum * c.units[head]) < 32768.0);
        const double score =
            rounded_product(rounded_product(sum * c.units[head], share), c.multipliers[head]) +
            (config.norms ? c.norms[token] : 0);
        const auto at = static_cast<std::size_t>(g * config.blocks * kSignatureBlock + i);
        worst.add(scores[at], score, 0.5);
        REQUIRE(std::abs(score) <= 16384.0);
      }
    }
  });
  CHECK(worst.ratio() == 0.0);
}

TEST_CASE("units fall from 1 to 2^-16 by a sixteenth of a power of 2 at a time") {
  CHECK(ScoreRule::units(-1) == 65536);
  CHECK(ScoreRule::units(-1) == ScoreRule::kCertain);
  CHECK(ScoreRule::units(0) == 31 << 11);
  CHECK(ScoreRule::units(255) == 1);
  for (int gap = 0; gap <= 255; ++gap) {
    CAPTURE(gap);
    CHECK(ScoreRule::units(gap) <= ScoreRule::units(gap - 1));
    CHECK(ScoreRule::units(gap) >= 1);
    // Linear between powers of 2, by 6.2 % above them at most, then rounded down.
    const double exact = 65536.0 * std::exp2(-(gap + 1) / 16.0);
    CHECK(ScoreRule::units(gap) <= 1.07 * exact);
    CHECK(ScoreRule::units(gap) > 0.999 * exact - 1.0);
  }
}

TEST_CASE("gaps count from below tau, from -1 for what is certain to the longest") {
  for_each_rule([&](const ScoreRule& rule) {
    int wrong = 0;
    for (int score = kLowest; score <= kHighest; score += score % 7 == 0 ? 3 : 1) {
      const int expected =
          is_certain(rule, score) ? -1 : std::min<int>(rule.longest, rule.tau - score - 1);
      wrong += rule.gap(static_cast<std::int16_t>(score)) != expected;
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE(
    "the oracle's combine_scores is within an eighth of an octave of the logarithm of a sum of "
    "two") {
  std::vector<std::int16_t> scores;
  for (int difference = -1024; difference < 1024; ++difference) {
    scores.push_back(static_cast<std::int16_t>(3 * difference + 7));
  }
  for (int difference = -1024; difference < 1024; ++difference) {
    scores.push_back(static_cast<std::int16_t>(2 * difference + 50));
  }
  const std::int16_t offsets[] = {7, 50};
  std::vector<std::int16_t> sums(2048);
  ScalarSignatureOps::combine_scores({.data = scores.data(), .stride = 2048}, 2048, 2, offsets,
                                     sums.data());
  double worst = 0.0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const double a = scores[i] - 7.0;
    const double b = scores[2048 + i] - 50.0;
    const double exact =
        std::max(a, b) + 16.0 * std::log2(1.0 + std::exp2(-std::abs(a - b) / 16.0));
    worst = std::max(worst, std::abs(sums[i] - exact));
  }
  CHECK(worst <= 2.0);
}

TEST_CASE(
    "the oracle's combine_scores adds up row by row by the formula that SignatureOps states") {
  constexpr std::uint64_t kSeed = 413;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int group : kGroups) {
    CAPTURE(group);
    const Addends a = make_addends(384, group, random);
    const auto sums = sum_of<ScalarSignatureOps>(a);
    int wrong = 0;
    for (int i = 0; i < a.n; ++i) {
      double sum = 0.0;
      for (int g = 0; g < group; ++g) {
        const double score = a.scores[static_cast<std::size_t>(g * (a.n + a.gap) + i)] -
                             static_cast<double>(a.offsets[static_cast<std::size_t>(g)]);
        const double near = std::max(0.0, 59.0 - std::abs(sum - score));
        sum = g == 0 ? score : std::max(sum, score) + std::floor(near / 4.0);
      }
      wrong += sums[static_cast<std::size_t>(i)] != sum;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("the oracle's expected adds up what is certain and the units of the rest") {
  constexpr std::uint64_t kSeed = 411;
  CAPTURE(kSeed);
  Random random(kSeed);
  for_each_rule([&](const ScoreRule& rule) {
    const auto scores = scores_around(rule, 1152, random);
    double least = 0.0;
    double most = 0.0;
    for (const std::int16_t score : scores) {
      const double gap = std::min<double>(rule.longest, rule.tau - 1.0 - score);
      const double exact =
          is_certain(rule, score) ? 65536.0 : 65536.0 * std::exp2(-(gap + 1.0) / 16.0);
      least += 0.999 * exact - 1.0;
      most += 1.07 * exact;
    }
    const auto expected =
        static_cast<double>(ScalarSignatureOps::expected(scores.data(), 1152, rule));
    CHECK(expected > least);
    CHECK(expected < most);
  });
}

TEST_CASE("the oracle's draw_systematic takes the tokens at which a sum passes a whole number") {
  constexpr std::uint64_t kSeed = 412;
  CAPTURE(kSeed);
  Random random(kSeed);
  for_each_rule([&](const ScoreRule& rule) {
    const auto scores = scores_around(rule, 640, random);
    const auto start = random_tracks(random);
    const Left left = systematic<ScalarSignatureOps>(scores, rule, start);
    int wrong = 0;
    for (std::size_t track = 0; track < 8; ++track) {
      std::int64_t sum = start[track];  // never cut to 16 bits
      for (std::size_t i = track; i < scores.size(); i += 8) {
        const bool certain = is_certain(rule, scores[i]);
        const std::int64_t before = sum / 65536;
        if (!certain) sum += ScoreRule::units(rule.gap(scores[i]));
        const bool drawn = ((left.drawn[i / 64] >> (i % 64)) & 1) != 0;
        wrong += drawn != (certain || sum / 65536 > before);
      }
      wrong += left.tracks[track] != sum % 65536;
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("the oracle's quantise_lanes takes the level with the nearest value") {
  Random random(421);
  constexpr double kSigma = 100000.0;
  constexpr Levels kLevels(3);
  std::vector<std::int32_t> bounds;
  for (int b = 4; b < 7; ++b) {
    const double bound = kSigma * kLevels.bound(b) / (1 << Levels::kFraction);
    bounds.insert(bounds.end(), kRotationLanes, static_cast<std::int32_t>(bound) - 1);
  }
  std::vector<std::int32_t> x;
  for (int i = 0; i < 128 * kRotationLanes; ++i) {
    x.push_back(static_cast<std::int32_t>(kSigma * random.normal()));
  }
  const Quantised result = quantised<ScalarSignatureOps, 3>(
      x, bounds, std::vector<std::uint16_t>(kRotationLanes, 15), 0, 0);
  double worst = 0.0;
  std::vector<std::int32_t> sums(std::size_t{3} * kRotationLanes);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t l = i % kRotationLanes;
    const std::size_t j = i / kRotationLanes;
    int code = 0;
    for (std::size_t p = 0; p < 3; ++p) {
      const int bit = (result.block[(p * 32 + j / 4) * 64 + 2 * l] >> (j % 4)) & 1;
      code |= bit << p;
      sums[p * kRotationLanes + l] += bit != 0 ? x[i] : -x[i];
    }
    const auto distance = [&](int own) {
      return std::abs(x[i] / kSigma * (1 << Levels::kFraction) - kLevels.value(own));
    };
    double least = distance(0);
    for (int own = 1; own < 8; ++own) least = std::min(least, distance(own));
    worst = std::max(worst, distance(code) - least);
  }
  CHECK(worst <= 1.0);
  CHECK(result.sums == sums);
}

TEST_CASE("the oracle's pair_lanes puts coordinates of a token side by side") {
  Random random(425);
  const auto first = random_lanes(5, 15, random);
  const auto second = random_lanes(5, 15, random);
  std::vector<std::int16_t> pairs(5 * 40, kUntouched);
  ScalarSignatureOps::pair_lanes(first.data(), second.data(), 5, 40, pairs.data());
  std::vector<std::int16_t> expected(5 * 40, kUntouched);
  for (std::size_t at = 0; at < first.size(); ++at) {
    const std::size_t to = at / kRotationLanes * 40 + at % kRotationLanes * 2;
    expected[to] = static_cast<std::int16_t>(first[at]);
    expected[to + 1] = static_cast<std::int16_t>(second[at]);
  }
  CHECK(pairs == expected);
  ScalarSignatureOps::pair_lanes(first.data(), nullptr, 5, 40, pairs.data());
  for (std::size_t i = 0; i < 5 * 40; ++i) {
    if (i % 40 < 32 && i % 2 == 1) expected[i] = 0;
  }
  CHECK(pairs == expected);
}

TEST_CASE("the oracle's project_lanes is a matrix by vectors, to the nearest, halves up") {
  Random random(426);
  constexpr int kSize = 22;
  constexpr std::size_t kHalf = kSize / 2;
  const auto matrix = random_shorts(kSize * kSize, 32767, random);
  const auto x = random_shorts(std::size_t{kSize} * kRotationLanes, 1400, random);
  for (const int shift : {0, 3, 15}) {
    CAPTURE(shift);
    const auto y = projected<ScalarSignatureOps>(matrix, kSize, x, shift);
    int wrong = 0;
    for (std::size_t at = 0; at < y.size(); ++at) {
      const std::size_t row = at / kRotationLanes;
      const std::size_t lane = at % kRotationLanes;
      double sum = 0.0;
      for (std::size_t column = 0; column < kSize; ++column) {  // paired with that kHalf further on
        const std::size_t pair = column % kHalf;
        const std::size_t which = column / kHalf;
        sum += wide(matrix[row * kSize + 2 * pair + which]) *
               wide(x[(pair * kRotationLanes + lane) * 2 + which]);
      }
      wrong += y[at] != std::floor(sum / std::exp2(shift) + (shift == 0 ? 0.0 : 0.5));
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("the oracle's nearest_lanes takes the least distance, the first of equals") {
  Random random(427);
  for (const int pairs : {1, 2}) {
    CAPTURE(pairs);
    NearestInput input = make_nearest(21, pairs, 300, random);
    // Even values have whole half norms.
    for (std::int16_t& value : input.values) value = static_cast<std::int16_t>(value / 2 * 2);
    const auto width = static_cast<std::size_t>(2 * pairs);
    const auto result = [&] {
      for (std::size_t at = 0; at < input.half_norms.size(); ++at) {
        double norm = 0.0;
        for (std::size_t j = 0; j < width; ++j) {
          norm += wide(input.values[at * width + j]) * wide(input.values[at * width + j]);
        }
        input.half_norms[at] = static_cast<std::int32_t>(norm / 2.0);
      }
      return nearest<ScalarSignatureOps>(input, std::vector<std::uint16_t>(16, 0xf0), 0, 4);
    }();
    int wrong = 0;
    for (std::size_t l = 0; l < kRotationLanes; ++l) {
      double dots = 0.0;
      for (std::size_t row = 0; row < 21; ++row) {
        double least = std::numeric_limits<double>::infinity();
        double own = 0.0;
        int code = 0;
        for (int c = 0; c < 16; ++c) {
          const std::size_t at = (row * 16 + static_cast<std::size_t>(c)) * width;
          double distance = 0.0;
          double product = 0.0;
          for (std::size_t j = 0; j < width; ++j) {
            const std::size_t pair = row * static_cast<std::size_t>(pairs) + j / 2;
            const double y = wide(input.y[(pair * kRotationLanes + l) * 2 + j % 2]);
            const double value = wide(input.values[at + j]);
            distance += (y - value) * (y - value);
            product += y * value;
          }
          if (distance >= least) continue;
          least = distance;
          own = product;
          code = c;
        }
        dots += std::floor(own / (1 << Centroids::kDotShift));
        wrong += result.block[row * 64 + 2 * l] != 16 * code + 5;
        wrong += result.block[row * 64 + 2 * l + 1] != 0xa5;
      }
      wrong += result.dots[l] != dots;
    }
    CHECK(wrong == 0);
  }
}

}  // namespace

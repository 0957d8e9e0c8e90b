// SPDX-License-Identifier: Apache-2.0
// Sampling by hash collisions: tokens that share a bucket with the query in at least t of L tables.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <utility>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/estimate/curve.hpp"
#include "magicpig/estimate/rule.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/hash/hamming_ball.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/index/bucket_walk.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Inclusion probability u(cosine) of a collision rule, known once q.k is: the cosine between q and
/// the centred key is (q.k - q.c) / (|q| |k - c|). A key at the centre and a zero query project to
/// 0 on every plane; against them any vector's bits are fair coins, as at cosine 0.
struct CosineInclusion {
  static constexpr bool kAnyToken = true;
  static constexpr std::int64_t kIndexBytes = sizeof(float);
  CurveView curve;
  const float* norms = nullptr;  // |k - c| by token - first_token
  TokenId first_token = 0;
  const float* query_centre = nullptr;  // [group] q.c
  const float* inverse_norm = nullptr;  // [group] 1 / |q|, 0 for a zero query

  template <class Ops>
  void log_probability(const CandidateTile& tile, float* out) const {
    for (std::size_t g = 0; g < tile.heads.size(); ++g) {
      const HeadReads& head = tile.heads[g];
      const TokenId* tokens = tile.tokens + head.row;
      const float* dots = tile.dots + head.at;
      float* cosines = out + head.at;
      for (int i = 0; i < head.count; ++i) cosines[i] = norms[tokens[i] - first_token];
      const float shift = query_centre[g];
      const float factor = inverse_norm[g];
      // Without a branch, so that compilers vectorise it.
      for (int i = 0; i < head.count; ++i) {
        const bool any = cosines[i] > 0.0F;
        const float cosine = (dots[i] - shift) * factor / (any ? cosines[i] : 1.0F);
        cosines[i] = any ? cosine : 0.0F;
      }
    }
    Ops::interpolate(curve, out, tile.reads);
  }

  void prefetch(const TokenId* tokens, int count) const {
    for (int i = 0; i < count; ++i) {
      magicpig::prefetch(norms + (tokens[i] - first_token));
    }
  }
};

/// How tokens are drawn from tables.
struct CollisionConfig {
  int min_collisions = 2;  ///< t, 1 to 3: tables in which a token must share a bucket
  int probe_radius = 0;    ///< r, 0 to K: buckets within r bit flips of the query's are visited too
};

/// Draws the tokens that collide with the query in at least t of L tables, one draw per query head.
/// pi = P(Bin(L, a_r(cosine)) >= t). The randomness is that of the planes: the same query draws the
/// same tokens at every step, and the noise key is not used.
/// Keys that are alike share buckets and are drawn together: where a report is asked a second walk
/// over the buckets finds the groups of tables to which each token is essential, from which the
/// error is estimated.
/// Source: Chen et al. 2024, algorithm 1 (t = 2, r = 0).
class Collisions {
 public:
  static constexpr bool kUnbiased = true;

  /// Tabulates the curve for the K, L and collision probability of `family`; draws are only valid
  /// on indexes of such a family. Errors: t outside [1, 3] or above L, r outside [0, K] or above 0
  /// for a family without Hamming balls, memory.
  template <HashFamily Family>
  [[nodiscard]] static Result<Collisions> create(const Family& family,
                                                 const CollisionConfig& config) noexcept {
    if (config.min_collisions < 1 || config.min_collisions > 3 ||
        config.min_collisions > family.tables()) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "min_collisions (t) %d must lie in [1, 3] and not exceed L = %d",
                           config.min_collisions, family.tables());
    }
    if (!Family::kHammingBalls && config.probe_radius != 0) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "probing radius %d must be 0: codes of this family that differ in a few "
                           "bits are no nearer than others",
                           config.probe_radius);
    }
    Result<HammingBall> ball = HammingBall::create(family.bits(), config.probe_radius);
    if (!ball.ok()) return ball.status();
    Result<InclusionCurve> curve = InclusionCurve::create([&](double cosine) {
      return log_at_least(config.min_collisions, family.tables(),
                          family.table_collision(cosine, config.probe_radius));
    });
    if (!curve.ok()) return curve.status();
    return Collisions(config, family, std::move(*ball), std::move(*curve));
  }

  /// Error: an index whose codes have other K or L than the family this was made for.
  template <HashFamily Family>
  [[nodiscard]] Status supports(const BucketTables<Family>& index) const noexcept {
    if (index.family().bits() == bits_ && index.family().tables() == tables_) return Status();
    return Status::error(ErrorCode::kShapeMismatch,
                         "the sampler is made for (K, L) = (%d, %d), the index has (%d, %d)", bits_,
                         tables_, index.family().bits(), index.family().tables());
  }

  [[nodiscard]] const CollisionConfig& config() const { return config_; }
  /// K and L of the families whose indexes it draws from.
  [[nodiscard]] int bits() const { return bits_; }
  [[nodiscard]] int tables() const { return tables_; }
  /// log u(cosine).
  [[nodiscard]] CurveView curve() const { return curve_.view(); }
  /// The bucket `code ^ mask` is visited for each of them.
  [[nodiscard]] std::span<const Code> masks() const { return ball_.masks(); }

  struct Scratch {
    Code* codes = nullptr;             // [group, L]
    float* projections = nullptr;      // scratch of the family
    std::uint64_t* seen = nullptr;     // [t - 1, kWords] bit sets over a segment
    std::uint64_t* drawn = nullptr;    // [group, kWords]
    float* query_centre = nullptr;     // [group]
    float* inverse_norm = nullptr;     // [group]
    TokenId* tokens = nullptr;         // [limits.tokens]
    std::uint32_t* members = nullptr;  // [limits.tokens]
    // For reports: the hits of a segment's tokens, and the candidates' groups.
    std::uint32_t* hits = nullptr;       // [min(limits.tokens, kMaxSegmentTokens)]
    std::uint16_t* essential = nullptr;  // [limits.tokens, group]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    const auto tokens = static_cast<std::size_t>(limits.tokens);
    return {.codes = arena.take<Code>(group * static_cast<std::size_t>(tables_)),
            .projections = arena.take<float>(group * projections_per_vector_),
            .seen = arena.take<std::uint64_t>(seen_sets() * kWords),
            .drawn = arena.take<std::uint64_t>(group * kWords),
            .query_centre = arena.take<float>(group),
            .inverse_norm = arena.take<float>(group),
            .tokens = arena.take<TokenId>(tokens),
            .members = arena.take<std::uint32_t>(tokens),
            .hits = arena.take<std::uint32_t>(
                limits.tokens < kMaxSegmentTokens ? tokens : std::size_t{kMaxSegmentTokens}),
            .essential = arena.take<std::uint16_t>(tokens * group)};
  }

  template <class Ops, class Source, HashFamily Family>
  [[nodiscard]] Candidates<CosineInclusion> draw(
      const DrawInput<Source, BucketTables<Family>>& input, Scratch& scratch) const {
    const BucketTables<Family>& index = input.index;
    const QueryGroup& queries = input.queries;
    if (input.query_codes == nullptr) {
      index.family().template hash<Ops>(queries.data, queries.count, scratch.codes,
                                        scratch.projections);
    }
    measure_queries(queries, index.centre(input.kv_head), scratch);
    using Walk = BucketWalk<BucketTables<Family>>;
    const typename Walk::Input buckets{
        .index = index,
        .kv_head = input.kv_head,
        .codes = input.query_codes != nullptr ? input.query_codes : scratch.codes,
        .queries = queries.count,
        .tables = tables_,
        .masks = ball_.masks()};
    Walk walk(buckets);
    std::optional<Walk> again;
    if (input.report) again.emplace(buckets);
    std::size_t count = 0;
    for (int s = 0; s < index.segment_count(); ++s) {
      const int tokens = index.segment(s, input.kv_head).tokens();
      for (int g = 0; g < queries.count; ++g) {
        collide(walk, tokens, scratch.seen, scratch.drawn + std::int64_t{g} * kWords);
      }
      const TokenId first = index.segment_begin(s);
      if (input.gone.any()) leave_out(input.gone, first, tokens, queries, scratch);
      const std::size_t before = count;
      count += emit(tokens, first, queries.count, scratch, count);
      for (int g = 0; g < queries.count && input.report; ++g) {
        find_essential(*again, first, {.first = before, .end = count}, g, queries.count, scratch);
      }
    }
    return {.tokens = {scratch.tokens, count},
            .members = {scratch.members, count},
            .inclusion = {.curve = curve_.view(),
                          .norms = index.norms(input.kv_head),
                          .first_token = index.indexed().begin,
                          .query_centre = scratch.query_centre,
                          .inverse_norm = scratch.inverse_norm},
            .groups = {.essential = scratch.essential,
                       .heads = queries.count,
                       .tables = input.report ? tables_ : 0},
            .index_bytes = input.report ? lookup_bytes(buckets) : 0};
  }

 private:
  static constexpr int kWords = kMaxSegmentTokens / 64;

  template <HashFamily Family>
  Collisions(const CollisionConfig& config, const Family& family, HammingBall ball,
             InclusionCurve curve)
      : config_(config),
        bits_(family.bits()),
        tables_(family.tables()),
        projections_per_vector_(family.scratch_floats(1)),
        ball_(std::move(ball)),
        curve_(std::move(curve)) {}

  static void measure_queries(const QueryGroup& queries, const float* centre, Scratch& scratch) {
    for (int g = 0; g < queries.count; ++g) {
      double dot = 0.0;
      double square = 0.0;
      for (int j = 0; j < queries.dim; ++j) {
        const double q = static_cast<double>(queries[g][j]);
        dot += q * static_cast<double>(centre[j]);
        square += q * q;
      }
      scratch.query_centre[g] = static_cast<float>(dot);
      // A query too short for its inverse norm to be a float counts as zero.
      scratch.inverse_norm[g] = square > 1e-70 ? static_cast<float>(1.0 / ::sqrt(square)) : 0.0F;
    }
  }

  // Bit sets of tokens that collided once, and twice, beside those that are drawn.
  [[nodiscard]] std::size_t seen_sets() const {
    return static_cast<std::size_t>(config_.min_collisions - 1);
  }

  // Marks in `drawn` the tokens that collide at least t times with the walk's next query. Counters
  // of one bit per count fit the first-level cache for a whole segment, and need no branch.
  template <class Walk>
  void collide(Walk& walk, int segment_tokens, std::uint64_t* seen, std::uint64_t* drawn) const {
    const auto words = static_cast<std::size_t>(segment_tokens + 63) / 64;
    for (std::size_t set = 0; set < seen_sets(); ++set) {
      std::memset(seen + set * kWords, 0, words * sizeof *seen);
    }
    std::memset(drawn, 0, words * sizeof *drawn);
    const std::size_t buckets = static_cast<std::size_t>(tables_) * ball_.masks().size();
    for (std::size_t b = 0; b < buckets; ++b) {
      if (config_.min_collisions == 1) count<1>(walk.next(), seen, drawn);
      if (config_.min_collisions == 2) count<2>(walk.next(), seen, drawn);
      if (config_.min_collisions == 3) count<3>(walk.next(), seen, drawn);
    }
  }

  template <int kAtLeast>
  MAGICPIG_ALWAYS_INLINE static void count(std::span<const std::uint16_t> ids, std::uint64_t* seen,
                                           std::uint64_t* drawn) {
    std::uint64_t* once = seen;
    std::uint64_t* twice = seen + kWords;
    for (const std::uint16_t id : ids) {
      const std::size_t word = id / 64;
      std::uint64_t bit = std::uint64_t{1} << (id % 64);
      if constexpr (kAtLeast > 1) {
        const std::uint64_t before = once[word];
        once[word] = before | bit;
        bit &= before;
      }
      if constexpr (kAtLeast > 2) {
        const std::uint64_t before = twice[word];
        twice[word] = before | bit;
        bit &= before;
      }
      drawn[word] |= bit;
    }
  }

  // Of all buckets visited their two offsets and their ids; of buckets that several heads visit,
  // once.
  template <class Buckets>
  [[nodiscard]] std::int64_t lookup_bytes(const Buckets& in) const {
    std::int64_t bytes = 0;
    for (int table = 0; table < tables_; ++table) {
      for (int g = 0; g < in.queries; ++g) {
        for (const Code mask : in.masks) {
          const auto code = static_cast<Code>(in.codes[std::int64_t{g} * tables_ + table] ^ mask);
          if (visited(in.codes + table, g, code)) continue;
          for (int s = 0; s < in.index.segment_count(); ++s) {
            const auto ids = in.index.segment(s, in.kv_head).bucket(table, code);
            bytes += static_cast<std::int64_t>(2 * sizeof(std::uint16_t) + ids.size_bytes());
          }
        }
      }
    }
    return bytes;
  }

  // Whether the bucket is within the ball of a head before g, whose codes of one table stand at
  // every tables_-th place.
  [[nodiscard]] bool visited(const Code* codes, int g, Code bucket) const {
    for (int before = 0; before < g; ++before) {
      const unsigned apart = codes[std::int64_t{before} * tables_] ^ static_cast<unsigned>(bucket);
      if (std::popcount(apart) <= config_.probe_radius) return true;
    }
    return false;
  }

  // A token's hits by groups of tables, of the first three groups with any; more than t groups are
  // essential to none. Each takes eight bits: the number of its hits, at most 3, and the group.
  static constexpr std::uint32_t kManyGroups = 1U << 24;

  static std::uint32_t hit(std::uint32_t hits, std::uint32_t group) {
    for (unsigned at = 0; at < 24; at += 8) {
      const std::uint32_t count = (hits >> at) & 3U;
      if (count == 0) return hits | (1U | group << 2) << at;
      if (((hits >> (at + 2)) & 15U) == group) return count < 3 ? hits + (1U << at) : hits;
    }
    return hits | kManyGroups;
  }

  // The groups without whose hits fewer than t are left.
  [[nodiscard]] std::uint16_t essential(std::uint32_t hits) const {
    if ((hits & kManyGroups) != 0) return 0;
    const auto count = [&](unsigned at) { return (hits >> at) & 3U; };
    const std::uint32_t total = count(0) + count(8) + count(16);
    unsigned groups = 0;
    for (unsigned at = 0; at < 24 && count(at) > 0; at += 8) {
      const bool needed = total - count(at) < static_cast<std::uint32_t>(config_.min_collisions);
      groups |= needed ? 1U << ((hits >> (at + 2)) & 15U) : 0U;
    }
    return static_cast<std::uint16_t>(groups);
  }

  struct Places {
    std::size_t first = 0;
    std::size_t end = 0;
  };

  // Of the candidates at `places`, all of one segment that begins with token `begin`, to which
  // groups of tables they are essential for head g, the walk's next. Zero for those of other heads.
  template <class Walk>
  void find_essential(Walk& walk, TokenId begin, const Places& places, int g, int group,
                      Scratch& scratch) const {
    const std::uint64_t* drawn = scratch.drawn + std::int64_t{g} * kWords;
    for (std::size_t i = places.first; i < places.end; ++i) {
      scratch.hits[scratch.tokens[i] - begin] = 0;
    }
    for (int table = 0; table < tables_; ++table) {
      const auto in = static_cast<std::uint32_t>(TableGroups::group_of(table, tables_));
      for (std::size_t mask = 0; mask < ball_.masks().size(); ++mask) {
        for (const std::uint16_t id : walk.next()) {
          if (((drawn[id / 64] >> (id % 64)) & 1U) == 0) continue;
          scratch.hits[id] = hit(scratch.hits[id], in);
        }
      }
    }
    for (std::size_t i = places.first; i < places.end; ++i) {
      const bool own = ((scratch.members[i] >> g) & 1U) != 0;
      scratch.essential[i * static_cast<std::size_t>(group) + static_cast<std::size_t>(g)] =
          own ? essential(scratch.hits[scratch.tokens[i] - begin]) : std::uint16_t{0};
    }
  }

  // Takes the tokens that are gone out of the drawn ones of a segment from token `first` on.
  static void leave_out(const TokenMask& gone, TokenId first, int segment_tokens,
                        const QueryGroup& queries, Scratch& scratch) {
    for (int word = 0; word * 64 < segment_tokens; ++word) {
      const std::uint64_t there = ~gone.bits(first + word * 64);
      for (int g = 0; g < queries.count; ++g) scratch.drawn[g * kWords + word] &= there;
    }
  }

  // Appends the union over the group in token order; returns its size.
  static std::size_t emit(int segment_tokens, TokenId first, int group, Scratch& scratch,
                          std::size_t at) {
    if (group <= 4) return emit<4>(segment_tokens, first, group, scratch, at);
    if (group <= 8) return emit<8>(segment_tokens, first, group, scratch, at);
    return emit<kMaxGroup>(segment_tokens, first, group, scratch, at);
  }

  // The same for up to kHeads heads: with a constant number of them their words stay in registers.
  template <int kHeads>
  static std::size_t emit(int segment_tokens, TokenId first, int group, Scratch& scratch,
                          std::size_t at) {
    const std::size_t begin = at;
    for (int word = 0; word * 64 < segment_tokens; ++word) {
      std::uint64_t drawn[kHeads];
      std::uint64_t any = 0;
      for (int g = 0; g < kHeads; ++g) {
        drawn[g] = g < group ? scratch.drawn[g * kWords + word] : 0;
        any |= drawn[g];
      }
      for (; any != 0; any &= any - 1) {
        const int bit = std::countr_zero(any);
        std::uint32_t members = 0;
        for (int g = 0; g < kHeads; ++g) {
          members |= static_cast<std::uint32_t>((drawn[g] >> bit) & 1U) << g;
        }
        scratch.tokens[at] = first + word * 64 + bit;
        scratch.members[at++] = members;
      }
    }
    return at - begin;
  }

  CollisionConfig config_;
  int bits_;
  int tables_;
  std::size_t projections_per_vector_;
  HammingBall ball_;
  InclusionCurve curve_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

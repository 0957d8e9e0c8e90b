// SPDX-License-Identifier: Apache-2.0
// What a sampler returns: tokens to read, who drew them, and the probability with which it did.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/random.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The queries of one KV head at one decode step.
struct QueryGroup {
  const float* data = nullptr;  ///< [count, dim], unscaled
  int count = 1;                ///< query heads of the group, 1 to kMaxGroup
  int dim = 0;

  [[nodiscard]] const float* operator[](int g) const { return data + std::int64_t{g} * dim; }
  /// Mask with one bit per query head of the group.
  [[nodiscard]] std::uint32_t everyone() const { return ~0U >> (kMaxGroup - count); }
};

/// What one query head reads of a tile: rows [row, row + count), with its own inner products, and
/// whatever is computed from them, at [at, at + count).
struct HeadReads {
  int row = 0;
  int at = 0;
  int count = 0;
};

/// Part of a candidate list, row by row, and which of the rows each head reads.
struct CandidateTile {
  const TokenId* tokens = nullptr;          ///< [rows]
  const std::int32_t* positions = nullptr;  ///< [rows], of the tokens in the candidate list
  const float* dots = nullptr;              ///< [reads], q.k, unscaled
  std::span<const HeadReads> heads;         ///< [query heads of the group]
  int reads = 0;                            ///< of all heads
};

/// Gives log pi of the candidates of a tile: the natural log of the probability, over the sampler's
/// randomness, that a query head draws the token. Known before the gather (an array) or only
/// once the inner product is (a curve of the cosine); the estimator cannot tell which. kAnyToken
/// says that it holds for tokens that were not drawn, too.
template <class I, class Ops>
concept InclusionOver = requires(const I& inclusion, const CandidateTile& tile,
                                 float* log_pi /* [reads] */) {
  { I::kAnyToken } -> std::convertible_to<bool>;
  inclusion.template log_probability<Ops>(tile, log_pi);
};

/// Brings into cache what log_probability() will read for these tokens, where the inclusion can
/// say.
template <class Inclusion>
void prefetch_inclusion(const Inclusion& inclusion, const TokenId* tokens, int count) {
  if constexpr (requires { inclusion.prefetch(tokens, count); }) inclusion.prefetch(tokens, count);
}

/// On which tables a drawn token hangs: those of a draw, independent of each other, are cut into
/// groups, and a token is essential to a group without whose tables it would not have been drawn.
/// What a head drew by other, independent randomness is essential to none, and what it drew by that
/// alone is kAlone. From this the error of draws is estimated whose tokens come in clusters.
struct TableGroups {
  static constexpr int kMost = 16;
  static constexpr std::uint16_t kAlone = 0xFFFF;  ///< no token is essential to so many

  const std::uint16_t* essential = nullptr;  ///< [candidates, heads], bit j: to group j
  int heads = 0;
  int tables = 0;
  float alone = 1.0F;  ///< 1 - pi of the other randomness

  /// Whether the draw says anything of this.
  [[nodiscard]] bool known() const { return tables > 0; }
  [[nodiscard]] int count() const { return count(tables); }
  [[nodiscard]] static int count(int tables) { return tables < kMost ? tables : kMost; }
  /// Runs of tables whose sizes differ by at most one.
  [[nodiscard]] static int group_of(int table, int tables) {
    return table * count(tables) / tables;
  }
  /// Tables of group j.
  [[nodiscard]] int size(int j) const { return first(j + 1) - first(j); }

 private:
  // The smallest table with table * count / tables >= j.
  [[nodiscard]] int first(int j) const { return (j * tables + count() - 1) / count(); }
};

/// Bytes of the index that an inclusion reads for each candidate: its kIndexBytes, where it has
/// one.
template <class Inclusion>
[[nodiscard]] constexpr std::int64_t inclusion_bytes() {
  if constexpr (requires { Inclusion::kIndexBytes; }) return Inclusion::kIndexBytes;
  return 0;
}

/// Tokens to read beside the exact ones, with their inclusion probabilities.
template <class I>
struct Candidates {
  using Inclusion = I;

  std::span<const TokenId> tokens;         ///< ascending, no duplicates, inside the indexed range
  std::span<const std::uint32_t> members;  ///< bit g: query head g drew it; empty: all heads did
  I inclusion;
  TableGroups groups = {};  ///< of draws from tables, where the input asked for a report
  /// Bytes of the index that were read for this, each once, as far as they grow with the tokens; of
  /// lookups in tables where the input asked for a report.
  std::int64_t index_bytes = 0;
};

/// Probabilities known per candidate: head g finds its own at log_pi[g * stride], so stride 0 means
/// one for all heads.
struct KnownInclusion {
  static constexpr bool kAnyToken = false;
  const float* log_pi = nullptr;  ///< [candidates] or [group, candidates]
  std::int64_t stride = 0;

  template <class Ops>
  void log_probability(const CandidateTile& tile, float* out) const {
    for (std::size_t g = 0; g < tile.heads.size(); ++g) {
      const HeadReads& head = tile.heads[g];
      const float* own = log_pi + static_cast<std::int64_t>(g) * stride;
      for (int i = 0; i < head.count; ++i) out[head.at + i] = own[tile.positions[head.row + i]];
    }
  }
};

/// The same probability for every token.
struct ConstantInclusion {
  static constexpr bool kAnyToken = true;
  float log_pi = 0.0F;

  template <class Ops>
  void log_probability(const CandidateTile& tile, float* out) const {
    for (int i = 0; i < tile.reads; ++i) out[i] = log_pi;
  }
};

/// Names the randomness of one draw: seed of the request, decode step, layer. Draws for the same
/// key are the same; samplers add the KV head.
struct NoiseKey {
  std::uint64_t seed = 0;
  std::uint32_t step = 0;
  std::uint32_t layer = 0;
  std::uint32_t first_head = 0;  ///< number in the layer of what the input calls KV head 0
};

/// Everything a sampler may look at for one KV head.
template <class Source, class Index>
struct DrawInput {
  const Source& key_values;
  const Index& index;
  int kv_head = 0;
  QueryGroup queries;
  float scale = 1.0F;  ///< logit = scale * q.k
  NoiseKey noise;
  int doublings = 0;  ///< a promise asks samplers that keep one for 2^doublings times their budget
  bool report = false;  ///< whether Candidates::groups and index_bytes are wanted
  TokenMask gone = {};  ///< tokens that are not to be drawn, nor counted as others
  /// [group, L], codes of the queries in the tables of the index; null: they are still to be
  /// hashed.
  const Code* query_codes = nullptr;

  /// How many tokens there are to draw from.
  [[nodiscard]] TokenId present() const { return gone.present(index.indexed()); }

  /// The random numbers of this draw.
  [[nodiscard]] RandomStream noise_for(Purpose purpose) const {
    return RandomStream({.seed = noise.seed,
                         .layer = noise.layer,
                         .head = noise.first_head + static_cast<std::uint32_t>(kv_head),
                         .stream = noise.step,
                         .purpose = purpose});
  }
};

/// Bounds for which a workspace is measured.
struct DrawLimits {
  int group = 1;
  TokenId tokens = 0;  ///< largest indexed range
  int value_dim = 0;
  RowCopies copies = {};  ///< of the source, where rows of it must be copied
};

}  // namespace magicpig::inline MAGICPIG_ABI

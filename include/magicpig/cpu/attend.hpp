// SPDX-License-Identifier: Apache-2.0
// Attention of one group of query heads over exact tokens and candidates: one list, one softmax.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/state.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cpu/attend_totals.hpp"
#include "magicpig/cpu/error_sketch.hpp"
#include "magicpig/estimate/estimator.hpp"
#include "magicpig/estimate/report.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Tokens per tile that all heads read. The keys of a tile are read while its values travel from
/// memory, and these while the next keys do: 32 rows of 256 bytes are 8 KiB each, about a
/// microsecond of memory bandwidth. Of 32, 48, 64, 96 and 128 tokens 32 is the fastest at one head
/// per group (bench: decode/exact).
inline constexpr int kAttendTile = 32;

/// Tokens per tile of which each head reads those that it drew: as many more as leave each head
/// whole vectors of weights. Of 32, 64, 128 and 256 tokens 256 is the fastest by a little, but its
/// keys and values and the next ones fill a second-level cache of 256 KiB (bench:
/// stage/attend/candidates).
inline constexpr int kAttendOwnTile = 128;

/// Rows per tile, each as often as a head reads it on its own: room for two heads per token. A tile
/// that needs more takes fewer tokens.
inline constexpr int kAttendRows = 2 * kAttendOwnTile;
static_assert(kAttendRows >= kMaxGroup && kAttendRows >= kAttendTile);

/// Scratch of one worker.
struct AttendScratch {
  float* weights = nullptr;            // [reads] inner products, then logits, then weights
  float* log_pi = nullptr;             // [reads]
  float* correction = nullptr;         // [reads] log of the estimator's factor
  float* spread = nullptr;             // [reads] (1 - pi) omega^2
  float* recent = nullptr;             // [group, value_dim] weighted values not yet in `values`
  float* spread_tile = nullptr;        // [group, value_dim] values of one tile weighted by spread
  std::byte* copied_keys = nullptr;    // [kAttendOwnTile] copies, where keys must be copied
  std::byte* copied_values = nullptr;  // likewise
  ErrorSketch sketch;                  // of a report

  /// `copies` of the source that is attended to.
  [[nodiscard]] static AttendScratch carve(Arena& arena, int group, int value_dim,
                                           const RowCopies& copies = {}) {
    const auto heads = static_cast<std::size_t>(group);
    const auto outputs = heads * static_cast<std::size_t>(value_dim);
    const std::size_t shared = heads * kAttendTile;
    const std::size_t reads = shared > kAttendRows ? shared : kAttendRows;
    return {.weights = arena.take<float>(reads),
            .log_pi = arena.take<float>(reads),
            .correction = arena.take<float>(reads),
            .spread = arena.take<float>(reads),
            .recent = arena.take<float>(outputs),
            .spread_tile = arena.take<float>(outputs),
            .copied_keys = arena.take<std::byte>(kAttendOwnTile * copies.key),
            .copied_values = arena.take<std::byte>(kAttendOwnTile * copies.value),
            .sketch = ErrorSketch::carve(arena, group, value_dim)};
  }
};

/// What the logits of one group of query heads have beside q.k: see LogitTerms.
struct GroupLogits {
  float scale = 1.0F;
  float soft_cap = 0.0F;                    // or 0
  const float* alibi_slopes = nullptr;      // [group], or null
  const float* sinks = nullptr;             // [group], or null
  const std::int32_t* positions = nullptr;  // of tokens, or null: their numbers
  std::int64_t query_position = 0;
};

/// Accumulates the sum of weights and the weighted sum of values over tiles of tokens, with a
/// running maximum per head so that no exponential overflows and one pass over the rows is enough.
/// Tiles are summed in float and added up in double: the error does not grow with the number of
/// tokens. Not-a-number in a key ends up in the lse, in a value in the output.
/// Source: online softmax, Milakov and Gimelshein 2018; by tiles, Dao et al. 2022.
template <class Ops, KeyValueSource Source>
class Attend {
  using KeyScalar = typename Source::KeyScalar;
  using ValueScalar = typename Source::ValueScalar;
  static constexpr int kTile = kAttendTile;
  static constexpr int kRecentRows = 256;  // summed in float before they are added up in double

 public:
  struct Input {
    const Source& key_values;
    int kv_head = 0;
    QueryGroup queries;
    GroupLogits logits;
    TokenMask gone = {};  ///< tokens that are not attended to, exact or drawn
    bool report = false;  ///< whether to gather what HeadReport needs
  };

  /// Clears `totals`, to which everything is added.
  Attend(const Input& input, const AttendScratch& scratch, const AttendTotals& totals)
      : in_(input),
        s_(scratch),
        totals_(totals),
        masked_(input.gone.any()),
        copies_(RowCopies::of<Source>(input.queries.dim, input.key_values.value_dim())) {
    totals_.clear();
    if (in_.report) s_.sketch.clear();
    const std::int64_t outputs = std::int64_t{in_.queries.count} * in_.key_values.value_dim();
    for (std::int64_t i = 0; i < outputs; ++i) s_.recent[i] = 0.0F;
  }

  /// The sinks, which have a weight and no value. Once, for all parts.
  void add_sinks() {
    for (int g = 0; g < in_.queries.count && in_.logits.sinks != nullptr; ++g) {
      const float sink = in_.logits.sinks[g];
      if (sink > totals_.sums[g].largest) raise(g, sink);
      if (sink == kEmptyLse) continue;
      totals_.sums[g].weight +=
          ::exp(static_cast<double>(sink) - static_cast<double>(totals_.sums[g].largest));
    }
  }

  /// Every token of `range` that is not gone, weight exp(logit).
  void add_exact(TokenRange range) {
    const TokenRange seen = in_.gone.clip(range);
    TokenId next = seen.begin;
    const auto fill = [&](Tile& tile) {
      int count = 0;
      for (; next < seen.end && count < kTile; ++next) {
        tile.tokens[count] = next;
        count += masked_ && in_.gone.has(next) ? 0 : 1;
      }
      share(tile, count);
    };
    for_each_tile(fill, [&](const Tile& tile) {
      make_logits(tile);
      weigh(tile);
    });
    const TokenId count = in_.gone.present(seen);
    for (int g = 0; g < in_.queries.count; ++g) totals_.sums[g].exact += count;
    *totals_.bytes += count * row_size();
  }

  /// Drawn tokens that are not gone, whatever the sampler returns, weight exp(logit) times the
  /// estimator's factor.
  template <class Inclusion, class Estimator>
  requires InclusionOver<Inclusion, Ops> && EstimatorOver<Estimator, Ops>
  void add_candidates(const Candidates<Inclusion>& candidates, const Estimator& estimator) {
    int first = 0;
    const auto fill = [&](Tile& tile) {
      first = fill_candidates(tile, candidates, first);
      prefetch_inclusion(candidates.inclusion, tile.tokens, tile.rows);
    };
    *totals_.bytes += candidates.index_bytes;
    for_each_tile(fill, [&](const Tile& tile) {
      *totals_.read += tile.count;
      *totals_.bytes += tile.count * (row_size() + inclusion_bytes<Inclusion>());
      candidates.inclusion.template log_probability<Ops>(
          {.tokens = tile.tokens,
           .positions = tile.positions,
           .dots = s_.weights,
           .heads = {tile.heads, static_cast<std::size_t>(in_.queries.count)},
           .reads = tile.reads},
          s_.log_pi);
      for (int i = 0; i < tile.reads; ++i) s_.correction[i] = s_.log_pi[i];
      estimator.template log_weight<Ops>(s_.correction, tile.reads);
      make_logits(tile);
      for (int i = 0; i < tile.reads; ++i) s_.weights[i] += s_.correction[i];
      weigh(tile);
      if (in_.report) account(tile, candidates.groups);
    });
    groups_ = candidates.groups;
  }

  /// After the last tokens; then the totals are complete.
  void finish() {
    add_up_recent();
    if (in_.report && groups_.known()) add_up_groups();
  }

  /// Goes back to `before`, what the totals were before any candidates; the next ones may follow.
  void restart(const AttendTotals& before) {
    totals_.assign(before);
    if (in_.report) s_.sketch.clear();
    sketched_tiles_ = 0;
    groups_ = {};
  }

 private:
  // Bytes of a key and a value.
  [[nodiscard]] std::int64_t row_size() const {
    return static_cast<std::int64_t>(
        row_bytes<KeyScalar>(static_cast<std::size_t>(in_.queries.dim)) +
        row_bytes<ValueScalar>(static_cast<std::size_t>(in_.key_values.value_dim())));
  }

  // Tokens that travel from memory together. All heads read all rows, or each head has rows of its
  // own, the tokens that it drew, one head's behind the other's.
  struct Tile {
    bool shared = true;
    int count = 0;                  // tokens
    int rows = 0;                   // as often as they are multiplied
    int reads = 0;                  // of all heads
    const TokenId* each = nullptr;  // [count] the tokens, each once
    HeadReads heads[kMaxGroup];
    const KeyScalar* keys[kAttendRows];
    const ValueScalar* values[kAttendRows];
    TokenId tokens[kAttendRows];
    std::int32_t positions[kAttendRows];  // in the candidate list
    TokenId copied[kAttendOwnTile];       // each token once, where rows must be copied
  };

  // Rows that are multiplied at once, with as many heads as read them.
  struct Batch {
    int row = 0;
    int count = 0;
    int head = 0;
    int heads = 1;
    int at = 0;  // of the first head's reads
  };

  [[nodiscard]] int batches(const Tile& tile) const { return tile.shared ? 1 : in_.queries.count; }
  [[nodiscard]] Batch batch(const Tile& tile, int b) const {
    if (tile.shared) return {.count = tile.rows, .heads = in_.queries.count};
    const HeadReads& own = tile.heads[b];
    return {.row = own.row, .count = own.count, .head = b, .at = own.at};
  }
  [[nodiscard]] Rows<KeyScalar> keys(const Tile& tile, const Batch& batch,
                                     const NextRows* next = nullptr) const {
    return {
        .rows = tile.keys + batch.row, .count = batch.count, .dim = in_.queries.dim, .next = next};
  }
  [[nodiscard]] Rows<ValueScalar> values(const Tile& tile, const Batch& batch,
                                         const NextRows* next = nullptr) const {
    return {.rows = tile.values + batch.row,
            .count = batch.count,
            .dim = in_.key_values.value_dim(),
            .next = next};
  }

  // All heads read the first `count` of the tile's tokens.
  void share(Tile& tile, int count) const {
    tile.shared = true;
    tile.count = tile.rows = count;
    tile.reads = count * in_.queries.count;
    for (int g = 0; g < in_.queries.count; ++g) {
      tile.heads[g] = {.row = 0, .at = g * count, .count = count};
    }
    tile.each = tile.tokens;
    point_at_rows(tile, [](int i) { return i; });
  }

  // Candidates from `first` on; returns the first one of the next tile. A tile is empty only where
  // there are no more.
  template <class Inclusion>
  int fill_candidates(Tile& tile, const Candidates<Inclusion>& candidates, int first) const {
    const TokenId* tokens = candidates.tokens.data();
    const auto end = static_cast<int>(candidates.tokens.size());
    if (candidates.members.empty()) {
      int count = 0;
      for (; first < end && count < kTile; ++first) {
        tile.tokens[count] = tokens[first];
        tile.positions[count] = first;
        count += masked_ && in_.gone.has(tokens[first]) ? 0 : 1;
      }
      share(tile, count);
      return first;
    }
    const std::uint32_t* members = candidates.members.data();
    std::int32_t places[kAttendOwnTile];  // of the tile's tokens, in the candidate list
    int count = 0;
    int reads = 0;
    for (; first < end && count < kAttendOwnTile; ++first) {
      const int more = std::popcount(members[first]);
      if (reads + more > kAttendRows) break;
      places[count] = first;
      const bool seen = !(masked_ && in_.gone.has(tokens[first]));
      count += seen ? 1 : 0;
      reads += seen ? more : 0;
    }
    tile.shared = false;
    tile.count = count;
    tile.rows = tile.reads = reads;
    int rows[kAttendRows + 1];  // their places in `places`
    int row = 0;
    for (int g = 0; g < in_.queries.count; ++g) {
      const int begin = row;
      for (int i = 0; i < count; ++i) {  // no branch: whether a head drew a token is anyone's guess
        rows[row] = i;
        row += static_cast<int>((members[places[i]] >> g) & 1U);
      }
      tile.heads[g] = {.row = begin, .at = begin, .count = row - begin};
    }
    for (int i = 0; i < row; ++i) tile.positions[i] = places[rows[i]];
    for (int i = 0; i < row; ++i) tile.tokens[i] = tokens[tile.positions[i]];
    if constexpr (!AddressableKeys<Source> || !AddressableValues<Source>) {
      for (int i = 0; i < count; ++i) tile.copied[i] = tokens[places[i]];
      tile.each = tile.copied;
    }
    point_at_rows(tile, [&](int i) { return rows[i]; });
    return first;
  }

  // Row i is that of tile.each[place_of(i)]: where it lies, or where it will be copied to.
  template <class PlaceOf>
  void point_at_rows(Tile& tile, const PlaceOf& place_of) const {
    for (int i = 0; i < tile.rows; ++i) {
      if constexpr (AddressableKeys<Source>) {
        tile.keys[i] = in_.key_values.key(in_.kv_head, tile.tokens[i]);
      } else {
        tile.keys[i] = key_copy(place_of(i));
      }
      if constexpr (AddressableValues<Source>) {
        tile.values[i] = in_.key_values.value(in_.kv_head, tile.tokens[i]);
      } else {
        tile.values[i] = value_copy(place_of(i));
      }
    }
  }

  [[nodiscard]] KeyScalar* key_copy(int place) const {
    return reinterpret_cast<KeyScalar*>(s_.copied_keys +
                                        static_cast<std::size_t>(place) * copies_.key);
  }
  [[nodiscard]] ValueScalar* value_copy(int place) const {
    return reinterpret_cast<ValueScalar*>(s_.copied_values +
                                          static_cast<std::size_t>(place) * copies_.value);
  }

  // Copies that last until another tile's are made.
  void copy_keys([[maybe_unused]] const Tile& tile) const {
    if constexpr (!AddressableKeys<Source>) {
      for (int i = 0; i < tile.count; ++i) {
        in_.key_values.read_key(in_.kv_head, tile.each[i], key_copy(i));
      }
    }
  }
  void copy_values([[maybe_unused]] const Tile& tile) const {
    if constexpr (!AddressableValues<Source>) {
      for (int i = 0; i < tile.count; ++i) {
        in_.key_values.read_value(in_.kv_head, tile.each[i], value_copy(i));
      }
    }
  }

  // Rows to be asked for; none that are copied, as they lie elsewhere until then.
  [[nodiscard]] NextRows next_keys(const Tile& tile, const Batch& batch) const {
    if constexpr (AddressableKeys<Source>) return NextRows(keys(tile, batch));
    return NextRows();
  }
  [[nodiscard]] NextRows next_values(const Tile& tile, const Batch& batch) const {
    if constexpr (AddressableValues<Source>) return NextRows(values(tile, batch));
    return NextRows();
  }

  // For each tile that fill(tile) makes, until it makes an empty one: computes the inner products,
  // calls use(tile), which turns them into weights, and adds the values. While the keys of a tile
  // are read its values are fetched into cache, and while those are read the keys of the next tile.
  template <class Fill, class Use>
  void for_each_tile(const Fill& fill, const Use& use) {
    fill(tiles_[0]);
    for (int t = 0; tiles_[t].count > 0; t = 1 - t) {
      const Tile& tile = tiles_[t];
      Tile& next_tile = tiles_[1 - t];
      fill(next_tile);
      copy_keys(tile);
      for (int b = 0; b < batches(tile); ++b) {
        const Batch at = batch(tile, b);
        const NextRows next = next_values(tile, at);
        Ops::dot_rows(keys(tile, at, &next), in_.queries[at.head], at.heads, s_.weights + at.at);
      }
      copy_values(tile);
      use(tile);
      if (recent_rows_ + tile.count > kRecentRows) add_up_recent();
      recent_rows_ += tile.count;
      for (int b = 0; b < batches(tile); ++b) {
        const Batch at = batch(tile, b);
        const NextRows next = next_keys(next_tile, batch(next_tile, b));
        Ops::add_rows(values(tile, at, &next), s_.weights + at.at, at.heads,
                      s_.recent + std::int64_t{at.head} * in_.key_values.value_dim());
        for (int i = at.count; i < next.count; ++i) {
          prefetch_row(&next, i, 0, next.bytes);
        }
      }
    }
  }

  // Turns the tile's inner products into logits.
  void make_logits(const Tile& tile) {
    const GroupLogits& terms = in_.logits;
    for (int i = 0; i < tile.reads; ++i) s_.weights[i] *= terms.scale;
    if (terms.soft_cap != 0.0F) cap_logits(tile.reads);
    for (int g = 0; g < in_.queries.count && terms.alibi_slopes != nullptr; ++g) {
      const HeadReads& own = tile.heads[g];
      const auto slope = static_cast<double>(terms.alibi_slopes[g]);
      for (int i = 0; i < own.count; ++i) {
        const TokenId token = tile.tokens[own.row + i];
        const std::int64_t at = terms.positions != nullptr ? terms.positions[token] : token;
        s_.weights[own.at + i] +=
            static_cast<float>(slope * static_cast<double>(at - terms.query_position));
      }
    }
  }

  // x = cap tanh(x / cap) by the exponential that all backends have; off by less than 2^-22 cap.
  // Not-a-number stays.
  void cap_logits(int n) {
    const float cap = in_.logits.soft_cap;
    float* decay = s_.spread;  // free until the tile is accounted for
    for (int i = 0; i < n; ++i) decay[i] = -2.0F * ::fabsf(s_.weights[i]) / cap;
    (void)Ops::exp_sum(decay, n, 0.0F);
    for (int i = 0; i < n; ++i) {
      s_.weights[i] = ::copysignf(cap * ((1.0F - decay[i]) / (1.0F + decay[i])), s_.weights[i]);
    }
  }

  // Brings the sums of head g to the scale of a larger logit.
  void raise(int g, float largest) {
    add_up_recent();
    if (in_.report) s_.sketch.scale(g, totals_.factor(g, largest));
    totals_.raise(g, largest);
  }

  // Turns the tile's logits into weights.
  void weigh(const Tile& tile) {
    for (int g = 0; g < in_.queries.count; ++g) {
      const HeadReads& own = tile.heads[g];
      float* logits = s_.weights + own.at;
      const float tile_largest = (Ops::max)(logits, own.count);
      if (tile_largest > totals_.sums[g].largest) raise(g, tile_largest);
      const float largest = totals_.sums[g].largest;
      // All logits -inf: any finite shift keeps the weights 0 and NaN visible.
      const float shift = largest == kEmptyLse ? 0.0F : largest;
      totals_.sums[g].weight += static_cast<double>(Ops::exp_sum(logits, own.count, shift));
    }
  }

  void add_up_recent() {
    const std::int64_t outputs = std::int64_t{in_.queries.count} * in_.key_values.value_dim();
    for (std::int64_t i = 0; i < outputs; ++i) {
      totals_.values[i] += static_cast<double>(s_.recent[i]);
      s_.recent[i] = 0.0F;
    }
    recent_rows_ = 0;
  }

  // Gathers the report's sums.
  void account(const Tile& tile, const TableGroups& groups) {
    const int dim = in_.key_values.value_dim();
    double norms[kAttendRows];
    for (int i = 0; i < tile.rows; ++i) {
      norms[i] = 0.0;
      for (int j = 0; j < dim; ++j) {
        const auto v = static_cast<double>(scalar_at(tile.values[i], j));
        norms[i] += v * v;
      }
    }
    for (int g = 0; g < in_.queries.count; ++g) account_head(g, tile.heads[g], norms);
    const std::int64_t outputs = std::int64_t{in_.queries.count} * dim;
    for (std::int64_t i = 0; i < outputs; ++i) s_.spread_tile[i] = 0.0F;
    for (int b = 0; b < batches(tile); ++b) {
      const Batch at = batch(tile, b);
      Ops::add_rows(values(tile, at), s_.spread + at.at, at.heads,
                    s_.spread_tile + std::int64_t{at.head} * dim);
    }
    for (std::int64_t i = 0; i < outputs; ++i) {
      totals_.spread_values[i] += static_cast<double>(s_.spread_tile[i]);
    }
    if (groups.known()) return add_to_groups(tile, groups);
    for (int k = 0; k < 2; ++k) sketch(tile, k);
    ++sketched_tiles_;
  }

  // Adds omega v of the tile's tokens to the groups of tables that they are essential to, unless
  // they are certain. What was drawn by other randomness alone is noise of variance
  // (1 - pi) omega^2 |v - out|^2: it goes to one group, with a random sign, and so into the mean of
  // what the groups differ by.
  void add_to_groups(const Tile& tile, const TableGroups& groups) {
    const float alone = ::sqrtf(groups.alone);
    for (int g = 0; g < in_.queries.count; ++g) {
      const HeadReads& own = tile.heads[g];
      for (int i = 0; i < own.count; ++i) {
        const int row = own.row + i;
        const float omega = s_.weights[own.at + i];
        if (s_.log_pi[own.at + i] >= 0.0F) continue;
        const std::uint16_t essential =
            groups.essential[std::int64_t{tile.positions[row]} * groups.heads + g];
        if (essential == TableGroups::kAlone) {
          const TokenId token = tile.tokens[row];
          add_to_group(tile, row, g, ErrorSketch::group_of(token, groups.count()),
                       ErrorSketch::sign(token, 0) * alone * omega);
          continue;
        }
        for (unsigned left = essential; left != 0; left &= left - 1) {
          add_to_group(tile, row, g, std::countr_zero(left), omega);
        }
      }
    }
  }

  void add_to_group(const Tile& tile, int row, int g, int j, float weight) {
    const int dim = in_.key_values.value_dim();
    s_.sketch.weights(j, 0)[g] += static_cast<double>(weight);
    Ops::add_rows(Rows<ValueScalar>{.rows = tile.values + row, .count = 1, .dim = dim}, &weight, 1,
                  s_.sketch.values(j, 0) + std::int64_t{g} * dim);
  }

  // Brings what the groups differ by into the totals.
  void add_up_groups() {
    s_.sketch.centre(groups_);
    for (int g = 0; g < in_.queries.count; ++g) {
      AttendSums& sums = totals_.sums[g];
      const auto squares = s_.sketch.squares(
          g, totals_.groups_values + std::int64_t{g} * in_.key_values.value_dim());
      sums.groups = groups_.count();
      sums.groups_square = squares.values;
      sums.groups_weight = squares.weights;
    }
  }

  // Adds the tile's errors, with the signs numbered k, to the sketch.
  void sketch(const Tile& tile, int k) {
    for (int g = 0; g < in_.queries.count; ++g) {
      const HeadReads& own = tile.heads[g];
      double sum = 0.0;
      for (int i = 0; i < own.count; ++i) {
        const float x =
            ErrorSketch::sign(tile.tokens[own.row + i], k) * ::sqrtf(s_.spread[own.at + i]);
        s_.correction[own.at + i] = x;
        sum += static_cast<double>(x);
      }
      s_.sketch.weights(sketched_tiles_, k)[g] += sum;
    }
    for (int b = 0; b < batches(tile); ++b) {
      const Batch at = batch(tile, b);
      Ops::add_rows(values(tile, at), s_.correction + at.at, at.heads,
                    s_.sketch.values(sketched_tiles_, k) +
                        std::int64_t{at.head} * in_.key_values.value_dim());
    }
  }

  void account_head(int g, const HeadReads& own, const double* norms) {
    AttendSums& sums = totals_.sums[g];
    for (int i = 0; i < own.count; ++i) {
      const auto omega = static_cast<double>(s_.weights[own.at + i]);
      const double pi = ::exp(static_cast<double>(s_.log_pi[own.at + i]));
      const double spread = (1.0 - pi) * omega * omega;
      s_.spread[own.at + i] = static_cast<float>(spread);
      sums.drawn += 1;
      sums.inverse_pi += 1.0 / pi;
      sums.inverse_pi_variance += (1.0 - pi) / (pi * pi);
      sums.spread += spread;
      sums.spread_square += spread * norms[own.row + i];
      sums.spread_2 += spread * spread;
      sums.spread_2_square += spread * spread * norms[own.row + i];
      sums.spread_2_fourth += spread * spread * norms[own.row + i] * norms[own.row + i];
      if (pi >= 1.0) continue;
      sums.omega += omega;
      sums.omega_squared += omega * omega;
      const double value = omega * ::sqrt(norms[own.row + i]);
      sums.largest_omega = omega > sums.largest_omega ? omega : sums.largest_omega;
      sums.largest_value = value > sums.largest_value ? value : sums.largest_value;
    }
  }

  Input in_;
  AttendScratch s_;
  AttendTotals totals_;
  bool masked_;  // whether anything may be gone
  RowCopies copies_;
  int recent_rows_ = 0;     // in recent
  int sketched_tiles_ = 0;  // since the last restart
  TableGroups groups_;      // of the candidates
  Tile tiles_[2];
};

}  // namespace magicpig::inline MAGICPIG_ABI

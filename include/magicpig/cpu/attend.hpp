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
    float scale = 1.0F;
    bool report = false;  ///< whether to gather what HeadReport needs
  };

  /// Clears `totals`, to which everything is added.
  Attend(const Input& input, const AttendScratch& scratch, const AttendTotals& totals)
      : in_(input),
        s_(scratch),
        totals_(totals),
        copies_(RowCopies::of<Source>(input.queries.dim, input.key_values.value_dim())) {
    totals_.clear();
    if (in_.report) s_.sketch.clear();
    const std::int64_t outputs = std::int64_t{in_.queries.count} * in_.key_values.value_dim();
    for (std::int64_t i = 0; i < outputs; ++i) s_.recent[i] = 0.0F;
  }

  /// Every token of `range`, weight exp(logit).
  void add_exact(TokenRange range) {
    TokenId first = range.begin;
    const auto fill = [&](Tile& tile) {
      const TokenRange part{.begin = first,
                            .end = range.end - first < kTile ? range.end : first + kTile};
      fill_shared(tile, part.size(), [&](int i) { return part.begin + i; });
      first = part.end;
    };
    for_each_tile(fill, [&](const Tile& tile) {
      for (int i = 0; i < tile.reads; ++i) s_.weights[i] *= in_.scale;
      weigh(tile);
    });
    for (int g = 0; g < in_.queries.count; ++g) totals_.sums[g].exact += range.size();
  }

  /// Drawn tokens, weight exp(logit) times the estimator's factor.
  template <class Inclusion, class Estimator>
  requires InclusionOver<Inclusion, Ops> && EstimatorOver<Estimator, Ops>
  void add_candidates(const Candidates<Inclusion>& candidates, const Estimator& estimator) {
    int first = 0;
    const auto fill = [&](Tile& tile) {
      first = fill_candidates(tile, candidates, first);
      prefetch_inclusion(candidates.inclusion, tile.tokens, tile.rows);
    };
    *totals_.read += static_cast<std::int64_t>(candidates.tokens.size());
    for_each_tile(fill, [&](const Tile& tile) {
      candidates.inclusion.template log_probability<Ops>(
          {.tokens = tile.tokens,
           .positions = tile.positions,
           .dots = s_.weights,
           .heads = {tile.heads, static_cast<std::size_t>(in_.queries.count)},
           .reads = tile.reads},
          s_.log_pi);
      for (int i = 0; i < tile.reads; ++i) s_.correction[i] = s_.log_pi[i];
      estimator.template log_weight<Ops>(s_.correction, tile.reads);
      for (int i = 0; i < tile.reads; ++i) {
        s_.weights[i] = s_.weights[i] * in_.scale + s_.correction[i];
      }
      weigh(tile);
      if (in_.report) account(tile);
    });
  }

  /// After the last tokens; then the totals are complete.
  void finish() { add_up_recent(); }

  /// Goes back to `before`, what the totals were before any candidates; the next ones may follow.
  void restart(const AttendTotals& before) {
    totals_.assign(before);
    if (in_.report) s_.sketch.clear();
    sketched_tiles_ = 0;
  }

 private:
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

  // `count` tokens, the i-th of which is token_at(i), that all heads read.
  template <class TokenAt>
  void fill_shared(Tile& tile, int count, const TokenAt& token_at) const {
    tile.shared = true;
    tile.count = tile.rows = count;
    tile.reads = count * in_.queries.count;
    for (int g = 0; g < in_.queries.count; ++g) {
      tile.heads[g] = {.row = 0, .at = g * count, .count = count};
    }
    for (int i = 0; i < count; ++i) tile.tokens[i] = token_at(i);
    tile.each = tile.tokens;
    point_at_rows(tile, [](int i) { return i; });
  }

  // Candidates from `first` on; returns the first one of the next tile.
  template <class Inclusion>
  int fill_candidates(Tile& tile, const Candidates<Inclusion>& candidates, int first) const {
    const TokenId* tokens = candidates.tokens.data() + first;
    const int left = static_cast<int>(candidates.tokens.size()) - first;
    if (candidates.members.empty()) {
      const int count = left < kTile ? left : kTile;
      fill_shared(tile, count, [&](int i) { return tokens[i]; });
      for (int i = 0; i < count; ++i) tile.positions[i] = first + i;
      return first + count;
    }
    const std::uint32_t* members = candidates.members.data() + first;
    int count = left < kAttendOwnTile ? left : kAttendOwnTile;
    int reads = 0;
    for (int i = 0; i < count; ++i) reads += std::popcount(members[i]);
    while (reads > kAttendRows) reads -= std::popcount(members[--count]);
    tile.shared = false;
    tile.count = count;
    tile.rows = tile.reads = reads;
    int places[kAttendRows + 1];  // of the rows, in `tokens`
    int row = 0;
    for (int g = 0; g < in_.queries.count; ++g) {
      const int begin = row;
      for (int i = 0; i < count; ++i) {  // no branch: whether a head drew a token is anyone's guess
        places[row] = i;
        row += static_cast<int>((members[i] >> g) & 1U);
      }
      tile.heads[g] = {.row = begin, .at = begin, .count = row - begin};
    }
    for (int i = 0; i < row; ++i) tile.tokens[i] = tokens[places[i]];
    for (int i = 0; i < row; ++i) tile.positions[i] = first + places[i];
    tile.each = tokens;
    point_at_rows(tile, [&](int i) { return places[i]; });
    return first + count;
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

  // Turns the tile's logits into weights.
  void weigh(const Tile& tile) {
    for (int g = 0; g < in_.queries.count; ++g) {
      const HeadReads& own = tile.heads[g];
      float* logits = s_.weights + own.at;
      const float tile_largest = (Ops::max)(logits, own.count);
      if (tile_largest > totals_.sums[g].largest) {
        add_up_recent();
        if (in_.report) s_.sketch.scale(g, totals_.factor(g, tile_largest));
        totals_.raise(g, tile_largest);
      }
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
  void account(const Tile& tile) {
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
    for (int k = 0; k < 2; ++k) sketch(tile, k);
    ++sketched_tiles_;
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
  RowCopies copies_;
  int recent_rows_ = 0;     // in recent
  int sketched_tiles_ = 0;  // since the last restart
  Tile tiles_[2];
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// vAttention: predicted heavy tokens for certain, and as large a uniform sample of the others as a
// bound of the error needs.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/estimate/normal.hpp"
#include "magicpig/index/index.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/exact_scores.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/uniform.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Which sums a sample is to estimate within epsilon.
enum class SampledSum {
  kDenominator,  ///< the softmax normaliser, as in the published experiments
  kNumerator,    ///< the weighted sum of values
  kBoth,         ///< whichever needs more
};

/// What vAttention bounds, and what it reads in any case.
struct VAttentionConfig {
  Budget heavy = {.fraction = 0.02};  ///< rows of largest score, union over the group
  Budget base = {.fraction = 0.01};   ///< rows of the pilot, which tells spreads; at least 2
  double epsilon = 0.05;              ///< relative error of the sum, above 0
  double delta = 0.05;                ///< probability of a larger one, in (0, 1)
  /// Phi^-1(1 - delta / 2) standard errors, for errors of either sign; the published code takes
  /// Phi^-1(1 - delta).
  bool two_sided = true;
  SampledSum sum = SampledSum::kDenominator;
};

/// Moments of the weights of some tokens for one query head, scaled by exp(-largest logit so far).
struct VAttentionMoments {
  float largest = -std::numeric_limits<float>::infinity();
  double known = 0.0;               // sum of w
  double pilot = 0.0;               // likewise
  double pilot_square = 0.0;        // sum of w^2
  double pilot_value_square = 0.0;  // sum of w^2 |v|^2

  // Brings everything, `values` [2, value_dim] of known and of pilot tokens too, to a logit's
  // scale.
  void raise(float logit, double* values, int value_dim) {
    const double factor = ::exp(static_cast<double>(largest) - static_cast<double>(logit));
    largest = logit;
    known *= factor;
    pilot *= factor;
    pilot_square *= factor * factor;
    pilot_value_square *= factor * factor;
    for (int j = 0; j < 2 * value_dim; ++j) values[j] *= factor;
  }
};

/// Three kinds of indexed tokens, all of them read by all heads of the group:
///   heavy   the best by Scores, as TopK takes them, certain
///   pilot   uniform among the others. It tells the spread of weights, and is certain too: what has
///           been read counts
///   sample  b tokens, uniform among the rest, pi = b / (how many they are)
/// b, at least 1, is the least, the largest over heads, at which Phi^-1(1 - delta / 2) standard
/// errors of the chosen sum, as the pilot estimates them, are within epsilon of the sum, the exact
/// window included. Sampling is without replacement, and the standard error that of a finite
/// population.
///
/// Unbiased: b depends on the pilot, and given that every other token is drawn with the probability
/// it has. The published code draws with replacement, drops duplicates and keeps the weight of all
/// draws, so that its tail is too small by a share of b / (2 n); it throws the pilot away.
///
/// The bound is the central limit theorem's, for the sum, not for the output: the denominator's
/// says nothing of values, and a pilot knows nothing of heavy tokens that neither it nor the scores
/// have seen. A vector's error of tr(covariance)^(1/2) is no rare one, so that for numerators delta
/// means what it says only below .317. Source: vAttention, Desai et al. 2025, lemma 4.1 and
/// algorithm 2.
template <class Scores = ExactScores>
class VAttention {
 public:
  static constexpr bool kUnbiased = true;

  /// Errors: as Budget::check() for heavy and base; epsilon not in (0, 1e30]; delta outside (0, 1).
  [[nodiscard]] static Result<VAttention> create(const VAttentionConfig& config,
                                                 const Scores& scores = {}) noexcept {
    const Result<TopK<Scores>> heavy = TopK<Scores>::create(config.heavy, scores);
    if (!heavy.ok()) return heavy.status();
    const Status status = config.base.check();
    if (!status.ok()) return status;
    if (!(config.epsilon > 0.0 && config.epsilon <= 1e30)) {
      return Status::error(ErrorCode::kInvalidArgument, "epsilon %g must lie in (0, 1e30]",
                           config.epsilon);
    }
    if (!(config.delta > 0.0 && config.delta < 1.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "delta %g must lie in (0, 1)",
                           config.delta);
    }
    return VAttention(config, *heavy);
  }

  /// Error: an index that the scores are not for.
  template <Index I>
  [[nodiscard]] Status supports(const I& index) const noexcept {
    return supported_by(heavy_, index);
  }

  struct Scratch {
    typename TopK<Scores>::Scratch heavy;
    float* dots = nullptr;                 // [group, kTile]
    std::byte* keys = nullptr;             // [kTile] copies, where keys must be copied
    std::byte* value = nullptr;            // one, where values must be
    VAttentionMoments* moments = nullptr;  // [group]
    double* values = nullptr;              // [group, 2, value_dim] of known and of pilot tokens
    TokenSet::Scratch heavy_set;
    TokenSet::Scratch known_set;  // and the pilot's
    TokenSet::Scratch drawn_set;  // and the sample's
    TokenId* tokens = nullptr;    // [limits.tokens]
    float* log_pi = nullptr;      // [limits.tokens]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    const auto n = static_cast<std::size_t>(limits.tokens);
    return {.heavy = heavy_.carve(arena, limits),
            .dots = arena.take<float>(group * kTile),
            .keys = arena.take<std::byte>(kTile * limits.copies.key),
            .value = arena.take<std::byte>(limits.copies.value),
            .moments = arena.take<VAttentionMoments>(group),
            .values = arena.take<double>(2 * group * static_cast<std::size_t>(limits.value_dim)),
            .heavy_set = TokenSet::carve(arena, limits.tokens),
            .known_set = TokenSet::carve(arena, limits.tokens),
            .drawn_set = TokenSet::carve(arena, limits.tokens),
            .tokens = arena.take<TokenId>(n),
            .log_pi = arena.take<float>(n)};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] Candidates<KnownInclusion> draw(const DrawInput<Source, Index>& input,
                                                Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const TokenId n = range.size();
    const auto found = heavy_.template draw<Ops>(input, scratch.heavy);
    TokenSet heavy(n, scratch.heavy_set);  // and what is gone: both are left out of the others
    heavy.add(input.gone, range.begin);
    for (const TokenId t : found.tokens) heavy.add(t - range.begin);

    const TokenId share = config_.base.of(input.present());
    const TokenId base = share > 2 ? share : 2;
    TokenSet known(heavy, scratch.known_set);
    known.pick(input.noise_for(Purpose::kUniform), base);
    const TokenId pilot = known.count() - heavy.count();
    const TokenId rest = n - known.count();
    TokenSet drawn(known, scratch.drawn_set);
    if (rest > 0) {
      measure<Ops>(input, scratch, heavy, known);
      drawn.pick(input.noise_for(Purpose::kUniform), needed(input, scratch, pilot, rest));
    }
    const TokenId sample = drawn.count() - known.count();
    const float log_pi =
        rest > 0 ? static_cast<float>(::log(static_cast<double>(sample) / rest)) : 0.0F;
    std::size_t count = 0;
    drawn.for_each([&](TokenId i) {
      if (input.gone.has(range.begin + i)) return;
      scratch.tokens[count] = range.begin + i;
      scratch.log_pi[count++] = known.has(i) ? 0.0F : log_pi;
    });
    return {.tokens = {scratch.tokens, count},
            .members = {},
            .inclusion = {.log_pi = scratch.log_pi},
            .index_bytes = found.index_bytes};
  }

 private:
  static constexpr int kTile = 64;

  VAttention(const VAttentionConfig& config, const TopK<Scores>& heavy)
      : config_(config),
        heavy_(heavy),
        quantile_(normal_quantile(config.two_sided ? config.delta / 2 : config.delta)) {}

  // Tokens whose moments are taken together.
  struct Batch {
    TokenId tokens[kTile];
    bool pilot[kTile];
    int count = 0;
  };

  // Moments of the exact window, of heavy and of pilot tokens.
  template <class Ops, class Source, class Index>
  void measure(const DrawInput<Source, Index>& input, const Scratch& scratch, const TokenSet& heavy,
               const TokenSet& known) const {
    const TokenRange range = input.index.indexed();
    const auto heads = static_cast<std::size_t>(input.queries.count);
    const auto value_dim = static_cast<std::size_t>(input.key_values.value_dim());
    for (std::size_t g = 0; g < heads; ++g) scratch.moments[g] = {};
    std::memset(scratch.values, 0, 2 * heads * value_dim * sizeof *scratch.values);
    Batch batch;
    const auto add_one = [&](TokenId token, bool pilot) {
      if (input.gone.has(token)) return;
      batch.tokens[batch.count] = token;
      batch.pilot[batch.count++] = pilot;
      if (batch.count == kTile) add<Ops>(input, scratch, batch);
    };
    for (TokenId t = 0; t < range.begin; ++t) add_one(t, false);
    known.for_each([&](TokenId i) { add_one(range.begin + i, !heavy.has(i)); });
    for (TokenId t = range.end; t < input.key_values.tokens(); ++t) add_one(t, false);
    add<Ops>(input, scratch, batch);
  }

  // Empties the batch.
  template <class Ops, class Source, class Index>
  void add(const DrawInput<Source, Index>& input, const Scratch& scratch, Batch& batch) const {
    using Scalar = typename Source::KeyScalar;
    const Scalar* rows[kTile];
    const RowCopies copies = RowCopies::of<Source>(input.queries.dim, 0);
    for (int i = 0; i < batch.count; ++i) {
      rows[i] = key_row(input.key_values, input.kv_head, batch.tokens[i],
                        scratch.keys + static_cast<std::size_t>(i) * copies.key);
    }
    Ops::dot_rows(
        Rows<Scalar>{.rows = rows, .count = batch.count, .dim = input.queries.dim, .next = nullptr},
        input.queries.data, input.queries.count, scratch.dots);
    for (int g = 0; g < input.queries.count; ++g) {
      for (int i = 0; i < batch.count; ++i) {
        add_token(input, scratch, g, scratch.dots[g * batch.count + i] * input.scale,
                  batch.tokens[i], batch.pilot[i]);
      }
    }
    batch.count = 0;
  }

  template <class Source, class Index>
  void add_token(const DrawInput<Source, Index>& input, const Scratch& scratch, int g, float logit,
                 TokenId token, bool pilot) const {
    const int value_dim = input.key_values.value_dim();
    VAttentionMoments& m = scratch.moments[g];
    double* values = scratch.values + std::int64_t{2} * g * value_dim;
    if (logit > m.largest) m.raise(logit, values, value_dim);
    const double w = ::exp(static_cast<double>(logit) - static_cast<double>(m.largest));
    (pilot ? m.pilot : m.known) += w;
    if (pilot) m.pilot_square += w * w;
    if (config_.sum == SampledSum::kDenominator) return;
    const auto* value = value_row(input.key_values, input.kv_head, token, scratch.value);
    double* to = values + (pilot ? value_dim : 0);
    double square = 0.0;
    for (int j = 0; j < value_dim; ++j) {
      const auto v = static_cast<double>(scalar_at(value, j));
      to[j] += w * v;
      square += v * v;
    }
    if (pilot) m.pilot_value_square += w * w * square;
  }

  // Tokens that the group needs of the `rest`, in [1, rest].
  template <class Source, class Index>
  [[nodiscard]] TokenId needed(const DrawInput<Source, Index>& input, const Scratch& scratch,
                               TokenId pilot, TokenId rest) const {
    const int value_dim = input.key_values.value_dim();
    double most = 1.0;
    for (int g = 0; g < input.queries.count; ++g) {
      const double own =
          needed_by(scratch.moments[g], scratch.values + std::int64_t{2} * g * value_dim, value_dim,
                    static_cast<double>(pilot), static_cast<double>(rest));
      most = own > most ? own : most;
    }
    const double up = ::ceil(most);
    return up < rest ? static_cast<TokenId>(up) : rest;
  }

  [[nodiscard]] double needed_by(const VAttentionMoments& m, const double* values, int value_dim,
                                 double pilot, double rest) const {
    double most = 1.0;
    // quantile * rest * spread / sqrt(b) * sqrt(1 - b / rest) <= epsilon * sum
    const auto note = [&](double variance, double sum) {
      const double total = quantile_ * rest * quantile_ * rest * variance;
      const double allowed = config_.epsilon * sum * config_.epsilon * sum;
      const double b = total / (allowed + total / rest);
      most = b > most ? b : most;  // NaN, of weights that are all 0, asks for no more
    };
    if (config_.sum != SampledSum::kNumerator) {
      const double variance = (m.pilot_square - m.pilot * m.pilot / pilot) / (pilot - 1.0);
      note(variance, m.known + m.pilot + rest * m.pilot / pilot);
    }
    if (config_.sum != SampledSum::kDenominator) {
      double mean_square = 0.0;  // times pilot
      double sum_square = 0.0;
      for (int j = 0; j < value_dim; ++j) {
        const double p = values[value_dim + j];
        const double sum = values[j] + p + rest * p / pilot;
        mean_square += p * p / pilot;
        sum_square += sum * sum;
      }
      note((m.pilot_value_square - mean_square) / (pilot - 1.0), ::sqrt(sum_square));
    }
    return most;
  }

  VAttentionConfig config_;
  TopK<Scores> heavy_;
  double quantile_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

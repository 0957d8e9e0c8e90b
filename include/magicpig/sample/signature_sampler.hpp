// SPDX-License-Identifier: Apache-2.0
// Draws by signatures: one scan gives every token a probability, a selection draws by it.
#pragma once

#include <math.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/signature_scores.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// How tokens are drawn by their signatures.
struct SignatureSamplerConfig {
  Budget budget;  ///< expected rows read per KV head
  /// pi is as exp(temperature * estimated logit), in [0, 4]; 0 for that of the quantiser.
  double temperature = 0.0;
  /// No token's probability is below this, nor below 2^-16: no weight exceeds its inverse. In
  /// [0, 1]; its rows come on top of the budget.
  double least = 0.0;
  /// Share of the budget, in [0, 1), for the tokens of the largest scores: they are certain, and
  /// the rest of the budget is for the others (two stages, one scan). Tokens that reach tau are
  /// certain anyway, so that a share below theirs changes nothing.
  double certain = 0.0;
};

/// How many of n < 2^16 scores reach `least`, in units of 2^-16.
template <class Ops>
[[nodiscard]] std::uint64_t count_from(const std::int16_t* scores, int n, std::int16_t least) {
  // So far below tau the others have 2^-16 each, which comes to less than one.
  const ScoreRule rule{.tau = INT16_MAX, .certain_from = least};
  return Ops::expected(scores, n, rule) / ScoreRule::kCertain * ScoreRule::kCertain;
}

/// The score from which on rows_from(score) of `n` scores, the largest of them `largest`, are
/// `target`, in units of 2^-16, to the nearest step. The first rounds move it by what would be
/// right if no more tokens became certain, which takes three or four; where most are, halving the
/// bounds is faster.
template <class Rows>
[[nodiscard]] constexpr std::int16_t score_threshold(int largest, int n, std::uint64_t target,
                                                     const Rows& rows_from) {
  constexpr int kQuickRounds = 6;
  const int wanted = log2_of(target > 0 ? target : 1);
  int tau = largest;
  int low = -32767;          // everything is certain
  int high = largest + 257;  // every probability is 2^-16
  std::uint64_t above = static_cast<std::uint64_t>(n) * ScoreRule::kCertain;
  std::uint64_t below = 0;
  for (int round = 0; high - low > 1; ++round) {
    const std::uint64_t rows = rows_from(static_cast<std::int16_t>(tau));
    const bool enough = rows >= target;
    (enough ? low : high) = tau;
    (enough ? above : below) = rows;
    const int step = log2_of(rows) - wanted;
    tau += step != 0 ? step : enough ? 1 : -1;
    if (round >= kQuickRounds || tau <= low || tau >= high) tau = low + (high - low) / 2;
  }
  return static_cast<std::int16_t>(above - target <= target - below ? low : high);
}

/// What selections that draw each token with its probability have in common.
struct UnbiasedSelection {
  static constexpr bool kUnbiased = true;
  static constexpr bool kIndependent = false;

  template <class Ops>
  [[nodiscard]] static std::uint64_t expected(const std::int16_t* scores, int n,
                                              const ScoreRule& rule) {
    return Ops::expected(scores, n, rule);
  }
};

/// One draw for the whole group, fresh for every noise key: each indexed token with pi =
/// min(1, s / tau), s the sum over the group of its estimated softmax probabilities in the indexed
/// range, tau such that the expected number of tokens is the budget. All heads use every drawn
/// token.
///
/// Unbiased given the codes, however bad the scores: pi is the number that the selection tests, a
/// multiple of 2^-16 and never 0, and it depends on codes and queries only. tau and the softmax
/// normalisers come from a pilot: all blocks of up to 8,192 tokens, 64 blocks spread evenly over
/// more. Tokens that are gone have no part in either; where none of the pilot's is there, all are
/// read. Tokens and probabilities are computed in integers and are the same on every machine,
/// whatever the SIMD library.
///
/// Selection::draw<Ops>(scores, n, rule, first token, drawn) draws from whole blocks in their
/// order; Selection::expected<Ops>(scores, n, rule) is how many it draws in the mean, in units of
/// 2^-16.
template <class Selection>
class SignatureSampler {
 public:
  static constexpr bool kUnbiased = Selection::kUnbiased;
  static constexpr bool kVerifiable = Selection::kUnbiased && Selection::kIndependent;
  /// Blocks that decide about tau.
  static constexpr int kPilotBlocks = 64;

  /// For indexes whose codes `quantiser` makes. Errors: as Budget::check(); a temperature, `least`
  /// or `certain` outside its bounds.
  template <Quantiser Q>
  [[nodiscard]] static Result<SignatureSampler> create(
      const Q& quantiser, const SignatureSamplerConfig& config) noexcept {
    const Status status = config.budget.check();
    if (!status.ok()) return status;
    if (!(config.temperature >= 0.0 && config.temperature <= 4.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "temperature %g must lie in [0, 4]",
                           config.temperature);
    }
    if (!(config.least >= 0.0 && config.least <= 1.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "least %g must lie in [0, 1]",
                           config.least);
    }
    if (!(config.certain >= 0.0 && config.certain < 1.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "certain %g must lie in [0, 1)",
                           config.certain);
    }
    return SignatureSampler(config, quantiser.shape(), quantiser.temperature());
  }

  /// What it was made from, the temperature being the one that is used.
  [[nodiscard]] const SignatureSamplerConfig& config() const { return config_; }
  /// Of the signatures that it draws from.
  [[nodiscard]] const QuantiserShape& shape() const { return shape_; }
  /// ScoreRule::longest for the least probability.
  [[nodiscard]] std::int16_t longest() const { return longest_; }

  /// Error: an index of other signatures than this was made for.
  template <class Q>
  [[nodiscard]] Status supports(const Signatures<Q>& index) const noexcept {
    return check_signatures(shape_, index.quantiser().shape());
  }

  struct Scratch {
    SignatureQueries::Scratch queries;
    std::int16_t* scores = nullptr;   // [group, pilot tokens]: of the pilot, then of a strip
    std::int16_t* offsets = nullptr;  // [group] log of a head's normaliser
    std::int16_t* pilot = nullptr;    // [pilot tokens] log s
    std::int16_t* strip = nullptr;    // [kStripBlocks * kSignatureBlock] log s
    TokenId* tokens = nullptr;        // [tokens]
    float* log_pi = nullptr;          // [tokens]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    const auto tokens = static_cast<std::size_t>(limits.tokens);
    const std::size_t blocks = (tokens + kSignatureBlock - 1) / kSignatureBlock;
    const std::size_t pilot = (std::min)(blocks, std::size_t{kPilotBlocks}) * kSignatureBlock;
    return {.queries = SignatureQueries::carve(arena, limits.group, shape_),
            .scores = arena.take<std::int16_t>(group * pilot),
            .offsets = arena.take<std::int16_t>(group),
            .pilot = arena.take<std::int16_t>(pilot),
            .strip = arena.take<std::int16_t>(kStripBlocks * kSignatureBlock),
            .tokens = arena.take<TokenId>(tokens),
            .log_pi = arena.take<float>(tokens)};
  }

  template <class Ops, class Source, class Q>
  [[nodiscard]] Candidates<KnownInclusion> draw(const DrawInput<Source, Signatures<Q>>& input,
                                                Scratch& scratch) const {
    const TokenId present = input.present();
    const TokenId budget = config_.budget.of(present, input.doublings);
    if (budget == present || longest_ < 0) return everything(input, scratch);
    Scan<Ops, Source, Q> scan(*this, input, scratch);
    return scan.pilot_tokens() > 0 ? scan.draw(budget) : everything(input, scratch);
  }

 private:
  static constexpr int kStripBlocks = 4;

  SignatureSampler(const SignatureSamplerConfig& config, const QuantiserShape& shape,
                   double temperature)
      : config_(config), shape_(shape) {
    if (config_.temperature == 0.0) config_.temperature = temperature;
    while (longest_ >= 0 && ScoreRule::units(longest_) < config.least * ScoreRule::kCertain) {
      --longest_;
    }
    for (int gap = -1; gap < 256; ++gap) {
      log_pi_[static_cast<std::size_t>(gap + 1)] =
          static_cast<float>(::log(ScoreRule::units(gap) * 0x1p-16));
    }
  }

  template <class Input>
  static Candidates<KnownInclusion> everything(const Input& input, Scratch& scratch) {
    const TokenRange range = input.index.indexed();
    std::size_t count = 0;
    for (TokenId token = range.begin; token < range.end; ++token) {
      scratch.tokens[count] = token;
      scratch.log_pi[count] = 0.0F;
      count += input.gone.has(token) ? 0U : 1U;
    }
    return {
        .tokens = {scratch.tokens, count}, .members = {}, .inclusion = {.log_pi = scratch.log_pi}};
  }

  // One draw, for one KV head.
  template <class Ops, class Source, class Q>
  class Scan {
   public:
    Scan(const SignatureSampler& sampler, const DrawInput<Source, Signatures<Q>>& input,
         Scratch& scratch)
        : sampler_(sampler),
          input_(input),
          scratch_(scratch),
          queries_(input, sampler.config_.temperature, scratch.queries),
          blocks_(input.index.block_count()),
          pilots_(blocks_ < kPilotBlocks ? blocks_ : kPilotBlocks),
          selection_(input) {}

    Candidates<KnownInclusion> draw(TokenId budget) {
      read_pilot();
      choose_rule(budget);
      int pilot = 0;  // the next one
      for (int block = 0; block < blocks_;) {
        if (pilot < pilots_ && block == pilot_block(pilot)) {
          emit(scratch_.pilot + std::int64_t{pilot} * kSignatureBlock, {block, 1});
          ++pilot;
          ++block;
        } else {
          block = read(strip_at(block, pilot), pilot);
        }
      }
      return {.tokens = {scratch_.tokens, count_},
              .members = {},
              .inclusion = {.log_pi = scratch_.log_pi},
              .index_bytes = input_.index.scan_bytes(true)};
    }

    // Tokens of the pilot's blocks that are there: the last block of the index may not be full.
    [[nodiscard]] TokenId pilot_tokens() const {
      const TokenRange range = input_.index.indexed();
      TokenId sum = 0;
      for (int i = 0; i < pilots_; ++i) {
        const TokenId begin = range.begin + pilot_block(i) * kSignatureBlock;
        const TokenId left = range.end - begin;
        sum += input_.gone.present(
            {.begin = begin, .end = left < kSignatureBlock ? range.end : begin + kSignatureBlock});
      }
      return sum;
    }

   private:
    // Stratum i of the pilot is blocks [first_block(i), first_block(i + 1)), its middle is read.
    [[nodiscard]] int first_block(int i) const {
      return static_cast<int>(std::int64_t{blocks_} * i / pilots_);
    }
    [[nodiscard]] int pilot_block(int i) const { return (first_block(i) + first_block(i + 1)) / 2; }

    void read_pilot() {
      const std::int64_t n = std::int64_t{pilots_} * kSignatureBlock;
      for (int i = 0; i < pilots_; ++i) {
        const Strip next{.first = i + 2 < pilots_ ? pilot_block(i + 2) : 0, .count = 1};
        const ScoreRows rows{scratch_.scores + std::int64_t{i} * kSignatureBlock, n};
        score({pilot_block(i), 1}, next, rows);
        leave_out({pilot_block(i), 1}, rows, input_.queries.count);
      }
      const auto tokens = static_cast<int>(n);
      for (int g = 0; g < input_.queries.count; ++g) {
        const std::int16_t* scores = scratch_.scores + g * n;
        const std::int16_t largest = Ops::largest_score(scores, tokens);
        const std::uint64_t sum = Ops::expected(scores, tokens, {.tau = largest, .longest = 255});
        scratch_.offsets[g] =
            static_cast<std::int16_t>(largest + log2_of(sum) - ScoreRule::kLogCertain);
      }
      combine({scratch_.scores, n}, tokens, scratch_.pilot);
    }

    // certain_from and tau for which the pilot has its share of the budget.
    void choose_rule(TokenId budget) {
      const std::int16_t* pilot = scratch_.pilot;
      const int n = pilots_ * kSignatureBlock;
      const std::uint64_t target =
          static_cast<std::uint64_t>(budget) * static_cast<std::uint64_t>(pilot_tokens()) *
          ScoreRule::kCertain / static_cast<std::uint64_t>(input_.present());
      const int largest = Ops::largest_score(pilot, n);
      const double certain = sampler_.config_.certain;
      if (certain > 0.0) {
        const auto first = static_cast<std::uint64_t>(certain * static_cast<double>(target));
        rule_.certain_from = score_threshold(largest, n, first, [=](std::int16_t least) {
          return count_from<Ops>(pilot, n, least);
        });
      }
      rule_.tau =
          score_threshold(largest, n, target, [=, from = rule_.certain_from](std::int16_t tau) {
            return Selection::template expected<Ops>(pilot, n, {.tau = tau, .certain_from = from});
          });
      rule_.longest = sampler_.longest_;
    }

    // Blocks of one segment.
    struct Strip {
      int first = 0;
      int count = 0;
    };

    // Blocks from `first` on that are scored together, up to the next one of the pilot; perhaps
    // none.
    [[nodiscard]] Strip strip_at(int first, int pilot) const {
      constexpr int kSegmentBlocks = kSignatureSegment / kSignatureBlock;
      const int segment_end = (first / kSegmentBlocks + 1) * kSegmentBlocks;
      const int stop = pilot < pilots_ ? pilot_block(pilot) : blocks_;
      int end = first + kStripBlocks < segment_end ? first + kStripBlocks : segment_end;
      end = stop < end ? stop : end;
      return {.first = first, .count = end - first};
    }

    // Scores a strip and draws from it; returns the first block behind it.
    int read(const Strip& strip, int pilot) {
      constexpr std::int64_t kStride = kStripBlocks * kSignatureBlock;
      const int end = strip.first + strip.count;
      const bool at_pilot = pilot < pilots_ && end == pilot_block(pilot);
      const Strip next = at_pilot ? strip_at(end + 1, pilot + 1) : strip_at(end, pilot);
      score(strip, next, {scratch_.scores, kStride});
      combine({scratch_.scores, kStride}, strip.count * kSignatureBlock, scratch_.strip);
      leave_out(strip, {scratch_.strip, kStride}, 1);
      emit(scratch_.strip, strip);
      return end;
    }

    // Asks for the blocks of `next`, too.
    void score(const Strip& strip, const Strip& next, const ScoreRows& rows) {
      const CodeBlocks wanted =
          next.count > 0 && next.first < blocks_ ? blocks_of(next) : CodeBlocks();
      CodeBlocks blocks = blocks_of(strip);
      blocks.next = &wanted;
      queries_.template score<Ops>(blocks, rows);
      const TokenId missing =
          (strip.first + strip.count) * kSignatureBlock - input_.index.indexed().size();
      for (int g = 0; g < input_.queries.count; ++g) {
        std::int16_t* end =
            rows.data + g * rows.stride + std::int64_t{strip.count} * kSignatureBlock;
        for (TokenId i = 1; i <= missing; ++i) end[-i] = ScoreRule::kNoScore;
      }
    }

    // No score in any of the rows for tokens that are gone: they are as those behind the last one.
    void leave_out(const Strip& strip, const ScoreRows& rows, int count) const {
      if (!input_.gone.any()) return;
      const TokenId first = input_.index.indexed().begin + strip.first * kSignatureBlock;
      for (int i = 0; i < strip.count * kSignatureBlock; i += 64) {
        for (std::uint64_t bits = input_.gone.bits(first + i); bits != 0; bits &= bits - 1) {
          std::int16_t* score = rows.data + i + std::countr_zero(bits);
          for (int r = 0; r < count; ++r) score[r * rows.stride] = ScoreRule::kNoScore;
        }
      }
    }

    [[nodiscard]] CodeBlocks blocks_of(const Strip& strip) const {
      return input_.index.blocks(strip.first, strip.count, input_.kv_head);
    }

    void combine(const ScoreRows& rows, int n, std::int16_t* to) const {
      Ops::combine_scores(rows, n, input_.queries.count, scratch_.offsets, to);
    }

    void emit(const std::int16_t* scores, const Strip& strip) {
      std::uint64_t drawn[kStripBlocks * kSignatureBlock / 64];
      const TokenRange range = input_.index.indexed();
      const int n = strip.count * kSignatureBlock;
      const TokenId first = range.begin + strip.first * kSignatureBlock;
      selection_.template draw<Ops>(scores, n, rule_, first, drawn);
      for (int i = 0; i < n && input_.gone.any(); i += 64) {
        drawn[i / 64] &= ~input_.gone.bits(first + i);
      }
      std::int32_t places[kStripBlocks * kSignatureBlock + kFew];
      int count = list(drawn, n, places);
      while (count > 0 && first + places[count - 1] >= range.end) --count;
      for (int i = 0; i < count; ++i) {
        scratch_.tokens[count_] = first + places[i];
        scratch_.log_pi[count_++] =
            sampler_.log_pi_[static_cast<std::size_t>(rule_.gap(scores[places[i]]) + 1)];
      }
    }

    // The places of the bits that are set, ascending; returns how many. A few are written for every
    // word, without a branch that depends on how many there are: at 2 % of the tokens it
    // would be mispredicted for every other word.
    static constexpr int kFew = 4;
    static int list(const std::uint64_t* words, int n, std::int32_t* places) {
      int count = 0;
      for (int i = 0; i < n; i += 64) {
        std::uint64_t bits = words[i / 64];
        const int set = std::popcount(bits);
        for (int done = 0; done < set || done == 0; done += kFew) {
          for (int k = 0; k < kFew; ++k, bits &= bits - 1) {
            places[count + done + k] = i + std::countr_zero(bits);
          }
        }
        count += set;
      }
      return count;
    }

    const SignatureSampler& sampler_;
    const DrawInput<Source, Signatures<Q>>& input_;
    Scratch& scratch_;
    SignatureQueries queries_;
    int blocks_;
    int pilots_;
    Selection selection_;
    ScoreRule rule_;
    std::size_t count_ = 0;
  };

  SignatureSamplerConfig config_;
  QuantiserShape shape_;
  std::int16_t longest_ = 255;
  std::array<float, 257> log_pi_{};  // of gaps from -1 on
};

}  // namespace magicpig::inline MAGICPIG_ABI

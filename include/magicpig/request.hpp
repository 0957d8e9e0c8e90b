// SPDX-License-Identifier: Apache-2.0
// What a host asks of decode(): a plan that all requests share, the requests, and their validation.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "magicpig/core/error.hpp"
#include "magicpig/core/logit_terms.hpp"
#include "magicpig/core/state.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/estimate/estimator.hpp"
#include "magicpig/estimate/promise.hpp"
#include "magicpig/estimate/report.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/index/index.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Indexed tokens below which reading all of them takes less time than drawing from them: the times
/// cross near 1,000 tokens for (10, 150) tables and near 1,500 for (12, 48) with probing
/// (docs/performance; group 4, head_dim 128, bf16).
inline constexpr TokenId kExactBelow = 1280;

/// What all requests of a decode step share. The sampler is the host's and must outlive the call.
template <class SamplerType = Exact, class EstimatorType = SelfNormalised>
struct DecodePlan {
  using Sampler = SamplerType;
  using Estimator = EstimatorType;

  Shape shape;
  const Sampler* sampler = nullptr;
  Estimator estimator = {};
  float scale = 0.0F;  ///< logit = scale * q.k; 0 means 1 / sqrt(head_dim)
  std::uint32_t layer = 0;
  TokenId exact_below = kExactBelow;  ///< fewer indexed tokens are not drawn from
  Promise promise = {};               ///< for every head's output, where the sampler can keep one
  LogitTerms logits = {};             ///< soft cap, ALiBi, sinks

  [[nodiscard]] float logit_scale() const {
    return scale != 0.0F ? scale : 1.0F / ::sqrtf(static_cast<float>(shape.head_dim));
  }
};

/// One sequence's part of a decode step: its newest token, or its newest few where a draft of
/// several is verified at once, all their heads. Row i of R query rows is the token at
/// key_values->tokens() - R + i, sees the tokens up to and with itself, and draws with step + i, on
/// its own: the very result of a request of one row at that step over so many tokens.
///
/// What `first_visible` and `hidden` leave out, and what was erased from the index, is neither
/// attended to nor drawn, and no row of a budget is spent on it.
template <KeyValueSource SourceType, Index IndexType = RangeIndex>
struct Request {
  using Source = SourceType;
  using Index = IndexType;

  const Source* key_values = nullptr;
  /// Null: every token is exact, and none was erased.
  const IndexType* index = nullptr;
  std::span<const float> query;        ///< [query_rows, query_heads, head_dim], unscaled
  std::span<AttentionState> states;    ///< [query_rows, query_heads], out [value_dim]; written
  std::span<HeadReport> reports = {};  ///< [query_rows, query_heads], or empty for none; written
  std::uint64_t seed = 0;              ///< of the request; with `step` names its random draws
  std::uint32_t step = 0;              ///< a new number for every token generated
  int query_rows = 1;
  TokenId first_visible = 0;  ///< of a sliding window: older tokens are not seen
  /// Bit t % 64 of word t / 64: token t is not seen (padding, another sequence's cell). At least
  /// mask_words(tokens), or empty.
  std::span<const std::uint64_t> hidden = {};
  /// Of tokens, for ALiBi, where they are not their numbers: at least [tokens], or empty. A query
  /// row has the position of its own token.
  std::span<const std::int32_t> positions = {};
  /// [query_rows, query_heads, L], the codes that the family of the index has for the queries, from
  /// where they were hashed: samplers then do not. Or empty. Only with an index of hash tables.
  std::span<const Code> query_codes = {};

  /// The tokens up to that of row `row` that lie in its window.
  [[nodiscard]] TokenRange visible(int row) const {
    const TokenId end = key_values->tokens() - query_rows + row + 1;
    return {.begin = first_visible < end ? first_visible : end, .end = end};
  }
  /// What is gone for row `row`: hidden, outside its window, erased from the index.
  [[nodiscard]] TokenMask gone(int row) const {
    TokenMask mask = index != nullptr ? erased_of(*index) : TokenMask{};
    if (!hidden.empty()) {
      mask.hidden = {.words = hidden.data(),
                     .count = static_cast<TokenId>(mask_words(key_values->tokens()))};
    }
    mask.seen.begin = visible(row).begin;
    if (row + 1 < query_rows) mask.seen.end = visible(row).end;
    return mask;
  }
};

/// Tokens that could be drawn from.
template <class Plan, class RequestType>
[[nodiscard]] TokenRange indexed_range(const RequestType& request) {
  if (std::is_same_v<typename Plan::Sampler, Exact> || request.index == nullptr) return {};
  const TokenRange range = request.index->indexed();
  return range.empty() ? TokenRange{} : range;
}

/// Tokens that are drawn from for a query row, but for those that are gone; all others that it sees
/// are exact.
template <class Plan, class RequestType>
[[nodiscard]] TokenRange sampled_range(const Plan& plan, const RequestType& request, int row) {
  const TokenMask gone = request.gone(row);
  const TokenRange range = gone.clip(indexed_range<Plan>(request));
  const TokenId present = gone.present(range);
  return present == 0 || present < plan.exact_below ? TokenRange{} : range;
}

/// Exact tokens that one task attends to at most; longer stretches are cut into parts of this many
/// for several workers. Where they are cut depends on the request alone, so that its result does
/// not depend on the number of workers.
inline constexpr TokenId kPartTokens = 8192;

/// The exact tokens of a query row, [first, sampled.begin) and [sampled.end, tokens), as parts.
struct ExactParts {
  TokenRange sampled;
  TokenId tokens = 0;
  bool whole = false;  ///< never cut: a promise is about the sum of all of them
  TokenId first = 0;   ///< that is seen

  [[nodiscard]] TokenId size() const { return tokens - first - sampled.size(); }
  /// At least one, be it empty.
  [[nodiscard]] int count() const {
    return whole || size() <= kPartTokens ? 1 : (size() - 1) / kPartTokens + 1;
  }
  /// Of part `number`, what lies before the sampled tokens.
  [[nodiscard]] TokenRange before(int number) const {
    return {.begin = first + smaller(number * kPartTokens, head()),
            .end = first + smaller(end(number), head())};
  }
  /// And behind them.
  [[nodiscard]] TokenRange behind(int number) const {
    const TokenId skipped = first + sampled.size();
    const TokenId from = number * kPartTokens < head() ? head() : number * kPartTokens;
    const TokenId to = end(number) < head() ? head() : end(number);
    return {.begin = from + skipped, .end = to + skipped};
  }

 private:
  static TokenId smaller(TokenId a, TokenId b) { return a < b ? a : b; }
  // Exact tokens before the sampled ones.
  [[nodiscard]] TokenId head() const { return sampled.empty() ? 0 : sampled.begin - first; }
  [[nodiscard]] TokenId end(int number) const {
    if (whole) return size();
    const TokenId rest = size() - number * kPartTokens;
    return number * kPartTokens + smaller(rest, kPartTokens);
  }
};

/// The parts of a query row.
template <class Plan, class RequestType>
[[nodiscard]] ExactParts exact_parts(const Plan& plan, const RequestType& request, int row) {
  const TokenRange sampled = sampled_range(plan, request, row);
  const TokenRange visible = request.visible(row);
  return {.sampled = sampled,
          .tokens = visible.end,
          .whole = plan.promise.asked() && !sampled.empty(),
          .first = visible.begin};
}

/// Errors: heads that do not divide, more than kMaxGroup query heads per KV head, dimensions
/// outside [1, kMaxDim], no sampler, a scale that is not finite, logit terms as
/// LogitTerms::check(); a promise as Promise::check(), or asked of a sampler or an estimator that
/// cannot keep one.
template <class Plan>
Status validate(const Plan& plan) noexcept {
  const Shape& shape = plan.shape;
  if (shape.kv_heads < 1 || shape.query_heads < 1 || shape.query_heads % shape.kv_heads != 0 ||
      shape.group() > kMaxGroup) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "query_heads %d must be 1 to %d times kv_heads %d", shape.query_heads,
                         kMaxGroup, shape.kv_heads);
  }
  if (shape.head_dim < 1 || shape.head_dim > kMaxDim || shape.value_dim < 1 ||
      shape.value_dim > kMaxDim) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "head_dim %d and value_dim %d must lie in [1, %d]", shape.head_dim,
                         shape.value_dim, kMaxDim);
  }
  if (plan.sampler == nullptr) {
    return Status::error(ErrorCode::kInvalidArgument, "the plan has no sampler");
  }
  if (!std::isfinite(plan.scale)) {
    return Status::error(ErrorCode::kNonFinite, "scale %g is not finite",
                         static_cast<double>(plan.scale));
  }
  const Status terms = plan.logits.check(static_cast<std::size_t>(shape.query_heads));
  if (!terms.ok() || !plan.promise.asked()) return terms;
  if (!verifiable<typename Plan::Sampler>() ||
      !std::is_same_v<typename Plan::Estimator, SelfNormalised>) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "no promise about the error can rest on this sampler and estimator: the "
                         "variance of its draws is not known");
  }
  return plan.promise.check();
}

/// The part of validate() that is about rows and what they see.
template <class RequestType>
Status validate_rows(const RequestType& request, std::size_t number) noexcept {
  const TokenId tokens = request.key_values->tokens();
  const int rows = request.query_rows;
  if (rows < 1 || (rows > 1 && rows > tokens)) {
    return Status::error(
        ErrorCode::kInvalidArgument,
        "request %zu: query_rows %d must be at least 1 and, the newest tokens of a "
        "cache of %d, not more",
        number, rows, tokens);
  }
  if (request.first_visible < 0) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "request %zu: first_visible %d must not be negative", number,
                         request.first_visible);
  }
  const auto needed = static_cast<std::size_t>(tokens);
  const auto words = static_cast<std::size_t>(mask_words(tokens));
  if ((!request.hidden.empty() && request.hidden.size() < words) ||
      (!request.positions.empty() && request.positions.size() < needed)) {
    return Status::error(ErrorCode::kShapeMismatch,
                         "request %zu: %zu words of hidden and %zu positions; a cache of %d tokens "
                         "needs %zu and %zu, or none",
                         number, request.hidden.size(), request.positions.size(), tokens, words,
                         needed);
  }
  return Status();
}

/// The part of validate() that is about codes of queries, `heads` of all rows.
template <class RequestType>
Status validate_codes(const RequestType& request, std::size_t heads, std::size_t number) noexcept {
  const std::span<const Code> codes = request.query_codes;
  if (codes.empty()) return Status();
  if constexpr (TableIndex<typename RequestType::Index>) {
    if (request.index != nullptr) {
      const auto tables = static_cast<std::size_t>(request.index->family().tables());
      const int buckets = bucket_count(request.index->family().bits());
      if (codes.size() != heads * tables) {
        return Status::error(ErrorCode::kShapeMismatch,
                             "request %zu: %zu query codes; %zu heads in %zu tables need %zu, or "
                             "none",
                             number, codes.size(), heads, tables, heads * tables);
      }
      for (std::size_t i = 0; i < codes.size(); ++i) {
        if (codes[i] < buckets) continue;
        return Status::error(ErrorCode::kInvalidArgument,
                             "request %zu: the query of head %zu has code %d in table %zu, which "
                             "has %d buckets",
                             number, i / tables, codes[i], i % tables, buckets);
      }
      return Status();
    }
  }
  return Status::error(ErrorCode::kInvalidArgument,
                       "request %zu: query codes are for an index of hash tables, and it has none",
                       number);
}

/// Errors: anything null, sizes that disagree with the shape, query rows that are none or more than
/// there are tokens, a window that begins below 0, an index that covers tokens which the
/// cache does not hold or that the sampler cannot draw from, a query that is not finite, query
/// codes without an index of hash tables or beyond its buckets. `number` is named in the messages.
template <class Plan, class RequestType>
Status validate(const Plan& plan, const RequestType& request, std::size_t number) noexcept {
  const Shape& shape = plan.shape;
  if (request.key_values == nullptr) {
    return Status::error(ErrorCode::kInvalidArgument, "request %zu has no keys and values", number);
  }
  const auto& source = *request.key_values;
  if (source.kv_heads() != shape.kv_heads || source.head_dim() != shape.head_dim ||
      source.value_dim() != shape.value_dim) {
    return Status::error(ErrorCode::kShapeMismatch,
                         "request %zu: keys and values have %d KV heads of %d and %d dimensions, "
                         "the plan %d of %d and %d",
                         number, source.kv_heads(), source.head_dim(), source.value_dim(),
                         shape.kv_heads, shape.head_dim, shape.value_dim);
  }
  const Status rows = validate_rows(request, number);
  if (!rows.ok()) return rows;
  const std::size_t heads =
      static_cast<std::size_t>(request.query_rows) * static_cast<std::size_t>(shape.query_heads);
  const std::size_t query_size = heads * static_cast<std::size_t>(shape.head_dim);
  if (request.query.size() != query_size || request.states.size() != heads ||
      (!request.reports.empty() && request.reports.size() != heads)) {
    return Status::error(ErrorCode::kShapeMismatch,
                         "request %zu: %zu query values, %zu states, %zu reports; the plan needs "
                         "%zu, %zu, and as many reports or none",
                         number, request.query.size(), request.states.size(),
                         request.reports.size(), query_size, heads);
  }
  for (std::size_t h = 0; h < heads; ++h) {
    if (request.states[h].out.size() != static_cast<std::size_t>(shape.value_dim)) {
      return Status::error(ErrorCode::kShapeMismatch,
                           "request %zu: the output of head %zu has %zu values, not %d", number, h,
                           request.states[h].out.size(), shape.value_dim);
    }
  }
  for (std::size_t i = 0; i < query_size; ++i) {
    if (!std::isfinite(request.query[i])) {
      return Status::error(ErrorCode::kNonFinite,
                           "request %zu: the query of head %zu is not finite", number,
                           i / static_cast<std::size_t>(shape.head_dim));
    }
  }
  const Status codes = validate_codes(request, heads, number);
  if (!codes.ok()) return codes;
  const TokenRange sampled = indexed_range<Plan>(request);
  if (sampled.empty()) return Status();
  if (request.index->kv_heads() != shape.kv_heads || request.index->dim() != shape.head_dim) {
    return Status::error(
        ErrorCode::kShapeMismatch,
        "request %zu: the index has %d KV heads of dimension %d, the plan %d of %d", number,
        request.index->kv_heads(), request.index->dim(), shape.kv_heads, shape.head_dim);
  }
  if (sampled.begin < 0 || sampled.end > source.tokens()) {
    return Status::error(ErrorCode::kShapeMismatch,
                         "request %zu: the index covers tokens [%d, %d) of a cache of %d: truncate "
                         "it with the cache",
                         number, sampled.begin, sampled.end, source.tokens());
  }
  return supported_by(*plan.sampler, *request.index);
}

}  // namespace magicpig::inline MAGICPIG_ABI

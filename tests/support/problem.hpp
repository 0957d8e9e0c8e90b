// SPDX-License-Identifier: Apache-2.0
// A random attention problem that owns its memory: keys and values in any scalar type and layout,
// queries, outputs, and the call of decode() on them.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "magicpig/attention.hpp"
#include "random.hpp"

namespace magicpig::test {

template <class T>
[[nodiscard]] T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return to_bf16(x);
  } else if constexpr (std::is_same_v<T, fp16>) {
    return to_fp16(x);
  } else {
    return x;
  }
}

/// Where the rows of a problem lie.
enum class Placement {
  kHeadMajor,    ///< dense [kv_heads, tokens, dim]
  kTokenMajor,   ///< dense [tokens, kv_heads, dim]
  kPadded,       ///< head-major with gaps after rows and heads, first row at an odd address
  kInterleaved,  ///< [tokens, kv_heads, head_dim + value_dim], keys and values in one block
  kReversed      ///< head-major with negative strides: the newest token first
};
inline constexpr Placement kPlacements[] = {Placement::kHeadMajor, Placement::kTokenMajor,
                                            Placement::kPadded, Placement::kInterleaved,
                                            Placement::kReversed};

struct ProblemConfig {
  Shape shape;
  TokenId tokens = 0;
  Placement placement = Placement::kHeadMajor;
  std::uint64_t seed = 1;
  double query_scale = 1.0;  ///< logits are about N(0, query_scale^2) at the default logit scale
  double key_offset = 0.0;   ///< added to every coordinate of every key
};

/// Keys and queries with standard normal entries, values with mean 1/2 (so that outputs are not
/// sums that cancel), rounded to T. Memory between rows is NaN, so that reading it shows.
template <class T>
class Problem {
 public:
  using Source = StridedKeyValues<T>;

  explicit Problem(const ProblemConfig& config) : config_(config) {
    const Shape& shape = config.shape;
    const int gap = config.placement == Placement::kPadded ? 3 : 0;
    const bool together = config.placement == Placement::kInterleaved;
    const std::int64_t key_row = shape.head_dim + (together ? shape.value_dim : gap);
    const std::int64_t value_row = together ? key_row : shape.value_dim + gap;
    const std::int64_t rows = std::int64_t{shape.kv_heads} * (config.tokens + gap);
    const T nan = from_float<T>(std::numeric_limits<float>::quiet_NaN());
    keys_.assign(static_cast<std::size_t>(rows * key_row + 2), nan);
    values_.assign(together ? 0 : static_cast<std::size_t>(rows * value_row + 2), nan);
    place(key_row, value_row, gap);

    Random random(config.seed);
    for (int h = 0; h < shape.kv_heads; ++h) {
      for (TokenId t = 0; t < config.tokens; ++t) {
        for (int j = 0; j < shape.head_dim; ++j) {
          key(h, t)[j] = from_float<T>(static_cast<float>(random.normal() + config.key_offset));
        }
        for (int j = 0; j < shape.value_dim; ++j) {
          value(h, t)[j] = from_float<T>(static_cast<float>(random.normal() + 0.5));
        }
      }
    }
    query_.resize(static_cast<std::size_t>(shape.query_heads) *
                  static_cast<std::size_t>(shape.head_dim));
    for (float& x : query_) x = static_cast<float>(config.query_scale * random.normal());
  }

  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  [[nodiscard]] const Shape& shape() const { return config_.shape; }
  [[nodiscard]] TokenId tokens() const { return config_.tokens; }
  [[nodiscard]] Source source() const { return *Source::create(layout_); }
  [[nodiscard]] std::vector<float>& query() { return query_; }
  [[nodiscard]] const std::vector<float>& query() const { return query_; }
  [[nodiscard]] const float* query(int head) const {
    return query_.data() + std::int64_t{head} * config_.shape.head_dim;
  }

  /// Rows for writing, to spoil them.
  [[nodiscard]] T* key(int kv_head, TokenId token) {
    return const_cast<T*>(source().key(kv_head, token));
  }
  [[nodiscard]] T* value(int kv_head, TokenId token) {
    return const_cast<T*>(source().value(kv_head, token));
  }

 private:
  void place(std::int64_t key_row, std::int64_t value_row, int gap) {
    const Shape& shape = config_.shape;
    const TokenId tokens = config_.tokens;
    layout_ = {.keys = keys_.data() + (gap != 0 ? 1 : 0),
               .values = values_.data() + (gap != 0 ? 1 : 0),
               .kv_heads = shape.kv_heads,
               .head_dim = shape.head_dim,
               .value_dim = shape.value_dim,
               .tokens = tokens};
    const auto bytes = std::int64_t{sizeof(T)};
    layout_.key_strides = {.head = key_row * bytes * (tokens + gap), .token = key_row * bytes};
    layout_.value_strides = {.head = value_row * bytes * (tokens + gap),
                             .token = value_row * bytes};
    switch (config_.placement) {
      case Placement::kHeadMajor:
      case Placement::kPadded:
        return;
      case Placement::kInterleaved:
        layout_.values = keys_.data() + shape.head_dim;
        [[fallthrough]];
      case Placement::kTokenMajor:
        layout_.key_strides = {.head = key_row * bytes, .token = key_row * bytes * shape.kv_heads};
        layout_.value_strides = {.head = value_row * bytes,
                                 .token = value_row * bytes * shape.kv_heads};
        return;
      case Placement::kReversed:
        if (tokens > 0) {
          const std::int64_t last = std::int64_t{shape.kv_heads} * tokens - 1;
          layout_.keys += last * key_row;
          layout_.values += last * value_row;
        }
        layout_.key_strides = {-layout_.key_strides.head, -layout_.key_strides.token};
        layout_.value_strides = {-layout_.value_strides.head, -layout_.value_strides.token};
        return;
    }
  }

  ProblemConfig config_;
  std::vector<T> keys_;
  std::vector<T> values_;
  std::vector<float> query_;
  typename Source::Layout layout_;
};

/// Room for the outputs of one request, filled with NaN so that what is not written shows.
struct Outputs {
  std::vector<float> values;
  std::vector<AttentionState> states;
  std::vector<HeadReport> reports;

  explicit Outputs(const Shape& shape)
      : values(
            static_cast<std::size_t>(shape.query_heads) * static_cast<std::size_t>(shape.value_dim),
            std::numeric_limits<float>::quiet_NaN()),
        states(static_cast<std::size_t>(shape.query_heads)),
        reports(static_cast<std::size_t>(shape.query_heads)) {
    const auto dim = static_cast<std::size_t>(shape.value_dim);
    for (std::size_t h = 0; h < states.size(); ++h) {
      states[h] = {.out = std::span(values).subspan(h * dim, dim),
                   .lse = std::numeric_limits<float>::quiet_NaN()};
    }
  }
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;

  [[nodiscard]] std::span<const float> out(int head) const {
    return states[static_cast<std::size_t>(head)].out;
  }
  [[nodiscard]] float lse(int head) const { return states[static_cast<std::size_t>(head)].lse; }
  [[nodiscard]] const HeadReport& report(int head) const {
    return reports[static_cast<std::size_t>(head)];
  }
};

/// Whether two floats are the same bits, -0 and NaN included.
[[nodiscard]] inline bool same_bits(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

[[nodiscard]] inline bool same_bits(const HeadReport& a, const HeadReport& b) {
  return a.exact == b.exact && a.drawn == b.drawn && a.rows_read == b.rows_read &&
         a.indexed == b.indexed && same_bits(a.effective_sample_size, b.effective_sample_size) &&
         same_bits(a.relative_error, b.relative_error) && same_bits(a.error_95, b.error_95) &&
         same_bits(a.estimated_tokens, b.estimated_tokens) && same_bits(a.alarm, b.alarm) &&
         a.promise == b.promise && a.looks == b.looks && a.rows_reread == b.rows_reread &&
         a.bytes == b.bytes;
}

/// Outputs, lse and reports, bit by bit.
[[nodiscard]] inline bool same_bits(const Outputs& a, const Outputs& b) {
  if (a.values.size() != b.values.size() || a.states.size() != b.states.size()) return false;
  bool same = true;
  for (std::size_t i = 0; i < a.values.size(); ++i) same &= same_bits(a.values[i], b.values[i]);
  for (std::size_t h = 0; h < a.states.size(); ++h) {
    same &= same_bits(a.states[h].lse, b.states[h].lse) && same_bits(a.reports[h], b.reports[h]);
  }
  return same;
}

/// What names the random draws of a request.
struct Draw {
  std::uint64_t seed = 0;
  std::uint32_t step = 0;
};

/// decode() of one request on `executor`, with a workspace of exactly the bytes it asks for.
template <class Ops, class Executor, class Plan, class Source, class IndexType>
[[nodiscard]] Status decode_one(Executor& executor, const Plan& plan,
                                const Request<Source, IndexType>& request) {
  std::vector<std::byte> workspace(
      workspace_bytes<Source>(plan, request.key_values->tokens(), executor.workers()));
  return decode(make_backend<Ops>(executor), plan,
                std::span<const Request<Source, IndexType>>(&request, 1), workspace);
}

/// A request for `problem` that writes to `outputs`, reports included. `source` must outlive it.
template <class T, class IndexType>
[[nodiscard]] Request<StridedKeyValues<T>, IndexType> make_request(
    const Problem<T>& problem, const StridedKeyValues<T>& source, const IndexType* index,
    Outputs& outputs, const Draw& draw = {}) {
  return {.key_values = &source,
          .index = index,
          .query = problem.query(),
          .states = outputs.states,
          .reports = outputs.reports,
          .seed = draw.seed,
          .step = draw.step};
}

}  // namespace magicpig::test

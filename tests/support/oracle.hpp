// SPDX-License-Identifier: Apache-2.0
// Attention by its definition, in double precision: what every backend is compared with.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"

namespace magicpig::test {

/// Output and natural-log lse of one query head.
struct OracleState {
  std::vector<double> out;
  double lse = -std::numeric_limits<double>::infinity();
};

/// A token whose weight is exp(logit + log_factor).
struct WeightedToken {
  TokenId token = 0;
  double log_factor = 0.0;
};

/// The query of one head, as the oracle needs it.
struct OracleQuery {
  const float* data = nullptr;  ///< [head_dim]
  int kv_head = 0;
  double scale = 1.0;
};

template <KeyValueSource Source>
[[nodiscard]] double oracle_logit(const Source& source, const OracleQuery& query, TokenId token) {
  const auto* key = source.key(query.kv_head, token);
  double dot = 0.0;
  for (int j = 0; j < source.head_dim(); ++j) {
    dot += static_cast<double>(query.data[j]) * static_cast<double>(scalar_at(key, j));
  }
  return query.scale * dot;
}

/// Attention over `tokens`, in two passes. No tokens: zeros and -inf.
template <KeyValueSource Source>
[[nodiscard]] OracleState oracle_attention(const Source& source, const OracleQuery& query,
                                           std::span<const WeightedToken> tokens) {
  OracleState state;
  state.out.assign(static_cast<std::size_t>(source.value_dim()), 0.0);
  std::vector<double> logits;
  double largest = -std::numeric_limits<double>::infinity();
  for (const WeightedToken& t : tokens) {
    logits.push_back(oracle_logit(source, query, t.token) + t.log_factor);
    largest = std::fmax(largest, logits.back());
  }
  double sum = 0.0;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const double weight = std::exp(logits[i] - largest);
    const auto* value = source.value(query.kv_head, tokens[i].token);
    for (std::size_t j = 0; j < state.out.size(); ++j) {
      state.out[j] += weight * static_cast<double>(scalar_at(value, static_cast<int>(j)));
    }
    sum += weight;
  }
  if (tokens.empty()) return state;
  for (double& x : state.out) x /= sum;
  state.lse = largest + std::log(sum);
  return state;
}

/// All tokens of a range with factor 1.
[[nodiscard]] inline std::vector<WeightedToken> every_token(TokenRange range) {
  std::vector<WeightedToken> tokens;
  for (TokenId t = range.begin; t < range.end; ++t) tokens.push_back({.token = t});
  return tokens;
}

/// |actual - expected| / max(|expected|, least_size), Euclidean; the absolute error where that is
/// 0.
[[nodiscard]] inline double relative_error(std::span<const float> actual,
                                           std::span<const double> expected,
                                           double least_size = 0.0) {
  double error = actual.size() == expected.size() ? 0.0 : std::numeric_limits<double>::infinity();
  double square = 0.0;
  for (std::size_t i = 0; i < actual.size() && i < expected.size(); ++i) {
    const double difference = static_cast<double>(actual[i]) - expected[i];
    error += difference * difference;
    square += expected[i] * expected[i];
  }
  const double size = std::fmax(std::sqrt(square), least_size);
  return size > 0.0 ? std::sqrt(error) / size : std::sqrt(error);
}

}  // namespace magicpig::test

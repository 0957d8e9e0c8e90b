// SPDX-License-Identifier: Apache-2.0
// What is measured: attention in double precision to compare with, and the errors of a method.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "capture.hpp"
#include "magicpig/core/executor.hpp"
#include "magicpig/core/state.hpp"
#include "magicpig/core/types.hpp"

namespace magicpig::bench {

/// Exact attention of the chosen query rows of a capture, in double from its stored values.
struct Reference {
  std::vector<double> outputs;  ///< [queries, query_heads, value_dim]
  std::vector<double> lse;      ///< [queries, query_heads], natural log
};

/// One query head over keys and values [0, tokens) of one KV head; returns the lse.
template <class Source>
double attend_in_double(const Source& source, int kv_head, std::span<const double> query,
                        std::span<double> out) {
  std::vector<double> weights(static_cast<std::size_t>(source.tokens()));
  double largest = -INFINITY;
  for (TokenId t = 0; t < source.tokens(); ++t) {
    const auto* key = source.key(kv_head, t);
    double dot = 0.0;
    for (std::size_t j = 0; j < query.size(); ++j) {
      dot += query[j] * static_cast<double>(to_float(key[j]));
    }
    weights[static_cast<std::size_t>(t)] = dot;
    largest = std::max(largest, dot);
  }
  double sum = 0.0;
  std::fill(out.begin(), out.end(), 0.0);
  for (TokenId t = 0; t < source.tokens(); ++t) {
    const auto* value = source.value(kv_head, t);
    const double weight = std::exp(weights[static_cast<std::size_t>(t)] - largest);
    sum += weight;
    for (std::size_t j = 0; j < out.size(); ++j) {
      out[j] += weight * static_cast<double>(to_float(value[j]));
    }
  }
  for (double& x : out) x /= sum;
  return largest + std::log(sum);
}

/// Exact attention for query rows `rows`.
template <Executor E>
[[nodiscard]] Reference make_reference(const Capture& capture, std::span<const int> rows,
                                       E& executor) {
  const Shape& shape = capture.shape();
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  const auto value_dim = static_cast<std::size_t>(shape.value_dim);
  Reference reference;
  reference.lse.resize(rows.size() * heads);
  reference.outputs.resize(reference.lse.size() * value_dim);
  capture.with_key_values([&](const auto& key_values) {
    executor.parallel_for(static_cast<int>(reference.lse.size()), [&](int task, int) {
      const auto at = static_cast<std::size_t>(task);
      const int row = rows[at / heads];
      const std::size_t head = at % heads;
      const auto dim = static_cast<std::size_t>(shape.head_dim);
      std::vector<double> query(dim);
      for (std::size_t j = 0; j < dim; ++j) {
        query[j] = static_cast<double>(capture.query(row)[head * dim + j]) *
                   static_cast<double>(capture.scale());
      }
      reference.lse[at] = attend_in_double(
          key_values.first(capture.visible(row)), static_cast<int>(head) / shape.group(), query,
          std::span(reference.outputs).subspan(at * value_dim, value_dim));
    });
  });
  return reference;
}

/// What one setting of one method did on one capture, over seeds, queries and heads.
struct Outcome {
  std::vector<double> errors;  ///< relative L2, one per seed, query and query head
  /// Sums over seeds of (output - exact output) / |exact output|, [queries, query_heads,
  /// value_dim].
  std::vector<double> error_sums = {};
  std::vector<double> lse_errors;      ///< |lse - exact lse|, likewise
  std::vector<double> bounds_95 = {};  ///< of the error, as reported; likewise
  std::vector<double> looks = {};      ///< of a promise, one per seed, query and KV head
  std::vector<double> dense = {};      ///< 1 where it took every token, else 0; likewise
  std::vector<double> rows;            ///< fraction of the middle, one per seed, query and KV head
  std::vector<double> bytes_read;      ///< per token of the middle, likewise; HeadReport::bytes
  std::size_t kv_heads = 1;
  double index_bytes_per_token = 0.0;  ///< per KV head
  double us_per_kv_head = 0.0;
};

[[nodiscard]] inline double mean(std::span<const double> x) {
  double sum = 0.0;
  for (const double value : x) sum += value;
  return x.empty() ? 0.0 : sum / static_cast<double>(x.size());
}

/// The q-quantile, q in [0, 1], linear between neighbours; x in any order, not empty.
[[nodiscard]] inline double quantile(std::span<const double> x, double q) {
  std::vector<double> sorted(x.begin(), x.end());
  std::sort(sorted.begin(), sorted.end());
  const double place = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  const double share = place - static_cast<double>(below);
  return sorted[below] + share * (sorted[above] - sorted[below]);
}

/// One line of the table and one entry of the JSON.
struct ResultRow {
  std::string capture;
  std::string method;
  std::string setting;
  double rows = 0.0;
  double index_bytes_per_token = 0.0;
  double bytes_read_per_token = 0.0;
  double error_mean = 0.0;
  /// |mean over seeds of the output - exact| / |exact|, mean over queries and heads: the bias, and
  /// what is left of the spread, which falls with the root of the seeds.
  double bias_mean = 0.0;
  double error_median = 0.0;
  double error_p95 = 0.0;
  double lse_error_mean = 0.0;
  double us_per_kv_head = 0.0;
  std::vector<double> error_by_seed =
      {};  ///< mean over queries and heads: what an interval is made of
  std::vector<double> error_by_kv_head = {};  ///< mean over seeds, queries and its query heads
};

/// Writes the figures of `outcome`, of so many seeds, into `row`; the names are the caller's.
inline void summarise(const Outcome& outcome, std::size_t seeds, ResultRow& row) {
  row.rows = mean(outcome.rows);
  row.index_bytes_per_token = outcome.index_bytes_per_token;
  row.bytes_read_per_token = mean(outcome.bytes_read);
  row.error_mean = mean(outcome.errors);
  const std::span<const double> errors(outcome.errors);
  const std::size_t each = errors.size() / seeds;
  for (std::size_t s = 0; s < seeds; ++s) {
    row.error_by_seed.push_back(mean(errors.subspan(s * each, each)));
  }
  std::vector<double> biases;
  for (std::size_t i = 0; i < each; ++i) {
    const std::size_t dim = outcome.error_sums.size() / each;
    double square = 0.0;
    for (const double sum : std::span(outcome.error_sums).subspan(i * dim, dim)) {
      square += sum * sum;
    }
    biases.push_back(std::sqrt(square) / static_cast<double>(seeds));
  }
  row.bias_mean = mean(biases);
  // Errors are in groups of a query's heads of one KV head, KV head after KV head.
  row.error_by_kv_head.assign(outcome.kv_heads, 0.0);
  const std::size_t group = outcome.rows.empty() ? 1 : errors.size() / outcome.rows.size();
  for (std::size_t i = 0; i < errors.size(); ++i) {
    row.error_by_kv_head[i / group % outcome.kv_heads] +=
        errors[i] * static_cast<double>(outcome.kv_heads) / static_cast<double>(errors.size());
  }
  row.error_median = quantile(outcome.errors, 0.5);
  row.error_p95 = quantile(outcome.errors, 0.95);
  row.lse_error_mean = mean(outcome.lse_errors);
  row.us_per_kv_head = outcome.us_per_kv_head;
}

}  // namespace magicpig::bench

// SPDX-License-Identifier: Apache-2.0
// Sampled attention without tables, curves or float32: codes compared one by one, probabilities and
// sums in double.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "magicpig/attention.hpp"
#include "oracle.hpp"

namespace magicpig::test {

/// A collision rule: at least `at_least` of `tables` codes of `bits` bits within `radius` flips.
struct CollisionRule {
  int bits = 1;
  int tables = 1;
  int at_least = 1;
  int radius = 0;
};

/// P(Bin(count, p) >= least) as the plain sum of its terms from `least` to `count`.
[[nodiscard]] inline double binomial_tail(int count, int least, double p) {
  if (p >= 1.0) return 1.0;
  if (p <= 0.0) return least <= 0 ? 1.0 : 0.0;
  double sum = 0.0;
  for (int j = least; j <= count; ++j) {
    sum += std::exp(std::lgamma(count + 1.0) - std::lgamma(j + 1.0) - std::lgamma(count - j + 1.0) +
                    j * std::log(p) + (count - j) * std::log1p(-p));
  }
  return std::fmin(sum, 1.0);
}

/// The rule's inclusion probability at an angle: bits differ with probability angle / pi each.
[[nodiscard]] inline double rule_probability(const CollisionRule& rule, double angle) {
  const double flip = angle / 3.14159265358979323846;
  // At most `radius` flips of `bits` = at least bits - radius bits agree.
  const double collide = binomial_tail(rule.bits, rule.bits - rule.radius, 1.0 - flip);
  return binomial_tail(rule.tables, rule.at_least, collide);
}

/// What the rule says of one token and one query head.
struct TokenDraw {
  TokenId token = 0;
  bool drawn = false;
  double pi = 0.0;
  std::vector<int> essential = {};  ///< groups of tables without which it would not be drawn
};

/// Table l is of the group l * groups / tables, rounded down, of 16 groups or one for each table.
[[nodiscard]] inline int table_groups(int tables) { return tables < 16 ? tables : 16; }

/// Compares codes token by token for one query head of one KV head over the indexed range.
class BruteForce {
 public:
  template <class Ops, class Source, class Family>
  static std::vector<TokenDraw> draw(const Source& source, const BucketTables<Family>& index,
                                     const OracleQuery& query, const CollisionRule& rule) {
    const float* centre = index.centre(query.kv_head);
    const auto query_codes = codes<Ops>(index.family(), query.data);
    std::vector<TokenDraw> draws;
    std::vector<float> centred(static_cast<std::size_t>(source.head_dim()));
    for (TokenId t = index.indexed().begin; t < index.indexed().end; ++t) {
      const auto* key = source.key(query.kv_head, t);
      for (std::size_t j = 0; j < centred.size(); ++j) centred[j] = to_float(key[j]) - centre[j];
      const auto key_codes = codes<Ops>(index.family(), centred.data());
      const int groups = table_groups(rule.tables);
      int collisions = 0;
      std::vector<int> without(static_cast<std::size_t>(groups));  // each group
      for (int l = 0; l < rule.tables; ++l) {
        const auto at = static_cast<std::size_t>(l);
        const unsigned difference = static_cast<unsigned>(key_codes[at] ^ query_codes[at]);
        if (std::popcount(difference) > rule.radius) continue;
        ++collisions;
        for (int j = 0; j < groups; ++j) {
          without[static_cast<std::size_t>(j)] += l * groups / rule.tables != j ? 1 : 0;
        }
      }
      std::vector<int> essential;
      for (int j = 0; j < groups; ++j) {
        const bool left = without[static_cast<std::size_t>(j)] >= rule.at_least;
        if (collisions >= rule.at_least && !left) essential.push_back(j);
      }
      const double theta = angle(query.data, key, centre, source.head_dim());
      draws.push_back({.token = t,
                       .drawn = collisions >= rule.at_least,
                       .pi = rule_probability(rule, theta),
                       .essential = essential});
    }
    return draws;
  }

 private:
  template <class Ops, class Family>
  static std::vector<Code> codes(const Family& family, const float* vector) {
    std::vector<float> scratch(family.scratch_floats(1));
    std::vector<Code> result(static_cast<std::size_t>(family.tables()));
    family.template hash<Ops>(vector, 1, result.data(), scratch.data());
    return result;
  }

  /// Between query and key - centre; a right angle where one of them is zero.
  template <class T>
  static double angle(const float* query, const T* key, const float* centre, int dim) {
    double dot = 0.0;
    double query_square = 0.0;
    double key_square = 0.0;
    for (int j = 0; j < dim; ++j) {
      const double q = static_cast<double>(query[j]);
      const double k = static_cast<double>(to_float(key[j])) - static_cast<double>(centre[j]);
      dot += q * k;
      query_square += q * q;
      key_square += k * k;
    }
    if (query_square == 0.0 || key_square == 0.0) return std::acos(0.0);
    const double cosine = dot / std::sqrt(query_square * key_square);
    return std::acos(std::fmax(-1.0, std::fmin(1.0, cosine)));
  }
};

/// One query head's drawn tokens, each with its probability and the factor of its weight.
struct DrawnToken {
  TokenId token = 0;
  double pi = 1.0;
  double factor = 1.0;
  std::vector<int> essential = {};  ///< as TokenDraw's
  double noise = 0.0;  ///< by which x is multiplied, where something else than tables drew it
};

/// What decode() should say of one query head.
struct ExpectedHead {
  OracleState state;
  std::int64_t exact = 0;
  std::int64_t drawn = 0;
  double effective_sample_size = 0.0;
  double relative_error = 0.0;
  double estimated_tokens = 0.0;
  double alarm = 0.0;
};

/// G / (G - 1) times the sum of |R_j - n_j / L sum_k R_k|^2 for groups of n_j of L tables.
[[nodiscard]] inline double jackknife(const std::vector<std::vector<double>>& sums, int tables) {
  const auto groups = static_cast<int>(sums.size());
  double trace = 0.0;
  for (std::size_t i = 0; i < sums[0].size(); ++i) {
    double total = 0.0;
    for (const auto& sum : sums) total += sum[i];
    for (int j = 0; j < groups; ++j) {
      int size = 0;
      for (int l = 0; l < tables; ++l) size += l * groups / tables == j ? 1 : 0;
      const double d = sums[static_cast<std::size_t>(j)][i] - total * size / tables;
      trace += d * d * groups / (groups - 1);
    }
  }
  return trace;
}

/// Output and report from their definitions: exact tokens with weight w, drawn ones with
/// omega = factor * w. Of draws from `tables` tables the error is the jackknife's over their
/// groups, with x = omega (v - out) of the tokens essential to each.
template <KeyValueSource Source>
[[nodiscard]] ExpectedHead expected_head(const Source& source, const OracleQuery& query,
                                         TokenRange indexed, std::span<const DrawnToken> drawn,
                                         int tables = 0) {
  ExpectedHead head;
  std::vector<WeightedToken> tokens;
  for (TokenId t = 0; t < source.tokens(); ++t) {
    if (!indexed.contains(t)) tokens.push_back({.token = t});
  }
  head.exact = static_cast<std::int64_t>(tokens.size());
  head.drawn = static_cast<std::int64_t>(drawn.size());
  for (const DrawnToken& d : drawn) {
    tokens.push_back({.token = d.token, .log_factor = std::log(d.factor)});
  }
  head.state = oracle_attention(source, query, tokens);
  double omega_sum = 0.0;
  double omega_squares = 0.0;
  double spread = 0.0;
  double variance = 0.0;
  const std::size_t dim = head.state.out.size();
  std::vector<std::vector<double>> sums(static_cast<std::size_t>(table_groups(tables)),
                                        std::vector<double>(dim));
  for (const DrawnToken& d : drawn) {
    // Weights relative to the normaliser, so that they cannot overflow.
    const double omega = d.factor * std::exp(oracle_logit(source, query, d.token) - head.state.lse);
    const auto* value = source.value(query.kv_head, d.token);
    double distance = 0.0;
    for (std::size_t j = 0; j < head.state.out.size(); ++j) {
      const double difference = static_cast<double>(to_float(value[j])) - head.state.out[j];
      distance += difference * difference;
      if (d.pi >= 1.0) continue;
      for (const int group : d.essential) {
        sums[static_cast<std::size_t>(group)][j] +=
            (d.noise != 0.0 ? d.noise : 1.0) * omega * difference;
      }
    }
    spread += (1.0 - d.pi) * omega * omega * distance;
    omega_sum += d.pi < 1.0 ? omega : 0.0;  // certain tokens are no sample
    omega_squares += d.pi < 1.0 ? omega * omega : 0.0;
    head.estimated_tokens += 1.0 / d.pi;
    variance += (1.0 - d.pi) / (d.pi * d.pi);
  }
  double square = 0.0;
  for (const double x : head.state.out) square += x * x;
  head.relative_error = std::sqrt((tables > 1 ? jackknife(sums, tables) : spread) / square);
  if (omega_squares > 0.0) head.effective_sample_size = omega_sum * omega_sum / omega_squares;
  if (variance > 0.0) head.alarm = (head.estimated_tokens - indexed.size()) / std::sqrt(variance);
  return head;
}

/// The candidates a sampler draws for one KV head, copied out of its scratch.
struct DrawnCandidates {
  std::vector<TokenId> tokens;
  std::vector<std::uint32_t> members;         ///< all heads where the sampler names none
  std::vector<std::uint16_t> essential = {};  ///< [tokens, group] where it names groups of tables
};

template <class Ops, class Sampler, class Source, class IndexType>
[[nodiscard]] DrawnCandidates draw_candidates(const Sampler& sampler,
                                              const DrawInput<Source, IndexType>& input) {
  const DrawLimits limits{
      .group = input.queries.count,
      .tokens = input.index.indexed().size(),
      .copies = RowCopies::of<Source>(input.queries.dim, input.key_values.value_dim())};
  Arena measure;
  (void)sampler.carve(measure, limits);
  std::vector<std::byte> memory(measure.bytes_needed());
  Arena arena{std::span<std::byte>(memory)};
  auto scratch = sampler.carve(arena, limits);
  const auto found = sampler.template draw<Ops>(input, scratch);
  DrawnCandidates result;
  result.tokens.assign(found.tokens.begin(), found.tokens.end());
  result.members.assign(found.members.begin(), found.members.end());
  if (found.members.empty()) result.members.assign(found.tokens.size(), input.queries.everyone());
  if (found.groups.known()) {
    const std::size_t size = found.tokens.size() * static_cast<std::size_t>(found.groups.heads);
    result.essential.assign(found.groups.essential, found.groups.essential + size);
  }
  return result;
}

}  // namespace magicpig::test

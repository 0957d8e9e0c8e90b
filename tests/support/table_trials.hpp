// SPDX-License-Identifier: Apache-2.0
// Trials over seeds of planes: one problem, indexed anew for each seed, and the sums that decode()
// estimates, with their exact values and moments.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "magicpig/attention.hpp"
#include "moments.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "random.hpp"
#include "statistics.hpp"

namespace magicpig::test {

/// Fixed directions on which the numerator, a vector, is observed: the first coordinate, and three
/// at random.
inline constexpr int kDirections = 4;

/// The normaliser D = sum w and the numerator N = sum w v of one query head, N in projections.
struct Sums {
  double normaliser = 0.0;
  double numerator[kDirections] = {};
};

/// n = 240 indexed tokens between 4 sink and 4 local ones, d = 32, two query heads at a cosine near
/// .8 to one KV head. Keys come in groups of four at a cosine near .7, so that tokens are drawn
/// together, around a mean far from 0. The first coordinate of a value follows its key's logit.
class Trial {
 public:
  static constexpr Shape kShape{.query_heads = 2, .kv_heads = 1, .head_dim = 32, .value_dim = 8};
  static constexpr TokenRange kRange{.begin = 4, .end = 244};

  explicit Trial(std::uint64_t data_seed = 1000)
      : problem_({.shape = kShape, .tokens = 248, .seed = data_seed}), source_(problem_.source()) {
    for (TokenId t = 0; t < 248; ++t) {
      for (int j = 0; j < 32; ++j) {
        float& x = problem_.key(0, t)[j];
        if (t % 4 != 0) x = 0.8F * problem_.key(0, t - t % 4)[j] + 0.6F * x;
      }
    }
    for (TokenId t = 0; t < 248; ++t) {
      for (int j = 0; j < 32; ++j) problem_.key(0, t)[j] += 1.0F;
    }
    for (std::size_t j = 0; j < 32; ++j) {
      float& second = problem_.query()[32 + j];
      second = 0.8F * problem_.query()[j] + 0.6F * second;
    }
    for (TokenId t = 0; t < 248; ++t) {
      float& first = problem_.value(0, t)[0];
      first = 0.3F * first + static_cast<float>(logit(t, 0) - logit(0, 0));
    }
    Random random(data_seed + 1);
    directions_.resize(kDirections * 8);
    for (double& x : directions_) x = random.normal() / std::sqrt(8.0);
    for (std::size_t j = 0; j < 8; ++j) directions_[j] = j == 0 ? 1.0 : 0.0;
  }

  [[nodiscard]] const Problem<float>& problem() const { return problem_; }
  [[nodiscard]] const StridedKeyValues<float>& source() const { return source_; }

  [[nodiscard]] double logit(TokenId token, int head) const {
    return oracle_logit(
        source_, {.data = problem_.query(head), .kv_head = 0, .scale = 1.0 / std::sqrt(32.0)},
        token);
  }
  [[nodiscard]] double weight(TokenId token, int head) const {
    return std::exp(logit(token, head));
  }
  [[nodiscard]] double projection(TokenId token, int direction) const {
    double sum = 0.0;
    for (int j = 0; j < 8; ++j) {
      sum += directions_[static_cast<std::size_t>(direction * 8 + j)] *
             static_cast<double>(source_.value(0, token)[j]);
    }
    return sum;
  }

  /// The sums over all tokens, token t counted factor(t) times.
  template <class Factor>
  [[nodiscard]] Sums sums(int head, const Factor& factor) const {
    Sums sums;
    for (TokenId t = 0; t < 248; ++t) {
      const double w = weight(t, head) * factor(t);
      sums.normaliser += w;
      for (int i = 0; i < kDirections; ++i) sums.numerator[i] += w * projection(t, i);
    }
    return sums;
  }
  [[nodiscard]] Sums exact(int head) const {
    return sums(head, [](TokenId) { return 1.0; });
  }

  /// D = exp(lse) and N = out D of a decoded head.
  [[nodiscard]] Sums estimate(const Outputs& outputs, int head) const {
    Sums sums;
    sums.normaliser = std::exp(static_cast<double>(outputs.lse(head)));
    for (int i = 0; i < kDirections; ++i) {
      for (int j = 0; j < 8; ++j) {
        sums.numerator[i] += sums.normaliser * directions_[static_cast<std::size_t>(i * 8 + j)] *
                             static_cast<double>(outputs.out(head)[static_cast<std::size_t>(j)]);
      }
    }
    return sums;
  }

  /// Key minus the mean of the indexed keys.
  [[nodiscard]] std::vector<double> centred(TokenId token) const {
    std::vector<double> key(32);
    for (std::size_t j = 0; j < 32; ++j) {
      double mean = 0.0;
      for (TokenId t = kRange.begin; t < kRange.end; ++t) {
        mean += static_cast<double>(source_.key(0, t)[j]) / kRange.size();
      }
      key[j] = static_cast<double>(source_.key(0, token)[j]) - mean;
    }
    return key;
  }

 private:
  Problem<float> problem_;
  StridedKeyValues<float> source_;
  std::vector<double> directions_;
};

[[nodiscard]] inline double cosine(const std::vector<double>& a, const std::vector<double>& b) {
  double ab = 0.0;
  double aa = 0.0;
  double bb = 0.0;
  for (std::size_t j = 0; j < a.size(); ++j) {
    ab += a[j] * b[j];
    aa += a[j] * a[j];
    bb += b[j] * b[j];
  }
  return ab / std::sqrt(aa * bb);
}

/// A collision rule, and how many tokens of Trial::kRange are drawn uniformly beside it.
struct DesignConfig {
  int bits = 0;
  int tables = 0;
  int min_collisions = 2;
  int radius = 0;
  int uniform = 0;
};

/// Exact inclusion probabilities of the indexed tokens of a trial for one head, and of their pairs.
[[nodiscard]] inline Design make_design(const Trial& trial, int head, const DesignConfig& config) {
  const auto n = static_cast<std::size_t>(Trial::kRange.size());
  std::vector<double> query(32);
  for (std::size_t j = 0; j < 32; ++j) {
    query[j] = static_cast<double>(trial.problem().query(head)[j]);
  }
  std::vector<std::vector<double>> keys;
  std::vector<double> agree;
  for (TokenId t = Trial::kRange.begin; t < Trial::kRange.end; ++t) {
    keys.push_back(trial.centred(t));
    agree.push_back(same_side(cosine(query, keys.back())));
  }
  Design design;
  design.single.resize(n);
  design.both.assign(n, std::vector<double>(n));
  const TablePair uniform =
      without_replacement(config.uniform, static_cast<int>(Trial::kRange.size()));
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      const double together = i == j ? 1.0 : same_side(cosine(keys[i], keys[j]));
      const BitPair bit{
          .first = agree[i], .second = agree[j], .both = same_side(agree[i], agree[j], together)};
      const auto in_ball = [&](double p) {
        return both_in_ball(config.bits, config.radius, {.first = p, .second = p, .both = p});
      };
      const TablePair table{.first = in_ball(agree[i]),
                            .second = in_ball(agree[j]),
                            .both = both_in_ball(config.bits, config.radius, bit)};
      const auto found = [&](double a) {
        return 1.0 - fewer_than(config.min_collisions, config.tables, a);
      };
      TablePair pair{.first = found(table.first),
                     .second = found(table.second),
                     .both = both_at_least(config.min_collisions, config.tables, table)};
      if (config.uniform > 0) pair = union_of(pair, uniform);
      if (i == j) pair.both = pair.first;
      design.single[i] = pair.first;
      design.both[i][j] = design.both[j][i] = pair.both;
    }
  }
  return design;
}

/// Indexes the trial's keys under `seeds` seeds of planes and calls body(index, seed) for each.
template <class Family, class Body>
void for_each_seed(const Trial& trial, const DesignConfig& config, int seeds, const Body& body) {
  SerialExecutor executor;
  const auto backend = make_backend<TrialOps>(executor);
  for (int s = 0; s < seeds; ++s) {
    const std::uint64_t seed = first_seed() + static_cast<std::uint64_t>(s);
    const auto family = Family::create(
        {.dim = 32, .bits = config.bits, .tables = config.tables, .seed = seed, .layer = 0});
    auto index = BucketTables<Family>::create(*family, {});
    if (!index->build(backend, trial.source(), Trial::kRange).ok()) return;
    body(*index, seed);
  }
}

/// The sums that decode() of a trial estimates with one sampler, for both query heads.
template <class Sampler, class Estimator, class IndexType>
[[nodiscard]] std::array<Sums, 2> estimate(const Trial& trial, const Sampler& sampler,
                                           const Estimator& estimator, const IndexType& index,
                                           std::uint64_t seed) {
  Outputs outputs(Trial::kShape);
  const DecodePlan<Sampler, Estimator> plan{
      .shape = Trial::kShape, .sampler = &sampler, .estimator = estimator, .exact_below = 0};
  SerialExecutor executor;
  const Status status = decode_one<TrialOps>(
      executor, plan,
      make_request(trial.problem(), trial.source(), &index, outputs, {.seed = seed, .step = 1}));
  if (!status.ok()) std::abort();
  return {trial.estimate(outputs, 0), trial.estimate(outputs, 1)};
}

}  // namespace magicpig::test

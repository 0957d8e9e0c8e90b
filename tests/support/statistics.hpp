// SPDX-License-Identifier: Apache-2.0
// What statistical tests share: samples with their z scores, chi-square, the number of seeds, and
// draws seen from outside.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "magicpig/attention.hpp"
#include "oracle.hpp"
#include "problem.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MAGICPIG_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define MAGICPIG_TEST_SANITIZED 1
#endif
#endif

namespace magicpig::test {

/// Bound on |z| of one statistical assertion: a correct library fails it with probability 6.8e-6.
inline constexpr double kZ = 4.5;

/// First seed of all replications: 1, so that CI is reproducible, or MAGICPIG_TEST_SEED.
[[nodiscard]] inline std::uint64_t first_seed() {
  const char* text = std::getenv("MAGICPIG_TEST_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 1;
}

/// Replications: `full`, or an eighth of it under a sanitizer, which runs about ten times slower.
/// MAGICPIG_TEST_SEEDS multiplies either, for longer runs.
[[nodiscard]] inline int replications(int full) {
#if defined(MAGICPIG_TEST_SANITIZED)
  const int base = full >= 64 ? full / 8 : full;
#else
  const int base = full;
#endif
  const char* text = std::getenv("MAGICPIG_TEST_SEEDS");
  const double factor = text != nullptr ? std::strtod(text, nullptr) : 1.0;
  return factor > 0.0 ? static_cast<int>(base * factor) : base;
}

/// ScalarOps with inner products in eight partial sums: trials hash for thousands of seeds.
struct TrialOps : ScalarOps {
  template <class T>
  static void dot_rows(const Rows<T>& rows, const float* queries, int group, float* dots) {
    for (int g = 0; g < group; ++g) {
      const float* query = queries + std::int64_t{g} * rows.dim;
      for (int i = 0; i < rows.count; ++i) {
        const T* row = rows.rows[i];
        float sums[8] = {};
        int j = 0;
        for (; j + 8 <= rows.dim; j += 8) {
          for (int k = 0; k < 8; ++k) sums[k] += query[j + k] * to_float(row[j + k]);
        }
        for (; j < rows.dim; ++j) sums[0] += query[j] * to_float(row[j]);
        dots[std::int64_t{g} * rows.count + i] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                                                 ((sums[4] + sums[5]) + (sums[6] + sums[7]));
      }
    }
  }
};
static_assert(VectorOps<TrialOps>);

/// Independent observations of one quantity, one per seed.
class Sample {
 public:
  void add(double x) { values_.push_back(x); }

  [[nodiscard]] double mean() const { return moment(0.0, 1); }
  [[nodiscard]] double variance() const { return moment(mean(), 2) * count() / (count() - 1.0); }
  [[nodiscard]] double standard_error() const { return std::sqrt(variance() / count()); }
  /// Standard errors between the mean and `expected`.
  [[nodiscard]] double z(double expected) const { return (mean() - expected) / standard_error(); }
  /// Standard errors between the variance and `expected`: the variance of a sample variance is
  /// s^4 (kurtosis - 1) / M, with the kurtosis of the sample.
  [[nodiscard]] double variance_z(double expected) const {
    const double m2 = moment(mean(), 2);
    const double kurtosis = moment(mean(), 4) / (m2 * m2);
    return (variance() / expected - 1.0) / std::sqrt((kurtosis - 1.0) / count());
  }

 private:
  [[nodiscard]] double count() const { return static_cast<double>(values_.size()); }
  [[nodiscard]] double moment(double about, int power) const {
    double sum = 0.0;
    for (const double x : values_) sum += std::pow(x - about, power);
    return sum / count();
  }

  std::vector<double> values_;
};

/// A chi-square value as a standard normal score, by the cube-root transformation.
/// Source: Wilson and Hilferty 1931.
[[nodiscard]] inline double chi_square_z(double chi_square, int freedom) {
  const double spread = 2.0 / (9.0 * freedom);
  return (std::cbrt(chi_square / freedom) - (1.0 - spread)) / std::sqrt(spread);
}

/// Score of observed counts against expected ones that have the same total; cells expected to hold
/// fewer than 5 are pooled.
[[nodiscard]] inline double chi_square_z(std::span<const double> observed,
                                         std::span<const double> expected) {
  double chi_square = 0.0;
  int cells = 0;
  double pooled_observed = 0.0;
  double pooled_expected = 0.0;
  const auto cell = [&](double o, double e) {
    chi_square += (o - e) * (o - e) / e;
    ++cells;
  };
  for (std::size_t i = 0; i < observed.size(); ++i) {
    if (expected[i] >= 5.0) {
      cell(observed[i], expected[i]);
    } else {
      pooled_observed += observed[i];
      pooled_expected += expected[i];
    }
  }
  if (pooled_expected > 0.5) cell(pooled_observed, pooled_expected);
  return chi_square_z(chi_square, cells - 1);
}

/// Standard errors between a frequency out of `trials` and a probability inside (0, 1).
[[nodiscard]] inline double frequency_z(double frequency, double probability, double trials) {
  return (frequency - probability) / std::sqrt(probability * (1.0 - probability) / trials);
}

/// Candidates copied out of a sampler's scratch, with log pi of each head of the group.
struct Drawn {
  std::vector<TokenId> tokens;
  std::vector<std::uint32_t> members;  ///< as the sampler returned them
  std::vector<std::vector<float>> log_pi;

  /// Whether query head `head` drew candidate i.
  [[nodiscard]] bool has(std::size_t i, int head) const {
    return members.empty() || ((members[i] >> head) & 1U) != 0;
  }
  /// The tokens of one head.
  [[nodiscard]] std::vector<TokenId> of(int head) const {
    std::vector<TokenId> own;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (has(i, head)) own.push_back(tokens[i]);
    }
    return own;
  }
};

/// All candidates as one tile that every head of the group reads.
struct SharedTile {
  SharedTile(std::span<const TokenId> candidates, int group) : tokens(candidates) {
    const auto count = static_cast<int>(tokens.size());
    for (int i = 0; i < count; ++i) positions.push_back(i);
    for (int g = 0; g < group; ++g) heads.push_back({.row = 0, .at = g * count, .count = count});
  }
  [[nodiscard]] CandidateTile view(const float* dots /* [group, candidates] */) const {
    return {.tokens = tokens.data(),
            .positions = positions.data(),
            .dots = dots,
            .heads = heads,
            .reads = static_cast<int>(tokens.size() * heads.size())};
  }

  std::span<const TokenId> tokens;
  std::vector<std::int32_t> positions;
  std::vector<HeadReads> heads;
};

/// What a sampler draws for KV head `kv_head` of a problem.
template <class Ops = ScalarOps, class Sampler, class T, class IndexType>
[[nodiscard]] Drawn draw_tokens(const Sampler& sampler, const Problem<T>& problem,
                                const IndexType& index, const NoiseKey& noise = {}, int kv_head = 0,
                                int doublings = 0) {
  const Shape& shape = problem.shape();
  const StridedKeyValues<T> source = problem.source();
  const DrawInput<StridedKeyValues<T>, IndexType> input{
      .key_values = source,
      .index = index,
      .kv_head = kv_head,
      .queries = {.data = problem.query(kv_head * shape.group()),
                  .count = shape.group(),
                  .dim = shape.head_dim},
      .scale = static_cast<float>(1.0 / std::sqrt(shape.head_dim)),
      .noise = noise,
      .doublings = doublings,
      .gone = erased_of(index)};
  const DrawLimits limits{
      .group = shape.group(), .tokens = index.indexed().size(), .value_dim = shape.value_dim};
  Arena counting;
  (void)sampler.carve(counting, limits);
  std::vector<std::byte> memory(counting.bytes_needed());
  Arena arena{std::span<std::byte>(memory)};
  typename Sampler::Scratch scratch = sampler.carve(arena, limits);
  const auto candidates = sampler.template draw<Ops>(input, scratch);
  Drawn drawn{.tokens = {candidates.tokens.begin(), candidates.tokens.end()},
              .members = {candidates.members.begin(), candidates.members.end()},
              .log_pi = {}};
  const auto count = drawn.tokens.size();
  std::vector<const T*> rows;
  for (const TokenId t : drawn.tokens) rows.push_back(source.key(kv_head, t));
  std::vector<float> dots(static_cast<std::size_t>(shape.group()) * count);
  ScalarOps::dot_rows(
      Rows<T>{.rows = rows.data(), .count = static_cast<int>(count), .dim = shape.head_dim},
      input.queries.data, shape.group(), dots.data());
  const SharedTile tile(drawn.tokens, shape.group());
  std::vector<float> log_pi(dots.size());
  candidates.inclusion.template log_probability<ScalarOps>(tile.view(dots.data()), log_pi.data());
  for (std::size_t at = 0; at < log_pi.size(); at += count) {
    const auto own = std::span<const float>(log_pi).subspan(at, count);
    drawn.log_pi.emplace_back(own.begin(), own.end());
  }
  if (count == 0) drawn.log_pi.resize(static_cast<std::size_t>(shape.group()));
  return drawn;
}

}  // namespace magicpig::test

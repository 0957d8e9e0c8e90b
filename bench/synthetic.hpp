// SPDX-License-Identifier: Apache-2.0
// A synthetic long context: keys, values and queries whose geometry is that of a real attention
// head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"

namespace magicpig::bench {

/// What a synthetic context is made from. The defaults lie within what captures of a small language
/// model show, except that their scores spread wider (std 2.2 to 4.4): 1 to 2 is where (10, 150) at
/// 2 % of the rows is meant to work.
struct SyntheticConfig {
  TokenId tokens = 0;
  int kv_heads = 8;
  int group = 4;
  int head_dim = 128;           ///< of keys and values, 2 (group + 2) to kMaxSyntheticDim
  double score_std = 1.5;       ///< std of the logits of one query over the middle
  double cosine_std = 0.105;    ///< std of the cosine between a query and the centred keys
  double norm_spread = 0.12;    ///< std of log |k - c|
  double similarity = 0.86;     ///< cosine between two queries of a group
  double centre_norm = 0.9;     ///< |c| over the median |k - c|
  double centre_cosine = -0.6;  ///< between a query and the centre c
  double sink_share = 0.5;      ///< of the softmax weight, for the first kSinkTokens tokens
  std::uint64_t seed = 1;
  MemoryAdvice memory_advice = nullptr;  ///< for keys and values
};

inline constexpr TokenId kSinkTokens = 4;
inline constexpr int kMaxSyntheticDim = 1024;

/// A row of `dim` scalars, each rounded to nearest.
template <class T>
void write_row(const float* from, int dim, T* to) {
  for (int j = 0; j < dim; ++j) {
    if constexpr (std::is_same_v<T, bf16>) to[j] = to_bf16(from[j]);
    if constexpr (std::is_same_v<T, fp16>) to[j] = to_fp16(from[j]);
    if constexpr (std::is_same_v<T, float>) to[j] = from[j];
  }
}
/// In blocks of which the largest scalar is 127 times the scale.
inline void write_row(const float* from, int dim, q8_0* to) {
  for (int begin = 0; begin < dim; begin += kQ8Block, ++to) {
    float largest = 0.0F;
    for (int j = begin; j < begin + kQ8Block; ++j) largest = std::max(largest, std::fabs(from[j]));
    to->scale = to_fp16(largest / 127.0F);
    const float scale = to_float(to->scale);
    for (int j = 0; j < kQ8Block; ++j) {
      const float steps = scale > 0.0F ? from[begin + j] / scale : 0.0F;
      to->values[j] = static_cast<std::int8_t>(std::lrint(std::clamp(steps, -127.0F, 127.0F)));
    }
  }
}

/// The standard normal distribution as 4,096 equally likely numbers, scaled to variance 1: one
/// lookup per number, where a long context needs hundreds of millions of them.
class NormalTable {
 public:
  static constexpr int kSize = 4096;

  NormalTable() {
    double square = 0.0;
    double below = -6.0;
    for (int i = 0; i < kSize; ++i) {
      below = quantile((i + 0.5) / kSize, below);
      quantiles_[i] = static_cast<float>(below);
      square += below * below / kSize;
    }
    for (float& q : quantiles_) q /= static_cast<float>(std::sqrt(square));
  }

  /// `count` numbers, a multiple of 8.
  void fill(const RandomStream& stream, float* out, int count) const {
    for (int i = 0; i < count; i += 8) {
      const auto bits = stream.block(static_cast<std::uint32_t>(i / 8));
      for (int word = 0; word < 4; ++word) {
        const std::uint32_t pair = bits[static_cast<std::size_t>(word)];
        out[i + 2 * word] = quantiles_[pair & 4095U];
        out[i + 2 * word + 1] = quantiles_[pair >> 20];
      }
    }
  }

 private:
  // x with P(N(0, 1) < x) = p, by bisection from `below` on.
  static double quantile(double p, double below) {
    double above = 6.0;
    for (int i = 0; i < 50; ++i) {
      const double middle = 0.5 * (below + above);
      (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? below : above) = middle;
    }
    return below;
  }

  float quantiles_[kSize];
};

/// The geometry of one KV head, in an orthonormal basis b_0 ... b_{G+1} of random directions:
///
///   queries  q_g = |q| (a b_0 + sqrt(1 - a^2) b_{1+g}), a^2 = similarity
///   centre   c = |c| (beta b_0 + sqrt(1 - beta^2) b_{G+1}), a beta = centre_cosine
///   keys     k = c + r u: r lognormal with median sqrt(d); the components of the unit vector u
///            along b_0 ... b_G are independent N(0, cosine_std^2), the rest of it has a uniform
///            direction. The cosine of u with every query is then exactly N(0, cosine_std^2).
///   sink     x b_0, with x such that kSinkTokens of them have sink_share of the softmax weight
///
/// Values are independent N(0, 1). |q| gives the logits the std asked for. Directions and values
/// are made of NormalTable's numbers, everything that decides a logit of Box and Muller's.
class SyntheticHead {
 public:
  [[nodiscard]] bool create(const SyntheticConfig& config, int kv_head) {
    config_ = config;
    kv_head_ = kv_head;
    const auto d = static_cast<std::size_t>(config.head_dim);
    if (!basis_.resize(static_cast<std::size_t>(config.group + 2) * d) || !centre_.resize(d)) {
      return false;
    }
    draw_basis();
    const double beta = config.centre_cosine / std::sqrt(config.similarity);
    const double norm = config.centre_norm * median_norm();
    for (int j = 0; j < config.head_dim; ++j) {
      centre_.data()[j] = static_cast<float>(
          norm * (beta * static_cast<double>(basis(0)[j]) +
                  std::sqrt(1.0 - beta * beta) * static_cast<double>(basis(config.group + 1)[j])));
    }
    return true;
  }

  /// q_g into out [head_dim].
  void query(int g, float* out) const {
    const double a = std::sqrt(config_.similarity);
    for (int j = 0; j < config_.head_dim; ++j) {
      out[j] = static_cast<float>(query_norm() *
                                  (a * static_cast<double>(basis(0)[j]) +
                                   std::sqrt(1.0 - a * a) * static_cast<double>(basis(1 + g)[j])));
    }
  }

  /// Key and value of one token into the rows key, value; scratch [head_dim + 8].
  template <class T>
  void token(const NormalTable& normals, TokenId token, T* key, T* value, float* scratch) const {
    const int d = config_.head_dim;
    const int padded = (d + 7) / 8 * 8;
    normals.fill(stream(kValues, token), scratch, padded);
    write_row(scratch, d, value);
    if (token < kSinkTokens) {
      const auto x = static_cast<float>(sink_norm());
      for (int j = 0; j < d; ++j) scratch[j] = x * basis(0)[j];
      return write_row(scratch, d, key);
    }
    float components[kMaxGroup + 3];  // along b_0 ... b_G, then log r in units of its std
    const RandomStream exact = stream(kComponents, token);
    for (int i = 0; i < config_.group + 2; i += 2) {
      const auto pair = exact.normals(static_cast<std::uint32_t>(i / 2));
      components[i] = static_cast<float>(pair[0]);
      components[i + 1] = static_cast<float>(pair[1]);
    }
    normals.fill(stream(kDirections, token), scratch, padded);
    set_direction(scratch, components);
    const double log_norm =
        config_.norm_spread * static_cast<double>(components[config_.group + 1]);
    const auto r = static_cast<float>(median_norm() * std::exp(log_norm));
    for (int j = 0; j < d; ++j) scratch[j] = centre_.data()[j] + r * scratch[j];
    write_row(scratch, d, key);
  }

  [[nodiscard]] int kv_head() const { return kv_head_; }

 private:
  // Values of their own: the planes of a hash family never share a stream with the data.
  static constexpr Purpose kBasis = Purpose{16};
  static constexpr Purpose kDirections = Purpose{17};
  static constexpr Purpose kComponents = Purpose{18};
  static constexpr Purpose kValues = Purpose{19};

  [[nodiscard]] RandomStream stream(Purpose purpose, TokenId token) const {
    return RandomStream({.seed = config_.seed,
                         .head = static_cast<std::uint32_t>(kv_head_),
                         .stream = static_cast<std::uint32_t>(token),
                         .purpose = purpose});
  }

  [[nodiscard]] const float* basis(int i) const {
    return basis_.data() + std::int64_t{i} * config_.head_dim;
  }
  [[nodiscard]] double median_norm() const { return std::sqrt(config_.head_dim); }
  [[nodiscard]] double query_norm() const {
    // logit = |q| r cos / sqrt(d), and sqrt(E r^2) = sqrt(d) exp(norm_spread^2).
    return config_.score_std /
           (config_.cosine_std * std::exp(config_.norm_spread * config_.norm_spread));
  }

  // E exp(logit - logit of the centre) over keys: given r the logit is normal with std
  // score_std r / sqrt(E r^2); the lognormal r by the trapezoidal rule.
  [[nodiscard]] double mean_weight() const {
    const double tau = config_.norm_spread;
    const double half_square = 0.5 * config_.score_std * config_.score_std;
    double sum = 0.0;
    for (int i = -50; i <= 50; ++i) {
      const double z = 0.1 * i;
      sum += 0.1 * std::exp(half_square * std::exp(2.0 * tau * (z - tau)) - 0.5 * z * z);
    }
    return sum / std::sqrt(6.283185307179586);
  }

  [[nodiscard]] double sink_norm() const {
    const double centre_logit = query_norm() * config_.centre_norm * config_.centre_cosine;
    const double others = (config_.tokens - kSinkTokens) * mean_weight();
    const double odds = config_.sink_share / (1.0 - config_.sink_share);
    const double logit = centre_logit + std::log(odds * others / kSinkTokens);
    return logit * median_norm() / (query_norm() * std::sqrt(config_.similarity));
  }

  // Gram and Schmidt on normal rows.
  void draw_basis() {
    const int d = config_.head_dim;
    for (int i = 0; i < config_.group + 2; ++i) {
      float* row = basis_.data() + std::int64_t{i} * d;
      for (int j = 0; j < d; ++j) {
        row[j] = static_cast<float>(stream(kBasis, i).normals(static_cast<std::uint32_t>(j))[0]);
      }
      for (int pass = 0; pass < 2; ++pass) {
        for (int e = 0; e < i; ++e) add(row, -dot(row, basis(e)), basis(e));
      }
      const float norm = std::sqrt(dot(row, row));
      for (int j = 0; j < d; ++j) row[j] /= norm;
    }
  }

  // Turns normals [head_dim] into the unit vector u with the given components along b_0 ... b_G.
  void set_direction(float* u, const float* components) const {
    const auto sigma = static_cast<float>(config_.cosine_std);
    float rest = 1.0F;
    for (int i = 0; i <= config_.group; ++i) {
      add(u, -dot(u, basis(i)), basis(i));
      rest -= sigma * sigma * components[i] * components[i];
    }
    const float share = std::sqrt((rest > 0.0F ? rest : 0.0F) / dot(u, u));
    for (int j = 0; j < config_.head_dim; ++j) u[j] *= share;
    for (int i = 0; i <= config_.group; ++i) add(u, sigma * components[i], basis(i));
  }

  [[nodiscard]] float dot(const float* a, const float* b) const {
    float sum = 0.0F;
    for (int j = 0; j < config_.head_dim; ++j) sum += a[j] * b[j];
    return sum;
  }
  void add(float* to, float factor, const float* row) const {
    for (int j = 0; j < config_.head_dim; ++j) to[j] += factor * row[j];
  }

  SyntheticConfig config_;
  int kv_head_ = 0;
  Buffer<float> basis_;   // [group + 2, head_dim]
  Buffer<float> centre_;  // [head_dim]
};

/// Keys and values of one layer in head-major order, and one query for each query head.
template <class T>
class SyntheticContext {
 public:
  /// The same numbers for any executor. Errors: a config value outside its bounds, memory.
  template <class Executor>
  [[nodiscard]] static Result<SyntheticContext> create(Executor& executor,
                                                       const SyntheticConfig& config) {
    if (config.tokens <= kSinkTokens || config.kv_heads < 1 || config.group < 1 ||
        config.group > kMaxGroup || config.head_dim < 2 * (config.group + 2) ||
        config.head_dim > kMaxSyntheticDim || config.head_dim % kScalarsPerElement<T> != 0) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "tokens %d, kv_heads %d, group %d, head_dim %d: want more than %d, at "
                           "least 1, 1 to %d, 2 (group + 2) to %d in blocks of %d",
                           config.tokens, config.kv_heads, config.group, config.head_dim,
                           kSinkTokens, kMaxGroup, kMaxSyntheticDim, kScalarsPerElement<T>);
    }
    SyntheticContext context(config);
    if (!context.allocate()) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d tokens", config.tokens);
    }
    const NormalTable normals;
    for (int h = 0; h < config.kv_heads; ++h) {
      SyntheticHead head;
      if (!head.create(config, h)) {
        return Status::error(ErrorCode::kOutOfMemory, "no memory for a head");
      }
      context.fill_head(executor, normals, head);
    }
    return context;
  }

  [[nodiscard]] const SyntheticConfig& config() const { return config_; }
  [[nodiscard]] Shape shape() const {
    return {.query_heads = config_.kv_heads * config_.group,
            .kv_heads = config_.kv_heads,
            .head_dim = config_.head_dim,
            .value_dim = config_.head_dim};
  }
  /// [query_heads, head_dim].
  [[nodiscard]] std::span<const float> queries() const { return queries_.span(); }
  /// Rows [kv_heads, tokens].
  [[nodiscard]] std::span<const T> keys() const { return keys_.span(); }
  [[nodiscard]] std::span<const T> values() const { return values_.span(); }
  [[nodiscard]] StridedKeyValues<T> view() const {
    return *StridedKeyValues<T>::head_major(keys_.data(), values_.data(), shape(), config_.tokens);
  }

 private:
  static constexpr int kChunk = 512;  // tokens per task

  explicit SyntheticContext(const SyntheticConfig& config) : config_(config) {}

  bool allocate() {
    const auto dim = static_cast<std::size_t>(config_.head_dim);
    const auto heads = static_cast<std::size_t>(config_.kv_heads);
    const std::size_t rows = heads * static_cast<std::size_t>(config_.tokens);
    const std::size_t elements = rows * dim / kScalarsPerElement<T>;
    return keys_.resize(elements, config_.memory_advice) &&
           values_.resize(elements, config_.memory_advice) &&
           queries_.resize(heads * static_cast<std::size_t>(config_.group) * dim);
  }

  template <class Executor>
  void fill_head(Executor& executor, const NormalTable& normals, const SyntheticHead& head) {
    const std::int64_t dim = config_.head_dim;
    const int kv_head = head.kv_head();
    for (int g = 0; g < config_.group; ++g) {
      head.query(g, queries_.data() + (std::int64_t{kv_head} * config_.group + g) * dim);
    }
    const std::int64_t first_row = std::int64_t{kv_head} * config_.tokens;
    executor.parallel_for((config_.tokens + kChunk - 1) / kChunk, [&](int chunk, int) {
      float scratch[kMaxSyntheticDim + 8];
      const TokenId begin = chunk * kChunk;
      const TokenId end = begin + kChunk < config_.tokens ? begin + kChunk : config_.tokens;
      for (TokenId t = begin; t < end; ++t) {
        const std::int64_t at = (first_row + t) * dim / kScalarsPerElement<T>;
        head.token(normals, t, keys_.data() + at, values_.data() + at, scratch);
      }
    });
  }

  SyntheticConfig config_;
  Buffer<T> keys_;
  Buffer<T> values_;
  Buffer<float> queries_;
};

}  // namespace magicpig::bench

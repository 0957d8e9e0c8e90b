// SPDX-License-Identifier: Apache-2.0
// A sketch of the covariance of sampled outputs: enough of it to tell in how many directions they
// err.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Sums of x_i = sqrt((1 - pi_i) omega_i^2) (v_i - out) with random signs, kSums of them by tile
/// and of each two with signs of their own, e_a and f_b. The error's covariance is sum x_i x_i^T;
/// its squared Frobenius norm is sum_ij (x_i . x_j)^2, which is the expectation over the signs of
/// sum_ab (e_a . f_b)^2. One vector in one direction is the worst case: 35 % off (standard
/// deviation) with 16 sums.
/// Source: sketches of second moments, Alon, Matias, Szegedy 1996.
///
/// For draws from tables the first sums are by groups of tables instead: the differences d_j of the
/// delete-a-group jackknife, see AttendTotals::error().
class ErrorSketch {
 public:
  static constexpr int kSums = 16;

  /// Of a covariance.
  struct Moments {
    double trace = 0.0;
    double square = 0.0;  ///< squared Frobenius norm
  };

  ErrorSketch() = default;

  [[nodiscard]] static ErrorSketch carve(Arena& arena, int group, int value_dim) {
    ErrorSketch sketch;
    sketch.group_ = group;
    sketch.dim_ = value_dim;
    sketch.values_ = arena.take<float>(static_cast<std::size_t>(sketch.size()));
    sketch.weights_ = arena.take<double>(static_cast<std::size_t>(2 * kSums * group));
    return sketch;
  }

  void clear() const {
    for (std::int64_t i = 0; i < size(); ++i) values_[i] = 0.0F;
    for (int i = 0; i < 2 * kSums * group_; ++i) weights_[i] = 0.0;
  }

  /// The other use of the first kSums sums, by groups of tables instead of tiles: what the tokens
  /// essential to each group add, R_j. Turns them into d_j = R_j - size_j / tables sum_k R_k; once
  /// they are that it changes nothing.
  void centre(const TableGroups& groups) const {
    static_assert(TableGroups::kMost <= kSums);
    for (int g = 0; g < group_; ++g) {
      for (int j = 0; j <= dim_; ++j) {  // the last one for the weights
        double sum = 0.0;
        for (int k = 0; k < groups.count(); ++k) sum += part(k, g, j);
        for (int k = 0; k < groups.count(); ++k) {
          const double shifted = part(k, g, j) - sum * groups.size(k) / groups.tables;
          if (j == dim_) weights(k, 0)[g] = shifted;
          if (j < dim_) values(k, 0)[std::int64_t{g} * dim_ + j] = static_cast<float>(shifted);
        }
      }
    }
  }

  /// Sum of products of d_j [value_dim + 1], the last one their weight, with each other: of the
  /// values with themselves, of the values with the weights into values [value_dim], and of the
  /// weights with themselves.
  struct Squares {
    double values = 0.0;
    double weights = 0.0;
  };
  Squares squares(int g, double* cross) const {
    Squares sum;
    for (int j = 0; j < dim_; ++j) cross[j] = 0.0;
    for (int k = 0; k < kSums; ++k) {
      const float* row = values(k, 0) + std::int64_t{g} * dim_;
      const double weight = weights(k, 0)[g];
      sum.weights += weight * weight;
      for (int j = 0; j < dim_; ++j) {
        const auto v = static_cast<double>(row[j]);
        sum.values += v * v;
        cross[j] += weight * v;
      }
    }
    return sum;
  }

  /// sum_jk (d_j . d_k)^2 of head g whose output is out [value_dim] and of the trace sum_j |d_j|^2.
  /// Afterwards the d_j are those of v - out, as below.
  [[nodiscard]] Moments group_moments(int g, const float* out) const {
    subtract(g, out);
    Moments moments;
    for (int a = 0; a < kSums; ++a) {
      for (int b = 0; b <= a; ++b) {
        const double product =
            dot(values(a, 0) + std::int64_t{g} * dim_, values(b, 0) + std::int64_t{g} * dim_);
        moments.square += (a == b ? 1.0 : 2.0) * product * product;
        if (a == b) moments.trace += product;
      }
    }
    return moments;
  }

  /// The sums [group, value_dim] of signs `k`, 0 or 1, that tile `tile` is added to, without `out`.
  [[nodiscard]] float* values(int tile, int k) const {
    return values_ + place(tile % kSums, k) * dim_;
  }
  /// And of the weights alone, [group].
  [[nodiscard]] double* weights(int tile, int k) const { return weights_ + place(tile % kSums, k); }

  /// 1 or -1: the sign of a token. Bits of a 32-bit mixing function.
  [[nodiscard]] static float sign(TokenId token, int k) {
    return ((mixed(token) >> k) & 1U) != 0 ? 1.0F : -1.0F;
  }

  /// One of `count` groups, by another part of the same function.
  [[nodiscard]] static int group_of(TokenId token, int count) {
    return static_cast<int>(
        (std::uint64_t{mixed(token) >> 2} * static_cast<std::uint64_t>(count)) >> 30);
  }

  /// Multiplies the sums of head g.
  void scale(int g, double factor) const {
    for (std::int64_t row = g; row < 2 * kSums * std::int64_t{group_}; row += group_) {
      for (int j = 0; j < dim_; ++j) {
        values_[row * dim_ + j] =
            static_cast<float>(static_cast<double>(values_[row * dim_ + j]) * factor);
      }
      weights_[row] *= factor;
    }
  }

  /// sum_ab (e_a . f_b)^2 of head g whose output is out [value_dim]. From then on
  /// the sums are those of v - out: asked again for the same output it says the same.
  [[nodiscard]] double frobenius_square(int g, const float* out) const {
    subtract(g, out);
    double sum = 0.0;
    for (int a = 0; a < kSums; ++a) {
      for (int b = 0; b < kSums; ++b) {
        const double product =
            dot(values(a, 0) + std::int64_t{g} * dim_, values(b, 1) + std::int64_t{g} * dim_);
        sum += product * product;
      }
    }
    return sum;
  }

 private:
  static std::uint32_t mixed(TokenId token) {
    auto x = static_cast<std::uint32_t>(token) * 0x9E3779B1U + 0x7F4A7C15U;
    x = (x ^ (x >> 16)) * 0x21F0AAADU;
    x = (x ^ (x >> 15)) * 0x735A2D97U;
    return x ^ (x >> 15);
  }
  void subtract(int g, const float* out) const {
    for (std::int64_t row = g; row < 2 * kSums * std::int64_t{group_}; row += group_) {
      const auto weight = static_cast<float>(weights_[row]);
      for (int j = 0; j < dim_; ++j) values_[row * dim_ + j] -= weight * out[j];
      weights_[row] = 0.0;
    }
  }
  [[nodiscard]] double part(int k, int g, int j) const {
    return j < dim_ ? static_cast<double>(values(k, 0)[std::int64_t{g} * dim_ + j])
                    : weights(k, 0)[g];
  }
  [[nodiscard]] std::int64_t size() const { return 2 * kSums * std::int64_t{group_} * dim_; }
  [[nodiscard]] std::int64_t place(int sum, int k) const {
    return std::int64_t{k * kSums + sum} * group_;
  }

  // Eight sums, so that the compiler may take vectors for them.
  [[nodiscard]] double dot(const float* x, const float* y) const {
    float sums[8] = {};
    int j = 0;
    for (; j + 8 <= dim_; j += 8) {
      for (int k = 0; k < 8; ++k) sums[k] += x[j + k] * y[j + k];
    }
    double total = 0.0;
    for (; j < dim_; ++j) total += static_cast<double>(x[j] * y[j]);
    for (const float sum : sums) total += static_cast<double>(sum);
    return total;
  }

  int group_ = 0;
  int dim_ = 0;
  float* values_ = nullptr;    // [2, kSums, group, value_dim]
  double* weights_ = nullptr;  // [2, kSums, group]
};

}  // namespace magicpig::inline MAGICPIG_ABI

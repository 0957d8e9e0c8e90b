// SPDX-License-Identifier: Apache-2.0
// A sketch of the covariance of sampled outputs: enough of it to tell in how many directions they
// err.
#pragma once

#include <cstddef>
#include <cstdint>

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
class ErrorSketch {
 public:
  static constexpr int kSums = 16;

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

  /// The sums [group, value_dim] of signs `k`, 0 or 1, that tile `tile` is added to, without `out`.
  [[nodiscard]] float* values(int tile, int k) const {
    return values_ + place(tile % kSums, k) * dim_;
  }
  /// And of the weights alone, [group].
  [[nodiscard]] double* weights(int tile, int k) const { return weights_ + place(tile % kSums, k); }

  /// 1 or -1: the sign of a token. Bits of a 32-bit mixing function.
  [[nodiscard]] static float sign(TokenId token, int k) {
    auto x = static_cast<std::uint32_t>(token) * 0x9E3779B1U + 0x7F4A7C15U;
    x = (x ^ (x >> 16)) * 0x21F0AAADU;
    x = (x ^ (x >> 15)) * 0x735A2D97U;
    x ^= x >> 15;
    return ((x >> k) & 1U) != 0 ? 1.0F : -1.0F;
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
    for (std::int64_t row = g; row < 2 * kSums * std::int64_t{group_}; row += group_) {
      const auto weight = static_cast<float>(weights_[row]);
      for (int j = 0; j < dim_; ++j) values_[row * dim_ + j] -= weight * out[j];
      weights_[row] = 0.0;
    }
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

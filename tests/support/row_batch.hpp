// SPDX-License-Identifier: Apache-2.0
// Batches of rows of any scalar type for tests of VectorOps, and how far results are from exact.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "random.hpp"

namespace magicpig::test {

/// Half a unit in the last place of 1.0F: relative error of one rounding.
inline constexpr double kUnit = 0x1p-24;

[[nodiscard]] inline double wide(float x) { return static_cast<double>(x); }

[[nodiscard]] inline std::vector<int> range(int first, int last) {
  std::vector<int> numbers;
  for (int i = first; i <= last; ++i) numbers.push_back(i);
  return numbers;
}

/// Remembers the largest error in units of its tolerance; NaN counts as infinite.
class Worst {
 public:
  void add(double actual, double expected, double tolerance) {
    if (actual == expected) return;
    const double ratio = std::fabs(actual - expected) / tolerance;
    worst_ = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : std::fmax(worst_, ratio);
  }
  [[nodiscard]] double ratio() const { return worst_; }

 private:
  double worst_ = 0.0;
};

/// Elements that hold a row of dim scalars.
template <class T>
[[nodiscard]] std::size_t row_elements(int dim) {
  return static_cast<std::size_t>(dim / kScalarsPerElement<T>);
}

/// Whether rows of T may have this dimension.
template <class T>
[[nodiscard]] bool fits(int dim) {
  return dim % kScalarsPerElement<T> == 0;
}

/// Scalar j of a row becomes x, rounded; small integers are exact. In a row of blocks the others of
/// its block keep their values only if they are integers that fit, to 7 in q4_0, or if x is NaN or
/// infinite, when all of them become x.
inline void put_scalar(float* row, int j, float x) { row[j] = x; }
inline void put_scalar(fp16* row, int j, float x) { row[j] = to_fp16(x); }
inline void put_scalar(bf16* row, int j, float x) { row[j] = to_bf16(x); }
inline void put_scalar(q8_0* row, int j, float x) {
  q8_0& block = row[j / kQ8Block];
  block.scale = to_fp16(std::isfinite(x) ? 1.0F : x);
  block.values[j % kQ8Block] = static_cast<std::int8_t>(std::isfinite(x) ? x : 1.0F);
  if (std::isfinite(x)) return;
  for (std::int8_t& value : block.values) value = 1;
}
inline void put_scalar(q4_0* row, int j, float x) {
  q4_0& block = row[j / kQ4Block];
  const int at = j % kQ4Block;
  const int shift = at / 16 * 4;
  const int number = 8 + static_cast<int>(std::isfinite(x) ? x : 1.0F);
  std::uint8_t& byte = block.nibbles[at % 16];
  block.scale = to_fp16(std::isfinite(x) ? 1.0F : x);
  byte = static_cast<std::uint8_t>((byte & (0xf0 >> shift)) | (number << shift));
  if (std::isfinite(x)) return;
  for (std::uint8_t& both : block.nibbles) both = 0x99;
}

/// Fills a row with magnitudes from 1/8 to 8, so that the order of summation matters.
[[nodiscard]] inline float random_scalar(Random& random) {
  const double scale = 0.125 * (1 << random.below(7));
  return static_cast<float>(scale * (2.0 * random.uniform() - 1.0));
}
template <class T>
void fill_row(Random& random, T* row, int dim) {
  for (int j = 0; j < dim; ++j) put_scalar(row, j, random_scalar(random));
}
inline void fill_row(Random& random, q8_0* row, int dim) {
  for (std::size_t b = 0; b < row_elements<q8_0>(dim); ++b) {
    row[b].scale = to_fp16(random_scalar(random) / 127.0F);
    for (std::int8_t& value : row[b].values) {
      value = static_cast<std::int8_t>(random.between(-128, 127));
    }
  }
}
inline void fill_row(Random& random, q4_0* row, int dim) {
  for (std::size_t b = 0; b < row_elements<q4_0>(dim); ++b) {
    row[b].scale = to_fp16(random_scalar(random) / 7.0F);
    for (std::uint8_t& both : row[b].nibbles) {
      both = static_cast<std::uint8_t>(random.between(0, 255));
    }
  }
}

/// Dimensions, rows and heads of a batch. Every array of it begins `offset` elements behind an
/// aligned address.
struct BatchSize {
  int dim = 0;
  int count = 0;
  int group = 0;
  std::size_t offset = 1;
};

/// Rows, queries, weights and sums. The row pointers are in random order, and a third of the rows
/// occur twice, roughly.
template <class T>
class Batch {
 public:
  Batch(Random& random, const BatchSize& size)
      : size_(size),
        stored_(size.count < 4 ? size.count : 2 * size.count / 3),
        elements_(size.offset + static_cast<std::size_t>(stored_) * row_elements<T>(size.dim)) {
    for (int i = 0; i < stored_; ++i) fill_row(random, stored(i), size.dim);
    fill(random, queries_, size.group * size.dim);
    fill(random, weights_, size.group * size.count);
    fill(random, sums_, size.group * size.dim);
    before_ = sums_;
    dots_.assign(size.offset + static_cast<std::size_t>(size.group * size.count), kUntouched);
    dots_.push_back(kUntouched);
    sums_.push_back(kUntouched);
    for (int i = 0; i < size.count; ++i) pointers_.push_back(stored(random.below(stored_)));
  }

  [[nodiscard]] const BatchSize& size() const { return size_; }
  [[nodiscard]] Rows<T> rows() const {
    return {.rows = pointers_.data(), .count = size_.count, .dim = size_.dim};
  }
  T* mutable_row(int i) {
    return elements_.data() + (pointers_[static_cast<std::size_t>(i)] - elements_.data());
  }
  float* queries() { return queries_.data() + size_.offset; }
  float* weights() { return weights_.data() + size_.offset; }
  float* sums() { return sums_.data() + size_.offset; }
  float* dots() { return dots_.data() + size_.offset; }

  /// Error of dots() in units of what float32 allows. Summing n products in any order, fused or
  /// not, errs by at most n roundings of sum |q_j r_j|, to first order; 1 % is for higher orders.
  [[nodiscard]] double dot_error() {
    const std::vector<double> scalars = wide_rows();
    Worst worst;
    for (int g = 0; g < size_.group; ++g) {
      const float* query = queries() + g * size_.dim;
      for (int i = 0; i < size_.count; ++i) {
        const double* row = scalars.data() + i * size_.dim;
        double exact = 0.0;
        double magnitude = 0.0;
        for (int j = 0; j < size_.dim; ++j) {
          const double product = wide(query[j]) * row[j];
          exact += product;
          magnitude += std::fabs(product);
        }
        worst.add(wide(dots()[g * size_.count + i]), exact,
                  1.01 * (size_.dim + 1) * kUnit * magnitude + 0x1p-149 * size_.dim);
      }
    }
    return worst.ratio();
  }

  /// The same of sums(), which began with other numbers.
  [[nodiscard]] double sum_error() {
    const std::vector<double> scalars = wide_rows();
    Worst worst;
    for (int g = 0; g < size_.group; ++g) {
      const float* weight = weights() + g * size_.count;
      for (int j = 0; j < size_.dim; ++j) {
        double exact = wide(before_[size_.offset + static_cast<std::size_t>(g * size_.dim + j)]);
        double magnitude = std::fabs(exact);
        for (int i = 0; i < size_.count; ++i) {
          const double product =
              wide(weight[i]) * scalars[static_cast<std::size_t>(i * size_.dim + j)];
          exact += product;
          magnitude += std::fabs(product);
        }
        worst.add(wide(sums()[g * size_.dim + j]), exact,
                  1.01 * (size_.count + 1) * kUnit * magnitude + 0x1p-149 * size_.count);
      }
    }
    return worst.ratio();
  }

  /// Whether the floats around dots() and sums() are as they were.
  [[nodiscard]] bool kept_bounds() const {
    bool kept = dots_.back() == kUntouched && sums_.back() == kUntouched;
    for (std::size_t i = 0; i < size_.offset; ++i) {
      kept &= dots_[i] == kUntouched && sums_[i] == before_[i];
    }
    return kept;
  }

 private:
  static constexpr float kUntouched = -7.0F;

  [[nodiscard]] T* stored(int i) {
    return elements_.data() + size_.offset +
           static_cast<std::size_t>(i) * row_elements<T>(size_.dim);
  }
  // [count, dim]
  [[nodiscard]] std::vector<double> wide_rows() const {
    std::vector<double> scalars;
    scalars.reserve(static_cast<std::size_t>(size_.count * size_.dim));
    for (const T* row : pointers_) {
      for (int j = 0; j < size_.dim; ++j) scalars.push_back(wide(scalar_at(row, j)));
    }
    return scalars;
  }
  void fill(Random& random, std::vector<float>& array, int count) const {
    array.assign(size_.offset, kUntouched);
    for (int i = 0; i < count; ++i) array.push_back(random_scalar(random));
  }

  BatchSize size_;
  int stored_;
  std::vector<T> elements_;
  std::vector<float> queries_;
  std::vector<float> weights_;
  std::vector<float> before_;
  std::vector<float> sums_;
  std::vector<float> dots_;
  std::vector<const T*> pointers_;
};

}  // namespace magicpig::test

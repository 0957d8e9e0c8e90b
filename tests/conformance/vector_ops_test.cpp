// SPDX-License-Identifier: Apache-2.0
// What every model of VectorOps must do, against double precision.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "guarded.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "random.hpp"

// One line per model.
#define MAGICPIG_VECTOR_OPS_MODELS magicpig::ScalarOps, magicpig::HighwayOps

namespace {

using namespace magicpig;
using magicpig::test::Guard;
using magicpig::test::GuardedArray;
using magicpig::test::Random;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit =
    0x1p-24;  // half a unit in the last place of 1.0F: relative error of one rounding

std::vector<int> range(int first, int last) {
  std::vector<int> numbers;
  for (int i = first; i <= last; ++i) numbers.push_back(i);
  return numbers;
}

std::vector<int> dimensions() {
  std::vector<int> dims = range(1, 70);
  for (const int dim : {96, 128, 192, 256, 257}) dims.push_back(dim);
  return dims;
}

template <class T>
T narrow(double x);
template <>
float narrow<float>(double x) {
  return static_cast<float>(x);
}
template <>
fp16 narrow<fp16>(double x) {
  return to_fp16(static_cast<float>(x));
}
template <>
bf16 narrow<bf16>(double x) {
  return to_bf16(static_cast<float>(x));
}

template <class T>
double wide(T x) {
  return static_cast<double>(to_float(x));
}

// Remembers the largest error in units of its tolerance; NaN counts as infinite.
class Worst {
 public:
  void add(double actual, double expected, double tolerance) {
    const double ratio = std::fabs(actual - expected) / tolerance;
    if (actual == expected) return;
    worst_ = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : std::fmax(worst_, ratio);
  }
  [[nodiscard]] double ratio() const { return worst_; }

 private:
  double worst_ = 0.0;
};

// Rows, queries, weights and sums; every array begins one scalar behind an aligned address, and the
// row pointers are in random order with repetitions.
template <class T>
class Batch {
 public:
  struct Size {
    int dim = 0;
    int count = 0;
    int group = 0;
  };

  Batch(Random& random, const Size& size) : size_(size) {
    fill(random, scalars_, stored() * size.dim);
    fill(random, queries_, size.group * size.dim);
    fill(random, weights_, size.group * size.count);
    fill(random, sums_, size.group * size.dim);
    dots_.assign(static_cast<std::size_t>(size.group * size.count + 2), -7.0F);
    for (int i = 0; i < size.count; ++i) {
      pointers_.push_back(scalars_.data() + 1 + random.below(stored()) * size.dim);
    }
  }

  [[nodiscard]] Rows<T> rows() const {
    return {.rows = pointers_.data(), .count = size_.count, .dim = size_.dim};
  }
  [[nodiscard]] const T* row(int i) const { return pointers_[static_cast<std::size_t>(i)]; }
  T* mutable_row(int i) { return scalars_.data() + (row(i) - scalars_.data()); }
  [[nodiscard]] const float* query(int g) const { return queries() + g * size_.dim; }
  [[nodiscard]] const float* queries() const { return queries_.data() + 1; }
  float* mutable_queries() { return queries_.data() + 1; }
  [[nodiscard]] const float* weights() const { return weights_.data() + 1; }
  float* mutable_weights() { return weights_.data() + 1; }
  float* sums() { return sums_.data() + 1; }
  float* dots() { return dots_.data() + 1; }
  /// Whether the float behind the inner products is as it was.
  [[nodiscard]] bool dots_kept_bounds() const {
    return dots_.front() == -7.0F && dots_.back() == -7.0F;
  }

 private:
  // A third of the rows occur twice, roughly.
  [[nodiscard]] int stored() const { return size_.count < 4 ? size_.count : 2 * size_.count / 3; }

  template <class Scalar>
  static void fill(Random& random, std::vector<Scalar>& array, int size) {
    for (int i = 0; i <= size; ++i) {
      // Magnitudes from 1/8 to 8, so that the order of summation matters.
      const double scale = std::exp2(random.between(-3, 3));
      array.push_back(narrow<Scalar>(scale * (2.0 * random.uniform() - 1.0)));
    }
  }

  Size size_;
  std::vector<T> scalars_;
  std::vector<float> queries_;
  std::vector<float> weights_;
  std::vector<float> sums_;
  std::vector<float> dots_;
  std::vector<const T*> pointers_;
};

// Summing n products in float in any order, fused or not, errs by at most n roundings of
// sum |q_j r_j|, to first order; 1 % is for the higher orders.
template <class T>
double dot_error(const Batch<T>& batch, const typename Batch<T>::Size& size, const float* dots) {
  Worst worst;
  for (int g = 0; g < size.group; ++g) {
    for (int i = 0; i < size.count; ++i) {
      double exact = 0.0;
      double magnitude = 0.0;
      for (int j = 0; j < size.dim; ++j) {
        const double product = wide(batch.query(g)[j]) * wide(batch.row(i)[j]);
        exact += product;
        magnitude += std::fabs(product);
      }
      worst.add(wide(dots[g * size.count + i]), exact,
                1.01 * (size.dim + 1) * kUnit * magnitude + 0x1p-149 * size.dim);
    }
  }
  return worst.ratio();
}

// The same for the weighted sum with what was there before.
template <class T>
double sum_error(const Batch<T>& batch, const typename Batch<T>::Size& size, const float* before,
                 const float* sums) {
  Worst worst;
  for (int g = 0; g < size.group; ++g) {
    for (int j = 0; j < size.dim; ++j) {
      double exact = wide(before[g * size.dim + j]);
      double magnitude = std::fabs(exact);
      for (int i = 0; i < size.count; ++i) {
        const double product = wide(batch.weights()[g * size.count + i]) * wide(batch.row(i)[j]);
        exact += product;
        magnitude += std::fabs(product);
      }
      worst.add(wide(sums[g * size.dim + j]), exact,
                1.01 * (size.count + 1) * kUnit * magnitude + 0x1p-149 * size.count);
    }
  }
  return worst.ratio();
}

constexpr int kCounts[] = {0, 1, 2, 3, 7, 8, 33, 128};
constexpr int kGroups[] = {1, 2, 3, 4, 5, 6, 7, 8, 32};

template <class Check>
void for_each_size(const Check& check) {
  for (const int dim : dimensions()) {
    for (const int count : kCounts) {
      for (const int group : kGroups) check(dim, count, group);
    }
  }
}

template <class Ops, class T>
void check_dots(std::uint64_t seed) {
  for_each_size([seed](int dim, int count, int group) {
    CAPTURE(seed);
    CAPTURE(dim);
    CAPTURE(count);
    CAPTURE(group);
    Random random(seed + static_cast<std::uint64_t>(dim * 100000 + count * 100 + group));
    const typename Batch<T>::Size size{.dim = dim, .count = count, .group = group};
    Batch<T> batch(random, size);
    Ops::dot_rows(batch.rows(), batch.queries(), group, batch.dots());
    CHECK(dot_error(batch, size, batch.dots()) <= 1.0);
    CHECK(batch.dots_kept_bounds());
  });
}

template <class Ops, class T>
void check_sums(std::uint64_t seed) {
  for_each_size([seed](int dim, int count, int group) {
    CAPTURE(seed);
    CAPTURE(dim);
    CAPTURE(count);
    CAPTURE(group);
    Random random(seed + static_cast<std::uint64_t>(dim * 100000 + count * 100 + group));
    const typename Batch<T>::Size size{.dim = dim, .count = count, .group = group};
    Batch<T> batch(random, size);
    std::vector<float> before(batch.sums(), batch.sums() + group * dim);
    Ops::add_rows(batch.rows(), batch.weights(), group, batch.sums());
    CHECK(sum_error(batch, size, before.data(), batch.sums()) <= 1.0);
  });
}

TEST_CASE_TEMPLATE(
    "dot_rows agrees with double precision for every size, misaligned, rows repeated", Ops,
    MAGICPIG_VECTOR_OPS_MODELS) {
  SUBCASE("float") { check_dots<Ops, float>(101); }
  SUBCASE("fp16") { check_dots<Ops, fp16>(102); }
  SUBCASE("bf16") { check_dots<Ops, bf16>(103); }
}

TEST_CASE_TEMPLATE(
    "add_rows agrees with double precision for every size, misaligned, rows repeated", Ops,
    MAGICPIG_VECTOR_OPS_MODELS) {
  SUBCASE("float") { check_sums<Ops, float>(201); }
  SUBCASE("fp16") { check_sums<Ops, fp16>(202); }
  SUBCASE("bf16") { check_sums<Ops, bf16>(203); }
}

TEST_CASE_TEMPLATE("add_rows without rows leaves the sums alone", Ops, MAGICPIG_VECTOR_OPS_MODELS) {
  float sums[5] = {1.0F, -2.0F, 3.0F, kInf, -0.0F};
  Ops::add_rows(Rows<float>{.rows = nullptr, .count = 0, .dim = 5}, nullptr, 1, sums);
  CHECK(sums[0] == 1.0F);
  CHECK(sums[1] == -2.0F);
  CHECK(sums[3] == kInf);
  CHECK(std::signbit(sums[4]));
}

// 0 + 1 * x is exact, so one row holds a whole block of patterns and the sums must be their values.
template <class Ops, class T>
void check_every_pattern() {
  constexpr int kBlock = 1 << 12;
  std::vector<T> row(kBlock + 1);
  const T* rows[] = {row.data() + 1};
  int wrong = 0;
  for (int first = 0; first < 1 << 16; first += kBlock) {
    for (int i = 0; i < kBlock; ++i) {
      row[static_cast<std::size_t>(i + 1)].bits = static_cast<std::uint16_t>(first + i);
    }
    std::vector<float> sums(kBlock, 0.0F);
    const float weight = 1.0F;
    Ops::add_rows(Rows<T>{.rows = rows, .count = 1, .dim = kBlock}, &weight, 1, sums.data());
    for (int i = 0; i < kBlock; ++i) {
      const float expected = to_float(rows[0][i]);
      const float actual = sums[static_cast<std::size_t>(i)];
      wrong += std::isnan(expected) ? !std::isnan(actual) : !(actual == expected);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("rows of 16-bit scalars convert exactly, all 65,536 patterns of each", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  SUBCASE("fp16: subnormals, infinities and NaN among them") { check_every_pattern<Ops, fp16>(); }
  SUBCASE("bf16") { check_every_pattern<Ops, bf16>(); }
}

// A special value in one row reaches that row's products and no others, wherever in the row it is.
template <class Ops, class T>
void check_special_rows(float special) {
  for (const int dim : {1, 3, 8, 16, 17, 31, 33, 64, 80}) {
    for (int j = 0; j < dim; ++j) {
      for (int count = 1; count <= 6; ++count) {
        CAPTURE(dim);
        CAPTURE(j);
        CAPTURE(count);
        std::vector<std::vector<T>> stored(static_cast<std::size_t>(count));
        std::vector<const T*> rows;
        for (auto& row : stored) {
          row.assign(static_cast<std::size_t>(dim), narrow<T>(0.5));
          rows.push_back(row.data());
        }
        stored.back()[static_cast<std::size_t>(j)] = narrow<T>(static_cast<double>(special));
        const std::vector<float> queries(static_cast<std::size_t>(5 * dim), 2.0F);
        std::vector<float> dots(static_cast<std::size_t>(5 * count));
        const Rows<T> batch{.rows = rows.data(), .count = count, .dim = dim};
        Ops::dot_rows(batch, queries.data(), 5, dots.data());
        int wrong = 0;
        for (int i = 0; i < 5 * count; ++i) {
          const float dot = dots[static_cast<std::size_t>(i)];
          if (i % count != count - 1) {
            wrong += dot != static_cast<float>(dim);
          } else {
            wrong += std::isnan(special) ? !std::isnan(dot) : dot != special;
          }
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE_TEMPLATE("NaN and infinities in a row reach the inner products of that row alone", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  for (const float special : {kNaN, kInf, -kInf}) {
    CAPTURE(special);
    check_special_rows<Ops, float>(special);
    check_special_rows<Ops, fp16>(special);
    check_special_rows<Ops, bf16>(special);
  }
}

TEST_CASE_TEMPLATE("an infinity in a query reaches the inner products of that query alone", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  Random random(7);
  for (const int dim : {1, 5, 16, 19, 40}) {
    for (int j = 0; j < dim; ++j) {
      CAPTURE(dim);
      CAPTURE(j);
      Batch<float> batch(random, {.dim = dim, .count = 5, .group = 6});
      for (int i = 0; i < 5; ++i) batch.mutable_row(i)[j] = 1.0F;
      batch.mutable_queries()[3 * dim + j] = kInf;
      Ops::dot_rows(batch.rows(), batch.queries(), 6, batch.dots());
      for (int i = 0; i < 6 * 5; ++i) {
        CHECK((batch.dots()[i] == kInf) == (i / 5 == 3));
        CHECK(!std::isnan(batch.dots()[i]));
      }
    }
  }
}

TEST_CASE_TEMPLATE("an infinity in a row reaches the sums in its own column alone", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  Random random(8);
  for (const int dim : {1, 5, 16, 19, 40}) {
    for (int count = 1; count <= 6; ++count) {
      for (int j = 0; j < dim; ++j) {
        CAPTURE(dim);
        CAPTURE(count);
        CAPTURE(j);
        Batch<float> batch(random, {.dim = dim, .count = count, .group = 3});
        batch.mutable_row(count - 1)[j] = kInf;
        // A row may occur twice: weights of one sign keep infinities from cancelling.
        for (int i = 0; i < 3 * count; ++i) {
          batch.mutable_weights()[i] = std::fabs(batch.weights()[i]);
        }
        Ops::add_rows(batch.rows(), batch.weights(), 3, batch.sums());
        for (int i = 0; i < 3 * dim; ++i) CHECK((batch.sums()[i] == kInf) == (i % dim == j));
      }
    }
  }
}

TEST_CASE_TEMPLATE("a zero weight does not hide a row that is not finite", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  for (int count = 1; count <= 5; ++count) {
    CAPTURE(count);
    const float row[3] = {1.0F, kInf, kNaN};
    const std::vector<const float*> rows(static_cast<std::size_t>(count), row);
    const std::vector<float> weights(static_cast<std::size_t>(count), 0.0F);
    float sums[3] = {4.0F, 4.0F, 4.0F};
    Ops::add_rows(Rows<float>{.rows = rows.data(), .count = count, .dim = 3}, weights.data(), 1,
                  sums);
    CHECK(sums[0] == 4.0F);
    CHECK(std::isnan(sums[1]));
    CHECK(std::isnan(sums[2]));
  }
}

// Every array of the two functions lies at a page that faults.
template <class Ops, class T>
void check_row_bounds(Guard guard, int dim, int count, int group) {
  std::vector<std::unique_ptr<GuardedArray<T>>> stored;
  GuardedArray<const T*> rows(static_cast<std::size_t>(count), guard);
  for (int i = 0; i < count; ++i) {
    stored.push_back(std::make_unique<GuardedArray<T>>(static_cast<std::size_t>(dim), guard));
    for (int j = 0; j < dim; ++j) (*stored.back())[static_cast<std::size_t>(j)] = narrow<T>(i + 1);
    rows[static_cast<std::size_t>(i)] = stored.back()->data();
  }
  GuardedArray<float> queries(static_cast<std::size_t>(group * dim), guard);
  GuardedArray<float> dots(static_cast<std::size_t>(group * count), guard);
  GuardedArray<float> sums(static_cast<std::size_t>(group * dim), guard);
  for (int i = 0; i < group * dim; ++i) queries[static_cast<std::size_t>(i)] = 1.0F;
  const Rows<T> batch{.rows = rows.data(), .count = count, .dim = dim};
  Ops::dot_rows(batch, queries.data(), group, dots.data());
  Ops::add_rows(batch, dots.data(), group, sums.data());
  // Small integers: exact. dots = dim * (i + 1), sums = dim * sum (i + 1)^2.
  const int squares = count * (count + 1) * (2 * count + 1) / 6;
  int wrong = 0;
  for (int i = 0; i < group * count; ++i) {
    wrong += dots[static_cast<std::size_t>(i)] != static_cast<float>(dim * (i % count + 1));
  }
  for (int i = 0; i < group * dim; ++i) {
    wrong += sums[static_cast<std::size_t>(i)] != static_cast<float>(dim * squares);
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("dot_rows and add_rows stay within arrays that end or begin at a forbidden page",
                   Ops, MAGICPIG_VECTOR_OPS_MODELS) {
  for (const Guard guard : {Guard::kBefore, Guard::kBehind}) {
    for (const int dim : range(1, 70)) {
      for (const int count : {1, 2, 3, 4, 5, 7}) {
        for (const int group : {1, 2, 3, 4, 7}) {
          if (count > 2 && group > 2 && dim % 3 != 0) continue;  // mapping pages takes long
          CAPTURE(dim);
          CAPTURE(count);
          CAPTURE(group);
          check_row_bounds<Ops, float>(guard, dim, count, group);
          check_row_bounds<Ops, fp16>(guard, dim, count, group);
          check_row_bounds<Ops, bf16>(guard, dim, count, group);
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE(
    "functions of one array stay within it where it ends or begins at a forbidden page", Ops,
    MAGICPIG_VECTOR_OPS_MODELS) {
  for (const Guard guard : {Guard::kBefore, Guard::kBehind}) {
    GuardedArray<float> nodes(6, guard);
    for (std::size_t i = 0; i < 6; ++i) nodes[i] = static_cast<float>(i);
    for (const int n : range(0, 70)) {
      CAPTURE(n);
      GuardedArray<float> x(static_cast<std::size_t>(n), guard);
      CHECK(Ops::max(x.data(), n) == (n == 0 ? -kInf : 0.0F));
      Ops::interpolate({.nodes = nodes.data(), .segments = 5}, x.data(), n);
      for (int i = 0; i < n; ++i) x[static_cast<std::size_t>(i)] = 0.0F;
      Ops::log_affine_exp(x.data(), n, 1.0F, 0.0F);
      for (int i = 0; i < n; ++i) CHECK(x[static_cast<std::size_t>(i)] == 0.0F);
      CHECK(Ops::exp_sum(x.data(), n, 0.0F) == static_cast<float>(n));  // exp(0) is exactly 1
    }
  }
}

TEST_CASE_TEMPLATE("max finds the largest in any place", Ops, MAGICPIG_VECTOR_OPS_MODELS) {
  for (const int n : dimensions()) {
    std::vector<float> x(static_cast<std::size_t>(n + 1));
    for (int i = 0; i <= n; ++i) x[static_cast<std::size_t>(i)] = static_cast<float>(-2 - i);
    x[0] = 5.0F;  // before the array
    for (int at = 1; at <= n; ++at) {
      CAPTURE(n);
      CAPTURE(at);
      const float kept = x[static_cast<std::size_t>(at)];
      x[static_cast<std::size_t>(at)] = -1.5F;
      CHECK(Ops::max(x.data() + 1, n) == -1.5F);
      x[static_cast<std::size_t>(at)] = kept;
    }
  }
}

TEST_CASE_TEMPLATE("max passes over NaN, knows infinities, and is -inf for nothing", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  CHECK(Ops::max(nullptr, 0) == -kInf);
  for (const int n : range(1, 70)) {
    CAPTURE(n);
    std::vector<float> x(static_cast<std::size_t>(n), kNaN);
    CHECK(Ops::max(x.data(), n) == -kInf);
    for (int at = 0; at < n; ++at) {
      CAPTURE(at);
      x[static_cast<std::size_t>(at)] = -3.0F;
      CHECK(Ops::max(x.data(), n) == -3.0F);
      x[static_cast<std::size_t>(at)] = kInf;
      CHECK(Ops::max(x.data(), n) == kInf);
      x[static_cast<std::size_t>(at)] = kNaN;
    }
    x.assign(static_cast<std::size_t>(n), -kInf);
    CHECK(Ops::max(x.data(), n) == -kInf);
  }
}

// exp of one float may err by 2 units in the last place (4 roundings' worth) where the result is
// normal and one of the smallest subnormal where it is not; before that, x - shift is rounded,
// which changes the result by |x - shift| roundings.
double exp_tolerance(double argument, bool rounded_argument) {
  const double of_argument = rounded_argument ? std::fabs(argument) * kUnit : 0.0;
  return std::exp(argument) * (1.01 * of_argument + 4.0 * kUnit) + 0x1p-149;
}

TEST_CASE_TEMPLATE("exp_sum is within 2 units in the last place over its whole range", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  // Steps of a prime number of floats over all negative ones down to -104, then up to 88.7.
  Worst worst;
  std::vector<float> x;
  for (std::uint32_t bits = 0; bits <= std::bit_cast<std::uint32_t>(104.0F); bits += 7919) {
    x.push_back(-std::bit_cast<float>(bits));
    if (x.back() >= -88.7F) x.push_back(-x.back());
  }
  std::vector<float> y = x;
  (void)Ops::exp_sum(y.data(), static_cast<int>(y.size()), 0.0F);
  for (std::size_t i = 0; i < x.size(); ++i) {
    worst.add(wide(y[i]), std::exp(wide(x[i])), exp_tolerance(wide(x[i]), false));
  }
  CHECK(worst.ratio() <= 1.0);
}

TEST_CASE_TEMPLATE("exp_sum subtracts the shift and returns the sum of what it wrote", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  constexpr std::uint64_t kSeed = 301;
  CAPTURE(kSeed);
  Random random(kSeed);
  for (const int n : {0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 70, 128, 1000}) {
    for (const float shift : {0.0F, 3.25F, -40.0F, 1000.1F}) {
      CAPTURE(n);
      CAPTURE(shift);
      std::vector<float> x(static_cast<std::size_t>(n + 2), 9.0F);
      for (int i = 1; i <= n; ++i) {
        x[static_cast<std::size_t>(i)] = shift - static_cast<float>(30.0 * random.uniform());
      }
      std::vector<float> y = x;
      const float sum = Ops::exp_sum(y.data() + 1, n, shift);
      Worst worst;
      double written = 0.0;
      for (std::size_t i = 1; i <= static_cast<std::size_t>(n); ++i) {
        const double argument = wide(x[i]) - wide(shift);
        worst.add(wide(y[i]), std::exp(argument), exp_tolerance(argument, true));
        written += wide(y[i]);
      }
      CHECK(worst.ratio() <= 1.0);
      // All terms are positive: at most n roundings in whatever order.
      CHECK(std::fabs(wide(sum) - written) <= 1.01 * n * kUnit * written);
      CHECK(y.front() == 9.0F);
      CHECK(y.back() == 9.0F);
    }
  }
}

TEST_CASE_TEMPLATE("exp_sum: exp(0) is 1, exp(-inf) is 0, far below is 0, far above is infinite",
                   Ops, MAGICPIG_VECTOR_OPS_MODELS) {
  const struct {
    float x;
    float expected;
  } cases[] = {{0.0F, 1.0F}, {-0.0F, 1.0F}, {-kInf, 0.0F}, {-104.5F, 0.0F},   {-1e30F, 0.0F},
               {kInf, kInf}, {89.0F, kInf}, {1e30F, kInf}, {0x1p-140F, 1.0F}, {-0x1p-140F, 1.0F}};
  for (const auto& c : cases) {
    for (const int n : {1, 5, 16, 21}) {
      CAPTURE(c.x);
      CAPTURE(n);
      std::vector<float> x(static_cast<std::size_t>(n), -kInf);
      x.back() = c.x;
      CHECK(Ops::exp_sum(x.data(), n, 0.0F) == c.expected);
      CHECK(x.back() == c.expected);
      if (n > 1) CHECK(x.front() == 0.0F);
    }
  }
}

TEST_CASE_TEMPLATE("exp_sum keeps subnormal results", Ops, MAGICPIG_VECTOR_OPS_MODELS) {
  for (float x = -103.5F; x < -87.5F; x += 0.25F) {
    CAPTURE(x);
    float y = x;
    CHECK(Ops::exp_sum(&y, 1, 0.0F) == y);
    CHECK(y > 0.0F);
  }
}

TEST_CASE_TEMPLATE("exp_sum leaves NaN where it is and spreads it to the sum", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  for (const int n : range(1, 40)) {
    for (int at = 0; at < n; ++at) {
      std::vector<float> x(static_cast<std::size_t>(n), 1.0F);
      x[static_cast<std::size_t>(at)] = kNaN;
      CHECK(std::isnan(Ops::exp_sum(x.data(), n, 1.0F)));
      int wrong = 0;
      for (int i = 0; i < n; ++i) {
        wrong += i == at ? !std::isnan(x[static_cast<std::size_t>(i)])
                         : x[static_cast<std::size_t>(i)] != 1.0F;
      }
      CAPTURE(n);
      CAPTURE(at);
      CHECK(wrong == 0);
    }
  }
  float infinite[1] = {kInf};
  CHECK(std::isnan(Ops::exp_sum(infinite, 1, kInf)));
}

// a + b exp(x) errs by 4 roundings in exp and 2 more, which log takes over as an absolute error;
// log itself errs by 4 units in the last place, 8 roundings. Subnormal exp(x), x < -87, adds less
// than b 2^-149 / a <= 2^-49 for the a and b below.
double log_tolerance(double exact) { return 1.01 * kUnit * (6.0 + 8.0 * std::fabs(exact)); }

double exact_log_affine_exp(double x, double a, double b) {
  return a > 0.0 ? std::log(a + b * std::exp(x)) : std::log(b) + x;
}

TEST_CASE_TEMPLATE("log_affine_exp agrees with double precision, a = 0 and b = 0 included", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  const struct {
    float a;
    float b;
  } cases[] = {{0.0F, 1.0F},   {0.0F, 0.3F},   {0.0F, 2.5F},  {1.0F, 0.0F},
               {0.3F, 0.0F},   {1.0F, 1.0F},   {0.5F, 0.5F},  {1e-4F, 1.0F},
               {0.02F, 0.98F}, {0.98F, 0.02F}, {1e-6F, 3.0F}, {1e-30F, 1.0F}};
  for (const auto& c : cases) {
    for (const int n : {0, 1, 3, 16, 31, 1700}) {
      CAPTURE(c.a);
      CAPTURE(c.b);
      CAPTURE(n);
      std::vector<float> x(static_cast<std::size_t>(n + 2), 9.0F);
      // From 0 down to -212, and twice as dense near 0.
      for (int i = 1; i <= n; ++i) {
        x[static_cast<std::size_t>(i)] =
            static_cast<float>(-(i - 1) * (i % 2 != 0 ? 0.125 : 0.001));
      }
      std::vector<float> y = x;
      Ops::log_affine_exp(y.data() + 1, n, c.a, c.b);
      Worst worst;
      for (std::size_t i = 1; i <= static_cast<std::size_t>(n); ++i) {
        const double exact = exact_log_affine_exp(wide(x[i]), wide(c.a), wide(c.b));
        worst.add(wide(y[i]), exact, log_tolerance(exact));
      }
      CHECK(worst.ratio() <= 1.0);
      CHECK(y.front() == 9.0F);
      CHECK(y.back() == 9.0F);
    }
  }
}

TEST_CASE_TEMPLATE("log_affine_exp with a = 0, b = 1 gives back x, however far down", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  for (const float x : {-0.5F, -50.0F, -100.0F, -110.0F, -1e4F, -1e30F}) {
    CAPTURE(x);
    float y = x;
    Ops::log_affine_exp(&y, 1, 0.0F, 1.0F);
    CHECK(y == x);
  }
}

// A curve that bends, rises and falls.
std::vector<float> curve_nodes(int segments) {
  std::vector<float> nodes;
  for (int i = 0; i <= segments; ++i) {
    const double x = static_cast<double>(i) / segments;
    nodes.push_back(static_cast<float>(3.0 * std::sin(5.0 * x) - 20.0 * x * x));
  }
  return nodes;
}

double exact_interpolation(const std::vector<float>& nodes, float x) {
  const auto segments = static_cast<double>(nodes.size() - 1);
  const double cosine = x > -1.0F ? std::fmin(wide(x), 1.0) : -1.0;
  const double place = std::sqrt(0.5 - 0.5 * cosine) * segments;
  const double node = std::fmin(std::floor(place), segments - 1.0);
  const auto left = static_cast<std::size_t>(node);
  return wide(nodes[left]) + (place - node) * (wide(nodes[left + 1]) - wide(nodes[left]));
}

// 0.5 - 0.5 c, its root and the product with `segments` round once each: the place is off by at
// most 2.5 roundings of `segments`, along the steepest segment. The value itself rounds at most 3
// times.
double interpolation_tolerance(const std::vector<float>& nodes) {
  double steepest = 0.0;
  double largest = 0.0;
  for (std::size_t i = 0; i + 1 < nodes.size(); ++i) {
    steepest = std::fmax(steepest, std::fabs(wide(nodes[i + 1]) - wide(nodes[i])));
    largest =
        std::fmax(largest, std::fmax(std::fabs(wide(nodes[i])), std::fabs(wide(nodes[i + 1]))));
  }
  return 1.01 * kUnit *
         (2.5 * static_cast<double>(nodes.size() - 1) * steepest + 3.0 * (largest + steepest));
}

TEST_CASE_TEMPLATE("interpolate follows the curve over [-1, 1] for any number of segments", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  for (const int segments : {1, 2, 3, 7, 64, 1000, 2048}) {
    const std::vector<float> nodes = curve_nodes(segments);
    const double tolerance = interpolation_tolerance(nodes);
    for (const int n : {0, 1, 5, 16, 37, 10007}) {
      CAPTURE(segments);
      CAPTURE(n);
      std::vector<float> x(static_cast<std::size_t>(n + 2), 9.0F);
      for (int i = 0; i < n; ++i) {  // both ends included
        x[static_cast<std::size_t>(i + 1)] =
            n == 1 ? 0.3F : static_cast<float>(-1.0 + 2.0 * i / (n - 1));
      }
      std::vector<float> y = x;
      Ops::interpolate({.nodes = nodes.data(), .segments = segments}, y.data() + 1, n);
      Worst worst;
      for (std::size_t i = 1; i <= static_cast<std::size_t>(n); ++i) {
        worst.add(wide(y[i]), exact_interpolation(nodes, x[i]), tolerance);
      }
      CHECK(worst.ratio() <= 1.0);
      CHECK(y.front() == 9.0F);
      CHECK(y.back() == 9.0F);
    }
  }
}

TEST_CASE_TEMPLATE("interpolate near a cosine of 1, where the curve is steepest in the cosine", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  const std::vector<float> nodes = curve_nodes(2048);
  const double tolerance = interpolation_tolerance(nodes);
  Worst worst;
  float x = 1.0F;
  for (int i = 0; i < 3000; ++i) {
    float y = x;
    Ops::interpolate({.nodes = nodes.data(), .segments = 2048}, &y, 1);
    worst.add(wide(y), exact_interpolation(nodes, x), tolerance);
    x = std::nextafter(x, 0.0F);
  }
  CHECK(worst.ratio() <= 1.0);
}

TEST_CASE_TEMPLATE("interpolate clamps cosines to [-1, 1] and takes NaN for -1", Ops,
                   MAGICPIG_VECTOR_OPS_MODELS) {
  const std::vector<float> nodes = curve_nodes(64);
  const CurveView curve{.nodes = nodes.data(), .segments = 64};
  float ends[2] = {1.0F, -1.0F};
  Ops::interpolate(curve, ends, 2);
  CHECK(ends[0] == nodes.front());
  CHECK(std::fabs(wide(ends[1]) - wide(nodes.back())) <= interpolation_tolerance(nodes));
  for (const int n : {1, 9, 16, 29}) {
    for (const float above : {1.0000001F, 1.5F, 1e30F, kInf}) {
      for (const float below : {-1.0000001F, -1.5F, -1e30F, -kInf, kNaN, -kNaN}) {
        CAPTURE(n);
        CAPTURE(above);
        CAPTURE(below);
        std::vector<float> x(static_cast<std::size_t>(n), above);
        x.back() = below;
        Ops::interpolate(curve, x.data(), n);
        for (int i = 0; i + 1 < n; ++i) CHECK(x[static_cast<std::size_t>(i)] == ends[0]);
        CHECK(x.back() == ends[1]);
      }
    }
  }
}

}  // namespace

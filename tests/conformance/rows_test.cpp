// SPDX-License-Identifier: Apache-2.0
// What every model of VectorOps must do with batches of rows: dot_rows and add_rows.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "backends.hpp"
#include "guarded.hpp"
#include "random.hpp"
#include "row_batch.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class T>
const char* type_name();
template <>
const char* type_name<float>() {
  return "float";
}
template <>
const char* type_name<fp16>() {
  return "fp16";
}
template <>
const char* type_name<bf16>() {
  return "bf16";
}
template <>
const char* type_name<q8_0>() {
  return "q8_0";
}
template <>
const char* type_name<q4_0>() {
  return "q4_0";
}

// Calls check for each scalar type, with a null pointer to one.
template <class Check>
void for_each_type(const Check& check) {
  check(static_cast<float*>(nullptr));
  check(static_cast<fp16*>(nullptr));
  check(static_cast<bf16*>(nullptr));
  check(static_cast<q8_0*>(nullptr));
  check(static_cast<q4_0*>(nullptr));
}
template <class Pointer>
using ScalarOf = std::remove_pointer_t<Pointer>;

// The one fixture: dot_rows and add_rows of a random batch agree with double precision, and write
// nothing else.
template <class Ops, class T>
void check_batch(std::uint64_t seed, const BatchSize& size) {
  if (!fits<T>(size.dim)) return;
  const char* type = type_name<T>();
  CAPTURE(type);
  CAPTURE(seed);
  CAPTURE(size.dim);
  CAPTURE(size.count);
  CAPTURE(size.group);
  CAPTURE(size.offset);
  Random random(seed +
                static_cast<std::uint64_t>(size.dim * 100000 + size.count * 100 + size.group));
  Batch<T> batch(random, size);
  Ops::dot_rows(batch.rows(), batch.queries(), size.group, batch.dots());
  CHECK(batch.dot_error() <= 1.0);
  Ops::add_rows(batch.rows(), batch.weights(), size.group, batch.sums());
  CHECK(batch.sum_error() <= 1.0);
  CHECK(batch.kept_bounds());
}

TEST_CASE_TEMPLATE("rows agree with double precision for every size, misaligned, some repeated",
                   Ops, MAGICPIG_TEST_BACKENDS) {
  for_each_type([](auto* type) {
    for (const int dim : range(1, 70)) {
      for (const int count : {0, 1, 2, 3, 7, 8, 33, 128}) {
        for (const int group : {1, 2, 3, 4, 5, 6, 7, 8, 32}) {
          check_batch<Ops, ScalarOf<decltype(type)>>(101,
                                                     {.dim = dim, .count = count, .group = group});
        }
      }
    }
  });
}

TEST_CASE_TEMPLATE("rows of larger dimensions agree with double precision", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for_each_type([](auto* type) {
    for (const int dim : {96, 128, 160, 192, 255, 256, 257, 288, 511, 512, 513, 544, 1024, 1055}) {
      for (const int count : {0, 1, 4, 7, 33}) {
        for (const int group : {1, 3, 4, 7}) {
          check_batch<Ops, ScalarOf<decltype(type)>>(102,
                                                     {.dim = dim, .count = count, .group = group});
        }
      }
      check_batch<Ops, ScalarOf<decltype(type)>>(102, {.dim = dim, .count = 128, .group = 32});
    }
  });
}

TEST_CASE_TEMPLATE("rows agree with double precision however their arrays are misaligned", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for_each_type([](auto* type) {
    for (std::size_t offset = 0; offset <= 16; ++offset) {
      for (const int dim : {1, 8, 17, 32, 64, 80}) {
        check_batch<Ops, ScalarOf<decltype(type)>>(
            103, {.dim = dim, .count = 9, .group = 5, .offset = offset});
      }
    }
  });
}

TEST_CASE_TEMPLATE("the same row any number of times counts that many times", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for_each_type([](auto* type) {
    using T = ScalarOf<decltype(type)>;
    constexpr int kDim = 96;
    std::vector<T> row(row_elements<T>(kDim));
    for (int j = 0; j < kDim; ++j) put_scalar(row.data(), j, static_cast<float>(j % 5));
    for (const int count : {2, 3, 4, 5, 31}) {
      const char* name = type_name<T>();
      CAPTURE(name);
      CAPTURE(count);
      const std::vector<const T*> rows(static_cast<std::size_t>(count), row.data());
      const std::vector<float> ones(3 * kDim, 1.0F);
      std::vector<float> dots(static_cast<std::size_t>(3 * count));
      std::vector<float> sums(3 * kDim);
      const Rows<T> batch{.rows = rows.data(), .count = count, .dim = kDim};
      Ops::dot_rows(batch, ones.data(), 3, dots.data());
      Ops::add_rows(batch, ones.data(), 3, sums.data());
      int wrong = 0;
      // 0 to 4 add up to 10, 19 times, and the 96th scalar is 0 again.
      for (const float dot : dots) wrong += dot != 190.0F;
      for (std::size_t j = 0; j < sums.size(); ++j) {
        wrong += sums[j] != static_cast<float>(count * (static_cast<int>(j) % kDim % 5));
      }
      CHECK(wrong == 0);
    }
  });
}

TEST_CASE_TEMPLATE("without rows nothing is written", Ops, MAGICPIG_TEST_BACKENDS) {
  for_each_type([](auto* type) {
    using T = ScalarOf<decltype(type)>;
    std::vector<float> sums = {1.0F, -2.0F, 3.0F, kInf, -0.0F};
    sums.resize(32, 5.0F);
    const Rows<T> none{.rows = nullptr, .count = 0, .dim = 32};
    Ops::add_rows(none, nullptr, 1, sums.data());
    CHECK(sums[0] == 1.0F);
    CHECK(sums[1] == -2.0F);
    CHECK(sums[3] == kInf);
    CHECK(std::signbit(sums[4]));
    const std::vector<float> queries(32, 1.0F);
    std::vector<float> dots(32, -7.0F);
    Ops::dot_rows(none, queries.data(), 1, dots.data());
    CHECK(dots == std::vector<float>(32, -7.0F));
  });
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
                   MAGICPIG_TEST_BACKENDS) {
  SUBCASE("fp16: subnormals, infinities and NaN among them") { check_every_pattern<Ops, fp16>(); }
  SUBCASE("bf16") { check_every_pattern<Ops, bf16>(); }
}

TEST_CASE_TEMPLATE("rows of blocks convert exactly: 256 values under scales of every kind", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (const int bits : {0x0000, 0x8000, 0x0001, 0x83ff, 0x0400, 0x3c00, 0xbc01, 0x2e66, 0x7bff}) {
    CAPTURE(bits);
    q8_0 row[8];
    for (int i = 0; i < 256; ++i) {
      row[i / kQ8Block].scale.bits = static_cast<std::uint16_t>(bits);
      row[i / kQ8Block].values[i % kQ8Block] = static_cast<std::int8_t>(i - 128);
    }
    const q8_0* rows[] = {row};
    std::vector<float> sums(256, 0.0F);
    const float weight = 1.0F;
    Ops::add_rows(Rows<q8_0>{.rows = rows, .count = 1, .dim = 256}, &weight, 1, sums.data());
    int wrong = 0;
    for (int i = 0; i < 256; ++i) {
      wrong += sums[static_cast<std::size_t>(i)] != scalar_at(row, i);
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE_TEMPLATE("rows of 4-bit blocks convert exactly: every byte in every place", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (const int bits : {0x0000, 0x8000, 0x0001, 0x83ff, 0x0400, 0x3c00, 0xbc01, 0x2e66, 0x7bff}) {
    CAPTURE(bits);
    q4_0 row[256];
    for (int i = 0; i < 256 * 16; ++i) {
      row[i / 16].scale.bits = static_cast<std::uint16_t>(bits);
      row[i / 16].nibbles[i % 16] = static_cast<std::uint8_t>(i / 16 + i % 16);
    }
    const q4_0* rows[] = {row};
    constexpr int kDim = 256 * kQ4Block;
    std::vector<float> sums(kDim, 0.0F);
    const float weight = 1.0F;
    Ops::add_rows(Rows<q4_0>{.rows = rows, .count = 1, .dim = kDim}, &weight, 1, sums.data());
    const double scale = wide(to_float(fp16{static_cast<std::uint16_t>(bits)}));
    int wrong = 0;
    for (int i = 0; i < kDim; ++i) {
      const int byte = (i / kQ4Block + i % 16) % 256;
      const int number = i % kQ4Block < 16 ? byte % 16 : byte / 16;
      wrong += wide(sums[static_cast<std::size_t>(i)]) != scale * (number - 8);
    }
    CHECK(wrong == 0);
  }
}

// A special value in one row reaches that row's products and no others, wherever in the row it is.
template <class Ops, class T>
void check_special_row(float special, int dim, int j, int count) {
  std::vector<std::vector<T>> stored(static_cast<std::size_t>(count));
  std::vector<const T*> rows;
  for (auto& row : stored) {
    row.resize(row_elements<T>(dim));
    for (int k = 0; k < dim; ++k) put_scalar(row.data(), k, 1.0F);
    rows.push_back(row.data());
  }
  put_scalar(stored.back().data(), j, special);
  const std::vector<float> queries(static_cast<std::size_t>(5 * dim), 2.0F);
  std::vector<float> dots(static_cast<std::size_t>(5 * count));
  const Rows<T> batch{.rows = rows.data(), .count = count, .dim = dim};
  Ops::dot_rows(batch, queries.data(), 5, dots.data());
  int wrong = 0;
  for (int i = 0; i < 5 * count; ++i) {
    const float dot = dots[static_cast<std::size_t>(i)];
    if (i % count != count - 1) {
      wrong += dot != static_cast<float>(2 * dim);
    } else {
      wrong += std::isnan(special) ? !std::isnan(dot) : dot != special;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("NaN and infinities in a row reach the inner products of that row alone", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for_each_type([](auto* type) {
    using T = ScalarOf<decltype(type)>;
    const char* name = type_name<T>();
    CAPTURE(name);
    for (const float special : {kNaN, kInf, -kInf}) {
      CAPTURE(special);
      for (const int dim : {1, 3, 8, 16, 17, 31, 32, 33, 64, 80, 96}) {
        if (!fits<T>(dim)) continue;
        for (int j = 0; j < dim; j += kScalarsPerElement<T>) {
          for (int count = 1; count <= 6; ++count) {
            CAPTURE(dim);
            CAPTURE(j);
            CAPTURE(count);
            check_special_row<Ops, T>(special, dim, j, count);
          }
        }
      }
    }
  });
}

TEST_CASE_TEMPLATE("an infinity in a query reaches the inner products of that query alone", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  Random random(7);
  for (const int dim : {1, 5, 16, 19, 40}) {
    for (int j = 0; j < dim; ++j) {
      CAPTURE(dim);
      CAPTURE(j);
      Batch<float> batch(random, {.dim = dim, .count = 5, .group = 6});
      for (int i = 0; i < 5; ++i) batch.mutable_row(i)[j] = 1.0F;
      batch.queries()[3 * dim + j] = kInf;
      Ops::dot_rows(batch.rows(), batch.queries(), 6, batch.dots());
      for (int i = 0; i < 6 * 5; ++i) {
        CHECK((batch.dots()[i] == kInf) == (i / 5 == 3));
        CHECK(!std::isnan(batch.dots()[i]));
      }
    }
  }
}

TEST_CASE_TEMPLATE("an infinity in a row reaches the sums in its own column alone", Ops,
                   MAGICPIG_TEST_BACKENDS) {
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
        for (int i = 0; i < 3 * count; ++i) batch.weights()[i] = std::fabs(batch.weights()[i]);
        Ops::add_rows(batch.rows(), batch.weights(), 3, batch.sums());
        for (int i = 0; i < 3 * dim; ++i) CHECK((batch.sums()[i] == kInf) == (i % dim == j));
      }
    }
  }
}

TEST_CASE_TEMPLATE("a zero weight does not hide a row that is not finite", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (int count = 1; count <= 5; ++count) {
    CAPTURE(count);
    const int dim = count + 2;
    std::vector<float> row(static_cast<std::size_t>(dim), 1.0F);
    row[1] = kInf;
    row[2] = kNaN;
    const std::vector<const float*> rows(static_cast<std::size_t>(count), row.data());
    const std::vector<float> weights(static_cast<std::size_t>(count), 0.0F);
    std::vector<float> sums(row.size(), 4.0F);
    Ops::add_rows(Rows<float>{.rows = rows.data(), .count = count, .dim = dim}, weights.data(), 1,
                  sums.data());
    for (std::size_t j = 0; j < sums.size(); ++j) {
      CHECK(std::isnan(sums[j]) == (j == 1 || j == 2));
      if (j != 1 && j != 2) CHECK(sums[j] == 4.0F);
    }
  }
}

// Rows that each end or begin at a page that faults, and so does the array of their pointers.
template <class T>
class GuardedRows {
 public:
  GuardedRows(Guard guard, int count, int dim)
      : pointers_(static_cast<std::size_t>(count), guard), count_(count), dim_(dim) {
    for (int i = 0; i < count; ++i) {
      stored_.push_back(std::make_unique<GuardedArray<T>>(row_elements<T>(dim), guard));
      for (int j = 0; j < dim; ++j) {
        put_scalar(stored_.back()->data(), j, static_cast<float>(number(i)));
      }
      pointers_[static_cast<std::size_t>(i)] = stored_.back()->data();
    }
  }
  [[nodiscard]] Rows<T> rows() { return {.rows = pointers_.data(), .count = count_, .dim = dim_}; }
  // All scalars of row i, which any type can hold.
  [[nodiscard]] static int number(int i) { return i % 7 + 1; }

 private:
  std::vector<std::unique_ptr<GuardedArray<T>>> stored_;
  GuardedArray<const T*> pointers_;
  int count_;
  int dim_;
};

// Every array of the two functions lies at a page that faults.
template <class Ops, class T>
void check_row_bounds(Guard guard, int dim, int count, int group) {
  if (!fits<T>(dim)) return;
  GuardedRows<T> rows(guard, count, dim);
  GuardedArray<float> queries(static_cast<std::size_t>(group * dim), guard);
  GuardedArray<float> dots(static_cast<std::size_t>(group * count), guard);
  GuardedArray<float> sums(static_cast<std::size_t>(group * dim), guard);
  for (int i = 0; i < group * dim; ++i) queries[static_cast<std::size_t>(i)] = 1.0F;
  Ops::dot_rows(rows.rows(), queries.data(), group, dots.data());
  Ops::add_rows(rows.rows(), dots.data(), group, sums.data());
  // Small integers: exact. dots = dim * number(i), sums = dim * sum number(i)^2.
  int squares = 0;
  for (int i = 0; i < count; ++i) squares += rows.number(i) * rows.number(i);
  int wrong = 0;
  for (int i = 0; i < group * count; ++i) {
    wrong += dots[static_cast<std::size_t>(i)] != static_cast<float>(dim * rows.number(i % count));
  }
  for (int i = 0; i < group * dim; ++i) {
    wrong += sums[static_cast<std::size_t>(i)] != static_cast<float>(dim * squares);
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("rows stay within arrays that end or begin at a forbidden page", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  std::vector<int> dims = range(1, 70);
  dims.push_back(96);
  for (const Guard guard : {Guard::kBefore, Guard::kBehind}) {
    for (const int dim : dims) {
      for (const int count : {1, 2, 3, 4, 5, 7, 9}) {
        for (const int group : {1, 2, 3, 4, 7}) {
          if (count > 2 && group > 2 && dim % 3 != 0) continue;  // mapping pages takes long
          CAPTURE(dim);
          CAPTURE(count);
          CAPTURE(group);
          for_each_type([&](auto* type) {
            check_row_bounds<Ops, ScalarOf<decltype(type)>>(guard, dim, count, group);
          });
        }
      }
    }
  }
}

// What a batch of 9 rows gives with `next`, bit by bit.
template <class Ops, class T>
std::vector<float> results_with(const NextRows* next) {
  Random random(9);
  Batch<T> batch(random, {.dim = 64, .count = 9, .group = 6});
  Rows<T> rows = batch.rows();
  rows.next = next;
  Ops::dot_rows(rows, batch.queries(), 6, batch.dots());
  Ops::add_rows(rows, batch.weights(), 6, batch.sums());
  std::vector<float> results(batch.dots(), batch.dots() + 6 * 9);
  results.insert(results.end(), batch.sums(), batch.sums() + 6 * 64);
  return results;
}

TEST_CASE_TEMPLATE("the rows wanted next change no result, and none is named that is not there",
                   Ops, MAGICPIG_TEST_BACKENDS) {
  for_each_type([](auto* type) {
    using T = ScalarOf<decltype(type)>;
    const char* name = type_name<T>();
    CAPTURE(name);
    const std::vector<float> expected = results_with<Ops, T>(nullptr);
    const NextRows none(Rows<T>{.rows = nullptr, .count = 0, .dim = 64});
    CHECK(results_with<Ops, T>(&none) == expected);
    for (const Guard guard : {Guard::kBefore, Guard::kBehind}) {
      for (const int count : {1, 3, 4, 5, 8, 9, 10, 40}) {  // shorter, as long, longer
        for (const int dim : {32, 64, 96, 640}) {
          CAPTURE(count);
          CAPTURE(dim);
          GuardedRows<T> next(guard, count, dim);
          const NextRows rows(next.rows());
          CHECK(results_with<Ops, T>(&rows) == expected);
        }
      }
    }
  });
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// What every model of VectorOps must do with panels of rows: project.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
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
constexpr float kUntouched = -7.0F;

std::size_t at(int i) { return static_cast<std::size_t>(i); }

// 70 rows and 40 vectors of one dimension, and the products of all of them in double.
class Products {
 public:
  static constexpr int kRows = 70;
  static constexpr int kVectors = 40;

  Products(Random& random, int dim) : dim_(dim) {
    for (int i = 0; i < kRows * dim; ++i) rows_.push_back(random_scalar(random));
    vectors_.push_back(kUntouched);  // one float behind an aligned address
    for (int i = 0; i < kVectors * dim; ++i) vectors_.push_back(random_scalar(random));
    for (int v = 0; v < kVectors; ++v) {
      for (int p = 0; p < kRows; ++p) add_product(v, p);
    }
  }

  // Panels of the first `count` rows, one float behind the array's begin.
  [[nodiscard]] std::vector<float> panels(int count) const {
    std::vector<float> data(1 + Panels::size(count, dim_), 0.0F);
    for (int p = 0; p < count; ++p) {
      for (int j = 0; j < dim_; ++j) {
        data[1 + Panels::place(p, j, dim_)] = rows_[at(p * dim_ + j)];
      }
    }
    return data;
  }
  [[nodiscard]] const float* vectors() const { return vectors_.data() + 1; }

  // Error of out [vectors, rows], in units of what float32 allows for sums of dim products.
  [[nodiscard]] double error(const float* out, int vectors, int rows) const {
    Worst worst;
    for (int v = 0; v < vectors; ++v) {
      for (int p = 0; p < rows; ++p) {
        worst.add(wide(out[v * rows + p]), exact_[at(v * kRows + p)],
                  1.01 * (dim_ + 1) * kUnit * magnitudes_[at(v * kRows + p)] + 0x1p-149 * dim_);
      }
    }
    return worst.ratio();
  }

 private:
  void add_product(int v, int p) {
    double exact = 0.0;
    double magnitude = 0.0;
    for (int j = 0; j < dim_; ++j) {
      const double product = wide(vectors()[v * dim_ + j]) * wide(rows_[at(p * dim_ + j)]);
      exact += product;
      magnitude += std::fabs(product);
    }
    exact_.push_back(exact);
    magnitudes_.push_back(magnitude);
  }

  int dim_;
  std::vector<float> rows_;
  std::vector<float> vectors_;
  std::vector<double> exact_;
  std::vector<double> magnitudes_;
};

template <class Ops>
void check_products(const Products& products, const std::vector<float>& panels, int dim, int rows,
                    int vectors) {
  CAPTURE(dim);
  CAPTURE(rows);
  CAPTURE(vectors);
  std::vector<float> out(at(vectors * rows + 2), kUntouched);
  Ops::project({.data = panels.data() + 1, .count = rows, .dim = dim}, products.vectors(), vectors,
               out.data() + 1);
  CHECK(products.error(out.data() + 1, vectors, rows) <= 1.0);
  CHECK(out.front() == kUntouched);
  CHECK(out.back() == kUntouched);
}

TEST_CASE_TEMPLATE("project agrees with double precision for every size, misaligned", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  std::vector<int> dims = range(1, 70);
  dims.push_back(128);
  Random random(401);
  for (const int dim : dims) {
    const Products products(random, dim);
    for (int rows = 0; rows <= Products::kRows; ++rows) {
      const std::vector<float> panels = products.panels(rows);
      // Four of the 41 numbers of vectors, so that each meets every dimension and every number of
      // rows.
      for (int i = 0; i < 4; ++i) {
        check_products<Ops>(products, panels, dim, rows, (3 * dim + 5 * rows + 10 * i) % 41);
      }
    }
  }
}

TEST_CASE_TEMPLATE("project takes any number of vectors and of rows", Ops, MAGICPIG_TEST_BACKENDS) {
  Random random(402);
  for (const int dim : {1, 5, 32}) {
    const Products products(random, dim);
    for (const int rows : {0, 1, 31, 32, 33, 64, 70}) {
      const std::vector<float> panels = products.panels(rows);
      for (int vectors = 0; vectors <= Products::kVectors; ++vectors) {
        check_products<Ops>(products, panels, dim, rows, vectors);
      }
    }
  }
}

TEST_CASE_TEMPLATE("project sums dimensions beyond any chunk", Ops, MAGICPIG_TEST_BACKENDS) {
  Random random(403);
  for (const int dim : {255, 256, 257, 511, 512, 513, 1100}) {
    const Products products(random, dim);
    for (const int rows : {1, 32, 70}) {
      const std::vector<float> panels = products.panels(rows);
      for (const int vectors : {1, 2, 3, 4, 6, 8, 9, 17, 33, 40}) {
        check_products<Ops>(products, panels, dim, rows, vectors);
      }
    }
  }
}

TEST_CASE_TEMPLATE("project stays within arrays that end or begin at a forbidden page", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (const Guard guard : {Guard::kBefore, Guard::kBehind}) {
    for (const int dim : {1, 2, 3, 7, 16, 33, 70}) {
      for (const int rows : {1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 70}) {
        for (const int vectors : {1, 2, 3, 4, 5, 6, 7, 8, 11, 17}) {
          CAPTURE(dim);
          CAPTURE(rows);
          CAPTURE(vectors);
          GuardedArray<float> panels(Panels::size(rows, dim), guard);
          GuardedArray<float> in(at(vectors * dim), guard);
          GuardedArray<float> out(at(vectors * rows), guard);
          for (int p = 0; p < rows; ++p) {
            for (int j = 0; j < dim; ++j) {
              panels[Panels::place(p, j, dim)] = static_cast<float>(p + 1);
            }
          }
          for (int i = 0; i < vectors * dim; ++i) in[at(i)] = static_cast<float>(i / dim + 1);
          Ops::project({.data = panels.data(), .count = rows, .dim = dim}, in.data(), vectors,
                       out.data());
          int wrong = 0;  // small integers: exact
          for (int i = 0; i < vectors * rows; ++i) {
            wrong += out[at(i)] != static_cast<float>(dim * (i % rows + 1) * (i / rows + 1));
          }
          CHECK(wrong == 0);
        }
      }
    }
  }
}

// What project gives where scalar j of one row, or of one vector, is special and all others are 1.
struct SpecialPlace {
  int dim = 0;
  int rows = 0;
  int vectors = 0;
  int j = 0;
};

template <class Ops>
std::vector<float> project_special(const SpecialPlace& place, float special, int row, int vector) {
  std::vector<float> panels(Panels::size(place.rows, place.dim), 0.0F);
  for (int p = 0; p < place.rows; ++p) {
    for (int j = 0; j < place.dim; ++j) panels[Panels::place(p, j, place.dim)] = 1.0F;
  }
  std::vector<float> in(at(place.vectors * place.dim), 1.0F);
  if (row >= 0) panels[Panels::place(row, place.j, place.dim)] = special;
  if (vector >= 0) in[at(vector * place.dim + place.j)] = special;
  std::vector<float> out(at(place.vectors * place.rows), kUntouched);
  Ops::project({.data = panels.data(), .count = place.rows, .dim = place.dim}, in.data(),
               place.vectors, out.data());
  return out;
}

bool is_same(float actual, float expected) {
  return std::isnan(expected) ? std::isnan(actual) : actual == expected;
}

TEST_CASE_TEMPLATE("NaN and infinities in a row or a vector reach their own products alone", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  for (const float special : {kNaN, kInf, -kInf}) {
    for (const int dim : {1, 4, 9}) {
      for (const int rows : {1, 5, 32, 37}) {
        for (const int vectors : {1, 2, 5, 8, 13}) {
          for (int i = 0; i < std::max(rows, vectors); ++i) {
            CAPTURE(special);
            CAPTURE(dim);
            CAPTURE(rows);
            CAPTURE(vectors);
            CAPTURE(i);
            const SpecialPlace place{.dim = dim, .rows = rows, .vectors = vectors, .j = i % dim};
            const auto of_row = project_special<Ops>(place, special, i % rows, -1);
            const auto of_vector = project_special<Ops>(place, special, -1, i % vectors);
            int wrong = 0;
            for (int o = 0; o < vectors * rows; ++o) {
              const auto finite = static_cast<float>(dim);
              wrong += !is_same(of_row[at(o)], o % rows == i % rows ? special : finite);
              wrong += !is_same(of_vector[at(o)], o / rows == i % vectors ? special : finite);
            }
            CHECK(wrong == 0);
          }
        }
      }
    }
  }
}

}  // namespace

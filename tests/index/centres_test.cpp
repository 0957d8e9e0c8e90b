// SPDX-License-Identifier: Apache-2.0
// Means of rows: of all of them, or of groups that are equally far apart.
#include "magicpig/index/centres.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/scalar.hpp"

namespace {

using namespace magicpig;

constexpr int kDim = 3;

// Rows that a function makes, as mean_of_rows() takes them.
template <class Row>
class MadeRows {
 public:
  explicit MadeRows(const Row& make) : make_(make) {}
  [[nodiscard]] const float* row(int h, TokenId t, int, int) { return make_(h, t); }
  static void prefetch(int, TokenId) {}

 private:
  const Row& make_;
};

// Row t of head h is (t, h, 1).
struct Counted {
  explicit Counted(TokenId tokens) : read(static_cast<std::size_t>(tokens)) {}

  std::vector<float> means(TokenRange range) {
    std::vector<double> sums(2 * kDim);
    std::vector<float> means(2 * kDim, -1.0F);
    SerialExecutor executor;
    const auto row = [&](int h, TokenId t) {
      float* to = rows[next++ % rows.size()].data();
      to[0] = static_cast<float>(t);
      to[1] = static_cast<float>(h);
      to[2] = 1.0F;
      read[static_cast<std::size_t>(t)] = true;
      return static_cast<const float*>(to);
    };
    MadeRows made(row);
    mean_of_rows(make_backend<ScalarOps>(executor), 2, kDim, range, made, sums.data(),
                 means.data());
    return means;
  }

  std::vector<bool> read;
  std::vector<std::vector<float>> rows{64, std::vector<float>(kDim)};
  std::size_t next = 0;
};

TEST_CASE("up to kMeanRows rows are averaged, each of them") {
  for (const TokenId count : {1, 7, 8, 9, 1000, kMeanRows}) {
    Counted counted(count + 5);
    const std::vector<float> means = counted.means({.begin = 5, .end = count + 5});
    for (int h = 0; h < 2; ++h) {
      CHECK(means[static_cast<std::size_t>(h * kDim)] == 5.0F + static_cast<float>(count - 1) / 2);
      CHECK(means[static_cast<std::size_t>(h * kDim + 1)] == static_cast<float>(h));
      CHECK(means[static_cast<std::size_t>(h * kDim + 2)] == 1.0F);
    }
  }
}

TEST_CASE("of more rows the mean of groups all over the range is within a group of theirs") {
  for (const TokenId count : {kMeanRows + 1, 3 * kMeanRows + 11, 100003}) {
    Counted counted(count);
    const std::vector<float> means = counted.means({.begin = 0, .end = count});
    const TokenId stride = 8 * ((count - 1) / kMeanRows + 1);
    for (int h = 0; h < 2; ++h) {
      const double middle = static_cast<double>(count - 1) / 2;
      const auto mean = static_cast<double>(means[static_cast<std::size_t>(h * kDim)]);
      CHECK(mean >= middle - stride);
      CHECK(mean <= middle + stride);
      CHECK(means[static_cast<std::size_t>(h * kDim + 2)] == 1.0F);
    }
    TokenId asked = 0;
    for (const bool read : counted.read) asked += read ? 1 : 0;
    CHECK(asked <= kMeanRows + 8);
    CHECK(asked > kMeanRows / 2 - 8);
  }
}

TEST_CASE("tokens near the largest id are no trouble") {
  constexpr TokenId kLast = std::numeric_limits<TokenId>::max();
  const std::vector<float> row(kDim, 2.0F);
  std::vector<double> sums(kDim);
  std::vector<float> means(kDim);
  SerialExecutor executor;
  const auto same = [&](int, TokenId) { return row.data(); };
  MadeRows rows(same);
  mean_of_rows(make_backend<ScalarOps>(executor), 1, kDim, {.begin = kLast - 100000, .end = kLast},
               rows, sums.data(), means.data());
  CHECK(means[0] == 2.0F);
}

TEST_CASE("rows of no scalars are not asked for") {
  SerialExecutor executor;
  bool asked = false;
  const float none = 0.0F;
  const auto ask = [&](int, TokenId) {
    asked = true;
    return &none;
  };
  MadeRows rows(ask);
  mean_of_rows(make_backend<ScalarOps>(executor), 1, 0, {.begin = 0, .end = 10}, rows, nullptr,
               nullptr);
  CHECK(!asked);
}

}  // namespace

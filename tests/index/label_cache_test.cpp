// SPDX-License-Identifier: Apache-2.0
// Labels of keys: which channels they have, how well they keep them, how they follow a cache, and
// what is refused.
#include "magicpig/index/label_cache.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "problem.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 2, .kv_heads = 2, .head_dim = 7, .value_dim = 3};
constexpr LabelCacheConfig kConfig{.kv_heads = 2, .dim = 7, .channels = 3};

LabelCache make(const LabelCacheConfig& config, const std::vector<float>& importance = {}) {
  auto index = LabelCache::create(config, importance);
  REQUIRE(index.ok());
  return std::move(*index);
}

std::vector<int> channels_of(const LabelCache& index, int kv_head) {
  std::vector<int> channels;
  for (int j = 0; j < index.label_size(); ++j) channels.push_back(index.channels(kv_head)[j]);
  return channels;
}

std::vector<float> label_of(const LabelCache& index, int kv_head, TokenId i) {
  std::vector<float> label(static_cast<std::size_t>(index.label_size()));
  index.label(kv_head, i, label.data());
  return label;
}

bool same_labels(const LabelCache& a, const LabelCache& b) {
  bool same = a.indexed() == b.indexed();
  for (int h = 0; h < a.kv_heads() && same; ++h) {
    same = channels_of(a, h) == channels_of(b, h);
    for (TokenId i = 0; i < a.indexed().size() && same; ++i) {
      same = label_of(a, h, i) == label_of(b, h, i);
    }
  }
  return same;
}

TEST_CASE("LabelCache.keeps_the_channels_that_importance_names_or_the_largest_of_the_keys") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Problem<float> problem({.shape = kShape, .tokens = 60});
  for (TokenId t = 0; t < 60; ++t) {
    // Negative and of both signs: the mean of magnitudes counts, not that of numbers.
    problem.key(0, t)[5] = -9.0F;
    problem.key(0, t)[2] = t % 2 == 0 ? 8.0F : -8.0F;
    problem.key(0, t)[3] = 7.0F;
    problem.key(1, t)[0] = 5.0F;
    problem.key(1, t)[6] = -5.0F;
    problem.key(1, t)[1] = 4.0F;
  }
  LabelCache index = make(kConfig);
  REQUIRE(index.build(backend, problem.source(), {0, 60}).ok());
  CHECK(channels_of(index, 0) == std::vector{2, 3, 5});
  CHECK(channels_of(index, 1) == std::vector{0, 1, 6});
  // As said by the caller, ties to the first channels.
  LabelCache told = make(kConfig, {0, 1, 0, 0, 3, 0, 2, 1, 1, 1, 1, 1, 1, 1});
  REQUIRE(told.build(backend, problem.source(), {0, 60}).ok());
  CHECK(channels_of(told, 0) == std::vector{1, 4, 6});
  CHECK(channels_of(told, 1) == std::vector{0, 1, 2});
}

TEST_CASE_TEMPLATE("LabelCache.keeps_a_channel_within_half_a_step_of_the_keys_own_spread", T, float,
                   fp16, bf16) {
  SerialExecutor executor;
  const Problem<T> problem({.shape = kShape, .tokens = 150, .key_offset = 3.0});
  for (const int channels : {1, 2, 3, 7}) {
    LabelCache index = make({.kv_heads = 2, .dim = 7, .channels = channels});
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {7, 150}).ok());
    double worst = 0.0;
    for (int h = 0; h < 2; ++h) {
      for (TokenId i = 0; i < 143; ++i) {
        std::vector<double> key;
        for (const int j : channels_of(index, h)) {
          key.push_back(static_cast<double>(to_float(problem.source().key(h, 7 + i)[j])));
        }
        const auto [low, high] = std::minmax_element(key.begin(), key.end());
        const std::vector<float> label = label_of(index, h, i);
        for (std::size_t c = 0; c < key.size(); ++c) {
          const double off = std::fabs(static_cast<double>(label[c]) - key[c]);
          // Half a step, or at the ends what bf16 rounds of the least and of 15 steps.
          const double step = (*high - *low) / 15.0;
          REQUIRE(off <= 0.51 * step + (std::fabs(*low) + (*high - *low)) * 0x1p-8);
          worst = std::max(worst, step > 0.0 ? off / step : 0.0);
        }
      }
    }
    if (channels == 7) CHECK(worst > 0.4);  // of 16 levels, and of no more
  }
}

TEST_CASE("LabelCache.keeps_zeros_and_keys_at_the_ends_of_float") {
  SerialExecutor executor;
  Problem<float> problem({.shape = {.head_dim = 2, .value_dim = 2}, .tokens = 3});
  constexpr float kMost = std::numeric_limits<float>::max();
  const float keys[3][2] = {{0.0F, -0.0F}, {kMost, -kMost}, {1.6e38F, -1.6e38F}};
  for (TokenId t = 0; t < 3; ++t) {
    for (int j = 0; j < 2; ++j) problem.key(0, t)[j] = keys[t][j];
  }
  LabelCache index = make({.dim = 2, .channels = 2});
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 3}).ok());
  for (TokenId t = 0; t < 3; ++t) {
    const std::vector<float> label = label_of(index, 0, t);
    for (std::size_t j = 0; j < 2; ++j) {
      CHECK(std::isfinite(label[j]));
      CHECK(label[j] == doctest::Approx(t == 1 ? keys[t][j] / 2.0F : keys[t][j]).epsilon(0.05));
    }
  }
}

TEST_CASE("LabelCache.appended_in_any_chunks_is_the_one_built_at_once") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const Problem<float> problem({.shape = kShape, .tokens = 100});
  std::vector<float> importance(14);
  std::iota(importance.begin(), importance.end(), 0.0F);
  LabelCache whole = make(kConfig, importance);
  REQUIRE(whole.build(backend, problem.source(), {3, 100}).ok());
  for (const TokenId chunk : {1, 13, 97}) {
    LabelCache grown = make(kConfig, importance);
    REQUIRE(grown.build(backend, problem.source(), {3, 3}).ok());
    for (TokenId end = 3; end < 100;) {
      end = std::min(end + chunk, 100);
      REQUIRE(grown.append(backend, problem.source(), end).ok());
    }
    CHECK(same_labels(grown, whole));
    CHECK(grown.append(backend, problem.source(), 50).ok());
    CHECK(grown.indexed() == TokenRange{3, 100});
  }
  // Without importance the first append chooses the channels of all.
  LabelCache first = make(kConfig);
  REQUIRE(first.build(backend, problem.source(), {3, 40}).ok());
  const std::vector<int> chosen = channels_of(first, 1);
  REQUIRE(first.append(backend, problem.source(), 100).ok());
  CHECK(channels_of(first, 1) == chosen);
}

TEST_CASE("LabelCache.truncated_and_appended_to_is_the_one_built_at_once") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Problem<float> problem({.shape = kShape, .tokens = 100});
  LabelCache index = make(kConfig);
  REQUIRE(index.build(backend, problem.source(), {0, 100}).ok());
  LabelCache whole = make(kConfig);
  REQUIRE(whole.build(backend, problem.source(), {0, 100}).ok());
  REQUIRE(index.truncate(43).ok());
  CHECK(index.indexed() == TokenRange{0, 43});
  CHECK_FALSE(same_labels(index, whole));
  REQUIRE(index.append(backend, problem.source(), 100).ok());
  CHECK(same_labels(index, whole));

  CHECK(index.truncate(-1).code() == ErrorCode::kInvalidArgument);
  CHECK(index.truncate(1000).ok());
  CHECK(same_labels(index, whole));
  CHECK(index.truncate(0).ok());
  CHECK(index.indexed().empty());
  // Nothing is left of the old channels, either.
  for (TokenId t = 0; t < 100; ++t) problem.key(0, t)[channels_of(whole, 0)[0]] = 0.0F;
  REQUIRE(index.append(backend, problem.source(), 100).ok());
  CHECK(channels_of(index, 0) != channels_of(whole, 0));
}

struct NoWorkers {
  [[nodiscard]] static int workers() { return 0; }
  template <class Task>
  void parallel_for(int, const Task&) const {}
};

TEST_CASE("LabelCache.keeps_what_it_had_when_keys_are_refused") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Problem<float> problem({.shape = kShape, .tokens = 100});
  LabelCache index = make(kConfig);
  REQUIRE(index.build(backend, problem.source(), {0, 44}).ok());
  LabelCache same = make(kConfig);
  REQUIRE(same.build(backend, problem.source(), {0, 44}).ok());
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    problem.key(1, 60)[2] = bad;
    const Status appended = index.append(backend, problem.source(), 100);
    CHECK(appended.code() == ErrorCode::kNonFinite);
    CHECK(std::string(appended.message()) == "the key of token 60, KV head 1 is not finite");
    CHECK(index.build(backend, problem.source(), {0, 100}).code() == ErrorCode::kNonFinite);
    CHECK(same_labels(index, same));
  }
  const Problem<float> other({.shape = {.head_dim = 4, .value_dim = 4}, .tokens = 100});
  CHECK(index.build(backend, other.source(), {0, 10}).code() == ErrorCode::kShapeMismatch);
  CHECK(index.append(backend, problem.source(), 101).code() == ErrorCode::kInvalidArgument);
  CHECK(index.build(backend, problem.source(), {5, 4}).code() == ErrorCode::kInvalidArgument);
  const NoWorkers nobody;
  CHECK(index.append(make_backend<ScalarOps>(nobody), problem.source(), 50).code() ==
        ErrorCode::kInvalidArgument);
  CHECK(same_labels(index, same));
}

TEST_CASE("LabelCache.of_impossible_shapes_or_importance_is_not_made") {
  CHECK_FALSE(LabelCache::create({.kv_heads = 0, .dim = 5, .channels = 2}).ok());
  CHECK_FALSE(LabelCache::create({.dim = 0, .channels = 1}).ok());
  CHECK_FALSE(LabelCache::create({.dim = kMaxDim + 1, .channels = 1}).ok());
  CHECK_FALSE(LabelCache::create({.dim = 5, .channels = 0}).ok());
  CHECK(std::string(LabelCache::create({.dim = 5, .channels = 6}).status().message()) ==
        "channels 6 must lie in [1, dim = 5]");
  const std::vector<float> short_one(6, 1.0F);
  CHECK(LabelCache::create(kConfig, short_one).status().code() == ErrorCode::kShapeMismatch);
  for (const float bad :
       {-1.0F, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<float> importance(14, 1.0F);
    importance[9] = bad;
    const auto refused = LabelCache::create(kConfig, importance);
    CHECK(refused.status().code() == ErrorCode::kInvalidArgument);
    CHECK(std::string(refused.status().message()).find("of channel 9") != std::string::npos);
  }
}

TEST_CASE("LabelCache.holds_as_many_bytes_as_it_says") {
  SerialExecutor executor;
  const Problem<float> problem({.shape = kShape, .tokens = 160});
  LabelCache index = make(kConfig);
  const std::size_t empty = index.bytes();
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 160}).ok());
  CHECK(index.bytes() - empty == LabelCache::bytes_per_token(3) * 160 * 2);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Clusters of keys: that they are k-means', how they follow a cache, and what is refused.
#include "magicpig/index/key_clusters.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "problem.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 2, .kv_heads = 2, .head_dim = 5, .value_dim = 3};
constexpr KeyClustersConfig kConfig{.kv_heads = 2, .dim = 5, .lists = 6, .seed = 3};

KeyClusters make(const KeyClustersConfig& config) {
  auto index = KeyClusters::create(config);
  REQUIRE(index.ok());
  return std::move(*index);
}

float centroid(const KeyClusters& index, int kv_head, int list, int j) {
  return index.centroids(kv_head).data[Panels::place(list, j, index.dim())];
}

bool same_clusters(const KeyClusters& a, const KeyClusters& b) {
  bool same = a.indexed() == b.indexed() && a.lists() == b.lists();
  for (int h = 0; h < a.kv_heads() && same; ++h) {
    same = std::equal(a.list_of(h), a.list_of(h) + a.indexed().size(), b.list_of(h));
    for (int l = 0; l < a.lists(); ++l) {
      for (int j = 0; j < a.dim(); ++j) same &= centroid(a, h, l, j) == centroid(b, h, l, j);
    }
  }
  return same;
}

// Squared distance of the key of token indexed().begin + i from a centroid, in double.
template <class T>
double square(const KeyClusters& index, const Problem<T>& problem, int kv_head, TokenId i,
              int list) {
  const T* key = problem.source().key(kv_head, index.indexed().begin + i);
  double sum = 0.0;
  for (int j = 0; j < index.dim(); ++j) {
    const double away = static_cast<double>(to_float(key[j])) -
                        static_cast<double>(index.centre(kv_head)[j]) -
                        static_cast<double>(centroid(index, kv_head, list, j));
    sum += away * away;
  }
  return sum;
}

// Of all keys, each from its own centroid.
template <class T>
double mean_square(const KeyClusters& index, const Problem<T>& problem, int kv_head) {
  double sum = 0.0;
  for (TokenId i = 0; i < index.indexed().size(); ++i) {
    sum += square(index, problem, kv_head, i, index.list_of(kv_head)[i]);
  }
  return sum / index.indexed().size();
}

TEST_CASE_TEMPLATE("KeyClusters.put_every_key_into_the_list_of_its_nearest_centroid", T, float,
                   bf16) {
  const auto pool = ThreadPool::create(3);
  REQUIRE(pool.ok());
  const Problem<T> problem({.shape = kShape, .tokens = 3000, .key_offset = 2.0});
  KeyClusters index = make(kConfig);
  REQUIRE(index.build(make_backend<ScalarOps>(**pool), problem.source(), {7, 2500}).ok());
  REQUIRE(index.append(make_backend<ScalarOps>(**pool), problem.source(), 3000).ok());
  CHECK(index.indexed() == TokenRange{7, 3000});
  CHECK(index.lists() == 6);
  for (int h = 0; h < 2; ++h) {
    std::vector<int> sizes(6);
    for (TokenId i = 0; i < 2993; ++i) {
      const int own = index.list_of(h)[i];
      REQUIRE(own < 6);
      ++sizes[static_cast<std::size_t>(own)];
      for (int l = 0; l < 6; ++l) {
        REQUIRE(square(index, problem, h, i, own) <= square(index, problem, h, i, l) + 1e-4);
      }
    }
    for (const int size : sizes) CHECK(size > 100);
  }
}

TEST_CASE("KeyClusters.come_nearer_to_their_keys_by_rounds_until_centroids_are_means") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const Problem<float> problem({.shape = kShape, .tokens = 400});
  double before = std::numeric_limits<double>::infinity();
  KeyClusters index = make(kConfig);
  for (const int rounds : {0, 1, 3, 10, 200}) {
    KeyClustersConfig config = kConfig;
    config.rounds = rounds;
    index = make(config);
    REQUIRE(index.build(backend, problem.source(), {0, 400}).ok());
    const double now = mean_square(index, problem, 1);
    CHECK(now <= before);
    if (rounds == 1) CHECK(now < 0.95 * before);
    before = now;
  }
  // Converged: every centroid is the mean of its keys.
  for (int l = 0; l < 6; ++l) {
    for (int j = 0; j < 5; ++j) {
      double sum = 0.0;
      int count = 0;
      for (TokenId i = 0; i < 400; ++i) {
        if (index.list_of(1)[i] != l) continue;
        sum += static_cast<double>(problem.source().key(1, i)[j]) -
               static_cast<double>(index.centre(1)[j]);
        ++count;
      }
      REQUIRE(count > 0);
      CHECK(static_cast<double>(centroid(index, 1, l, j)) ==
            doctest::Approx(sum / count).epsilon(1e-5));
    }
  }
}

TEST_CASE("KeyClusters.find_groups_that_are_far_apart") {
  SerialExecutor executor;
  Problem<float> problem({.shape = kShape, .tokens = 300});
  for (int h = 0; h < 2; ++h) {
    for (TokenId t = 0; t < 300; ++t) problem.key(h, t)[t % 3] += 50.0F;
  }
  // Twelve centroids for three groups, so that none goes without.
  KeyClusters index = make({.kv_heads = 2, .dim = 5, .lists = 12, .seed = 1});
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 300}).ok());
  for (int h = 0; h < 2; ++h) {
    std::vector<int> group(12, -1);
    for (TokenId t = 0; t < 300; ++t) {
      int& own = group[index.list_of(h)[t]];
      if (own < 0) own = t % 3;
      REQUIRE(own == t % 3);
    }
  }
}

TEST_CASE("KeyClusters.are_the_same_for_any_workers_and_others_for_another_seed") {
  SerialExecutor executor;
  const auto pool = ThreadPool::create(4);
  REQUIRE(pool.ok());
  const Problem<float> problem({.shape = kShape, .tokens = 3000});
  KeyClusters serial = make(kConfig);
  KeyClusters parallel = make(kConfig);
  KeyClustersConfig config = kConfig;
  config.seed = 4;
  KeyClusters other = make(config);
  REQUIRE(serial.build(make_backend<ScalarOps>(executor), problem.source(), {1, 3000}).ok());
  REQUIRE(parallel.build(make_backend<ScalarOps>(**pool), problem.source(), {1, 3000}).ok());
  REQUIRE(other.build(make_backend<ScalarOps>(**pool), problem.source(), {1, 3000}).ok());
  CHECK(same_clusters(serial, parallel));
  CHECK_FALSE(same_clusters(serial, other));
}

TEST_CASE("KeyClusters.appended_in_any_chunks_are_those_appended_at_once") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const Problem<float> problem({.shape = kShape, .tokens = 200});
  KeyClusters whole = make(kConfig);
  REQUIRE(whole.build(backend, problem.source(), {3, 80}).ok());
  REQUIRE(whole.append(backend, problem.source(), 200).ok());
  for (const TokenId chunk : {1, 13, 119}) {
    KeyClusters grown = make(kConfig);
    REQUIRE(grown.build(backend, problem.source(), {3, 80}).ok());
    for (TokenId end = 80; end < 200;) {
      end = std::min(end + chunk, 200);
      REQUIRE(grown.append(backend, problem.source(), end).ok());
    }
    CHECK(same_clusters(grown, whole));
    CHECK(grown.append(backend, problem.source(), 50).ok());
    CHECK(grown.indexed() == TokenRange{3, 200});
  }
}

TEST_CASE("KeyClusters.truncated_and_appended_to_are_as_before") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const Problem<float> problem({.shape = kShape, .tokens = 200});
  KeyClusters index = make(kConfig);
  REQUIRE(index.build(backend, problem.source(), {0, 200}).ok());
  KeyClusters whole = make(kConfig);
  REQUIRE(whole.build(backend, problem.source(), {0, 200}).ok());
  for (const TokenId end : {43, 2}) {  // 2: fewer tokens than lists
    REQUIRE(index.truncate(end).ok());
    CHECK(index.indexed() == TokenRange{0, end});
    CHECK(index.lists() == 6);
    REQUIRE(index.append(backend, problem.source(), 200).ok());
    CHECK(same_clusters(index, whole));
  }
  CHECK(index.truncate(-1).code() == ErrorCode::kInvalidArgument);
  CHECK(index.truncate(1000).ok());
  CHECK(same_clusters(index, whole));
  CHECK(index.truncate(0).ok());
  CHECK(index.indexed().empty());
  CHECK(index.lists() == 0);
  // Learnt anew, from what is then appended.
  REQUIRE(index.append(backend, problem.source(), 100).ok());
  KeyClusters half = make(kConfig);
  REQUIRE(half.build(backend, problem.source(), {0, 100}).ok());
  CHECK(same_clusters(index, half));
}

TEST_CASE("KeyClusters.have_a_list_for_64_tokens_unless_told_and_no_more_than_tokens") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const Problem<float> problem({.shape = kShape, .tokens = 200});
  KeyClusters index = make({.kv_heads = 2, .dim = 5});
  CHECK(index.lists() == 0);
  for (const auto& [end, lists] : {std::pair{1, 1}, {64, 1}, {65, 2}, {200, 4}}) {
    REQUIRE(index.build(backend, problem.source(), {0, end}).ok());
    CHECK(index.lists() == lists);
  }
  CHECK(KeyClusters::default_lists(1 << 30) == 4096);
  KeyClusters many = make({.kv_heads = 2, .dim = 5, .lists = 50, .samples = 7});
  REQUIRE(many.build(backend, problem.source(), {0, 9}).ok());
  CHECK(many.lists() == 9);
  for (TokenId i = 0; i < 9; ++i) CHECK(square(many, problem, 1, i, many.list_of(1)[i]) < 1e-9);
  REQUIRE(many.build(backend, problem.source(), {9, 9}).ok());
  CHECK(many.lists() == 0);
}

struct NoWorkers {
  [[nodiscard]] static int workers() { return 0; }
  template <class Task>
  void parallel_for(int, const Task&) const {}
};

TEST_CASE("KeyClusters.keep_what_they_had_when_keys_are_refused") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Problem<float> problem({.shape = kShape, .tokens = 100});
  KeyClusters index = make(kConfig);
  REQUIRE(index.build(backend, problem.source(), {0, 44}).ok());
  KeyClusters same = make(kConfig);
  REQUIRE(same.build(backend, problem.source(), {0, 44}).ok());
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    problem.key(1, 60)[2] = bad;
    const Status appended = index.append(backend, problem.source(), 100);
    CHECK(appended.code() == ErrorCode::kNonFinite);
    CHECK(std::string(appended.message()) == "the key of token 60, KV head 1 is not finite");
    CHECK(index.build(backend, problem.source(), {0, 100}).code() == ErrorCode::kNonFinite);
  }
  const Problem<float> other({.shape = {.head_dim = 4, .value_dim = 4}, .tokens = 100});
  CHECK(index.build(backend, other.source(), {0, 10}).code() == ErrorCode::kShapeMismatch);
  CHECK(index.append(backend, problem.source(), 101).code() == ErrorCode::kInvalidArgument);
  CHECK(index.build(backend, problem.source(), {5, 4}).code() == ErrorCode::kInvalidArgument);
  const NoWorkers nobody;
  CHECK(index.append(make_backend<ScalarOps>(nobody), problem.source(), 50).code() ==
        ErrorCode::kInvalidArgument);
  CHECK(same_clusters(index, same));
}

TEST_CASE("KeyClusters.of_keys_that_are_all_alike_or_huge_are_made") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Problem<float> problem({.shape = kShape, .tokens = 50});
  for (const float x : {0.0F, 3.0e38F}) {
    for (TokenId t = 0; t < 50; ++t) {
      for (int j = 0; j < 5; ++j) problem.key(0, t)[j] = t % 2 == 0 ? x : -x;
    }
    KeyClusters index = make(kConfig);
    REQUIRE(index.build(backend, problem.source(), {0, 50}).ok());
    for (TokenId i = 0; i < 50; ++i) REQUIRE(index.list_of(0)[i] < 6);
  }
}

TEST_CASE("KeyClusters.of_impossible_configs_are_not_made") {
  CHECK_FALSE(KeyClusters::create({.kv_heads = 0, .dim = 5}).ok());
  CHECK_FALSE(KeyClusters::create({.dim = 0}).ok());
  CHECK_FALSE(KeyClusters::create({.dim = kMaxDim + 1}).ok());
  CHECK(std::string(KeyClusters::create({.dim = 5, .lists = 65537}).status().message()) ==
        "lists 65537 must lie in [0, 65536]");
  CHECK_FALSE(KeyClusters::create({.dim = 5, .lists = -1}).ok());
  CHECK_FALSE(KeyClusters::create({.dim = 5, .samples = 0}).ok());
  CHECK_FALSE(KeyClusters::create({.dim = 5, .rounds = -1}).ok());
}

TEST_CASE("KeyClusters.hold_two_bytes_per_token_beside_their_centroids") {
  SerialExecutor executor;
  const Problem<float> problem({.shape = kShape, .tokens = 160});
  KeyClusters index = make(kConfig);
  const std::size_t empty = index.bytes();
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 160}).ok());
  CHECK(index.bytes() - empty == 2 * (160 * 2 + 4 * (Panels::size(6, 5) + 6)));
}

}  // namespace

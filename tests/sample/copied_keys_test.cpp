// SPDX-License-Identifier: Apache-2.0
// Indexes and samplers over keys that must be copied together are those over the same keys in rows.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "brute_force.hpp"
#include "layouts.hpp"
#include "magicpig/core/executor.hpp"
#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "magicpig/index/hash_codes.hpp"
#include "magicpig/index/key_clusters.hpp"
#include "magicpig/index/label_cache.hpp"
#include "magicpig/index/page_bounds.hpp"
#include "magicpig/index/sign_codes.hpp"
#include "magicpig/sample/exact_scores.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/vattention.hpp"
#include "same_index.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr int kHeads = 2;
constexpr int kDim = 64;
constexpr TokenId kTokens = 333;
constexpr TokenRange kRange{.begin = 3, .end = 301};
constexpr Shape kShape{
    .query_heads = 2 * kHeads, .kv_heads = kHeads, .head_dim = kDim, .value_dim = kDim};

using Columns = BlockColumnKeyValues<bf16>;

// The same keys and values in rows and in columns, with three workers.
struct Both {
  Both() : rows(kShape, kTokens, 31), plain(rows.source()), columns(rows) {}

  // use(backend, source) with both sources.
  template <class Use>
  void with_both(const Use& use) {
    const auto backend = make_backend<ScalarOps>(**pool);
    use(backend, plain, 0);
    use(backend, columns.source, 1);
  }

  Result<std::unique_ptr<ThreadPool>> pool = ThreadPool::create(3);
  PlainRows<bf16, bf16> rows;
  StridedKeyValues<bf16> plain;
  BlockColumnLayout<bf16, bf16> columns;
};

// What make(backend, source) gives for both sources, compared by same(in rows, in columns). Indexes
// take their tokens in two parts, so that the second meets what is there.
template <class Index, class Same>
void check_index(Result<Index> made, Result<Index> also_made, const Same& same) {
  REQUIRE(made.ok());
  REQUIRE(also_made.ok());
  Index& in_rows = *made;
  Index& in_columns = *also_made;
  Both both;
  Index* const indexes[] = {&in_rows, &in_columns};
  both.with_both([&](const auto& backend, const auto& source, int which) {
    Status status = indexes[which]->build(backend, source, {kRange.begin, 200});
    CHECK_MESSAGE(status.ok(), status.message());
    status = indexes[which]->append(backend, source, kRange.end);
    CHECK_MESSAGE(status.ok(), status.message());
  });
  CHECK(in_rows.indexed() == in_columns.indexed());
  CHECK(same(in_rows, in_columns));
  // Another key is noticed.
  const_cast<bf16&>(both.plain.key(1, 20)[5]) = to_bf16(-70.0F);
  SerialExecutor serial;
  CHECK(in_rows.build(make_backend<ScalarOps>(serial), both.plain, {kRange.begin, 200}).ok());
  CHECK(in_rows.append(make_backend<ScalarOps>(serial), both.plain, kRange.end).ok());
  CHECK(!same(in_rows, in_columns));
}

template <class T>
bool same_bytes(const T* a, const T* b, std::int64_t count) {
  return std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(T)) == 0;
}

TEST_CASE("pages of copied keys have the bounds of the same keys in rows") {
  const PageBoundsConfig config{.kv_heads = kHeads, .dim = kDim};
  check_index(PageBounds<bf16>::create(config), PageBounds<bf16>::create(config),
              [](const auto& a, const auto& b) {
                bool same = a.pages() == b.pages();
                for (int h = 0; h < kHeads; ++h) {
                  for (int p = 0; p < a.pages(); ++p) {
                    same &= same_bytes(a.least(h, p), b.least(h, p), 2 * kDim);
                  }
                }
                return same;
              });
}

TEST_CASE("labels of copied keys are those of the same keys in rows") {
  const LabelCacheConfig config{.kv_heads = kHeads, .dim = kDim};
  check_index(LabelCache::create(config), LabelCache::create(config),
              [](const LabelCache& a, const LabelCache& b) {
                bool same = true;
                std::vector<float> x(16), y(16);
                for (int h = 0; h < kHeads; ++h) {
                  same &= same_bytes(a.channels(h), b.channels(h), 16);
                  for (TokenId i = 0; i < a.indexed().size(); ++i) {
                    a.label(h, i, x.data());
                    b.label(h, i, y.data());
                    same &= x == y;
                  }
                }
                return same;
              });
}

TEST_CASE("clusters of copied keys are those of the same keys in rows") {
  const KeyClustersConfig config{.kv_heads = kHeads, .dim = kDim, .lists = 9, .rounds = 3};
  check_index(KeyClusters::create(config), KeyClusters::create(config),
              [](const KeyClusters& a, const KeyClusters& b) {
                bool same = a.lists() == b.lists();
                for (int h = 0; h < kHeads; ++h) {
                  same &= same_bytes(a.centre(h), b.centre(h), kDim);
                  same &= same_bytes(a.list_of(h), b.list_of(h), a.indexed().size());
                  same &= same_bytes(a.centroids(h).data, b.centroids(h).data,
                                     static_cast<std::int64_t>(Panels::size(a.lists(), kDim)));
                }
                return same;
              });
}

TEST_CASE("hash codes of copied keys are those of the same keys in rows") {
  const auto family = SimHash::create({.dim = kDim, .bits = 8, .tables = 5, .seed = 3});
  REQUIRE(family.ok());
  using Codes = HashCodes<SimHash>;
  const HashCodesConfig config{.kv_heads = kHeads, .value_dim = kDim, .centred = true};
  check_index(Codes::create(*family, config), Codes::create(*family, config),
              [](const Codes& a, const Codes& b) {
                bool same = a.segment_count() == b.segment_count();
                for (int h = 0; h < kHeads; ++h) {
                  same &= same_bytes(a.value_norms(0, h), b.value_norms(0, h), a.segment_tokens(0));
                  for (int l = 0; l < 5; ++l) {
                    same &= same_bytes(a.codes(0, h, l), b.codes(0, h, l), a.segment_tokens(0));
                  }
                }
                return same;
              });
}

TEST_CASE("learned codes of copied keys are those of the same keys in rows") {
  std::vector<float> weights(kHeads * kDim * 40);
  Random random(4);
  for (float& x : weights) x = static_cast<float>(random.normal());
  const LearnedLayer layer{.in = kDim, .out = 40, .weights = weights};
  const auto hash = LearnedHash::create({.kv_heads = kHeads, .key_layers = {&layer, 1}});
  REQUIRE_MESSAGE(hash.ok(), hash.status().message());
  check_index<SignCodes>(
      SignCodes(*hash), SignCodes(*hash), [](const SignCodes& a, const SignCodes& b) {
        bool same = a.blocks() == b.blocks();
        for (int h = 0; h < kHeads; ++h) {
          for (int block = 0; block < a.blocks(); ++block) {
            same &= same_bytes(a.codes(block, h), b.codes(block, h), 2 * a.block_tokens(block));
          }
        }
        return same;
      });
}

TEST_CASE("what is trained on copied keys is what the same keys in rows train") {
  Both both;
  const ProductQuantiserConfig config{.kv_heads = kHeads, .samples = 100, .rounds = 2};
  std::vector<ProductQuantiser> trained;
  both.with_both([&](const auto& backend, const auto& source, int) {
    auto made = ProductQuantiser::train(backend, source, kRange, config);
    REQUIRE_MESSAGE(made.ok(), made.status().message());
    trained.push_back(std::move(*made));
  });
  std::vector<Signatures<ProductQuantiser>> indexes;
  both.with_both([&](const auto& backend, const auto& source, int which) {
    const ProductQuantiser& own = trained[static_cast<std::size_t>(which)];
    auto made = Signatures<ProductQuantiser>::create(own, {.kv_heads = kHeads});
    REQUIRE(made.ok());
    CHECK(made->build(backend, source, kRange).ok());
    indexes.push_back(std::move(*made));
  });
  CHECK(index_difference(indexes[0], indexes[1]) == nullptr);
}

// Tokens drawn for KV head 1 from copied keys and from keys in rows.
template <class Sampler>
void check_sampler(const Sampler& sampler) {
  Both both;
  Random random(8);
  std::vector<float> query(2 * kDim);
  for (float& x : query) x = static_cast<float>(0.4 * random.normal());
  const RangeIndex index(kRange, kHeads, kDim);
  std::vector<DrawnCandidates> drawn;
  both.with_both([&]<class Source>(const auto&, const Source& source, int) {
    drawn.push_back(draw_candidates<ScalarOps>(
        sampler,
        DrawInput<Source, RangeIndex>{.key_values = source,
                                      .index = index,
                                      .kv_head = 1,
                                      .queries = {.data = query.data(), .count = 2, .dim = kDim},
                                      .scale = 0.125F,
                                      .noise = {.seed = 5}}));
  });
  CHECK(!drawn[0].tokens.empty());
  CHECK(drawn[0].tokens == drawn[1].tokens);
  CHECK(drawn[0].members == drawn[1].members);
}

TEST_CASE("samplers that read copied keys and values select as from rows") {
  check_sampler(*TopK<>::create({.fraction = 0.1}));
  check_sampler(*VAttention<>::create({.epsilon = 0.2, .sum = SampledSum::kBoth}));
}

TEST_CASE("a key in columns that is not finite is named") {
  Both both;
  const_cast<bf16&>(both.plain.key(1, 200)[63]) = to_bf16(std::numeric_limits<float>::infinity());
  const BlockColumnLayout<bf16, bf16> columns(both.rows);
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  const auto message = [&](auto made) {
    REQUIRE(made.ok());
    const Status status = made->build(backend, columns.source, kRange);
    CHECK(status.code() == ErrorCode::kNonFinite);
    return std::string(status.message());
  };
  const char* expected = "the key of token 200, KV head 1 is not finite";
  CHECK(message(PageBounds<bf16>::create({.kv_heads = kHeads, .dim = kDim})) == expected);
  CHECK(message(LabelCache::create({.kv_heads = kHeads, .dim = kDim})) == expected);
  CHECK(message(KeyClusters::create({.kv_heads = kHeads, .dim = kDim})) == expected);
  const auto trained =
      ProductQuantiser::train(backend, columns.source, kRange, {.kv_heads = kHeads});
  CHECK(std::string(trained.status().message()) == expected);
}

}  // namespace

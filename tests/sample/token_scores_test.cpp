// SPDX-License-Identifier: Apache-2.0
// Scores of tokens: what all models share, each model's own promise, and the selections by them.
#include "magicpig/sample/token_scores.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "backends.hpp"
#include "magicpig/hash/learned_hash.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "magicpig/hash/scalar_quantiser.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/hash_codes.hpp"
#include "magicpig/index/key_clusters.hpp"
#include "magicpig/index/label_cache.hpp"
#include "magicpig/index/page_bounds.hpp"
#include "magicpig/index/sign_codes.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/sample/agreement_scores.hpp"
#include "magicpig/sample/cluster_scores.hpp"
#include "magicpig/sample/code_scores.hpp"
#include "magicpig/sample/exact_scores.hpp"
#include "magicpig/sample/label_scores.hpp"
#include "magicpig/sample/page_scores.hpp"
#include "magicpig/sample/soft_collisions.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/top_p.hpp"
#include "random.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

constexpr Shape kShape{.query_heads = 6, .kv_heads = 2, .head_dim = 24, .value_dim = 8};
constexpr TokenId kTokens = 700;

// One model each, over `range` of a problem: an index, and scores() for it. A model more is one of
// these and a line in the first test.
struct ExactModel {
  ExactModel(const Problem<float>&, TokenRange range) : index(range, 2, 24) {}
  [[nodiscard]] static ExactScores scores() { return {}; }
  RangeIndex index;
};

template <class T, int kPage>
struct PageModel {
  PageModel(const Problem<float>& problem, TokenRange range)
      : index(std::move(*PageBounds<T>::create({.kv_heads = 2, .dim = 24, .page = kPage}))) {
    SerialExecutor executor;
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  [[nodiscard]] static PageScores scores() { return PageScores(24); }
  PageBounds<T> index;
};

template <int kBits>
struct CodeModel {
  CodeModel(const Problem<float>& problem, TokenRange range)
      : quantiser(std::move(*HadamardQuantiser::create(24, kBits, 1))),
        index(std::move(
            *Signatures<HadamardQuantiser>::create(quantiser, {.kv_heads = 2, .value_dim = 8}))) {
    SerialExecutor executor;
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  CodeModel(const CodeModel&) = delete;
  [[nodiscard]] CodeScores scores() const { return CodeScores(quantiser); }
  HadamardQuantiser quantiser;
  Signatures<HadamardQuantiser> index;
};

template <int kBits>
struct TrainedModel {
  TrainedModel(const Problem<float>& problem, TokenRange range)
      : quantiser(train(problem)),
        index(std::move(*Signatures<ProductQuantiser>::create(quantiser, {.kv_heads = 2}))) {
    SerialExecutor executor;
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  TrainedModel(const TrainedModel&) = delete;
  static ProductQuantiser train(const Problem<float>& problem) {
    SerialExecutor executor;
    auto trained =
        ProductQuantiser::train(make_backend<ScalarOps>(executor), problem.source(),
                                {0, problem.tokens()}, {.kv_heads = 2, .bits = kBits, .seed = 1});
    REQUIRE(trained.ok());
    return std::move(*trained);
  }
  [[nodiscard]] CodeScores scores() const { return CodeScores(quantiser); }
  ProductQuantiser quantiser;
  Signatures<ProductQuantiser> index;
};

template <int kBits, int kTables, bool kCentred>
struct SoftModel {
  SoftModel(const Problem<float>& problem, TokenRange range)
      : family(
            std::move(*SimHash::create({.dim = 24, .bits = kBits, .tables = kTables, .seed = 3}))),
        index(std::move(*HashCodes<SimHash>::create(
            family, {.kv_heads = 2, .value_dim = 8, .centred = kCentred}))) {
    SerialExecutor executor;
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  SoftModel(const SoftModel&) = delete;
  [[nodiscard]] SoftCollisions<SimHash> scores() const {
    return *SoftCollisions<SimHash>::create(family);
  }
  SimHash family;
  HashCodes<SimHash> index;
};

// Codes of kBits random planes for each of two KV heads.
template <int kBits, bool kGroupSum>
struct AgreementModel {
  AgreementModel(const Problem<float>& problem, TokenRange range)
      : planes(make_planes()), hash(std::move(*make_hash(planes))), index(hash) {
    SerialExecutor executor;
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  AgreementModel(const AgreementModel&) = delete;
  [[nodiscard]] AgreementScores scores() const { return AgreementScores(hash, kGroupSum); }

  static std::vector<float> make_planes() {
    Random random(5);
    std::vector<float> planes(2 * kBits * 24);
    for (float& x : planes) x = static_cast<float>(random.normal());
    return planes;
  }
  static Result<LearnedHash> make_hash(const std::vector<float>& planes) {
    const LearnedLayer layers[] = {{.in = 24, .out = kBits, .weights = planes}};
    return LearnedHash::create({.kv_heads = 2, .key_layers = layers});
  }
  std::vector<float> planes;
  LearnedHash hash;
  SignCodes index;
};

template <int kChannels>
struct LabelModel {
  LabelModel(const Problem<float>& problem, TokenRange range)
      : index(std::move(*LabelCache::create({.kv_heads = 2, .dim = 24, .channels = kChannels}))) {
    SerialExecutor executor;
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  [[nodiscard]] static LabelScores scores() { return LabelScores(kChannels); }
  LabelCache index;
};

template <int kLists>
struct ClusterModel {
  ClusterModel(const Problem<float>& problem, TokenRange range)
      : index(std::move(*KeyClusters::create({.kv_heads = 2, .dim = 24, .lists = kLists}))) {
    SerialExecutor executor;
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  [[nodiscard]] static ClusterScores scores() { return ClusterScores(kLists); }
  KeyClusters index;
};

// [group][n] of KV head 1.
template <class Ops, class Scores, class Index>
std::vector<std::vector<float>> compute(const Scores& scores, const Index& index,
                                        const Problem<float>& problem, float scale = 0.2F) {
  const auto source = problem.source();
  const DrawInput<StridedKeyValues<float>, Index> input{
      .key_values = source,
      .index = index,
      .kv_head = 1,
      .queries = {.data = problem.query(3), .count = 3, .dim = 24},
      .scale = scale,
      .noise = {}};
  static_assert(TokenScoresOver<Scores, Ops, StridedKeyValues<float>, Index>);
  const DrawLimits limits{.group = 3, .tokens = index.indexed().size()};
  Arena counting;
  (void)scores.carve(counting, limits);
  std::vector<std::byte> memory(counting.bytes_needed());
  Arena arena{std::span<std::byte>(memory)};
  const auto scratch = scores.carve(arena, limits);
  const float* found = scores.template compute<Ops>(input, scratch);
  const std::int64_t n = index.indexed().size();
  std::vector<std::vector<float>> rows;
  for (int g = 0; g < 3; ++g) rows.emplace_back(found + g * n, found + (g + 1) * n);
  return rows;
}

// q.k of KV head 1 over a range, in double.
std::vector<std::vector<double>> exact_dots(const Problem<float>& problem, TokenRange range) {
  std::vector<std::vector<double>> rows(3);
  for (std::size_t g = 0; g < 3; ++g) {
    for (TokenId t = range.begin; t < range.end; ++t) {
      rows[g].push_back(oracle_logit(
          problem.source(),
          {.data = problem.query(3 + static_cast<int>(g)), .kv_head = 1, .scale = 1.0}, t));
    }
  }
  return rows;
}

template <class Model>
void check_model() {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  for (const TokenRange range : {TokenRange{0, 0}, {5, 6}, {4, 640}, {0, kTokens}}) {
    const Model model(problem, range);
    const auto expected = compute<ScalarOps>(model.scores(), model.index, problem);
    for (const auto& row : expected) {
      REQUIRE(static_cast<TokenId>(row.size()) == range.size());
      for (const float score : row) REQUIRE(std::isfinite(score));
    }
    for_each_backend([&]<class Ops>() {
      const auto found = compute<Ops>(model.scores(), model.index, problem);
      for (std::size_t g = 0; g < 3; ++g) {
        for (std::size_t i = 0; i < found[g].size(); ++i) {
          // 24 products of numbers below 6, added up in float in another order.
          REQUIRE(std::fabs(found[g][i] - expected[g][i]) <= 24 * 36 * 0x1p-23F);
        }
      }
    });
  }
}

TEST_CASE("TokenScores.are_finite_and_the_same_on_every_backend") {
  check_model<ExactModel>();
  check_model<PageModel<float, 16>>();
  check_model<PageModel<fp16, 7>>();
  check_model<CodeModel<1>>();
  check_model<CodeModel<4>>();
  check_model<TrainedModel<1>>();
  check_model<SoftModel<6, 20, false>>();
  check_model<SoftModel<1, 3, true>>();
  check_model<AgreementModel<70, false>>();
  check_model<LabelModel<5>>();
  check_model<ClusterModel<9>>();
}

template <class Model>
void check_page_scores(float tolerance) {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  const TokenRange range{.begin = 3, .end = 500};
  const Model model(problem, range);
  const auto scores = compute<ScalarOps>(model.scores(), model.index, problem);
  const auto dots = exact_dots(problem, range);
  for (std::size_t g = 0; g < 3; ++g) {
    double slack = 0.0;
    for (std::size_t i = 0; i < dots[g].size(); ++i) {
      REQUIRE(static_cast<double>(scores[g][i]) >= dots[g][i] - 1e-4);
      slack += static_cast<double>(scores[g][i]) - dots[g][i];
      // The formula of the paper.
      const int page = model.index.page();
      const int p = static_cast<int>(i) / page;
      CHECK(scores[g][i] == scores[g][static_cast<std::size_t>(p * page)]);
      double bound = 0.0;
      for (int j = 0; j < 24; ++j) {
        const auto q = static_cast<double>(problem.query(3 + static_cast<int>(g))[j]);
        bound += std::max(q * static_cast<double>(to_float(model.index.least(1, p)[j])),
                          q * static_cast<double>(to_float(model.index.largest(1, p)[j])));
      }
      REQUIRE(std::fabs(static_cast<double>(scores[g][i]) - bound) <=
              static_cast<double>(tolerance));
    }
    CHECK(slack > 0.0);
  }
}

TEST_CASE("PageScores.bound_every_inner_product_of_their_page") {
  check_page_scores<PageModel<float, 16>>(1e-4F);
  check_page_scores<PageModel<fp16, 7>>(1e-4F);
  check_page_scores<PageModel<bf16, 64>>(1e-4F);
}

TEST_CASE("PageScores.of_pages_of_one_token_are_the_inner_products") {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  const PageModel<float, 1> model(problem, {0, 100});
  const auto scores = compute<ScalarOps>(model.scores(), model.index, problem);
  const auto dots = exact_dots(problem, {0, 100});
  for (std::size_t g = 0; g < 3; ++g) {
    for (std::size_t i = 0; i < 100; ++i) {
      CHECK(static_cast<double>(scores[g][i]) == doctest::Approx(dots[g][i]).epsilon(1e-5));
    }
  }
}

// Correlation of two rows of numbers.
double correlation(const std::vector<float>& a, const std::vector<double>& b) {
  const auto n = static_cast<double>(a.size());
  const double mean_a = std::accumulate(a.begin(), a.end(), 0.0) / n;
  const double mean_b = std::accumulate(b.begin(), b.end(), 0.0) / n;
  double ab = 0.0;
  double aa = 0.0;
  double bb = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(a[i]) - mean_a;
    const double y = b[i] - mean_b;
    ab += x * y;
    aa += x * x;
    bb += y * y;
  }
  return ab / std::sqrt(aa * bb);
}

TEST_CASE("CodeScores.estimate_logits_the_better_the_more_bits_and_at_any_scale") {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  const TokenRange range{.begin = 3, .end = 600};
  const auto dots = exact_dots(problem, range);
  const CodeModel<1> one(problem, range);
  const CodeModel<4> four(problem, range);
  for (const float scale : {0.1F, 0.2F, 1.0F}) {
    const auto rough = compute<ScalarOps>(one.scores(), one.index, problem, scale);
    const auto fine = compute<ScalarOps>(four.scores(), four.index, problem, scale);
    for (std::size_t g = 0; g < 3; ++g) {
      // A coordinate's sign keeps 2 / pi of its square, 4 bits 0.99.
      CHECK(correlation(rough[g], dots[g]) > 0.7);
      CHECK(correlation(rough[g], dots[g]) < 0.9);
      CHECK(correlation(fine[g], dots[g]) > 0.97);
      // Unscaled: a slope of one whatever the scale. Steps of log 2 / 16 are of scaled logits.
      double xy = 0.0;
      double xx = 0.0;
      const double mean = std::accumulate(dots[g].begin(), dots[g].end(), 0.0) / 597.0;
      for (std::size_t i = 0; i < dots[g].size(); ++i) {
        xy += static_cast<double>(fine[g][i]) * (dots[g][i] - mean);
        xx += (dots[g][i] - mean) * (dots[g][i] - mean);
      }
      CHECK(xy / xx == doctest::Approx(1.0).epsilon(0.03));
    }
  }
  for (const auto& row : compute<ScalarOps>(one.scores(), one.index, problem, 0.0F)) {
    CHECK(std::count(row.begin(), row.end(), 0.0F) == 597);
  }
}

TEST_CASE("CodeScores.of_trained_codes_estimate_logits_better_than_of_as_many_random_bits") {
  // Keys on four of 24 axes, and little beside them: what one bit per dimension is enough for.
  Problem<float> problem({.shape = kShape, .tokens = kTokens});
  for (TokenId t = 0; t < kTokens; ++t) {
    for (int j = 0; j < 24; ++j) problem.key(1, t)[j] *= j % 6 == 0 ? 1.0F : 0.2F;
  }
  const TokenRange range{.begin = 3, .end = 600};
  const auto dots = exact_dots(problem, range);
  const CodeModel<1> random(problem, range);
  const TrainedModel<1> trained(problem, range);
  const auto rough = compute<ScalarOps>(random.scores(), random.index, problem);
  const auto fine = compute<ScalarOps>(trained.scores(), trained.index, problem);
  for (std::size_t g = 0; g < 3; ++g) {
    CHECK(correlation(fine[g], dots[g]) > 0.8);
    CHECK(correlation(fine[g], dots[g]) > correlation(rough[g], dots[g]) + 0.05);
  }
}

TEST_CASE("LabelScores.are_the_inner_products_over_the_channels_of_the_labels") {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  const TokenRange range{.begin = 3, .end = 600};
  const LabelModel<7> model(problem, range);
  const auto scores = compute<ScalarOps>(model.scores(), model.index, problem);
  const std::int32_t* channels = model.index.channels(1);
  for (std::size_t g = 0; g < 3; ++g) {
    for (std::size_t i = 0; i < 597; ++i) {
      float label[7];
      model.index.label(1, static_cast<TokenId>(i), label);
      double dot = 0.0;
      for (int c = 0; c < 7; ++c) {
        dot += static_cast<double>(label[c]) *
               static_cast<double>(problem.query(3 + static_cast<int>(g))[channels[c]]);
      }
      REQUIRE(static_cast<double>(scores[g][i]) == doctest::Approx(dot).epsilon(1e-5));
    }
  }
  // Of all channels, they are the inner products but for the 4 bits: a step of 1/15 of a spread of
  // some 4 standard deviations leaves 1/12 of its square, 0.6 % of the variance.
  const LabelModel<24> all(problem, range);
  const auto whole = compute<ScalarOps>(all.scores(), all.index, problem);
  const auto dots = exact_dots(problem, range);
  for (std::size_t g = 0; g < 3; ++g) {
    CHECK(correlation(whole[g], dots[g]) > 0.99);
    CHECK(correlation(whole[g], dots[g]) < 0.9999);
  }
}

TEST_CASE("ClusterScores.are_the_products_with_centroids_and_of_lists_of_one_key_the_keys_own") {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  const TokenRange range{.begin = 3, .end = 203};
  const ClusterModel<9> model(problem, range);
  const auto scores = compute<ScalarOps>(model.scores(), model.index, problem);
  const ClusterModel<200> single(problem, range);
  const auto own = compute<ScalarOps>(single.scores(), single.index, problem);
  const auto dots = exact_dots(problem, range);
  for (std::size_t g = 0; g < 3; ++g) {
    const float* query = problem.query(3 + static_cast<int>(g));
    double centre = 0.0;
    for (int j = 0; j < 24; ++j) {
      centre += static_cast<double>(query[j]) * static_cast<double>(single.index.centre(1)[j]);
    }
    for (std::size_t i = 0; i < 200; ++i) {
      double dot = 0.0;
      for (int j = 0; j < 24; ++j) {
        const std::size_t at = Panels::place(model.index.list_of(1)[i], j, 24);
        dot +=
            static_cast<double>(query[j]) * static_cast<double>(model.index.centroids(1).data[at]);
      }
      REQUIRE(std::fabs(static_cast<double>(scores[g][i]) - dot) < 1e-4);
      REQUIRE(std::fabs(static_cast<double>(own[g][i]) - (dots[g][i] - centre)) < 1e-4);
    }
  }
}

TEST_CASE("InvertedFile.takes_whole_lists_of_largest_product_but_for_the_last") {
  const Problem<float> problem({.shape = {.head_dim = 24, .value_dim = 8}, .tokens = 400});
  auto index = std::move(*KeyClusters::create({.dim = 24, .lists = 20}));
  SerialExecutor executor;
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {10, 330}).ok());
  const Drawn drawn =
      draw_tokens(*InvertedFile::create({.tokens = 100}, ClusterScores(20)), problem, index);
  REQUIRE(drawn.tokens.size() == 100);
  std::vector<int> sizes(20);
  std::vector<int> taken(20);
  for (int i = 0; i < 320; ++i) ++sizes[index.list_of(0)[i]];
  for (const TokenId t : drawn.tokens) ++taken[index.list_of(0)[t - 10]];
  std::vector<double> products(20);
  for (std::size_t l = 0; l < 20; ++l) {
    for (int j = 0; j < 24; ++j) {
      products[l] +=
          static_cast<double>(problem.query(0)[j]) *
          static_cast<double>(index.centroids(0).data[Panels::place(static_cast<int>(l), j, 24)]);
    }
  }
  std::vector<std::size_t> order(20);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return products[a] > products[b]; });
  int room = 100;
  for (const std::size_t l : order) {
    CHECK(taken[l] == std::min(room, sizes[l]));
    room -= taken[l];
  }
  CHECK(room == 0);
}

TEST_CASE("SoftCollisions.are_a_softmax_over_all_buckets_of_each_table_times_the_norm") {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens, .query_scale = 0.4});
  const TokenRange range{.begin = 3, .end = 200};
  constexpr int kBits = 5;
  constexpr int kTables = 7;
  const SoftModel<kBits, kTables, false> model(problem, range);
  const double temperature = 0.2;
  const auto scores = compute<ScalarOps>(
      *SoftCollisions<SimHash>::create(model.family, temperature), model.index, problem);
  // <w, x> of plane b * L + l.
  const auto project = [&](const float* x, int plane) {
    double dot = 0.0;
    for (int j = 0; j < 24; ++j) {
      dot += static_cast<double>(model.family.plane(plane, j)) * static_cast<double>(x[j]);
    }
    return dot;
  };
  for (int g = 0; g < 3; ++g) {
    for (TokenId t = range.begin; t < range.end; ++t) {
      double sum = 0.0;
      for (int l = 0; l < kTables; ++l) {
        double logits[1 << kBits] = {};
        int own = 0;
        for (int b = 0; b < kBits; ++b) {
          const int plane = b * kTables + l;
          const double margin = std::tanh(project(problem.query(3 + g), plane)) / std::sqrt(24.0);
          own |= project(problem.source().key(1, t), plane) > 0.0 ? 1 << b : 0;
          for (int r = 0; r < 1 << kBits; ++r) {
            logits[r] += (((r >> b) & 1) != 0 ? margin : -margin) / temperature;
          }
        }
        double all = 0.0;
        for (const double logit : logits) all += std::exp(logit);
        sum += std::exp(logits[own]) / all;
      }
      double norm = 0.0;
      for (int j = 0; j < 8; ++j) {
        const auto v = static_cast<double>(problem.source().value(1, t)[j]);
        norm += v * v;
      }
      const float found =
          scores[static_cast<std::size_t>(g)][static_cast<std::size_t>(t - range.begin)];
      REQUIRE(static_cast<double>(found) == doctest::Approx(sum * std::sqrt(norm)).epsilon(1e-5));
    }
  }
}

TEST_CASE("SoftCollisions.of_a_hot_query_count_and_of_a_cold_one_match") {
  // At high temperatures all buckets are alike, at low ones only the query's own remains.
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  const SoftModel<3, 40, true> model(problem, {0, 300});
  const auto flat =
      compute<ScalarOps>(*SoftCollisions<SimHash>::create(model.family, 1e9), model.index, problem);
  const auto hard = compute<ScalarOps>(*SoftCollisions<SimHash>::create(model.family, 1e-6),
                                       model.index, problem);
  const float* norms = model.index.value_norms(0, 1);
  int matches = 0;
  for (std::size_t i = 0; i < 300; ++i) {
    CHECK(flat[0][i] == doctest::Approx(40.0F / 8.0F * norms[i]).epsilon(1e-5));
    const float count = hard[0][i] / norms[i];
    CHECK(count == doctest::Approx(std::round(count)).epsilon(1e-3));
    matches += static_cast<int>(std::lround(count));
  }
  CHECK(matches > 0);
  for (const double temperature : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN(),
                                   std::numeric_limits<double>::infinity()}) {
    CHECK(SoftCollisions<SimHash>::create(model.family, temperature).status().code() ==
          ErrorCode::kInvalidArgument);
  }
}

template <bool kGroupSum>
void check_agreements() {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  const TokenRange range{.begin = 3, .end = 600};
  const AgreementModel<70, kGroupSum> model(problem, range);
  const auto scores = compute<ScalarOps>(model.scores(), model.index, problem);
  const auto sign = [&](const float* x, int plane) {
    double dot = 0.0;
    for (int j = 0; j < 24; ++j) {
      dot += static_cast<double>(model.planes[static_cast<std::size_t>((70 + plane) * 24 + j)]) *
             static_cast<double>(x[j]);
    }
    return dot > 0.0;
  };
  for (TokenId t = range.begin; t < range.end; ++t) {
    int agree[3] = {};
    for (int g = 0; g < 3; ++g) {
      for (int b = 0; b < 70; ++b) {
        agree[g] += sign(problem.query(3 + g), b) == sign(problem.source().key(1, t), b) ? 1 : 0;
      }
    }
    for (std::size_t g = 0; g < 3; ++g) {
      const int expected = kGroupSum ? agree[0] + agree[1] + agree[2] : agree[g];
      REQUIRE(scores[g][static_cast<std::size_t>(t - range.begin)] == static_cast<float>(expected));
    }
  }
}

TEST_CASE("AgreementScores.count_the_bits_that_are_alike_for_a_head_or_for_its_group") {
  check_agreements<false>();
  check_agreements<true>();
}

TEST_CASE("scores refuse an index that they are not for") {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  const PageModel<float, 16> pages(problem, {0, 100});
  CHECK(Quest::create({.tokens = 5}, PageScores(24))->supports(pages.index).ok());
  const Status wrong = Quest::create({.tokens = 5}, PageScores(23))->supports(pages.index);
  CHECK(wrong.code() == ErrorCode::kShapeMismatch);
  CHECK(std::string(wrong.message()) == "the scores are made for dimension 23, the index has 24");
  const CodeModel<1> one(problem, {0, 100});
  const CodeModel<4> four(problem, {0, 100});
  CHECK(TopP<CodeScores>::create(0.5, one.scores())->supports(one.index).ok());
  CHECK(TopP<CodeScores>::create(0.5, one.scores())->supports(four.index).code() ==
        ErrorCode::kShapeMismatch);
  const LabelModel<5> labels(problem, {0, 100});
  CHECK(DoubleSparsity::create({.tokens = 5}, LabelScores(5))->supports(labels.index).ok());
  const Status other =
      DoubleSparsity::create({.tokens = 5}, LabelScores(6))->supports(labels.index);
  CHECK(other.code() == ErrorCode::kShapeMismatch);
  CHECK(std::string(other.message()) ==
        "the scores are made for labels of 6 channels, the index has 5");
  const ClusterModel<9> clusters(problem, {0, 100});
  CHECK(InvertedFile::create({.tokens = 5}, ClusterScores(9))->supports(clusters.index).ok());
  const Status more =
      InvertedFile::create({.tokens = 5}, ClusterScores(8))->supports(clusters.index);
  CHECK(more.code() == ErrorCode::kShapeMismatch);
  CHECK(std::string(more.message()) == "the scores are made for up to 8 lists, the index has 9");
  const SoftModel<4, 5, false> soft(problem, {0, 100});
  const SoftModel<4, 5, false> twin(problem, {0, 100});
  const AgreementModel<8, false> agree(problem, {0, 100});
  const AgreementModel<8, false> agree_twin(problem, {0, 100});
  using Learned = TopK<AgreementScores>;
  CHECK(Learned::create({.tokens = 5}, agree.scores())->supports(agree.index).ok());
  const Status elsewhere =
      Learned::create({.tokens = 5}, agree.scores())->supports(agree_twin.index);
  CHECK(elsewhere.code() == ErrorCode::kShapeMismatch);
  CHECK(std::string(elsewhere.message()) ==
        "the scores are made for another hash than the index, which has 8 bits");
  using Socket = TopK<SoftCollisions<SimHash>>;
  CHECK(Socket::create({.tokens = 5}, soft.scores())->supports(soft.index).ok());
  CHECK(Socket::create({.tokens = 5}, soft.scores())->supports(twin.index).code() ==
        ErrorCode::kShapeMismatch);
}

TEST_CASE("rank_tokens.gives_ties_to_the_older_and_no_rank_to_what_is_not_a_number") {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float scores[] = {1.0F, kNan, 3.0F, -kInf, 3.0F, kInf, 1.0F, kNan};
  TokenId order[8];
  rank_tokens(scores, 8, 8, order);
  CHECK(std::vector<TokenId>(order, order + 8) == std::vector<TokenId>{5, 2, 4, 0, 6, 1, 3, 7});
  rank_tokens(scores, 8, 2, order);
  CHECK(order[0] == 5);
  CHECK(order[1] == 2);
  rank_tokens(scores, 0, 0, order);
}

TEST_CASE("Quest.takes_whole_pages_of_largest_bound_but_for_the_last") {
  const Problem<float> problem({.shape = {.head_dim = 24, .value_dim = 8}, .tokens = 400});
  auto index = std::move(*PageBounds<float>::create({.dim = 24, .page = 16}));
  SerialExecutor executor;
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {10, 330}).ok());
  const auto quest = Quest::create({.tokens = 40}, PageScores(24));
  const Drawn drawn = draw_tokens(*quest, problem, index);
  REQUIRE(drawn.tokens.size() == 40);
  std::vector<int> of_page(20);
  for (const TokenId t : drawn.tokens) ++of_page[static_cast<std::size_t>((t - 10) / 16)];
  CHECK(std::count(of_page.begin(), of_page.end(), 16) == 2);
  CHECK(std::count(of_page.begin(), of_page.end(), 8) == 1);
  CHECK(std::count(of_page.begin(), of_page.end(), 0) == 17);
}

TEST_CASE("TopP.takes_the_fewest_tokens_that_hold_p_of_each_heads_softmax") {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens, .query_scale = 2.0});
  const TokenRange range{.begin = 4, .end = 640};
  const RangeIndex index(range, 2, 24);
  for (const double p : {1e-9, 0.3, 0.9, 0.99, 1.0}) {
    CAPTURE(p);
    const auto top = TopP<>::create(p);
    REQUIRE(top.ok());
    const Drawn drawn = draw_tokens(*top, problem, index, {}, 1);
    CHECK(std::is_sorted(drawn.tokens.begin(), drawn.tokens.end()));
    const auto dots = exact_dots(problem, range);
    for (int g = 0; g < 3; ++g) {
      const auto own = drawn.of(g);
      double all = 0.0;
      double kept = 0.0;
      double smallest = std::numeric_limits<double>::infinity();
      double best_left = 0.0;
      for (TokenId t = range.begin; t < range.end; ++t) {
        const double weight = std::exp(
            dots[static_cast<std::size_t>(g)][static_cast<std::size_t>(t - 4)] / std::sqrt(24.0));
        all += weight;
        if (std::binary_search(own.begin(), own.end(), t)) {
          kept += weight;
          smallest = std::min(smallest, weight);
        } else {
          best_left = std::max(best_left, weight);
        }
      }
      CHECK(kept >= p * all * (1.0 - 1e-5));
      CHECK(kept - smallest <= p * all * (1.0 + 1e-5));
      CHECK(smallest >= best_left * (1.0 - 1e-5));
      CHECK(!own.empty());
    }
    for (const auto& row : drawn.log_pi) {
      CHECK(std::count(row.begin(), row.end(), 0.0F) == static_cast<std::ptrdiff_t>(row.size()));
    }
  }
}

TEST_CASE("TopP.of_an_empty_range_is_empty_and_of_no_share_is_refused") {
  const Problem<float> problem({.shape = kShape, .tokens = kTokens});
  CHECK(draw_tokens(*TopP<>::create(0.5), problem, RangeIndex({9, 9}, 2, 24)).tokens.empty());
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double p : {0.0, -0.5, 1.0001, nan}) {
    const auto refused = TopP<>::create(p);
    CHECK(refused.status().code() == ErrorCode::kInvalidArgument);
    CHECK(std::string(refused.status().message()).find("must lie in (0, 1]") != std::string::npos);
  }
}

}  // namespace

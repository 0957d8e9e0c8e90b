// SPDX-License-Identifier: Apache-2.0
// Product quantisation: the axes, the codes and factors, and draws by them.
#include "magicpig/hash/product_quantiser.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "backends.hpp"
#include "magicpig/attention.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "same_index.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

using Index = Signatures<ProductQuantiser>;

constexpr TokenId kTokens = 900;
constexpr TokenRange kRange{.begin = 4, .end = 880};

// Keys with far more variance along some dimensions than along others, which depend on each other.
void stretch(Problem<float>& problem) {
  const Shape& shape = problem.shape();
  for (int h = 0; h < shape.kv_heads; ++h) {
    for (TokenId t = 0; t < problem.tokens(); ++t) {
      float* key = problem.key(h, t);
      for (int j = 0; j < shape.head_dim; ++j) {
        key[j] = key[j] * 6.0F / static_cast<float>(1 + j) + (j > 0 ? 0.5F * key[j - 1] : 0.0F);
      }
    }
  }
}

struct Setting {
  explicit Setting(int dim, double query_scale = 1.0)
      : problem({.shape = {.query_heads = 4, .kv_heads = 2, .head_dim = dim, .value_dim = 8},
                 .tokens = kTokens,
                 .query_scale = query_scale,
                 .key_offset = 0.5}) {
    stretch(problem);
  }

  [[nodiscard]] ProductQuantiser train(const ProductQuantiserConfig& config,
                                       int workers = 1) const {
    const auto pool = ThreadPool::create(workers);
    REQUIRE(pool.ok());
    auto made =
        ProductQuantiser::train(make_backend<ScalarOps>(**pool), problem.source(), kRange, config);
    REQUIRE(made.ok());
    return std::move(*made);
  }

  template <class Ops = ScalarOps>
  [[nodiscard]] Index index(const ProductQuantiser& quantiser) const {
    auto made = Index::create(quantiser, {.kv_heads = 2, .value_dim = 8});
    REQUIRE(made.ok());
    SerialExecutor executor;
    REQUIRE(made->build(make_backend<Ops>(executor), problem.source(), kRange).ok());
    return std::move(*made);
  }

  Problem<float> problem;
};

// f <x, q> of a token, by what the quantiser says of a query.
double estimate(const Index& index, int kv_head, TokenId token, const float* query) {
  const QuantiserShape shape = index.quantiser().shape();
  std::vector<std::int32_t> scratch(static_cast<std::size_t>(shape.query_scratch));
  std::vector<std::int32_t> sums(static_cast<std::size_t>(shape.rows) * 16);
  const double unit = index.quantiser().tabulate(kv_head, query, scratch.data(), sums.data());
  const TokenId at = token - index.indexed().begin;
  const SignatureSegment& segment = index.segment(at / kSignatureSegment, kv_head);
  const std::uint8_t* block =
      segment.codes.data() +
      std::int64_t{at % kSignatureSegment / kSignatureBlock} * shape.rows * 64;
  double sum = 0.0;
  for (int r = 0; r < shape.rows; ++r) {
    const int bits = code_bits(block + std::int64_t{r} * 64, CodePlace::of(at % kSignatureBlock));
    sum += sums[static_cast<std::size_t>(r * 16 + bits)];
  }
  const float factor = to_float(segment.factors.data()[at % kSignatureSegment]);
  return static_cast<double>(factor) * unit * sum;
}

// k - c of a token.
std::vector<float> centred(const Setting& s, const Index& index, int kv_head, TokenId token) {
  std::vector<float> key(static_cast<std::size_t>(index.dim()));
  for (std::size_t j = 0; j < key.size(); ++j) {
    key[j] = s.problem.source().key(kv_head, token)[j] - index.centre(kv_head)[j];
  }
  return key;
}

double dot(const std::vector<float>& a, const float* b) {
  double sum = 0.0;
  for (std::size_t j = 0; j < a.size(); ++j) {
    sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  }
  return sum;
}

TEST_CASE("PrincipalAxes.are_eigenvectors_of_length_1_by_falling_eigenvalue") {
  Random random(501);
  for (const int n : {1, 2, 8, 33}) {
    CAPTURE(n);
    const auto size = static_cast<std::size_t>(n);
    std::vector<double> root(size * size);
    for (double& x : root) x = random.normal();
    std::vector<float> matrix(size * size);
    for (std::size_t i = 0; i < size; ++i) {
      for (std::size_t j = 0; j < size; ++j) {
        double sum = 0.0;
        for (std::size_t k = 0; k < size; ++k) sum += root[i * size + k] * root[j * size + k];
        matrix[i * size + j] = static_cast<float>(sum);
      }
    }
    std::vector<float> used = matrix;
    std::vector<float> axes(size * size);
    PrincipalAxes(used.data(), axes.data(), n);
    double before = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < size; ++i) {
      double value = 0.0;
      std::vector<double> image(size);
      for (std::size_t j = 0; j < size; ++j) {
        for (std::size_t k = 0; k < size; ++k) {
          image[j] +=
              static_cast<double>(matrix[j * size + k]) * static_cast<double>(axes[i * size + k]);
        }
        value += image[j] * static_cast<double>(axes[i * size + j]);
      }
      CHECK(value <= before * (1.0 + 1e-5));
      before = value;
      for (std::size_t j = 0; j < size; ++j) {
        const double off = image[j] - value * static_cast<double>(axes[i * size + j]);
        CHECK(std::abs(off) < 1e-4 * static_cast<double>(2 * n));
      }
      for (std::size_t k = 0; k <= i; ++k) {
        double product = 0.0;
        for (std::size_t j = 0; j < size; ++j) {
          product +=
              static_cast<double>(axes[i * size + j]) * static_cast<double>(axes[k * size + j]);
        }
        CHECK(std::abs(product - (i == k ? 1.0 : 0.0)) < 1e-4);
      }
    }
  }
}

// The factor makes it so: f <x, y> = |y|^2, unless it is at one of its bounds.
TEST_CASE("ProductQuantiser.gives_each_key_its_squared_norm_as_product_with_itself") {
  for (const int dim : {1, 3, 24, 65, 257}) {
    for (const int bits : {1, 2, 3, 4}) {
      CAPTURE(dim);
      CAPTURE(bits);
      const Setting s(dim);
      const ProductQuantiser quantiser = s.train({.kv_heads = 2, .bits = bits});
      const Index index = s.index(quantiser);
      int off = 0;
      for (TokenId t = kRange.begin; t < kRange.end; t += 13) {
        const std::vector<float> key = centred(s, index, 1, t);
        const double square = dot(key, key.data());
        off +=
            std::abs(estimate(index, 1, t, key.data()) / square - 1.0) > (dim < 200 ? 0.03 : 0.06);
      }
      CHECK(off <= (dim < 4 ? 20 : 2));  // of 68; those at a bound, or near 0
    }
  }
}

TEST_CASE("ProductQuantiser.estimates_better_than_a_random_rotation_where_dimensions_differ") {
  const Setting s(64);
  for (const int bits : {1, 2}) {
    CAPTURE(bits);
    const ProductQuantiser trained = s.train({.kv_heads = 2, .bits = bits});
    const Index index = s.index(trained);
    const auto random = HadamardQuantiser::create(64, bits, 3);
    REQUIRE(random.ok());
    auto other = Signatures<HadamardQuantiser>::create(*random, {.kv_heads = 2});
    SerialExecutor executor;
    REQUIRE(other->build(make_backend<ScalarOps>(executor), s.problem.source(), kRange).ok());
    double own_square = 0.0;
    double other_square = 0.0;
    double exact_square = 0.0;
    std::vector<std::int32_t> scratch(64);
    std::vector<std::int32_t> sums(static_cast<std::size_t>(random->shape().rows) * 16);
    for (int g = 0; g < 4; ++g) {
      const int h = g / 2;
      const float* query = s.problem.query(g);
      const double unit = random->tabulate(h, query, scratch.data(), sums.data());
      for (TokenId t = kRange.begin; t < kRange.end; ++t) {
        const double exact = dot(centred(s, index, h, t), query);
        const double own = estimate(index, h, t, query) - exact;
        const TokenId at = t - kRange.begin;
        const SignatureSegment& segment = other->segment(0, h);
        double sum = 0.0;
        for (int r = 0; r < random->shape().rows; ++r) {
          const std::int64_t row = std::int64_t{at / kSignatureBlock} * random->shape().rows + r;
          const int code = code_bits(segment.codes.data() + row * 64, CodePlace::of(at % 128));
          sum += sums[static_cast<std::size_t>(r * 16 + code)];
        }
        const auto factor = static_cast<double>(to_float(segment.factors.data()[at]));
        own_square += own * own;
        other_square += (factor * unit * sum - exact) * (factor * unit * sum - exact);
        exact_square += exact * exact;
      }
    }
    CHECK(own_square < 0.5 * other_square);
    CHECK(own_square < 0.3 * exact_square);
  }
}

TEST_CASE("ProductQuantiser.takes_keys_far_beyond_those_that_it_was_trained_on") {
  Setting s(24);
  const ProductQuantiser quantiser = s.train({.kv_heads = 2, .bits = 2});
  for (int j = 0; j < 24; ++j) s.problem.key(1, 500)[j] *= 4096.0F;
  for (int j = 0; j < 24; ++j) s.problem.key(1, 501)[j] = j == 3 ? 3e38F : 0.0F;
  const Index index = s.index(quantiser);
  const std::vector<float> key = centred(s, index, 1, 500);
  CHECK(std::abs(estimate(index, 1, 500, key.data()) / dot(key, key.data()) - 1.0) < 0.1);
  CHECK(std::isfinite(to_float(index.segment(0, 1).factors.data()[501 - kRange.begin])));
}

TEST_CASE("ProductQuantiser.learns_the_same_with_any_number_of_workers_and_encodes_it_on_all") {
  const Setting s(40);
  for (const int bits : {1, 2, 3, 4}) {
    const ProductQuantiser one = s.train({.kv_heads = 2, .bits = bits, .seed = 9});
    const Index expected = s.index(one);
    for (const int workers : {2, 5}) {
      const ProductQuantiser other = s.train({.kv_heads = 2, .bits = bits, .seed = 9}, workers);
      for_each_backend([&]<class Ops>() {
        const Index index = s.index<Ops>(other);
        CHECK(index_difference(index, expected) == nullptr);
      });
    }
    const ProductQuantiser unlike = s.train({.kv_heads = 2, .bits = bits, .seed = 10});
    CHECK(index_difference(s.index(unlike), expected) != nullptr);
  }
}

// The normaliser and one coordinate of the weighted sum, over draws.
TEST_CASE("ProductQuantiser.leaves_sums_unbiased") {
  const Setting s(24, 0.5);
  const Shape& shape = s.problem.shape();
  const ProductQuantiser quantiser = s.train({.kv_heads = 2, .bits = 1, .samples = 50});
  const Index index = s.index(quantiser);
  const auto sampler = Systematic::create(quantiser, {.budget = {.fraction = 0.1}});
  REQUIRE(sampler.ok());
  const int head = 3;
  const OracleState exact = oracle_attention(
      s.problem.source(),
      {.data = s.problem.query(head), .kv_head = 1, .scale = 1.0 / std::sqrt(24.0)},
      every_token({.begin = 0, .end = kTokens}));
  const auto source = s.problem.source();
  SerialExecutor executor;
  const auto run = [&](const auto& estimator, int draws) {
    const DecodePlan<Systematic, std::remove_cvref_t<decltype(estimator)>> plan{
        .shape = shape, .sampler = &*sampler, .estimator = estimator, .exact_below = 0};
    Outputs outputs(shape);
    auto request = make_request(s.problem, source, &index, outputs);
    request.seed = first_seed();
    std::pair<Sample, Sample> sums;
    for (int d = 0; d < draws; ++d) {
      request.step = static_cast<std::uint32_t>(d);
      REQUIRE(decode_one<ScalarOps>(executor, plan, request).ok());
      const double normaliser = std::exp(static_cast<double>(outputs.lse(head)) - exact.lse);
      sums.first.add(normaliser);
      sums.second.add(normaliser * static_cast<double>(outputs.out(head)[2]));
    }
    return sums;
  };
  INFO("seed ", first_seed());
  const auto right = run(SelfNormalised{}, replications(4000));
  CHECK(std::abs(right.first.z(1.0)) < kZ);
  CHECK(std::abs(right.second.z(exact.out[2])) < kZ);
  CHECK(std::abs(run(Uncorrected{}, replications(1000)).first.z(1.0)) > 10.0);  // a control
}

// FNV-1a of codes and factors, which no library of functions has a say in.
TEST_CASE("ProductQuantiser.makes_the_same_codes_on_every_machine") {
  Problem<float> problem(
      {.shape = {.query_heads = 1, .kv_heads = 1, .head_dim = 48, .value_dim = 1}, .tokens = 700});
  auto number = [state = std::uint32_t{1}]() mutable {
    state = state * 1664525U + 1013904223U;
    return static_cast<float>(state >> 16) / 16384.0F - 2.0F;
  };
  for (TokenId t = 0; t < 700; ++t) {
    for (int j = 0; j < 48; ++j) {
      problem.key(0, t)[j] =
          number() * static_cast<float>(j % 7 + 1) + (j > 0 ? problem.key(0, t)[j - 1] : 0.0F);
    }
  }
  std::uint64_t hash = 14695981039346656037ULL;
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  for (const int bits : {1, 2, 3, 4}) {
    const auto quantiser =
        ProductQuantiser::train(backend, problem.source(), {0, 700}, {.bits = bits});
    REQUIRE(quantiser.ok());
    auto index = Index::create(*quantiser, {});
    REQUIRE(index->build(backend, problem.source(), {0, 700}).ok());
    const SignatureSegment& segment = index->segment(0, 0);
    const auto take = [&](std::uint32_t x) { hash = (hash ^ x) * 1099511628211ULL; };
    for (int i = 0; i < 700 / 128 * quantiser->shape().rows * 64; ++i)
      take(segment.codes.data()[i]);
    for (int t = 0; t < 700; ++t) take(segment.factors.data()[t].bits);
  }
  CHECK(hash == 12178389956281676248ULL);
}

TEST_CASE("ProductQuantiser.takes_keys_that_are_all_equal") {
  Problem<float> problem(
      {.shape = {.query_heads = 2, .kv_heads = 1, .head_dim = 16, .value_dim = 4}, .tokens = 300});
  for (TokenId t = 0; t < 300; ++t) {
    for (int j = 0; j < 16; ++j) problem.key(0, t)[j] = 1.5F;
  }
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const auto quantiser = ProductQuantiser::train(backend, problem.source(), {0, 300}, {});
  REQUIRE(quantiser.ok());
  auto index = Index::create(*quantiser, {});
  REQUIRE(index->build(backend, problem.source(), {0, 300}).ok());
  const auto sampler = Systematic::create(*quantiser, {.budget = {.tokens = 60}});
  const Drawn drawn = draw_tokens(*sampler, problem, *index, {});
  CHECK(drawn.tokens.size() >= 50);
  CHECK(drawn.tokens.size() <= 70);
}

TEST_CASE("ProductQuantiser.refuses_what_it_cannot_learn_from") {
  Problem<float> problem(
      {.shape = {.query_heads = 2, .kv_heads = 2, .head_dim = 16, .value_dim = 4}, .tokens = 100});
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const auto code = [&](TokenRange range, const ProductQuantiserConfig& config) {
    return ProductQuantiser::train(backend, problem.source(), range, config).status().code();
  };
  const TokenRange all{.begin = 0, .end = 100};
  CHECK(code(all, {.kv_heads = 2}) == ErrorCode::kOk);
  for (const ProductQuantiserConfig config :
       {ProductQuantiserConfig{.kv_heads = 0}, ProductQuantiserConfig{.kv_heads = 2, .bits = 0},
        ProductQuantiserConfig{.kv_heads = 2, .bits = 5},
        ProductQuantiserConfig{.kv_heads = 2, .samples = 0},
        ProductQuantiserConfig{.kv_heads = 2, .samples = 65537},
        ProductQuantiserConfig{.kv_heads = 2, .rounds = -1}}) {
    CHECK(code(all, config) == ErrorCode::kInvalidArgument);
  }
  CHECK(code(all, {.kv_heads = 1}) == ErrorCode::kShapeMismatch);
  for (const TokenRange range :
       {TokenRange{.begin = 0, .end = 0}, TokenRange{.begin = -1, .end = 5},
        TokenRange{.begin = 5, .end = 3}, TokenRange{.begin = 0, .end = 101}}) {
    CHECK(code(range, {.kv_heads = 2}) == ErrorCode::kInvalidArgument);
  }
  const Problem<float> wide(
      {.shape = {.query_heads = 1, .kv_heads = 1, .head_dim = 513, .value_dim = 1}, .tokens = 9});
  CHECK(ProductQuantiser::train(backend, wide.source(), {0, 9}, {}).status().code() ==
        ErrorCode::kShapeMismatch);
  problem.key(1, 42)[3] = std::numeric_limits<float>::quiet_NaN();
  const Status status =
      ProductQuantiser::train(backend, problem.source(), all, {.kv_heads = 2}).status();
  CHECK(status.code() == ErrorCode::kNonFinite);
  CHECK(std::string(status.message()) == "the key of token 42, KV head 1 is not finite");

  const auto quantiser =
      ProductQuantiser::train(backend, problem.source(), {0, 42}, {.kv_heads = 2});
  REQUIRE(quantiser.ok());
  CHECK(Index::create(*quantiser, {.kv_heads = 1}).status().code() == ErrorCode::kShapeMismatch);
}

}  // namespace

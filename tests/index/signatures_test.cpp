// SPDX-License-Identifier: Apache-2.0
// Signatures: building, growing and cutting them, and what they estimate.
#include "magicpig/index/signatures.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "problem.hpp"
#include "same_index.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

using Index = Signatures<HadamardQuantiser>;

HadamardQuantiser make_quantiser(int dim, int bits = 2, std::uint64_t seed = 1) {
  auto quantiser = HadamardQuantiser::create(dim, bits, seed);
  REQUIRE(quantiser.ok());
  return std::move(*quantiser);
}

Index make_index(const HadamardQuantiser& quantiser, const SignaturesConfig& config) {
  auto index = Index::create(quantiser, config);
  REQUIRE(index.ok());
  return std::move(*index);
}

// The code of one token, dimension by dimension.
std::vector<int> codes_of(const Index& index, int kv_head, TokenId token) {
  const TokenId local = token - index.indexed().begin;
  const auto& segment = index.segment(local / kSignatureSegment, kv_head);
  const int at = local % kSignatureSegment;
  const int padded = index.quantiser().rotation().padded();
  const std::uint8_t* block =
      segment.codes.data() + std::int64_t{at / kSignatureBlock} * index.rows_per_block() * 64;
  const CodePlace place = CodePlace::of(at % kSignatureBlock);
  std::vector<int> codes(static_cast<std::size_t>(padded));
  for (int p = 0; p < index.quantiser().levels().bits(); ++p) {
    for (int j = 0; j < padded; ++j) {
      const int half = code_bits(block + (p * padded / 4 + j / 4) * 64, place);
      codes[static_cast<std::size_t>(j)] |= ((half >> (j % 4)) & 1) << p;
    }
  }
  return codes;
}

float factor_of(const Index& index, int kv_head, TokenId token) {
  const TokenId local = token - index.indexed().begin;
  return to_float(
      index.segment(local / kSignatureSegment, kv_head).factors.data()[local % kSignatureSegment]);
}

// Of the tokens that a segment has.
float largest_of(const Index& index, int number, int kv_head) {
  const TokenId first = index.indexed().begin + number * kSignatureSegment;
  float largest = 0.0F;
  for (TokenId t = first; t < first + index.segment_tokens(number); ++t) {
    largest = std::max(largest, factor_of(index, kv_head, t));
  }
  return largest;
}

constexpr Shape kShape{.query_heads = 4, .kv_heads = 2, .head_dim = 24, .value_dim = 8};

TEST_CASE("Signatures.quantise_each_rotated_coordinate_to_its_nearest_level") {
  const Problem<float> problem({.shape = kShape, .tokens = 100, .key_offset = 2.0});
  SerialExecutor executor;
  for (int bits = 1; bits <= 4; ++bits) {
    const HadamardQuantiser quantiser = make_quantiser(24, bits);
    const HadamardRotation& rotation = quantiser.rotation();
    Index index = make_index(quantiser, {.kv_heads = 2});
    REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {3, 100}).ok());
    const Levels& levels = index.quantiser().levels();
    for (int h = 0; h < 2; ++h) {
      for (TokenId t = 3; t < 100; ++t) {
        std::vector<float> centred(24);
        for (std::size_t j = 0; j < 24; ++j) {
          centred[j] = problem.source().key(h, t)[j] - index.centre(h)[j];
        }
        std::vector<std::int32_t> rotated(24);
        const Rotated result = rotation.rotate(centred.data(), rotated.data());
        const double sigma = std::sqrt(static_cast<double>(result.square) / 24.0);
        const std::vector<int> codes = codes_of(index, h, t);
        double dot = 0.0;
        for (std::size_t j = 0; j < 24; ++j) {
          const double x = rotated[j] / sigma * (1 << Levels::kFraction);
          int best = 0;
          for (int c = 0; c < levels.count(); ++c) {
            if (std::abs(x - levels.value(c)) < std::abs(x - levels.value(best))) best = c;
          }
          const double chosen = std::abs(x - levels.value(codes[j]));
          CHECK(chosen <= std::abs(x - levels.value(best)) + 2.0);  // bounds are whole numbers
          dot += levels.value(codes[j]) * 0x1p-14 * rotated[j];
        }
        // A bf16 has 8 bits.
        const double factor = result.unit * static_cast<double>(result.square) / dot;
        CHECK(static_cast<double>(factor_of(index, h, t)) ==
              doctest::Approx(factor).epsilon(0.004));
      }
    }
  }
}

TEST_CASE("Signatures.keep_the_norms_of_centred_values_in_sixteenths_of_a_power_of_2") {
  Problem<bf16> problem({.shape = kShape, .tokens = 60});
  for (int j = 0; j < 8; ++j) problem.value(0, 7)[j] = to_bf16(1e30F);
  problem.value(1, 9)[2] = to_bf16(std::numeric_limits<float>::infinity());
  const HadamardQuantiser quantiser = make_quantiser(24);
  SerialExecutor executor;
  Index index = make_index(quantiser, {.kv_heads = 2, .value_dim = 8});
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {10, 60}).ok());
  for (int h = 0; h < 2; ++h) {
    double mean[8] = {};
    for (TokenId t = 10; t < 60; ++t) {
      for (int j = 0; j < 8; ++j) {
        mean[j] += static_cast<double>(to_float(problem.source().value(h, t)[j])) / 50.0;
      }
    }
    for (TokenId t = 10; t < 60; ++t) {
      double square = 0.0;
      for (int j = 0; j < 8; ++j) {
        const double d = static_cast<double>(to_float(problem.source().value(h, t)[j])) - mean[j];
        square += d * d;
      }
      const int stored = index.segment(0, h).value_norms.data()[t - 10];
      // The bounds are the nearest doubles, the mean of floats is rounded once.
      CHECK(std::abs(stored - 8.0 * std::log2(square)) < 0.501);
    }
  }
  // Not finite: the largest there is, and the keys are taken over all the same.
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 60}).ok());
  CHECK(index.segment(0, 1).value_norms.data()[9] == 2048);
  // Values that are their own mean: the smallest there is.
  for (TokenId t = 0; t < 60; ++t) {
    for (int j = 0; j < 8; ++j) problem.value(1, t)[j] = to_bf16(0.5F);
  }
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 60}).ok());
  CHECK(index.segment(0, 1).value_norms.data()[9] == -2048);
  const Problem<float> other(
      {.shape = {.query_heads = 4, .kv_heads = 2, .head_dim = 24, .value_dim = 9}, .tokens = 60});
  CHECK(index.build(make_backend<ScalarOps>(executor), other.source(), {0, 60}).code() ==
        ErrorCode::kShapeMismatch);
}

TEST_CASE("Signatures.appended_token_by_token_and_cut_are_those_built_at_once") {
  const Shape shape{.query_heads = 2, .kv_heads = 2, .head_dim = 9, .value_dim = 4};
  const TokenId tokens = kSignatureSegment + 100;
  const Problem<fp16> problem({.shape = shape, .tokens = tokens});
  const HadamardQuantiser quantiser = make_quantiser(9, 3);
  auto pool = ThreadPool::create(3);
  REQUIRE(pool.ok());
  const auto backend = make_backend<ScalarOps>(**pool);
  Index whole = make_index(quantiser, {.kv_heads = 2});
  REQUIRE(whole.build(backend, problem.source(), {.begin = 5, .end = tokens}).ok());

  Index grown = make_index(quantiser, {.kv_heads = 2});
  REQUIRE(grown.build(backend, problem.source(), {.begin = 5, .end = tokens}).ok());
  for (const TokenId cut : {kSignatureSegment + 60, kSignatureSegment + 5, 4000, 40}) {
    CAPTURE(cut);
    REQUIRE(grown.truncate(cut).ok());
    CHECK(grown.indexed() == TokenRange{.begin = 5, .end = cut});
    TokenId end = cut;
    for (; end < cut + 40 && end < tokens; ++end) {
      REQUIRE(grown.append(backend, problem.source(), end).ok());
    }
    REQUIRE(grown.append(backend, problem.source(), tokens).ok());
    CHECK(index_difference(grown, whole) == nullptr);
    CHECK(grown.bytes() == whole.bytes());
  }
}

// Keys that grow with their number, so that every cut takes the largest away.
TEST_CASE("Signatures.know_the_largest_factor_of_each_segment_however_they_came_to_be") {
  const Shape shape{.query_heads = 2, .kv_heads = 2, .head_dim = 8, .value_dim = 4};
  const TokenId tokens = 2 * kSignatureSegment + 300;
  Problem<float> problem({.shape = shape, .tokens = tokens});
  for (int h = 0; h < 2; ++h) {
    for (TokenId t = 0; t < tokens; ++t) {
      for (int j = 0; j < 8; ++j) {
        problem.key(h, t)[j] *= (h == 0 ? 1.0F : 3.0F) * static_cast<float>(1 + t / 16);
      }
    }
  }
  const HadamardQuantiser quantiser = make_quantiser(8);
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const auto check_largest = [](const Index& index) {
    for (int number = 0; number < index.segment_count(); ++number) {
      for (int h = 0; h < 2; ++h) {
        CHECK(index.segment(number, h).largest_factor == largest_of(index, number, h));
        CHECK(index.segment(number, h).largest_factor > 0.0F);
      }
    }
  };
  Index whole = make_index(quantiser, {.kv_heads = 2});
  REQUIRE(whole.build(backend, problem.source(), {.begin = 3, .end = tokens}).ok());
  check_largest(whole);
  Index grown = make_index(quantiser, {.kv_heads = 2});
  REQUIRE(grown.build(backend, problem.source(), {.begin = 3, .end = tokens}).ok());
  for (const TokenId cut : {2 * kSignatureSegment + 10, 2 * kSignatureSegment + 3,
                            kSignatureSegment + 4, kSignatureSegment + 3, 700, 4}) {
    CAPTURE(cut);
    REQUIRE(grown.truncate(cut).ok());
    check_largest(grown);
    for (TokenId end = cut; end < tokens; end += end < cut + 5 ? 1 : 997) {
      REQUIRE(grown.append(backend, problem.source(), end).ok());
      if (end < cut + 5) check_largest(grown);
    }
    check_largest(grown);
    REQUIRE(grown.append(backend, problem.source(), tokens).ok());
    CHECK(index_difference(grown, whole) == nullptr);
  }
}

TEST_CASE("Signatures.hand_out_blocks_of_every_segment_with_what_belongs_to_them") {
  const Shape shape{.query_heads = 2, .kv_heads = 2, .head_dim = 12, .value_dim = 4};
  const TokenId tokens = 7 + 2 * kSignatureSegment + 300;
  const Problem<float> problem({.shape = shape, .tokens = tokens});
  const HadamardQuantiser quantiser = make_quantiser(12, 3);
  SerialExecutor executor;
  for (const int value_dim : {0, 4}) {
    Index index = make_index(quantiser, {.kv_heads = 2, .value_dim = value_dim});
    REQUIRE(
        index
            .build(make_backend<ScalarOps>(executor), problem.source(), {.begin = 7, .end = tokens})
            .ok());
    constexpr int kBlocks = kSignatureSegment / kSignatureBlock;
    REQUIRE(index.block_count() == 2 * kBlocks + 3);
    for (int h = 0; h < 2; ++h) {
      int wrong = 0;
      for (int b = 0; b < index.block_count(); ++b) {
        const int count = b % kBlocks == kBlocks - 1 || b + 1 == index.block_count() ? 1 : 2;
        const CodeBlocks blocks = index.blocks(b, count, h);
        const SignatureSegment& segment = index.segment(b / kBlocks, h);
        wrong += blocks.blocks != count || blocks.rows != index.rows_per_block();
        // 2^15 or little less of the largest factor.
        const float most = blocks.factor_scale * segment.largest_factor;
        wrong += !(most > 32766.0F && most <= 32768.0F);
        wrong += (blocks.norms != nullptr) != (value_dim != 0);
        const int first = b % kBlocks * kSignatureBlock;
        wrong += blocks.codes != segment.codes.data() + first / kSignatureBlock * blocks.rows * 64;
        for (int i = 0; i < count * kSignatureBlock; ++i) {
          const TokenId token = 7 + b * kSignatureBlock + i;
          if (token >= tokens) break;
          wrong += to_float(blocks.factors[i]) != factor_of(index, h, token);
          if (value_dim != 0) wrong += blocks.norms[i] != segment.value_norms.data()[first + i];
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("Signatures.place_each_token_of_a_block_in_halves_of_bytes_of_their_own") {
  bool taken[64][2] = {};
  for (int t = 0; t < kSignatureBlock; ++t) {
    CAPTURE(t);
    const CodePlace place = CodePlace::of(t);
    REQUIRE((place.byte >= 0 && place.byte < 64 && (place.upper == 0 || place.upper == 1)));
    CHECK_FALSE(taken[place.byte][place.upper]);
    taken[place.byte][place.upper] = true;
    CHECK(place.upper == (t >= 64 ? 1 : 0));
    CHECK(place.byte % 2 == (t % 64 >= 32 ? 1 : 0));
  }
}

TEST_CASE("Signatures.take_the_bytes_that_they_say") {
  CHECK(Index::bytes_per_token(make_quantiser(128, 1).shape(), true) == 20);
  CHECK(Index::bytes_per_token(make_quantiser(128, 2).shape(), false) == 34);
  const Shape shape{.query_heads = 1, .kv_heads = 1, .head_dim = 64, .value_dim = 4};
  const Problem<bf16> problem({.shape = shape, .tokens = 2 * kSignatureSegment});
  const HadamardQuantiser quantiser = make_quantiser(64);
  SerialExecutor executor;
  Index index = make_index(quantiser, {});
  REQUIRE(index
              .build(make_backend<ScalarOps>(executor), problem.source(),
                     {.begin = 0, .end = 2 * kSignatureSegment})
              .ok());
  CHECK(index.bytes() == std::size_t{2 * kSignatureSegment} * 18 + 64 * sizeof(float));
}

// Over rotations f <x, R q> has the mean <q, k - c>, and an error that falls with bits.
TEST_CASE("Signatures.estimate_inner_products_without_bias_over_rotations") {
  const int dim = 64;
  const Shape shape{.query_heads = 1, .kv_heads = 1, .head_dim = dim, .value_dim = 4};
  const Problem<float> problem({.shape = shape, .tokens = 33});
  SerialExecutor executor;
  double before = std::numeric_limits<double>::infinity();
  for (int bits = 1; bits <= 4; ++bits) {
    CAPTURE(bits);
    Sample error;
    const int seeds = replications(1500);
    for (int s = 0; s < seeds; ++s) {
      const HadamardQuantiser quantiser =
          make_quantiser(dim, bits, first_seed() + static_cast<std::uint64_t>(s));
      const HadamardRotation& rotation = quantiser.rotation();
      Index index = make_index(quantiser, {});
      REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 33}).ok());
      std::vector<std::int32_t> rotated(static_cast<std::size_t>(dim));
      const Rotated query = rotation.rotate(problem.query(0), rotated.data());
      const TokenId token = 32;
      const std::vector<int> codes = codes_of(index, 0, token);
      double estimate = 0.0;
      double exact = 0.0;
      for (std::size_t j = 0; j < codes.size(); ++j) {
        const double level = quantiser.levels().value(codes[j]) * 0x1p-14;
        estimate += level * query.unit * rotated[j];
        exact += static_cast<double>(problem.query(0)[j]) *
                 static_cast<double>(problem.source().key(0, token)[j] - index.centre(0)[j]);
      }
      error.add(estimate * static_cast<double>(factor_of(index, 0, token)) - exact);
    }
    // The factor's rounding to bf16 is a bias of up to 2^-9 of an inner product of size 8.
    CHECK(std::abs(error.mean()) < kZ * error.standard_error() + 8.0 / 512);
    CHECK(error.variance() < before / 2.0);
    before = error.variance();
  }
}

TEST_CASE("Signatures.of_equal_keys_have_factor_0") {
  Problem<float> problem({.shape = kShape, .tokens = 40});
  for (TokenId t = 0; t < 40; ++t) {
    for (int h = 0; h < 2; ++h) {
      for (int j = 0; j < 24; ++j) problem.key(h, t)[j] = 0.5F;
    }
  }
  const HadamardQuantiser quantiser = make_quantiser(24);
  SerialExecutor executor;
  Index index = make_index(quantiser, {.kv_heads = 2});
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 40}).ok());
  for (TokenId t = 0; t < 40; ++t) CHECK(factor_of(index, 1, t) == 0.0F);
}

TEST_CASE("Signatures.refuse_keys_that_are_not_finite_and_stay_as_they_were") {
  Problem<float> problem({.shape = kShape, .tokens = 90});
  const HadamardQuantiser quantiser = make_quantiser(24);
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Index index = make_index(quantiser, {.kv_heads = 2});
  Index before = make_index(quantiser, {.kv_heads = 2});
  REQUIRE(index.build(backend, problem.source(), {0, 50}).ok());
  REQUIRE(before.build(backend, problem.source(), {0, 50}).ok());
  const float kept = problem.key(1, 60)[3];
  problem.key(1, 60)[3] = std::numeric_limits<float>::quiet_NaN();
  const Status status = index.append(backend, problem.source(), 90);
  CHECK(status.code() == ErrorCode::kNonFinite);
  CHECK(std::string(status.message()) == "the key of token 60, KV head 1 is not finite");
  CHECK(index_difference(index, before) == nullptr);
  CHECK(index.build(backend, problem.source(), {0, 90}).code() == ErrorCode::kNonFinite);
  CHECK(index_difference(index, before) == nullptr);
  problem.key(1, 60)[3] = kept;
  REQUIRE(index.append(backend, problem.source(), 90).ok());
  REQUIRE(before.append(backend, problem.source(), 90).ok());
  CHECK(index_difference(index, before) == nullptr);
}

TEST_CASE("Signatures.refuse_more_tokens_than_segments_can_count") {
  // Refused before a key is read: there are none.
  const float somewhere = 0.0F;
  const TokenId tokens = std::numeric_limits<TokenId>::max();
  const auto source = StridedKeyValues<float>::head_major(&somewhere, &somewhere, kShape, tokens);
  REQUIRE(source.ok());
  const HadamardQuantiser quantiser = make_quantiser(24);
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Index index = make_index(quantiser, {.kv_heads = 2});
  const Status status = index.build(backend, *source, {.begin = 0, .end = tokens});
  CHECK(status.code() == ErrorCode::kInvalidArgument);
  CHECK(std::string(status.message()) ==
        "signatures end at token 2147479552 at the latest, not at 2147483647");
  // Few of them, but as far back.
  CHECK(index.build(backend, *source, {.begin = tokens - 100, .end = tokens}).code() ==
        ErrorCode::kInvalidArgument);
  CHECK(index.append(backend, *source, tokens).code() == ErrorCode::kInvalidArgument);
  CHECK(index.indexed().empty());
}

TEST_CASE("Signatures.refuse_what_is_out_of_bounds") {
  const HadamardQuantiser quantiser = make_quantiser(24);
  for (const SignaturesConfig config :
       {SignaturesConfig{.kv_heads = 0}, SignaturesConfig{.value_dim = -1}}) {
    CHECK(Index::create(quantiser, config).status().code() == ErrorCode::kInvalidArgument);
  }
  for (const int bits : {0, 5}) {
    CHECK(HadamardQuantiser::create(24, bits, 1).status().code() == ErrorCode::kInvalidArgument);
  }
  CHECK(HadamardQuantiser::create(0, 2, 1).status().code() == ErrorCode::kInvalidArgument);
  const Problem<float> problem({.shape = kShape, .tokens = 20});
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  Index index = make_index(quantiser, {.kv_heads = 2});
  CHECK(index.build(backend, problem.source(), {0, 21}).code() == ErrorCode::kInvalidArgument);
  CHECK(index.build(backend, problem.source(), {-1, 5}).code() == ErrorCode::kInvalidArgument);
  CHECK(index.truncate(-1).code() == ErrorCode::kInvalidArgument);
  Index other = make_index(quantiser, {.kv_heads = 1});
  CHECK(other.build(backend, problem.source(), {0, 20}).code() == ErrorCode::kShapeMismatch);
}

TEST_CASE("Signatures.of_an_empty_range_refuse_a_source_of_another_shape_and_take_their_own") {
  const Problem<float> problem({.shape = kShape, .tokens = 20});
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const HadamardQuantiser quantiser = make_quantiser(24);
  const HadamardQuantiser longer = make_quantiser(25);
  for (const TokenRange range : {TokenRange{0, 0}, TokenRange{5, 5}, TokenRange{20, 20}}) {
    CAPTURE(range.begin);
    Index heads = make_index(quantiser, {.kv_heads = 1});
    Index dims = make_index(longer, {.kv_heads = 2});
    Index values = make_index(quantiser, {.kv_heads = 2, .value_dim = 9});
    for (Index* index : {&heads, &dims, &values}) {
      CHECK(index->build(backend, problem.source(), range).code() == ErrorCode::kShapeMismatch);
    }
    Index right = make_index(quantiser, {.kv_heads = 2, .value_dim = 8});
    REQUIRE(right.build(backend, problem.source(), range).ok());
    CHECK(right.indexed() == range);
    CHECK(right.segment_count() == 0);
    CHECK(right.block_count() == 0);
  }
}

}  // namespace

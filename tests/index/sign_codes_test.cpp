// SPDX-License-Identifier: Apache-2.0
// Codes of learned hashes: what they are, how they follow a cache, and what they refuse.
#include "magicpig/index/sign_codes.hpp"

#include <doctest/doctest.h>

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
constexpr int kBits = 37;

LearnedHash make_hash() {
  Random random(3);
  std::vector<float> weights(2 * 9 * 5 + 2 * kBits * 9);
  for (float& w : weights) w = static_cast<float>(random.normal());
  const LearnedLayer layers[] = {
      {.in = 5, .out = 9, .weights = std::span(weights).first(90), .silu = true},
      {.in = 9, .out = kBits, .weights = std::span(weights).subspan(90)}};
  return std::move(*LearnedHash::create({.kv_heads = 2, .key_layers = layers}));
}

// Whether every token has the code of its key, hashed alone.
template <class T>
void check_codes(const SignCodes& index, const Problem<T>& problem) {
  const LearnedHash& hash = index.hash();
  std::vector<float> scratch(hash.scratch_floats(1));
  const TokenRange range = index.indexed();
  for (int h = 0; h < 2; ++h) {
    for (TokenId t = range.begin; t < range.end; ++t) {
      float key[5];
      for (int j = 0; j < 5; ++j) key[j] = to_float(problem.source().key(h, t)[j]);
      std::uint32_t code[2];
      hash.pack(hash.key_outputs<ScalarOps>(h, key, 1, scratch.data()), 1, code);
      const int block = (t - range.begin) / SignCodes::kBlock;
      const int at = (t - range.begin) % SignCodes::kBlock;
      REQUIRE(at < index.block_tokens(block));
      REQUIRE(index.codes(block, h)[2 * at] == code[0]);
      REQUIRE(index.codes(block, h)[2 * at + 1] == code[1]);
    }
  }
}

TEST_CASE_TEMPLATE("SignCodes.are_those_of_their_keys_with_any_workers", T, float, fp16) {
  const LearnedHash hash = make_hash();
  const Problem<T> problem({.shape = kShape, .tokens = 700});
  const auto pool = ThreadPool::create(3);
  SignCodes index(hash);
  CHECK(index.indexed().empty());
  CHECK(index.blocks() == 0);
  for (const TokenRange range : {TokenRange{0, 700}, {7, 519}, {3, 4}, {9, 9}}) {
    REQUIRE(index.build(make_backend<ScalarOps>(**pool), problem.source(), range).ok());
    CHECK(index.indexed() == range);
    CHECK(index.blocks() == (range.size() + 255) / 256);
    check_codes(index, problem);
  }
}

TEST_CASE("SignCodes.grow_and_shrink_with_a_cache") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const LearnedHash hash = make_hash();
  Problem<float> problem({.shape = kShape, .tokens = 900});
  SignCodes index(hash);
  REQUIRE(index.build(backend, problem.source(), {3, 3}).ok());
  for (TokenId end = 4; end <= 300; ++end) {
    REQUIRE(index.append(backend, problem.source(), end).ok());
  }
  check_codes(index, problem);
  REQUIRE(index.append(backend, problem.source(), 900).ok());
  CHECK(index.append(backend, problem.source(), 50).ok());
  CHECK(index.indexed() == TokenRange{3, 900});
  check_codes(index, problem);

  REQUIRE(index.truncate(400).ok());
  CHECK(index.indexed() == TokenRange{3, 400});
  CHECK(index.blocks() == 2);
  CHECK(index.block_tokens(1) == 397 - 256);
  // Other keys take the place of those that were forgotten.
  for (TokenId t = 400; t < 900; ++t) problem.key(1, t)[2] *= -2.0F;
  REQUIRE(index.append(backend, problem.source(), 800).ok());
  check_codes(index, problem);

  CHECK(index.truncate(-1).code() == ErrorCode::kInvalidArgument);
  CHECK(index.truncate(1000).ok());
  CHECK(index.indexed() == TokenRange{3, 800});
  CHECK(index.truncate(0).ok());
  CHECK(index.indexed() == TokenRange{3, 3});
  CHECK(index.blocks() == 0);
}

TEST_CASE("SignCodes.keep_what_they_had_when_something_is_refused") {
  SerialExecutor executor;
  const auto backend = make_backend<ScalarOps>(executor);
  const LearnedHash hash = make_hash();
  Problem<float> problem({.shape = kShape, .tokens = 400});
  SignCodes index(hash);
  REQUIRE(index.build(backend, problem.source(), {0, 270}).ok());
  for (const float x :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    problem.key(0, 350)[4] = x;
    problem.key(1, 330)[2] = x;
    const Status refused = index.append(backend, problem.source(), 400);
    CHECK(refused.code() == ErrorCode::kNonFinite);
    CHECK(std::string(refused.message()) == "the key of token 330, KV head 1 is not finite");
    CHECK(index.build(backend, problem.source(), {0, 400}).code() == ErrorCode::kNonFinite);
    CHECK(index.indexed() == TokenRange{0, 270});
    check_codes(index, problem);
  }
  CHECK(index.append(backend, problem.source(), 401).code() == ErrorCode::kInvalidArgument);
  CHECK(index.build(backend, problem.source(), {5, 4}).code() == ErrorCode::kInvalidArgument);
  const Problem<float> other({.shape = {.head_dim = 4, .value_dim = 4}, .tokens = 100});
  CHECK(index.build(backend, other.source(), {0, 10}).code() == ErrorCode::kShapeMismatch);
  CHECK(index.append(backend, problem.source(), 330).ok());
  check_codes(index, problem);
}

TEST_CASE("SignCodes.take_four_bytes_for_32_bits_of_a_token") {
  SerialExecutor executor;
  const LearnedHash hash = make_hash();
  const Problem<float> problem({.shape = kShape, .tokens = 512});
  SignCodes index(hash);
  REQUIRE(index.build(make_backend<ScalarOps>(executor), problem.source(), {0, 512}).ok());
  CHECK(index.bytes() == 512 * 2 * 8);
}

}  // namespace

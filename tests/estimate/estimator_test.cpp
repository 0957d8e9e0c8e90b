// SPDX-License-Identifier: Apache-2.0
// Weights of drawn tokens, and the inclusion probabilities that candidates carry.
#include "magicpig/estimate/estimator.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "magicpig/core/candidates.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/sample/defensive.hpp"

namespace {

using namespace magicpig;

const std::vector<float> kLogPi = {0.0F, -1e-6F, -0.5F, -9.2F, -40.0F, -80.0F};

TEST_CASE("SelfNormalised.weighs_a_token_by_the_inverse_of_its_probability") {
  std::vector<float> x = kLogPi;
  SelfNormalised{}.log_weight<ScalarOps>(x.data(), static_cast<int>(x.size()));
  for (std::size_t i = 0; i < x.size(); ++i) CHECK(x[i] == -kLogPi[i]);
}

TEST_CASE("Floored.adds_its_floor_to_the_probability") {
  for (const float floor : {1e-4F, 0.1F}) {
    std::vector<float> x = kLogPi;
    Floored{.floor = floor}.log_weight<ScalarOps>(x.data(), static_cast<int>(x.size()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double pi = std::exp(static_cast<double>(kLogPi[i]));
      // expf, a sum and logf, each within an ulp of values of size below 1 and 10.
      CHECK(std::abs(static_cast<double>(x[i]) + std::log(pi + static_cast<double>(floor))) < 2e-6);
    }
  }
}

TEST_CASE("Uncorrected.weighs_every_token_1") {
  std::vector<float> x = kLogPi;
  Uncorrected{}.log_weight<ScalarOps>(x.data(), static_cast<int>(x.size()));
  for (const float weight : x) CHECK(weight == 0.0F);
}

// Candidates 1 to 4 of a list, of which the first head reads the last two and the second all.
constexpr TokenId kTokens[] = {9, 12, 4, 7, 9, 12};
constexpr std::int32_t kPositions[] = {3, 4, 1, 2, 3, 4};
constexpr HeadReads kHeads[] = {{.row = 0, .at = 0, .count = 2}, {.row = 2, .at = 2, .count = 4}};
constexpr float kDots[6] = {};
const CandidateTile kTile{
    .tokens = kTokens, .positions = kPositions, .dots = kDots, .heads = kHeads, .reads = 6};

TEST_CASE("ConstantInclusion.is_the_same_for_every_token_and_head") {
  float out[6];
  ConstantInclusion{.log_pi = -1.25F}.log_probability<ScalarOps>(kTile, out);
  for (const float log_pi : out) CHECK(log_pi == -1.25F);
}

TEST_CASE("KnownInclusion.finds_each_head_at_its_stride_and_each_token_at_its_position") {
  const float log_pi[] = {-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12};
  std::vector<float> out(6);
  KnownInclusion{.log_pi = log_pi, .stride = 6}.log_probability<ScalarOps>(kTile, out.data());
  CHECK(out == std::vector<float>{-4, -5, -8, -9, -10, -11});
  KnownInclusion{.log_pi = log_pi, .stride = 0}.log_probability<ScalarOps>(kTile, out.data());
  CHECK(out == std::vector<float>{-4, -5, -2, -3, -4, -5});
}

TEST_CASE("UnionInclusion.is_the_probability_of_either_of_two_independent_draws") {
  for (const float rho : {0.0F, 0.005F, 0.5F, 1.0F}) {
    for (const float log_u : kLogPi) {
      const UnionInclusion<ConstantInclusion> either{.inner = {.log_pi = log_u}, .rho = rho};
      float out[6];
      either.log_probability<ScalarOps>(kTile, out);
      const double u = std::exp(static_cast<double>(log_u));
      const auto r = static_cast<double>(rho);
      for (const float log_pi : out) {
        // expf, two products and logf: some ulps of 1, and an ulp of 80 from expf's argument.
        CHECK(std::abs(static_cast<double>(log_pi) - std::log(u + r - u * r)) < 1e-5);
        CHECK(log_pi <= 1e-6F);
      }
    }
  }
}

}  // namespace

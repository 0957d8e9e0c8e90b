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

const TokenId kTokens[] = {3, 4, 9, 12, 20, 21};
const float kDots[6] = {};

TEST_CASE("ConstantInclusion.is_the_same_for_every_token_and_head") {
  float out[3];
  for (int head = 0; head < 2; ++head) {
    ConstantInclusion{.log_pi = -1.25F}.log_probability<ScalarOps>(
        {.tokens = kTokens, .dots = kDots, .first = 2, .count = 3, .head = head}, out);
    for (const float log_pi : out) CHECK(log_pi == -1.25F);
  }
}

TEST_CASE("KnownInclusion.finds_each_head_at_its_stride_and_each_tile_at_its_place") {
  const float log_pi[] = {-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12};
  float out[2];
  const KnownInclusion own{.log_pi = log_pi, .stride = 6};
  own.log_probability<ScalarOps>(
      {.tokens = kTokens + 3, .dots = kDots, .first = 3, .count = 2, .head = 1}, out);
  CHECK(out[0] == -10.0F);
  CHECK(out[1] == -11.0F);
  const KnownInclusion shared{.log_pi = log_pi, .stride = 0};
  shared.log_probability<ScalarOps>(
      {.tokens = kTokens + 3, .dots = kDots, .first = 3, .count = 2, .head = 1}, out);
  CHECK(out[0] == -4.0F);
  CHECK(out[1] == -5.0F);
}

TEST_CASE("UnionInclusion.is_the_probability_of_either_of_two_independent_draws") {
  for (const float rho : {0.0F, 0.005F, 0.5F, 1.0F}) {
    for (const float log_u : kLogPi) {
      const UnionInclusion<ConstantInclusion> either{.inner = {.log_pi = log_u}, .rho = rho};
      float out[6];
      either.log_probability<ScalarOps>(
          {.tokens = kTokens, .dots = kDots, .first = 0, .count = 6, .head = 0}, out);
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

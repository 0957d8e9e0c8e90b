// SPDX-License-Identifier: Apache-2.0
// Signatures on every target of Highway that this processor has: the codes, the tokens that are
// drawn and their probabilities are those of ScalarOps, bit by bit.

// Included before any target's section, so that all they define is for the least processor.
#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "on_every_target.hpp"
#include "problem.hpp"
#include "statistics.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "signature_targets_test.cpp"
#include <hwy/foreach_target.h>

#include "magicpig/cpu/highway-inl.hpp"

#ifndef MAGICPIG_TEST_SIGNATURE_TARGETS
#define MAGICPIG_TEST_SIGNATURE_TARGETS
namespace magicpig::test {

template <class Q>
struct SignatureCase {
  const Problem<bf16>& problem;
  const Q& quantiser;
};

/// What a sampler draws from an index that was built and appended to.
template <class Ops, class Sampler, class Q>
Drawn draw_case(const SignatureCase<Q>& c, int kv_head) {
  const Shape& shape = c.problem.shape();
  const auto source = c.problem.source();
  auto index = std::move(*Signatures<Q>::create(
      c.quantiser, {.kv_heads = shape.kv_heads, .value_dim = shape.value_dim}));
  SerialExecutor executor;
  const auto backend = make_backend<Ops>(executor);
  CHECK(index.build(backend, source, {.begin = 4, .end = 300}).ok());
  CHECK(index.append(backend, source, c.problem.tokens()).ok());
  const auto sampler = Sampler::create(c.quantiser, {.budget = {.fraction = 0.05}});
  CHECK(sampler.ok());
  return draw_tokens<Ops>(*sampler, c.problem, index, {.seed = 3, .step = 8}, kv_head);
}

}  // namespace magicpig::test
#endif

HWY_BEFORE_NAMESPACE();
namespace magicpig::test {
namespace HWY_NAMESPACE {

using Ops = magicpig::HWY_NAMESPACE::HighwayOps;

Drawn draw_systematic(const SignatureCase<HadamardQuantiser>& c, int kv_head) {
  return draw_case<Ops, Systematic>(c, kv_head);
}
Drawn draw_poisson(const SignatureCase<HadamardQuantiser>& c, int kv_head) {
  return draw_case<Ops, Poisson>(c, kv_head);
}
Drawn draw_trained(const SignatureCase<ProductQuantiser>& c, int kv_head) {
  return draw_case<Ops, Systematic>(c, kv_head);
}

}  // namespace HWY_NAMESPACE
}  // namespace magicpig::test
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace magicpig::test {
namespace {

HWY_EXPORT(draw_systematic);
HWY_EXPORT(draw_poisson);
HWY_EXPORT(draw_trained);

TEST_CASE("on every target signatures draw the tokens of ScalarOps") {
  for (const int head_dim : {128, 65, 3}) {
    const Problem<bf16> problem(
        {.shape = {.query_heads = 10, .kv_heads = 2, .head_dim = head_dim, .value_dim = 33},
         .tokens = 1700,
         .seed = 7,
         .key_offset = 0.5});
    for (const int bits : {1, 2, 3, 4}) {
      const auto quantiser = std::move(*HadamardQuantiser::create(head_dim, bits, 11));
      const SignatureCase<HadamardQuantiser> own{.problem = problem, .quantiser = quantiser};
      SerialExecutor executor;
      const auto trained = ProductQuantiser::train(make_backend<ScalarOps>(executor),
                                                   problem.source(), {.begin = 0, .end = 1700},
                                                   {.kv_heads = 2, .bits = bits, .samples = 300});
      REQUIRE(trained.ok());
      const SignatureCase<ProductQuantiser> learned{.problem = problem, .quantiser = *trained};
      CAPTURE(head_dim);
      CAPTURE(bits);
      const Drawn systematic = draw_case<ScalarOps, Systematic>(own, 1);
      const Drawn poisson = draw_case<ScalarOps, Poisson>(own, 1);
      const Drawn by_training = draw_case<ScalarOps, Systematic>(learned, 1);
      CHECK(systematic.tokens.size() > 40);
      CHECK(by_training.tokens.size() > 40);
      CHECK(poisson.tokens != systematic.tokens);
      on_every_target([&] {
        const Drawn by_track = HWY_DYNAMIC_DISPATCH(draw_systematic)(own, 1);
        CHECK(by_track.tokens == systematic.tokens);
        CHECK(by_track.log_pi == systematic.log_pi);
        const Drawn by_token = HWY_DYNAMIC_DISPATCH(draw_poisson)(own, 1);
        CHECK(by_token.tokens == poisson.tokens);
        CHECK(by_token.log_pi == poisson.log_pi);
        const Drawn again = HWY_DYNAMIC_DISPATCH(draw_trained)(learned, 1);
        CHECK(again.tokens == by_training.tokens);
        CHECK(again.log_pi == by_training.log_pi);
      });
    }
  }
}

}  // namespace
}  // namespace magicpig::test
#endif  // HWY_ONCE

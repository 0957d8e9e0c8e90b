// SPDX-License-Identifier: Apache-2.0
// Bits of erased tokens, against a list of them.
#include "magicpig/core/token_mask.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <vector>

#include "allocations.hpp"
#include "random.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

void check_same(const TokenBits& bits, const std::set<TokenId>& model, Random& random) {
  const TokenMask mask = bits.view();
  CHECK(bits.count() == static_cast<TokenId>(model.size()));
  CHECK(mask.any() == !model.empty());
  int wrong = 0;
  for (TokenId t = 0; t < 700; ++t) wrong += mask.has(t) != model.contains(t) ? 1 : 0;
  for (int repetition = 0; repetition < 20; ++repetition) {
    const TokenId first = random.below(700);
    const std::uint64_t word = mask.bits(first);
    for (int i = 0; i < 64; ++i) wrong += (word >> i & 1U) != model.contains(first + i) ? 1 : 0;
    const TokenRange range{.begin = first, .end = random.between(first, 800)};
    const auto inside = static_cast<TokenId>(
        std::count_if(model.begin(), model.end(), [&](TokenId t) { return range.contains(t); }));
    wrong += mask.count(range) != inside ? 1 : 0;
    wrong += mask.present(range) != range.size() - inside ? 1 : 0;
  }
  CHECK(wrong == 0);
}

TEST_CASE("TokenBits.hold_what_was_added_and_not_taken_out") {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    TokenBits bits;
    std::set<TokenId> model;
    TokenId end = 1;
    for (int step = 0; step < 40; ++step) {
      if (random.below(4) == 0) {
        end = random.between(1, 640);
        bits.truncate(end);
        model.erase(model.lower_bound(end), model.end());
      } else {
        end = std::max(end, random.between(1, 640));
        std::vector<TokenId> tokens;
        for (int i = random.below(30); i > 0; --i) tokens.push_back(random.below(end));
        REQUIRE(bits.add(tokens, end));
        model.insert(tokens.begin(), tokens.end());
      }
      check_same(bits, model, random);
      TokenBits copy;
      REQUIRE(copy.assign(bits));
      check_same(copy, model, random);
    }
  }
}

TEST_CASE("TokenBits.need_no_memory_before_the_first_and_stay_as_they_were_without_any") {
  TokenBits bits;
  CHECK(bits.bytes() == 0);
  bits.truncate(0);
  const std::vector<TokenId> token{100};
  fail_allocations_after(0);
  CHECK_FALSE(bits.add(token, 101));
  fail_allocations_after(-1);
  CHECK(bits.count() == 0);
  CHECK_FALSE(bits.view().any());
  REQUIRE(bits.add(token, 101));
  CHECK(bits.bytes() == 16);
  TokenBits copy;
  fail_allocations_after(0);
  CHECK_FALSE(copy.assign(bits));
  CHECK_FALSE(bits.add(std::vector<TokenId>{3000}, 3001));
  fail_allocations_after(-1);
  CHECK(bits.count() == 1);
  CHECK(bits.view().has(100));
  bits.truncate(100);
  CHECK(bits.bytes() == 0);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Estimators with one mistake each: the test that passes for the library must fail for them, by
// more than chance could explain.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

#include "magicpig/core/random.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/sample/collision.hpp"
#include "magicpig/sample/uniform.hpp"
#include "planes.hpp"
#include "table_trials.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

// A correct estimator exceeds 10 standard errors with probability 1.5e-23. Under a sanitizer there
// are an eighth of the seeds, and z of a biased mean is smaller by the square root of that.
#if defined(MAGICPIG_TEST_SANITIZED)
constexpr double kCaught = 4.5;
#else
constexpr double kCaught = 10.0;
#endif

constexpr DesignConfig kRule{.bits = 4, .tables = 16};

Collisions collisions(int t) {
  const auto family = SimHash::create({.dim = 32, .bits = kRule.bits, .tables = kRule.tables});
  return std::move(*Collisions::create(*family, {.min_collisions = t}));
}

// Draws by one rule and states the probabilities of another.
struct Mismatched {
  Collisions drawn;
  Collisions stated;

  struct Scratch {
    Collisions::Scratch drawn;
    Collisions::Scratch stated;
  };
  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    return {.drawn = drawn.carve(arena, limits), .stated = stated.carve(arena, limits)};
  }
  template <class Ops, class Source, class IndexType>
  auto draw(const DrawInput<Source, IndexType>& input, Scratch& scratch) const {
    auto candidates = drawn.draw<Ops>(input, scratch.drawn);
    candidates.inclusion = stated.draw<Ops>(input, scratch.stated).inclusion;
    return candidates;
  }
};

// Weight u^-power.
struct PowerWeight {
  float power = 1.0F;
  template <class Ops>
  void log_weight(float* log_pi, int n) const {
    for (int i = 0; i < n; ++i) log_pi[i] *= -power;
  }
};

// Cosines with |k| where |k - c| belongs.
struct UncentredNorms {
  Collisions collisions;

  struct Scratch {
    Collisions::Scratch collisions;
    float* norms = nullptr;
  };
  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    return {.collisions = collisions.carve(arena, limits),
            .norms = arena.take<float>(static_cast<std::size_t>(limits.tokens))};
  }
  template <class Ops, class Source, class IndexType>
  auto draw(const DrawInput<Source, IndexType>& input, Scratch& scratch) const {
    auto candidates = collisions.draw<Ops>(input, scratch.collisions);
    const TokenRange range = input.index.indexed();
    for (TokenId t = range.begin; t < range.end; ++t) {
      double square = 0.0;
      for (int j = 0; j < 32; ++j) {
        square += std::pow(static_cast<double>(input.key_values.key(input.kv_head, t)[j]), 2);
      }
      scratch.norms[t - range.begin] = static_cast<float>(std::sqrt(square));
    }
    candidates.inclusion.norms = scratch.norms;
    return candidates;
  }
};

// m draws with replacement, duplicates collapsed, stated as m / n each.
struct Collapsed {
  TokenId draws = 0;
  bool corrected = false;  // states 1 - (1 - 1/n)^m instead, which is right

  struct Scratch {
    TokenId* tokens = nullptr;
  };
  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    return {.tokens = arena.take<TokenId>(static_cast<std::size_t>(limits.tokens + draws))};
  }
  template <class Ops, class Source, class IndexType>
  Candidates<ConstantInclusion> draw(const DrawInput<Source, IndexType>& input,
                                     Scratch& scratch) const {
    const TokenRange range = input.index.indexed();
    const RandomStream stream({.seed = input.noise.seed, .purpose = Purpose::kUniform});
    for (TokenId d = 0; d < draws; ++d) {
      scratch.tokens[d] = range.begin + static_cast<TokenId>(
                                            stream.below(static_cast<std::uint32_t>(d),
                                                         static_cast<std::uint32_t>(range.size())));
    }
    std::sort(scratch.tokens, scratch.tokens + draws);
    const auto* end = std::unique(scratch.tokens, scratch.tokens + draws);
    const double n = range.size();
    const double pi = corrected ? 1.0 - std::pow(1.0 - 1.0 / n, draws) : draws / n;
    return {.tokens = {scratch.tokens, static_cast<std::size_t>(end - scratch.tokens)},
            .members = {},
            .inclusion = {.log_pi = static_cast<float>(std::log(pi))}};
  }
};

template <class Sampler>
double uniform_z(const Trial& trial, const Sampler& sampler) {
  const RangeIndex index(Trial::kRange, 1, 32);
  Sample normaliser;
  for (int s = 0; s < replications(8000); ++s) {
    const std::uint64_t seed = first_seed() + static_cast<std::uint64_t>(s);
    normaliser.add(estimate(trial, sampler, SelfNormalised{}, index, seed)[0].normaliser);
  }
  return normaliser.z(trial.exact(0).normaliser);
}

TEST_CASE("Controls.draws_with_replacement_whose_duplicates_collapse_are_caught") {
  const Trial trial;
  const double z = uniform_z(trial, Collapsed{.draws = 80});

  CHECK(z < -kCaught);
  CHECK(std::abs(uniform_z(trial, Collapsed{.draws = 80, .corrected = true})) < kZ);
  const auto uniform = Uniform::create({.tokens = 80});
  REQUIRE(uniform.ok());
  CHECK(std::abs(uniform_z(trial, *uniform)) < kZ);
}

// Every head uses every row drawn by any head, weighted by 1 / (1 - prod_g (1 - u_g)), as if the
// heads drew independently; they share the planes.
struct ProductOfHeads {
  Collisions collisions;

  struct Scratch {
    Collisions::Scratch collisions;
    float* log_pi = nullptr;
  };
  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto n = static_cast<std::size_t>(limits.tokens);
    return {.collisions = collisions.carve(arena, limits), .log_pi = arena.take<float>(n)};
  }
  template <class Ops, class Source, class IndexType>
  Candidates<KnownInclusion> draw(const DrawInput<Source, IndexType>& input,
                                  Scratch& scratch) const {
    const auto found = collisions.draw<Ops>(input, scratch.collisions);
    const int count = static_cast<int>(found.tokens.size());
    std::vector<const float*> rows;
    for (const TokenId t : found.tokens) rows.push_back(input.key_values.key(input.kv_head, t));
    const std::size_t heads = static_cast<std::size_t>(input.queries.count);
    std::vector<float> dots(heads * rows.size());
    std::vector<float> one(dots.size());
    Ops::dot_rows(Rows<float>{.rows = rows.data(), .count = count, .dim = input.queries.dim},
                  input.queries.data, input.queries.count, dots.data());
    found.inclusion.template log_probability<Ops>(
        SharedTile(found.tokens, input.queries.count).view(dots.data()), one.data());
    std::vector<double> missed(rows.size(), 1.0);
    for (std::size_t i = 0; i < one.size(); ++i) {
      missed[i % rows.size()] *= 1.0 - std::exp(static_cast<double>(one[i]));
    }
    for (std::size_t i = 0; i < missed.size(); ++i) {
      scratch.log_pi[i] = static_cast<float>(std::log(1.0 - missed[i]));
    }
    return {.tokens = found.tokens, .members = {}, .inclusion = {.log_pi = scratch.log_pi}};
  }
};

// The normaliser under all estimators, over the same seeds of planes.
struct Normalisers {
  Trial trial;
  std::array<Sample, 3> correct;  // t = 1, 2, 3
  Sample power, t_too_high, t_too_low, first_collision, uncentred, floored, uncorrected;
  std::array<Sample, 2> product;

  Normalisers() {
    const std::array<Collisions, 3> rules{collisions(1), collisions(2), collisions(3)};
    const Mismatched two_as_three{collisions(2), collisions(3)};
    const Mismatched three_as_two{collisions(3), collisions(2)};
    const Mismatched one_as_two{collisions(1), collisions(2)};
    const UncentredNorms norms{collisions(2)};
    const ProductOfHeads heads{collisions(2)};
    for_each_seed<SimHash>(
        trial, kRule, replications(4000), [&](const auto& index, std::uint64_t seed) {
          const auto both = [&](const auto& sampler, const auto& estimator) {
            return estimate(trial, sampler, estimator, index, seed);
          };
          const auto add = [&](Sample& sample, const auto& sampler, const auto& estimator) {
            sample.add(both(sampler, estimator)[0].normaliser);
          };
          for (std::size_t t = 0; t < 3; ++t) add(correct[t], rules[t], SelfNormalised{});
          add(power, rules[1], PowerWeight{.power = 1.05F});
          add(floored, rules[1], Floored{.floor = 0.1F});
          add(uncorrected, rules[1], Uncorrected{});
          add(t_too_high, two_as_three, SelfNormalised{});
          add(t_too_low, three_as_two, SelfNormalised{});
          add(first_collision, one_as_two, SelfNormalised{});
          add(uncentred, norms, SelfNormalised{});
          const auto sums = both(heads, SelfNormalised{});
          product[0].add(sums[0].normaliser);
          product[1].add(sums[1].normaliser);
        });
  }

  [[nodiscard]] double exact(int head) const { return trial.exact(head).normaliser; }
};

const Normalisers& normalisers() {
  static const Normalisers all;
  return all;
}

TEST_CASE("Controls.the_correct_estimators_pass") {
  const Normalisers& all = normalisers();
  for (const Sample& sample : all.correct) CHECK(std::abs(sample.z(all.exact(0))) < kZ);
}

TEST_CASE("Controls.a_weight_of_the_power_1_05_is_caught") {
  CHECK(normalisers().power.z(normalisers().exact(0)) > kCaught);
}

TEST_CASE("Controls.a_rule_with_t_off_by_one_is_caught") {
  CHECK(normalisers().t_too_high.z(normalisers().exact(0)) > kCaught);
  CHECK(normalisers().t_too_low.z(normalisers().exact(0)) < -kCaught);
}

TEST_CASE("Controls.a_counter_that_emits_at_its_first_collision_is_caught") {
  CHECK(normalisers().first_collision.z(normalisers().exact(0)) > kCaught);
}

TEST_CASE("Controls.norms_of_keys_that_were_not_centred_are_caught") {
  CHECK(std::abs(normalisers().uncentred.z(normalisers().exact(0))) > kCaught);
}

TEST_CASE("Controls.a_floor_of_one_tenth_is_caught_and_estimates_what_its_formula_says") {
  const Normalisers& all = normalisers();
  const Design design = make_design(all.trial, 0, kRule);
  const Sums floored = all.trial.sums(0, [&](TokenId t) {
    if (!Trial::kRange.contains(t)) return 1.0;
    const double u = design.single[static_cast<std::size_t>(t - Trial::kRange.begin)];
    return u / (u + 0.1);
  });
  CHECK(all.floored.z(all.exact(0)) < -kCaught);
  CHECK(std::abs(all.floored.z(floored.normaliser)) < kZ);
}

TEST_CASE("Controls.weights_of_1_are_caught") {
  CHECK(normalisers().uncorrected.z(normalisers().exact(0)) < -kCaught);
}

TEST_CASE("Controls.a_union_over_heads_with_independent_probabilities_is_caught") {
  for (int head = 0; head < 2; ++head) {
    const Sample& product = normalisers().product[static_cast<std::size_t>(head)];
    CHECK(product.z(normalisers().exact(head)) < -kCaught);
  }
}

// Keys that are the planes of one seed, indexed under planes of another, or of the same.
class PlanesAsKeys {
 public:
  static constexpr int kBits = 4;
  static constexpr int kTables = 12;
  static constexpr int kKeys = kBits * kTables;
  static constexpr Shape kShape{.query_heads = 1, .kv_heads = 1, .head_dim = 16, .value_dim = 1};

  /// Estimated over exact normaliser of one draw.
  double ratio(std::uint64_t key_seed, std::uint64_t plane_seed) {
    const std::vector<float> keys = planes_of(family(key_seed));
    std::copy(keys.begin(), keys.end(), problem_.key(0, 0));
    const auto planes = family(plane_seed);
    auto index = BucketTables<SimHash>::create(planes, {});
    SerialExecutor executor;
    const auto view = problem_.source();
    const TokenRange range{.begin = 0, .end = kKeys};
    if (!index->build(make_backend<TrialOps>(executor), view, range).ok()) std::abort();
    const DecodePlan<Collisions> plan{.shape = kShape, .sampler = &sampler_, .exact_below = 0};
    Outputs outputs(kShape);
    const Status status =
        decode_one<TrialOps>(executor, plan, make_request(problem_, view, &*index, outputs));
    if (!status.ok()) std::abort();
    const OracleState exact =
        oracle_attention(view, {.data = problem_.query(0), .scale = 0.25}, every_token(range));
    return std::exp(static_cast<double>(outputs.lse(0)) - exact.lse);
  }

 private:
  static SimHash family(std::uint64_t seed) {
    return std::move(*SimHash::create({.dim = 16, .bits = kBits, .tables = kTables, .seed = seed}));
  }

  Problem<float> problem_{{.shape = kShape, .tokens = kKeys, .seed = 77, .query_scale = 2.0}};
  Collisions sampler_ = std::move(*Collisions::create(family(0), {.min_collisions = 1}));
};

TEST_CASE("Controls.data_drawn_with_the_seed_of_the_planes_are_caught") {
  PlanesAsKeys trial;
  Sample shared;
  Sample separate;
  for (int s = 0; s < replications(24000); ++s) {
    const std::uint64_t seed = first_seed() + static_cast<std::uint64_t>(s);
    shared.add(trial.ratio(seed, seed));
    separate.add(trial.ratio(seed, seed + (std::uint64_t{1} << 32)));
  }
  CAPTURE(shared.z(1.0));
  CHECK(std::abs(shared.z(1.0)) > kCaught);
  CHECK(std::abs(separate.z(1.0)) < kZ);
}

}  // namespace

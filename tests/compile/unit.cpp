// SPDX-License-Identifier: Apache-2.0
// One translation unit with every public header; compiled several times, with other flags and
// another function name.
#include "unit.hpp"

#include "all_headers.hpp"

namespace {

using namespace magicpig;
using Source = StridedKeyValues<float>;
using Tables = BucketTables<SimHash>;

constexpr Shape kShape{.query_heads = 2, .kv_heads = 1, .head_dim = 24, .value_dim = 24};
constexpr TokenId kTokens = 200;

std::vector<float> normals(std::size_t count, std::uint64_t seed) {
  const RandomStream stream({.seed = seed});
  std::vector<float> numbers(count);
  for (std::size_t i = 0; i < count; ++i) {
    numbers[i] = static_cast<float>(stream.normals(static_cast<std::uint32_t>(i))[0]);
  }
  return numbers;
}

// lse plus sum of the output over the heads; NaN where decode() refuses.
template <class Ops, class Sampler>
float checksum(const Sampler& sampler, const Source& cache, const Tables& index) {
  const std::vector<float> query = normals(2 * 24, 3);
  std::vector<float> out(query.size());
  AttentionState states[] = {{.out = std::span(out).first(24)}, {.out = std::span(out).last(24)}};
  SerialExecutor serial;
  const auto backend = make_backend<Ops>(serial);
  const DecodePlan<Sampler> plan{.shape = kShape, .sampler = &sampler, .exact_below = 0};
  std::vector<std::byte> workspace(workspace_bytes(plan, kTokens, 1));
  const Request<Source, Tables> requests[] = {
      {.key_values = &cache, .index = &index, .query = query, .states = states}};
  if (!decode(backend, plan, requests, workspace).ok()) return NAN;
  float sum = 0;
  for (const AttentionState& state : states) sum += state.lse;
  for (const float x : out) sum += x;
  return sum;
}

template <class Ops>
void compute(float& exact, float& sampled) {
  const std::vector<float> keys = normals(kTokens * 24, 1);
  const std::vector<float> values = normals(kTokens * 24, 2);
  const auto cache = Source::head_major(keys.data(), values.data(), kShape, kTokens).value();
  const auto family = SimHash::create({.dim = 24, .bits = 4, .tables = 10, .seed = 4}).value();
  const auto collisions = Collisions::create(family, {.min_collisions = 2}).value();
  auto index = Tables::create(family, {.kv_heads = 1}).value();
  SerialExecutor serial;
  const auto middle = Window{.sink = 4, .local = 16}.middle(kTokens);
  const bool built = index.build(make_backend<Ops>(serial), cache, middle).ok();
  exact = built ? checksum<Ops>(Exact{}, cache, index) : NAN;
  sampled = built ? checksum<Ops>(collisions, cache, index) : NAN;
}

}  // namespace

Unit MAGICPIG_TEST_UNIT() {
  Unit unit{.abi = MAGICPIG_STRINGIFY(MAGICPIG_ABI),
            .target = highway_target(),
            .exact_scalar = 0,
            .exact_highway = 0,
            .sampled_scalar = 0,
            .sampled_highway = 0};
  compute<ScalarOps>(unit.exact_scalar, unit.sampled_scalar);
  compute<HighwayOps>(unit.exact_highway, unit.sampled_highway);
  return unit;
}

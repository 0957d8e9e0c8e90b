// SPDX-License-Identifier: Apache-2.0
// The smallest embedding: one layer, one request, one decode step of sampled attention.
#include <cstdio>
#include <magicpig/attention.hpp>
#include <vector>

int main() {
  using namespace magicpig;
  const Shape shape{.query_heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64};
  const TokenId tokens = 8192;
  std::vector<float> keys(2 * 8192 * 64), values(2 * 8192 * 64), query(8 * 64), out(8 * 64);
  std::uint32_t i = 0;  // the host's own numbers go here
  for (auto* data : {&keys, &values, &query}) {
    for (float& x : *data) x = static_cast<float>(RandomStream({.seed = 1}).normals(i++)[0]);
  }

  const auto family = SimHash::create({.dim = 64, .bits = 8, .tables = 75, .seed = 42}).value();
  const auto sampler = Collisions::create(family, {.min_collisions = 2}).value();
  const auto pool = ThreadPool::create(2).value();
  const auto backend = make_backend<ScalarOps>(*pool);
  const auto cache =
      StridedKeyValues<float>::head_major(keys.data(), values.data(), shape, tokens).value();

  auto index = BucketTables<SimHash>::create(family, {.kv_heads = 2}).value();
  Status status = index.build(backend, cache, Window{.sink = 4, .local = 64}.middle(tokens));

  std::vector<AttentionState> states;
  for (std::size_t h = 0; h < 8; ++h) states.push_back({.out = std::span(out).subspan(h * 64, 64)});
  const DecodePlan<Collisions> plan{.shape = shape, .sampler = &sampler};
  std::vector<std::byte> workspace(workspace_bytes(plan, tokens, pool->workers()));
  const Request<StridedKeyValues<float>, BucketTables<SimHash>> requests[] = {
      {.key_values = &cache, .index = &index, .query = query, .states = states}};
  if (status.ok()) status = decode(backend, plan, requests, workspace);

  std::printf("%s\n", status.ok() ? "attention of 8 heads:" : status.message());
  for (const AttentionState& s : states) std::printf("lse %.3f, out %.4f ...\n", s.lse, s.out[0]);
  return status.ok() ? 0 : 1;
}

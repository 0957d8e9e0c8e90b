// SPDX-License-Identifier: Apache-2.0
// One layer, one request: exact and sampled attention on the best instruction set of the processor.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "decode_dispatch.hpp"

int main() {
  using namespace magicpig;
  const Shape shape{.query_heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64};
  const TokenId tokens = 8192;
  std::vector<bf16> keys(2 * 8192 * 64), values(2 * 8192 * 64);
  std::vector<float> query(8 * 64), out(8 * 64);
  const RandomStream random({.seed = 1});
  std::uint32_t i = 0;  // the engine's own numbers go here
  for (bf16& x : keys) x = to_bf16(static_cast<float>(random.normals(i++)[0]));
  for (bf16& x : values) x = to_bf16(static_cast<float>(random.normals(i++)[0]));
  for (float& x : query) x = static_cast<float>(random.normals(i++)[0]);

  const auto family = SimHash::create({.dim = 64, .bits = 8, .tables = 75, .seed = 42}).value();
  const auto collisions = Collisions::create(family, {.min_collisions = 2}).value();
  const auto threads = ThreadPool::create(2).value();
  const auto cache = engine::Cache::head_major(keys.data(), values.data(), shape, tokens).value();
  auto index = engine::Index::create(family, {.kv_heads = 2}).value();
  const TokenRange middle = Window{.sink = 4, .local = 64}.middle(tokens);
  Status status = engine::build_index(index, cache, middle, *threads);

  std::vector<AttentionState> states;
  for (std::size_t h = 0; h < 8; ++h) states.push_back({.out = std::span(out).subspan(h * 64, 64)});
  const engine::Request requests[] = {
      {.key_values = &cache, .index = &index, .query = query, .states = states}};
  const Exact every_token;
  const engine::ExactPlan exact{.shape = shape, .sampler = &every_token};
  const engine::SampledPlan sampled{.shape = shape, .sampler = &collisions};
  std::vector<std::byte> workspace(workspace_bytes(sampled, tokens, threads->workers()));

  std::printf("on %s\n", engine::target_name());
  if (status.ok()) status = engine::decode_exact(exact, requests, workspace, *threads);
  for (const AttentionState& s : states) std::printf("exact   lse %.3f\n", double{s.lse});
  if (status.ok()) status = engine::decode_sampled(sampled, requests, workspace, *threads);
  for (const AttentionState& s : states) std::printf("sampled lse %.3f\n", double{s.lse});
  if (!status.ok()) std::printf("%s\n", status.message());
  return status.ok() ? 0 : 1;
}

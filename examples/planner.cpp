// SPDX-License-Identifier: Apache-2.0
// A layer planned: from a sample of its own keys and queries, an error and a memory budget to a
// setting for each KV head, and a decode step with these.
#include <cstdio>
#include <magicpig/planner.hpp>
#include <vector>

using namespace magicpig;

int main() {
  // A prompt of the host's own: here keys with a few directions that stand out, and 8 queries.
  const Shape shape{.query_heads = 4, .kv_heads = 2, .head_dim = 32, .value_dim = 32};
  const TokenId tokens = 1500;
  const std::size_t rows = 8;
  std::vector<float> keys(2 * 1500 * 32), values(2 * 1500 * 32), queries(rows * 4 * 32);
  std::uint32_t i = 0;
  for (auto* data : {&keys, &values, &queries}) {
    for (std::size_t j = 0; j < data->size(); ++j) {
      const float scale = j % 32 < 4 ? 3.0F : 0.5F;
      (*data)[j] = scale * static_cast<float>(RandomStream({.seed = 1}).normals(i++)[0]);
    }
  }
  const auto cache =
      StridedKeyValues<float>::head_major(keys.data(), values.data(), shape, tokens).value();
  const auto pool = ThreadPool::create(2).value();
  const auto backend = make_backend<ScalarOps>(*pool);
  const TokenRange middle = Window{.sink = 4, .local = 64}.middle(tokens);

  // Once per model and layer: an error of a tenth, and 20 bytes per token and KV head for a cache
  // of 32,768 tokens.
  const PlanSample<StridedKeyValues<float>> sample{
      .shape = shape, .key_values = &cache, .indexed = middle, .queries = queries};
  const PlanGoal goal{.error = 0.1, .index_bytes = std::size_t{20} * 2 * 32'768};
  const auto plan =
      plan_profile(backend, sample, goal, {.tables = false}, {.seeds = 1, .tokens = 32'768});
  if (!plan.ok()) return std::printf("%s\n", plan.status().message()), 1;
  for (std::size_t h = 0; h < 2; ++h) {
    const HeadSetting& setting = plan->settings()[h];
    const HeadPoint& point = plan->heads.span()[h];
    std::printf(
        "KV head %zu: kind %d, %d bits, %.3g of the rows; error %.3f, %.1f bytes read of %d\n", h,
        static_cast<int>(setting.kind), setting.bits, setting.budget, point.error, point.bytes,
        2 * 32 * 4);
  }

  // Then as with any sampler.
  const auto hashes = HeadHashes::create(backend, cache, middle, plan->settings()).value();
  auto index = PerHeadIndex::create(hashes).value();
  Status status = index.build(backend, cache, middle);
  const auto sampler = PerHead::create(hashes).value();
  const DecodePlan<PerHead> step{.shape = shape, .sampler = &sampler, .exact_below = 0};
  std::vector<float> out(4 * 32);
  std::vector<AttentionState> states;
  for (std::size_t h = 0; h < 4; ++h) states.push_back({.out = std::span(out).subspan(h * 32, 32)});
  std::vector<std::byte> workspace(workspace_bytes(step, tokens, pool->workers()));
  const Request<StridedKeyValues<float>, PerHeadIndex> requests[] = {
      {.key_values = &cache,
       .index = &index,
       .query = std::span<const float>(queries).first(4 * 32),
       .states = states}};
  if (status.ok()) status = decode(backend, step, requests, workspace);
  std::printf("%s\n", status.ok() ? "decoded" : status.message());
  return status.ok() && plan->together.index_bytes <= goal.index_bytes ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// Signatures: one layer, one decode step, with codes drawn at random and with codes trained on
// keys.
#include <cstdio>
#include <magicpig/attention.hpp>
#include <magicpig/hash/product_quantiser.hpp>
#include <vector>

namespace {

using namespace magicpig;
using Cache = StridedKeyValues<float>;

constexpr Shape kShape{.query_heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64};
constexpr TokenId kTokens = 8192;
constexpr TokenRange kMiddle = Window{.sink = 4, .local = 64}.middle(kTokens);

/// One step with an index of `quantiser`'s codes that reads 2 % of the rows of the middle.
template <class Quantiser>
Status attend(const Quantiser& quantiser, const Cache& cache, std::span<const float> query,
              std::span<AttentionState> states, ThreadPool& pool) {
  const auto backend = make_backend<ScalarOps>(pool);
  auto index = Signatures<Quantiser>::create(quantiser, {.kv_heads = 2, .value_dim = 64}).value();
  Status status = index.build(backend, cache, kMiddle);  // later on: index.append(), truncate()

  const auto sampler = Systematic::create(quantiser, {.budget = {.fraction = 0.02}}).value();
  const DecodePlan<Systematic> plan{.shape = kShape, .sampler = &sampler};
  std::vector<std::byte> workspace(workspace_bytes(plan, kTokens, pool.workers()));
  const Request<Cache, Signatures<Quantiser>> requests[] = {
      {.key_values = &cache, .index = &index, .query = query, .states = states}};
  if (status.ok()) status = decode(backend, plan, requests, workspace);
  return status;
}

}  // namespace

int main() {
  std::vector<float> keys(2 * 8192 * 64), values(2 * 8192 * 64), query(8 * 64), out(8 * 64);
  std::uint32_t i = 0;  // the host's own numbers go here
  for (auto* data : {&keys, &values, &query}) {
    for (float& x : *data) x = static_cast<float>(RandomStream({.seed = 1}).normals(i++)[0]);
  }
  // Keys fill few of their dimensions, as those of a model do.
  for (std::size_t k = 0; k < keys.size(); ++k)
    keys[k] *= 4.0F / (1.0F + 0.25F * static_cast<float>(k % 64));

  const auto pool = ThreadPool::create(2).value();
  const auto cache = Cache::head_major(keys.data(), values.data(), kShape, kTokens).value();
  std::vector<AttentionState> states;
  for (std::size_t h = 0; h < 8; ++h) states.push_back({.out = std::span(out).subspan(h * 64, 64)});

  // No training, no state but a seed.
  const auto random = HadamardQuantiser::create(64, /*bits=*/2, /*seed=*/42).value();
  Status status = attend(random, cache, query, states, *pool);
  for (const AttentionState& s : states) std::printf("random  lse %.3f\n", double{s.lse});

  // Learned once per layer, from the keys of a prompt: smaller errors in as many bytes.
  const auto backend = make_backend<ScalarOps>(*pool);
  const auto trained =
      ProductQuantiser::train(backend, cache, kMiddle, {.kv_heads = 2, .bits = 2}).value();
  if (status.ok()) status = attend(trained, cache, query, states, *pool);
  for (const AttentionState& s : states) std::printf("trained lse %.3f\n", double{s.lse});
  if (!status.ok()) std::printf("%s\n", status.message());
  return status.ok() ? 0 : 1;
}

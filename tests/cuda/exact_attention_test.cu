// SPDX-License-Identifier: Apache-2.0
// A decode step on the device that reads every token: the host's output but for rounding.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "device_cache.cuh"
#include "magicpig/cuda/exact_attention.cuh"

namespace magicpig::test {
namespace {

template <class T>
void check_exact(const DeviceCacheConfig& config, const std::vector<std::int32_t>& tokens,
                 int splits) {
  CAPTURE(config.dim);
  CAPTURE(config.query_heads);
  DeviceCache<T> cache(config);
  cache.set_tokens(tokens);
  const auto heads = static_cast<std::size_t>(config.query_heads);
  const auto dim = static_cast<std::size_t>(config.dim);
  DeviceArray<float> out(tokens.size() * heads * dim);
  DeviceArray<float> lse(tokens.size() * heads);
  const cuda::DecodePlan<Exact> plan{.query_heads = config.query_heads, .splits = splits};
  const cuda::DecodeBatch<T> batch{.key_values = cache.device(),
                                   .queries = cache.device_queries.data(),
                                   .out = out.data(),
                                   .lse = lse.data()};
  DeviceArray<std::byte> workspace(cuda::workspace_bytes(plan, config.requests, config.dim));
  require(cuda::decode(plan, batch, workspace.span(), nullptr));
  const Exact sampler;
  for (int r = 0; r < config.requests; ++r) {
    CAPTURE(r);
    const auto source = cache.host(r, tokens[static_cast<std::size_t>(r)]);
    const auto queries = cache.host_queries(r);
    std::vector<float> outputs(heads * dim);
    std::vector<AttentionState> states(heads);
    for (std::size_t h = 0; h < heads; ++h) {
      states[h].out = std::span(outputs).subspan(h * dim, dim);
    }
    const DecodePlan<Exact> host_plan{.shape = cache.shape(), .sampler = &sampler};
    const std::vector<Request<StridedKeyValues<T>>> requests = {
        {.key_values = &source, .query = queries, .states = states}};
    SerialExecutor serial;
    std::vector<std::byte> host_workspace(workspace_bytes(host_plan, source.tokens(), 1));
    require(decode(make_backend<ScalarOps>(serial), host_plan, requests, host_workspace));
    check_outputs(out.get(), lse.get(), r, states);
  }
}

TEST_CASE("device: exact attention is the host's") {
  for (const int dim : {64, 96, 128, 256}) check_exact<bf16>({.dim = dim}, {1300, 77}, 3);
  for (const int group : {1, 2, 4, 7, 16}) {
    check_exact<bf16>({.query_heads = 2 * group}, {200, 33}, 2);
  }
  check_exact<float>({}, {500, 1}, 4);
  check_exact<fp16>({}, {500, 0}, 4);
}

TEST_CASE("device: exact attention refuses what it cannot do") {
  DeviceCache<bf16> cache({});
  cache.set_tokens({10, 10});
  DeviceArray<float> out(2 * 8 * 64);
  const cuda::DecodePlan<Exact> plan{.query_heads = 8};
  cuda::DecodeBatch<bf16> batch{
      .key_values = cache.device(), .queries = cache.device_queries.data(), .out = out.data()};
  DeviceArray<std::byte> workspace(cuda::workspace_bytes(plan, 2, 64));
  const auto code = [&](std::size_t less) {
    const auto span = workspace.span();
    return cuda::decode(plan, batch, span.first(span.size() - less), nullptr).code();
  };
  CHECK(code(0) == ErrorCode::kOk);
  CHECK(code(1) == ErrorCode::kWorkspaceTooSmall);
  batch.out = nullptr;
  CHECK(code(0) == ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace magicpig::test

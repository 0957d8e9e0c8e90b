// SPDX-License-Identifier: Apache-2.0
// The smallest embedding on a device: a decode step of one layer by signatures and by hash tables,
// as docs/cuda.md shows it. Without a device it says so and returns 77.
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <thrust/device_vector.h>

#include <cstdio>
#include <magicpig/cuda/attention.cuh>
#include <magicpig/hash/simhash.hpp>
#include <span>
#include <vector>

using namespace magicpig;
namespace gpu = magicpig::cuda;  // the toolkit has a namespace cuda of its own

constexpr int kQueryHeads = 8;
constexpr int kKvHeads = 2;
constexpr int kDim = 64;
constexpr TokenId kTokens = 8192;
constexpr TokenId kLocal = 64;  // newest tokens that stay exact

using Memory = thrust::device_vector<std::byte>;
std::span<std::byte> all_of(Memory& memory) { return {memory.data().get(), memory.size()}; }

// What an engine has on the device: keys and values [requests, kv_heads, tokens, dim] of two
// requests, their numbers of tokens, queries, and room for outputs.
struct Engine {
  Engine() {
    std::uint32_t i = 0;
    const auto fill = [&](thrust::device_vector<bf16>& data) {
      std::vector<bf16> own(data.size());
      for (bf16& x : own) {
        x = to_bf16(static_cast<float>(RandomStream({.seed = 1}).normals(i++)[0]));
      }
      data = own;
    };
    fill(keys);
    fill(values);
    fill(queries);
    cudaStreamCreate(&stream);
    cublasCreate(&blas);
    batch.key_values = gpu::KeyValues<bf16>::head_major(
        keys.data().get(), values.data().get(), 2, kKvHeads, kTokens, kDim, tokens.data().get());
    batch.queries = queries.data().get();
    batch.seeds = seeds.data().get();
    batch.steps = steps.data().get();
    batch.out = out.data().get();
    batch.lse = lse.data().get();
  }
  ~Engine() {
    cublasDestroy(blas);
    cudaStreamDestroy(stream);
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  thrust::device_vector<bf16> keys = thrust::device_vector<bf16>(2 * kKvHeads * kTokens * kDim);
  thrust::device_vector<bf16> values = keys;
  thrust::device_vector<bf16> queries = thrust::device_vector<bf16>(2 * kQueryHeads * kDim);
  thrust::device_vector<std::int32_t> tokens = thrust::device_vector<std::int32_t>(2, kTokens);
  thrust::device_vector<std::uint64_t> seeds = thrust::device_vector<std::uint64_t>(2, 42);
  thrust::device_vector<std::uint32_t> steps = thrust::device_vector<std::uint32_t>(2, 0);
  thrust::device_vector<float> out = thrust::device_vector<float>(2 * kQueryHeads * kDim);
  thrust::device_vector<float> lse = thrust::device_vector<float>(2 * kQueryHeads);
  gpu::DecodeBatch<bf16> batch;
  cudaStream_t stream = nullptr;
  cublasHandle_t blas = nullptr;
};

Status by_signatures(Engine& engine, int multiprocessors) {
  // Once per layer. All memory is the engine's, on the device.
  const auto quantiser = HadamardQuantiser::create(kDim, /*bits=*/2, /*seed=*/1).value();
  const auto sampler = Poisson::create(quantiser, {.budget = {.fraction = 0.02}}).value();
  const gpu::SignaturesConfig config{.requests = 2, .kv_heads = kKvHeads, .capacity = kTokens};
  Memory memory(gpu::Signatures::bytes(quantiser.shape(), config));
  const auto index = gpu::Signatures::create(quantiser, config, all_of(memory)).value();
  const gpu::DecodePlan<Poisson> plan{
      .query_heads = kQueryHeads,
      .sampler = &sampler,
      .splits = gpu::splits_for(2, kKvHeads, kTokens, multiprocessors)};
  Memory workspace(gpu::workspace_bytes(plan, index));

  // After the prompts: tokens before `ends`, which the device reads.
  thrust::device_vector<std::int32_t> ends(2, kTokens - kLocal);
  const gpu::KeyValues<bf16>& cache = engine.batch.key_values;
  Status status = index.build(cache, ends.data().get(), kTokens, engine.stream);
  // Per step, in a captured graph if wanted: what has left the local window, then attention.
  if (status.ok()) status = index.append(cache, ends.data().get(), 1, engine.stream);
  if (status.ok()) {
    status = gpu::decode(plan, index, engine.batch, all_of(workspace), engine.stream);
  }
  if (status.ok()) status = gpu::status_of(cudaStreamSynchronize(engine.stream), "step");
  return status;
}

Status by_tables(Engine& engine, int multiprocessors) {
  // Once for all layers, or once for each: planes and the rule of draws.
  const auto family = SimHash::create({.dim = kDim, .bits = 8, .tables = 75, .seed = 42}).value();
  const auto rule = Collisions::create(family, {.min_collisions = 2}).value();
  Memory planes_memory(gpu::SignPlanes::bytes(family));
  Memory rule_memory(gpu::Collisions::bytes(rule));
  const auto planes = gpu::SignPlanes::create(family, all_of(planes_memory), engine.stream).value();
  const auto sampler = gpu::Collisions::create(rule, all_of(rule_memory), engine.stream).value();
  // Once per layer.
  const gpu::BucketTablesConfig config{.requests = 2, .kv_heads = kKvHeads, .capacity = kTokens};
  Memory memory(gpu::BucketTables::bytes(family, config));
  auto index = gpu::BucketTables::create(planes, config, all_of(memory), engine.stream).value();
  Memory scratch(index.workspace_bytes());  // all layers may share it
  const gpu::DecodePlan<gpu::Collisions> plan{
      .query_heads = kQueryHeads,
      .sampler = &sampler,
      .splits = gpu::splits_for(2, kKvHeads, kTokens, multiprocessors)};
  Memory workspace(gpu::workspace_bytes(plan, index));

  const gpu::KeyValues<bf16>& cache = engine.batch.key_values;
  Status status;
  for (int request = 0; request < 2 && status.ok(); ++request) {
    // After its prompt.
    status =
        index.build(cache, request, kTokens - kLocal, all_of(scratch), engine.blas, engine.stream);
    // Per step; does something each seal_tokens tokens.
    if (!status.ok()) break;
    status = index.append(cache, request, kTokens - kLocal + 1, all_of(scratch), engine.blas,
                          engine.stream);
  }
  // Per step, in a captured graph if wanted.
  if (status.ok()) {
    status = gpu::decode(plan, index, engine.batch, all_of(workspace), engine.stream);
  }
  if (status.ok()) status = gpu::status_of(cudaStreamSynchronize(engine.stream), "step");
  return status;
}

int main() {
  int devices = 0;
  int multiprocessors = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("NOT RUN: no device here (%s)\n", cudaGetErrorString(error));
    return 77;
  }
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  Engine engine;
  for (const auto step : {by_signatures, by_tables}) {
    const Status status = step(engine, multiprocessors);
    if (!status.ok()) {
      std::printf("%s\n", status.message());
      return 1;
    }
    const std::vector<float> lse(engine.lse.begin(), engine.lse.end());
    const std::vector<float> out(engine.out.begin(), engine.out.end());
    for (std::size_t h = 0; h < lse.size(); ++h) {
      std::printf("request %zu, head %zu: lse %.3f, out %.4f ...\n", h / kQueryHeads,
                  h % kQueryHeads, static_cast<double>(lse[h]), static_cast<double>(out[h * kDim]));
    }
  }
  return 0;
}

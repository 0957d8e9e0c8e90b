// SPDX-License-Identifier: Apache-2.0
// Times a decode step on the device, its kernels in a graph, beside copying of memory: one JSON
// object per line.
//
// decode_cuda [TOKENS...]: 32 query heads, 8 KV heads, head_dim 128, bf16, batches of 1 and 8, 2 %
// of the rows by codes of 1 and 2 bits. Memory is written anew before each step, so that no cache
// has it.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cuda/attention.cuh"

namespace {

using namespace magicpig;

constexpr int kQueryHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kDim = 128;
constexpr TokenId kLocal = 64;
constexpr double kRows = 0.02;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "decode_cuda: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "decode_cuda: %s\n", status.message());
  std::exit(1);
}

template <class T>
class Array {
 public:
  explicit Array(std::size_t size) : size_(size) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T)), "cudaMalloc");
  }
  explicit Array(const std::vector<T>& from) : Array(from.size()) {
    require(cudaMemcpy(data_, from.data(), size_ * sizeof(T), cudaMemcpyHostToDevice),
            "cudaMemcpy");
  }
  ~Array() { (void)cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] std::span<T> span() const { return {data_, size_}; }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

// Numbers of about normal distribution, the sum of four uniform ones: the very ones do not matter.
__global__ void fill_kernel(bf16* to, std::int64_t size, std::uint64_t seed, float scale) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  const RandomStream stream({.seed = seed});
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += stride) {
    const auto four = stream.block(static_cast<std::uint32_t>(i));
    float sum = -2.0F;
    for (int k = 0; k < 4; ++k) sum += static_cast<float>(four[k]) * 0x1p-32F;
    to[i] = to_bf16(sum * 1.7320508F * scale);
  }
}

class Timer {
 public:
  Timer() : flushed_(std::size_t{256} << 20) {
    require(cudaStreamCreate(&stream_), "cudaStreamCreate");
    require(cudaEventCreate(&begin_), "cudaEventCreate");
    require(cudaEventCreate(&end_), "cudaEventCreate");
  }
  [[nodiscard]] cudaStream_t stream() const { return stream_; }

  // Median time in microseconds of what `start` puts on the stream, caches emptied before each.
  [[nodiscard]] double median(const std::function<void()>& start, int repetitions = 51) {
    std::vector<float> times;
    for (int i = 0; i < repetitions + 3; ++i) {
      require(cudaMemsetAsync(flushed_.data(), i, flushed_.span().size(), stream_), "flush");
      require(cudaEventRecord(begin_, stream_), "cudaEventRecord");
      start();
      require(cudaEventRecord(end_, stream_), "cudaEventRecord");
      require(cudaEventSynchronize(end_), "cudaEventSynchronize");
      float ms = 0.0F;
      require(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
      if (i >= 3) times.push_back(1000.0F * ms);
    }
    std::nth_element(times.begin(), times.begin() + repetitions / 2, times.end());
    return times[static_cast<std::size_t>(repetitions / 2)];
  }

 private:
  Array<std::byte> flushed_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

// What a capture of `start` takes when it is replayed.
double median_of_graph(Timer& timer, const std::function<void()>& start) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  require(cudaStreamBeginCapture(timer.stream(), cudaStreamCaptureModeThreadLocal), "capture");
  start();
  require(cudaStreamEndCapture(timer.stream(), &graph), "capture");
  require(cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate");
  const double time =
      timer.median([&] { require(cudaGraphLaunch(ready, timer.stream()), "cudaGraphLaunch"); });
  require(cudaGraphExecDestroy(ready), "cudaGraphExecDestroy");
  require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  return time;
}

struct Setting {
  TokenId tokens;
  int requests;
  int bits;
};

void run(Timer& timer, const Setting& setting, int multiprocessors, double gigabytes_per_second) {
  const auto rows = static_cast<std::size_t>(setting.requests) * kKvHeads *
                    static_cast<std::size_t>(setting.tokens);
  Array<bf16> keys(rows * kDim);
  Array<bf16> values(rows * kDim);
  Array<bf16> queries(static_cast<std::size_t>(setting.requests) * kQueryHeads * kDim);
  const auto fill = [&](const Array<bf16>& to, std::uint64_t seed, float scale) {
    fill_kernel<<<4096, 256>>>(to.data(), static_cast<std::int64_t>(to.span().size()), seed, scale);
  };
  fill(keys, 1, 1.0F);
  fill(values, 2, 1.0F);
  fill(queries, 3, 2.0F);
  const auto requests = static_cast<std::size_t>(setting.requests);
  Array<std::int32_t> tokens(std::vector<std::int32_t>(requests, setting.tokens));
  Array<std::int32_t> ends(std::vector<std::int32_t>(requests, setting.tokens - kLocal));
  Array<std::uint64_t> seeds(std::vector<std::uint64_t>(requests, 1));
  Array<std::uint32_t> steps(std::vector<std::uint32_t>(requests, 1));
  Array<bf16> out(requests * kQueryHeads * kDim);
  Array<float> lse(requests * kQueryHeads);

  const auto quantiser = HadamardQuantiser::create(kDim, setting.bits, 1);
  require(quantiser.status());
  const auto sampler = Poisson::create(*quantiser, {.budget = {.fraction = kRows}});
  require(sampler.status());
  const cuda::SignaturesConfig config{
      .requests = setting.requests, .kv_heads = kKvHeads, .capacity = setting.tokens};
  Array<std::byte> memory(cuda::Signatures::bytes(quantiser->shape(), config));
  const auto index = cuda::Signatures::create(*quantiser, config, memory.span());
  require(index.status());
  const cuda::DecodePlan plan{
      .query_heads = kQueryHeads,
      .sampler = &*sampler,
      .splits = cuda::splits_for(setting.requests, kKvHeads, setting.tokens, multiprocessors)};
  Array<std::byte> workspace(cuda::workspace_bytes(plan, *index));
  const cuda::DecodeBatch<bf16, bf16> batch{.key_values = cuda::KeyValues<bf16>::head_major(
                                                keys.data(), values.data(), setting.requests,
                                                kKvHeads, setting.tokens, kDim, tokens.data()),
                                            .queries = queries.data(),
                                            .seeds = seeds.data(),
                                            .steps = steps.data(),
                                            .out = out.data(),
                                            .lse = lse.data()};

  require(cudaDeviceSynchronize(), "fill");
  const double build = timer.median(
      [&] { require(index->build(batch.key_values, ends.data(), setting.tokens, timer.stream())); },
      3);
  const auto step = [&] {
    require(cuda::decode(plan, *index, batch, workspace.span(), timer.stream()));
  };
  const double direct = timer.median(step);
  const double graph = median_of_graph(timer, step);
  const double codes = static_cast<double>(rows) * (setting.bits * kDim / 8.0 + 2.0);
  const double read = static_cast<double>(rows) * kRows * 2.0 * kDim * sizeof(bf16);
  const double whole = static_cast<double>(rows) * 2.0 * kDim * sizeof(bf16);
  std::printf(
      "{\"tokens\": %d, \"requests\": %d, \"bits\": %d, \"splits\": %d, \"step_us\": %.1f, "
      "\"graph_us\": %.1f, \"bound_us\": %.1f, \"exact_bound_us\": %.1f, \"build_us\": %.1f, "
      "\"copy_gb_s\": %.0f}\n",
      setting.tokens, setting.requests, setting.bits, plan.splits, direct, graph,
      (codes + read) / gigabytes_per_second / 1e3, whole / gigabytes_per_second / 1e3, build,
      gigabytes_per_second);
  std::fflush(stdout);
}

// Bytes read and written per second by a copy on the device, in units of 1e9.
double copy_bandwidth(Timer& timer) {
  const std::size_t bytes = std::size_t{1} << 30;
  Array<std::byte> from(bytes);
  Array<std::byte> to(bytes);
  const double us = timer.median(
      [&] {
        require(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice,
                                timer.stream()),
                "copy");
      },
      11);
  return 2.0 * static_cast<double>(bytes) / us / 1e3;
}

}  // namespace

int main(int argc, char** argv) {
  int device = 0;
  int multiprocessors = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
  std::vector<TokenId> lengths;
  for (int i = 1; i < argc; ++i) lengths.push_back(std::atoi(argv[i]));
  if (lengths.empty()) lengths = {32768, 98304, 524288};
  Timer timer;
  const double bandwidth = copy_bandwidth(timer);
  for (const TokenId tokens : lengths) {
    for (const int requests : {1, 8}) {
      for (const int bits : {1, 2}) {
        run(timer, {.tokens = tokens, .requests = requests, .bits = bits}, multiprocessors,
            bandwidth);
      }
    }
  }
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// Times decode steps on the device, their kernels in a graph, beside copying of memory: one JSON
// object per line.
//
// decode_cuda [TOKENS...]: 32 query heads, 8 KV heads, head_dim 128, bf16, batches of 1 and 8: 2 %
// of the rows by codes of 1 and 2 bits, what collides in (10, 150) tables, and every row. Memory is
// written anew before each step, so that no cache has it.

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <thrust/device_vector.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <span>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cuda/attention.cuh"

namespace magicpig {
namespace {

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
using Array = thrust::device_vector<T>;
template <class T>
[[nodiscard]] T* data(Array<T>& array) {
  return array.data().get();
}
template <class T>
[[nodiscard]] std::span<T> span(Array<T>& array) {
  return {data(array), array.size()};
}

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
      require(cudaMemsetAsync(data(flushed_), i & 255, flushed_.size(), stream_), "flush");
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

// What all methods are timed on.
struct Problem {
  Problem(TokenId own_tokens, int own_requests, int multiprocessors)
      : tokens(own_tokens),
        requests(own_requests),
        splits(cuda::splits_for(own_requests, kKvHeads, own_tokens, multiprocessors)),
        rows(static_cast<std::size_t>(own_requests) * kKvHeads *
             static_cast<std::size_t>(own_tokens)),
        keys(rows * kDim),
        values(rows * kDim),
        queries(queries_in_all() * kDim),
        counts(static_cast<std::size_t>(own_requests), own_tokens),
        ends(counts.size(), own_tokens - kLocal),
        seeds(counts.size(), 1),
        steps(counts.size(), 1),
        out(queries.size()),
        lse(queries_in_all()) {
    const auto fill = [&](Array<bf16>& to, std::uint64_t seed, float scale) {
      fill_kernel<<<4096, 256>>>(data(to), static_cast<std::int64_t>(to.size()), seed, scale);
    };
    fill(keys, 1, 1.0F);
    fill(values, 2, 1.0F);
    fill(queries, 3, 2.0F);
    require(cudaDeviceSynchronize(), "fill");
    batch = {.key_values = cuda::KeyValues<bf16>::head_major(data(keys), data(values), requests,
                                                             kKvHeads, tokens, kDim, data(counts)),
             .queries = data(queries),
             .seeds = data(seeds),
             .steps = data(steps),
             .out = data(out),
             .lse = data(lse)};
  }
  [[nodiscard]] std::size_t queries_in_all() const {
    return static_cast<std::size_t>(requests) * kQueryHeads;
  }
  // Of the rows that were read.
  [[nodiscard]] static double row_bytes(double rows_read) {
    return rows_read * 2.0 * kDim * sizeof(bf16);
  }

  TokenId tokens;
  int requests;
  int splits;
  std::size_t rows;  // of keys, of all KV heads
  Array<bf16> keys;
  Array<bf16> values;
  Array<bf16> queries;
  Array<std::int32_t> counts;
  Array<std::int32_t> ends;
  Array<std::uint64_t> seeds;
  Array<std::uint32_t> steps;
  Array<bf16> out;
  Array<float> lse;
  cuda::DecodeBatch<bf16, bf16> batch;
};

// What was measured of a method, times in microseconds.
struct Times {
  double step = 0.0;
  double graph = 0.0;
  double scan = 0.0;   // a step that reads next to no rows, in a graph; 0 where there is none
  double build = 0.0;  // of the index
  double bytes = 0.0;  // that a step reads at least
  double rows = 1.0;   // share of them that is read
};

void print(const char* method, const Problem& problem, const Times& times,
           double gigabytes_per_second) {
  std::printf(
      "{\"method\": \"%s\", \"tokens\": %d, \"requests\": %d, \"splits\": %d, \"rows\": %.5f, "
      "\"step_us\": %.1f, \"graph_us\": %.1f, \"scan_us\": %.1f, \"bound_us\": %.1f, "
      "\"build_us\": %.1f, \"copy_gb_s\": %.0f}\n",
      method, problem.tokens, problem.requests, problem.splits, times.rows, times.step, times.graph,
      times.scan, times.bytes / gigabytes_per_second / 1e3, times.build, gigabytes_per_second);
  std::fflush(stdout);
}

[[nodiscard]] Times time_exact(Timer& timer, Problem& problem) {
  const cuda::DecodePlan<Exact> plan{.query_heads = kQueryHeads, .splits = problem.splits};
  Array<std::byte> workspace(cuda::workspace_bytes(plan, problem.requests, kDim));
  const auto step = [&] {
    require(cuda::decode(plan, problem.batch, span(workspace), timer.stream()));
  };
  return {.step = timer.median(step),
          .graph = median_of_graph(timer, step),
          .bytes = Problem::row_bytes(static_cast<double>(problem.rows))};
}

[[nodiscard]] Times time_signatures(Timer& timer, Problem& problem, int bits) {
  const auto quantiser = HadamardQuantiser::create(kDim, bits, 1);
  require(quantiser.status());
  const cuda::SignaturesConfig config{
      .requests = problem.requests, .kv_heads = kKvHeads, .capacity = problem.tokens};
  Array<std::byte> memory(cuda::Signatures::bytes(quantiser->shape(), config));
  const auto index = cuda::Signatures::create(*quantiser, config, span(memory));
  require(index.status());
  Times times{.rows = kRows};
  times.build = timer.median(
      [&] {
        require(index->build(problem.batch.key_values, data(problem.ends), problem.tokens,
                             timer.stream()));
      },
      3);
  const auto step_with = [&](const Budget& budget, const auto& measure) {
    const auto sampler = Poisson::create(*quantiser, {.budget = budget});
    require(sampler.status());
    const cuda::DecodePlan<Poisson> plan{
        .query_heads = kQueryHeads, .sampler = &*sampler, .splits = problem.splits};
    Array<std::byte> workspace(cuda::workspace_bytes(plan, *index));
    measure([&] {
      require(cuda::decode(plan, *index, problem.batch, span(workspace), timer.stream()));
    });
  };
  step_with({.fraction = kRows}, [&](const auto& step) {
    times.step = timer.median(step);
    times.graph = median_of_graph(timer, step);
  });
  step_with({.tokens = 1}, [&](const auto& step) { times.scan = median_of_graph(timer, step); });
  const auto rows = static_cast<double>(problem.rows);
  times.bytes = rows * (bits * kDim / 8.0 + 2.0) + Problem::row_bytes(rows * kRows);
  return times;
}

[[nodiscard]] Times time_tables(Timer& timer, Problem& problem, cublasHandle_t blas) {
  const auto family = SimHash::create({.dim = kDim, .bits = 10, .tables = 150});
  require(family.status());
  const auto rule = Collisions::create(*family, {.min_collisions = 2});
  require(rule.status());
  Array<std::byte> planes_memory(cuda::SignPlanes::bytes(*family));
  Array<std::byte> rule_memory(cuda::Collisions::bytes(*rule));
  const auto planes = cuda::SignPlanes::create(*family, span(planes_memory), timer.stream());
  require(planes.status());
  const auto sampler = cuda::Collisions::create(*rule, span(rule_memory), timer.stream());
  require(sampler.status());
  const cuda::BucketTablesConfig config{
      .requests = problem.requests, .kv_heads = kKvHeads, .capacity = problem.tokens};
  Array<std::byte> memory(cuda::BucketTables::bytes(*family, config));
  auto index = cuda::BucketTables::create(*planes, config, span(memory), timer.stream());
  require(index.status());
  Times times;
  {
    Array<std::byte> workspace(index->workspace_bytes());
    times.build = timer.median(
        [&] {
          for (int r = 0; r < problem.requests; ++r) {
            require(index->build(problem.batch.key_values, r, problem.tokens - kLocal,
                                 span(workspace), blas, timer.stream()));
          }
        },
        3);
  }
  const cuda::DecodePlan<cuda::Collisions> plan{
      .query_heads = kQueryHeads, .sampler = &*sampler, .splits = problem.splits};
  Array<std::byte> workspace(cuda::workspace_bytes(plan, *index));
  // Once with a list of what is drawn: how many rows that is.
  const auto words = static_cast<std::size_t>(index->view().words());
  Array<std::uint32_t> drawn(problem.queries_in_all() * words, 0);
  cuda::DecodeBatch<bf16, bf16> listed = problem.batch;
  listed.drawn = data(drawn);
  require(cuda::decode(plan, *index, listed, span(workspace), timer.stream()));
  require(cudaStreamSynchronize(timer.stream()), "decode");
  std::vector<std::uint32_t> bits(drawn.size());
  thrust::copy(drawn.begin(), drawn.end(), bits.begin());
  std::int64_t ids = 0;  // that were visited and drawn, of all query heads
  std::int64_t read = 0;
  constexpr std::size_t kGroup = kQueryHeads / kKvHeads;
  for (std::size_t group = 0; group < bits.size() / words / kGroup; ++group) {
    for (std::size_t w = 0; w < words; ++w) {
      std::uint32_t any = 0;
      for (std::size_t g = 0; g < kGroup; ++g) {
        const std::uint32_t own = bits[(group * kGroup + g) * words + w];
        ids += std::popcount(own);
        any |= own;
      }
      read += std::popcount(any);
    }
  }
  times.rows = static_cast<double>(read) / static_cast<double>(problem.rows);
  times.bytes = Problem::row_bytes(static_cast<double>(read)) + 2.0 * static_cast<double>(ids);
  const auto step = [&] {
    require(cuda::decode(plan, *index, problem.batch, span(workspace), timer.stream()));
  };
  times.step = timer.median(step);
  times.graph = median_of_graph(timer, step);
  return times;
}

// Bytes read and written per second by a copy on the device, in units of 1e9.
double copy_bandwidth(Timer& timer) {
  const std::size_t bytes = std::size_t{1} << 30;
  Array<std::byte> from(bytes);
  Array<std::byte> to(bytes);
  const double us = timer.median(
      [&] {
        require(
            cudaMemcpyAsync(data(to), data(from), bytes, cudaMemcpyDeviceToDevice, timer.stream()),
            "copy");
      },
      11);
  return 2.0 * static_cast<double>(bytes) / us / 1e3;
}

}  // namespace
}  // namespace magicpig

int main(int argc, char** argv) {
  using namespace magicpig;
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
  cublasHandle_t blas = nullptr;
  if (cublasCreate(&blas) != CUBLAS_STATUS_SUCCESS) {
    std::fprintf(stderr, "decode_cuda: cublasCreate failed\n");
    return 1;
  }
  for (const TokenId tokens : lengths) {
    for (const int requests : {1, 8}) {
      Problem problem(tokens, requests, multiprocessors);
      const auto show = [&](const char* method, const Times& times) {
        print(method, problem, times, bandwidth);
      };
      show("exact", time_exact(timer, problem));
      show("signatures, 1 bit", time_signatures(timer, problem, 1));
      show("signatures, 2 bits", time_signatures(timer, problem, 2));
      // 150 ids, a norm and its share of the offsets for each token.
      const std::size_t tables = problem.rows * 345;
      std::size_t free = 0;
      std::size_t total = 0;
      require(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
      if (tables < free / 10 * 9) {
        show("tables (10, 150)", time_tables(timer, problem, blas));
      } else {
        std::fprintf(stderr, "decode_cuda: no memory for tables of %d x %d tokens\n", requests,
                     tokens);
      }
    }
  }
  (void)cublasDestroy(blas);
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// Caches of several requests on the device and on the host.
#pragma once

#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cuda/key_values.cuh"
#include "random.hpp"

namespace magicpig::test {

/// REQUIRE that names the error.
inline void require(const Status& status) {
  INFO(status.message());
  REQUIRE(status.ok());
}
inline void require(cudaError_t error) {
  INFO(cudaGetErrorString(error));
  REQUIRE(error == cudaSuccess);
}

/// What an array of the library's on the device holds.
template <class T>
std::vector<T> download(const T* from, std::size_t size) {
  std::vector<T> to(size);
  require(cudaDeviceSynchronize());
  require(cudaMemcpy(to.data(), from, size * sizeof(T), cudaMemcpyDeviceToHost));
  return to;
}

/// An array on the device.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t size) : size_(size) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), (size + 1) * sizeof(T)));
    require(cudaMemset(data_, 0xff, (size + 1) * sizeof(T)));  // NaN in every format
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) { set(from); }
  ~DeviceArray() { (void)cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  void set(const std::vector<T>& from) {
    REQUIRE(from.size() == size_);
    require(cudaMemcpy(data_, from.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  [[nodiscard]] std::vector<T> get() const { return download(data_, size_); }
  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] std::span<T> span() const { return {data_, size_}; }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

inline float rounded(float x, float) { return x; }
inline bf16 rounded(float x, bf16) { return to_bf16(x); }
inline fp16 rounded(float x, fp16) { return to_fp16(x); }

struct DeviceCacheConfig {
  int requests = 2;
  int query_heads = 8;
  int kv_heads = 2;
  int dim = 64;
  int bits = 2;             ///< of codes, where there are any
  TokenId capacity = 6000;  ///< of a cache
  TokenId first = 4;
  std::uint64_t seed = 1;
};

/// Random keys, values and queries in both memories.
template <class T>
struct DeviceCache {
  explicit DeviceCache(const DeviceCacheConfig& own)
      : config(own),
        keys(rows(own.requests * own.kv_heads * own.capacity, 1.0, 1)),
        values(rows(own.requests * own.kv_heads * own.capacity, 1.0, 2)),
        queries(rows(own.requests * own.query_heads, 1.5, 3)),
        device_keys(keys),
        device_values(values),
        device_queries(queries),
        device_tokens(static_cast<std::size_t>(own.requests)) {}

  [[nodiscard]] Shape shape() const {
    return {.query_heads = config.query_heads,
            .kv_heads = config.kv_heads,
            .head_dim = config.dim,
            .value_dim = config.dim};
  }

  /// How many tokens the cache of each request has.
  void set_tokens(const std::vector<std::int32_t>& tokens) { device_tokens.set(tokens); }
  [[nodiscard]] cuda::KeyValues<T> device() const {
    return cuda::KeyValues<T>::head_major(device_keys.data(), device_values.data(), config.requests,
                                          config.kv_heads, config.capacity, config.dim,
                                          device_tokens.data());
  }
  [[nodiscard]] StridedKeyValues<T> host(int request, TokenId tokens) const {
    const std::size_t at = static_cast<std::size_t>(request) *
                           static_cast<std::size_t>(config.kv_heads * config.capacity) *
                           static_cast<std::size_t>(config.dim);
    const std::int64_t row = config.dim * static_cast<std::int64_t>(sizeof(T));
    const ByteStrides strides{.head = row * config.capacity, .token = row};
    const auto source = StridedKeyValues<T>::create({.keys = keys.data() + at,
                                                     .values = values.data() + at,
                                                     .key_strides = strides,
                                                     .value_strides = strides,
                                                     .kv_heads = config.kv_heads,
                                                     .head_dim = config.dim,
                                                     .value_dim = config.dim,
                                                     .tokens = tokens});
    require(source.status());
    return *source;
  }
  [[nodiscard]] std::vector<float> host_queries(int request) const {
    const auto size = static_cast<std::size_t>(config.query_heads * config.dim);
    std::vector<float> to(size);
    for (std::size_t i = 0; i < size; ++i) {
      to[i] = to_float(queries[static_cast<std::size_t>(request) * size + i]);
    }
    return to;
  }

  DeviceCacheConfig config;
  std::vector<T> keys;     // [requests, kv_heads, capacity, dim]
  std::vector<T> values;   // likewise
  std::vector<T> queries;  // [requests, query_heads, dim]
  DeviceArray<T> device_keys;
  DeviceArray<T> device_values;
  DeviceArray<T> device_queries;
  DeviceArray<std::int32_t> device_tokens;

 private:
  [[nodiscard]] std::vector<T> rows(int count, double scale, std::uint64_t stream) const {
    Random random(config.seed * 100 + stream);
    std::vector<T> to(static_cast<std::size_t>(count) * static_cast<std::size_t>(config.dim));
    for (T& x : to) x = rounded(static_cast<float>(scale * random.normal() + 0.25), T{});
    return to;
  }
};

/// The keys and values of a cache on pages [kv_heads, page, dim], keys and values of one side by
/// side, those of requests mixed.
template <class T>
class PagedCopy {
 public:
  /// `page` tokens, of which the capacity is a multiple.
  PagedCopy(const DeviceCache<T>& cache, int page)
      : page_(page),
        pages_(cache.config.capacity / page),
        row_(static_cast<std::size_t>(cache.config.dim)),
        half_(static_cast<std::size_t>(cache.config.kv_heads * page) * row_),
        pool_(2 * half_ * static_cast<std::size_t>(cache.config.requests * pages_)),
        table_(static_cast<std::size_t>(cache.config.requests * pages_)) {
    const DeviceCacheConfig& config = cache.config;
    REQUIRE(config.capacity % page == 0);
    std::vector<T> pool(pool_.span().size());
    std::vector<std::int32_t> table;
    for (int r = 0; r < config.requests; ++r) {
      for (int p = 0; p < pages_; ++p) {
        const int physical = (p * 7 % pages_) * config.requests + r;
        table.push_back(physical);
        for (int h = 0; h < config.kv_heads; ++h) {
          const std::int64_t token =
              (std::int64_t{r} * config.kv_heads + h) * config.capacity + std::int64_t{p} * page;
          const auto from = token * config.dim;
          const auto to = static_cast<std::size_t>(physical) * 2 * half_ +
                          static_cast<std::size_t>(h * page) * row_;
          const auto count = static_cast<std::size_t>(page) * row_;
          std::copy_n(cache.keys.begin() + from, count, pool.data() + to);
          std::copy_n(cache.values.begin() + from, count, pool.data() + to + half_);
        }
      }
    }
    pool_.set(pool);
    table_.set(table);
  }

  [[nodiscard]] cuda::KeyValues<T> of(const DeviceCache<T>& cache) const {
    const auto bytes = [](std::size_t size) { return static_cast<std::int64_t>(size * sizeof(T)); };
    const PageStrides strides{.page = bytes(2 * half_),
                              .head = bytes(static_cast<std::size_t>(page_) * row_),
                              .token = bytes(row_)};
    cuda::KeyValues<T> from = cache.device();
    from.keys = pool_.data();
    from.values = pool_.data() + half_;
    from.key_strides = from.value_strides = strides;
    from.block_table = table_.data();
    from.table_stride = pages_;
    from.page_tokens = page_;
    return from;
  }

 private:
  int page_;
  int pages_;
  std::size_t row_;
  std::size_t half_;  // scalars of a page's keys
  DeviceArray<T> pool_;
  DeviceArray<std::int32_t> table_;
};

/// What `work(stream)` starts, captured to be replayed.
class CapturedGraph {
 public:
  template <class Work>
  explicit CapturedGraph(const Work& work) {
    require(cudaStreamCreate(&stream_));
    require(cudaDeviceSynchronize());
    const cudaError_t capture = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed);
    if (capture == cudaErrorNotSupported) {
      std::printf("CUDA GRAPHS NOT TESTED: capture is not supported here\n");
      return;
    }
    require(capture);
    require(work(stream_));
    require(cudaStreamEndCapture(stream_, &graph_));
    require(cudaGraphInstantiate(&ready_, graph_, 0));
  }
  ~CapturedGraph() {
    if (ready_ != nullptr) (void)cudaGraphExecDestroy(ready_);
    if (graph_ != nullptr) (void)cudaGraphDestroy(graph_);
    (void)cudaStreamDestroy(stream_);
  }
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;

  [[nodiscard]] bool supported() const { return ready_ != nullptr; }
  void replay() const {
    require(cudaDeviceSynchronize());
    require(cudaGraphLaunch(ready_, stream_));
    require(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t ready_ = nullptr;
};

/// Of outputs of about 1 and of their lse: sums of float in another order.
inline constexpr double kTolerance = 2e-5;

/// Calls use(candidates) with what a sampler draws on the host.
template <class Sampler, class Source, class Index, class Use>
void draw_on_host(const Sampler& sampler, const DrawInput<Source, Index>& input, const Use& use) {
  const DrawLimits limits{.group = input.queries.count, .tokens = input.index.indexed().size()};
  Arena count;
  (void)sampler.carve(count, limits);
  std::vector<std::byte> memory(count.bytes_needed());
  Arena arena(memory);
  auto scratch = sampler.carve(arena, limits);
  use(sampler.template draw<ScalarOps>(input, scratch));
}

/// Outputs and lse of all requests' heads on the device against the host's of request `request`.
template <class Out>
void check_outputs(const std::vector<Out>& out, const std::vector<float>& lse, int request,
                   const std::vector<AttentionState>& states, double tolerance = kTolerance) {
  double worst = 0.0;
  double worst_lse = 0.0;
  const std::size_t first = static_cast<std::size_t>(request) * states.size();
  for (std::size_t h = 0; h < states.size(); ++h) {
    const std::size_t dim = states[h].out.size();
    for (std::size_t j = 0; j < dim; ++j) {
      const double own = to_float(out[(first + h) * dim + j]);
      const double off = std::abs(own - static_cast<double>(states[h].out[j]));
      worst = off <= worst ? worst : off;  // a NaN stays
    }
    const float own = lse[first + h];
    if (own == states[h].lse) continue;  // -inf, among others
    const double off = std::abs(static_cast<double>(own) - static_cast<double>(states[h].lse));
    worst_lse = off <= worst_lse ? worst_lse : off;
  }
  CHECK(worst <= tolerance);
  CHECK(worst_lse <= tolerance);
}

}  // namespace magicpig::test

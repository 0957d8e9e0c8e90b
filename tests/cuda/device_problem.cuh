// SPDX-License-Identifier: Apache-2.0
// Caches of several requests on the device and on the host, and what the host makes of them.
#pragma once

#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cuda/attention.cuh"
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

struct DeviceProblemConfig {
  int requests = 2;
  int query_heads = 8;
  int kv_heads = 2;
  int dim = 64;
  int bits = 2;
  TokenId capacity = 6000;  ///< of a cache
  TokenId first = 4;
  std::uint64_t seed = 1;
};

/// Random keys, values and queries in both memories, an index in both.
template <class T>
struct DeviceProblem {
  using Index = magicpig::Signatures<HadamardQuantiser>;

  explicit DeviceProblem(const DeviceProblemConfig& own)
      : config(own),
        keys(rows(own.requests * own.kv_heads * own.capacity, 1.0, 1)),
        values(rows(own.requests * own.kv_heads * own.capacity, 1.0, 2)),
        queries(rows(own.requests * own.query_heads, 1.5, 3)),
        device_keys(keys),
        device_values(values),
        device_queries(queries),
        device_tokens(static_cast<std::size_t>(own.requests)),
        ends(static_cast<std::size_t>(own.requests)),
        quantiser(make_quantiser(own)),
        memory(cuda::Signatures::bytes(quantiser->shape(), signatures_config())),
        index(make_index()) {}

  [[nodiscard]] cuda::SignaturesConfig signatures_config() const {
    return {.requests = config.requests,
            .kv_heads = config.kv_heads,
            .capacity = config.capacity,
            .first = config.first};
  }
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

  /// The host's index of tokens [first, end) of a request.
  [[nodiscard]] std::unique_ptr<Index> host_index(int request, TokenId end) const {
    auto made = Index::create(*quantiser, {.kv_heads = config.kv_heads});
    require(made.status());
    auto own = std::make_unique<Index>(std::move(*made));
    SerialExecutor serial;
    const auto backend = make_backend<ScalarOps>(serial);
    require(own->build(backend, host(request, end), {.begin = config.first, .end = end}));
    return own;
  }

  /// Indexes each request up to its end on the device.
  void build(const std::vector<std::int32_t>& up_to) {
    ends.set(up_to);
    require(index.build(device(), ends.data(), config.capacity, nullptr));
  }

  DeviceProblemConfig config;
  std::vector<T> keys;     // [requests, kv_heads, capacity, dim]
  std::vector<T> values;   // likewise
  std::vector<T> queries;  // [requests, query_heads, dim]
  DeviceArray<T> device_keys;
  DeviceArray<T> device_values;
  DeviceArray<T> device_queries;
  DeviceArray<std::int32_t> device_tokens;
  DeviceArray<std::int32_t> ends;
  std::unique_ptr<HadamardQuantiser> quantiser;
  DeviceArray<std::byte> memory;
  cuda::Signatures index;

 private:
  [[nodiscard]] std::vector<T> rows(int count, double scale, std::uint64_t stream) const {
    Random random(config.seed * 100 + stream);
    std::vector<T> to(static_cast<std::size_t>(count) * static_cast<std::size_t>(config.dim));
    for (T& x : to) x = rounded(static_cast<float>(scale * random.normal() + 0.25), T{});
    return to;
  }
  static std::unique_ptr<HadamardQuantiser> make_quantiser(const DeviceProblemConfig& config) {
    auto made = HadamardQuantiser::create(config.dim, config.bits, 7);
    require(made.status());
    return std::make_unique<HadamardQuantiser>(std::move(*made));
  }
  [[nodiscard]] cuda::Signatures make_index() const {
    const auto made = cuda::Signatures::create(*quantiser, signatures_config(), memory.span());
    require(made.status());
    require(made->clear(nullptr));
    return *made;
  }
};

}  // namespace magicpig::test

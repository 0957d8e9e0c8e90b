// SPDX-License-Identifier: Apache-2.0
// Caches with signatures on the device and on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "device_cache.cuh"
#include "magicpig/attention.hpp"
#include "magicpig/cuda/signatures.cuh"

namespace magicpig::test {

template <class T>
struct SignatureProblem : DeviceCache<T> {
  using Index = magicpig::Signatures<HadamardQuantiser>;
  using DeviceCache<T>::config;

  explicit SignatureProblem(const DeviceCacheConfig& own)
      : DeviceCache<T>(own),
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

  /// The host's index of tokens [first, end) of a request.
  [[nodiscard]] std::unique_ptr<Index> host_index(int request, TokenId end) const {
    auto made = Index::create(*quantiser, {.kv_heads = config.kv_heads});
    require(made.status());
    auto own = std::make_unique<Index>(std::move(*made));
    SerialExecutor serial;
    const auto backend = make_backend<ScalarOps>(serial);
    require(own->build(backend, this->host(request, end), {.begin = config.first, .end = end}));
    return own;
  }

  /// Indexes each request up to its end on the device.
  void build(const std::vector<std::int32_t>& up_to) {
    ends.set(up_to);
    require(index.build(this->device(), ends.data(), config.capacity, nullptr));
  }

  DeviceArray<std::int32_t> ends;
  std::unique_ptr<HadamardQuantiser> quantiser;
  DeviceArray<std::byte> memory;
  cuda::Signatures index;

 private:
  static std::unique_ptr<HadamardQuantiser> make_quantiser(const DeviceCacheConfig& config) {
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

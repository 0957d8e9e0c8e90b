// SPDX-License-Identifier: Apache-2.0
// magicpig's exact attention as a C library: ours.py calls it to time it beside the peers.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"

using namespace magicpig;

/// One query token and the dense keys and values of a layer; Layer in ours.py has the same fields.
struct Layer {
  const void* keys = nullptr;
  const void* values = nullptr;
  const float* queries = nullptr;  ///< [query_heads, head_dim], unscaled
  float* out = nullptr;            ///< [query_heads, head_dim]
  std::int32_t query_heads = 0;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t tokens = 0;
  std::int32_t dtype = 0;  ///< 0 float, 1 fp16, 2 bf16, 3 q8_0
  std::int32_t token_major = 0;
};

/// Threads, and the memory of a step.
struct Decoder {
  std::unique_ptr<ThreadPool> threads;
  std::vector<std::byte> workspace;
  std::vector<AttentionState> states;
  Status status;
};

template <class T>
static Status decode_layer(Decoder& decoder, const Layer& layer) {
  const Shape shape{.query_heads = layer.query_heads,
                    .kv_heads = layer.kv_heads,
                    .head_dim = layer.head_dim,
                    .value_dim = layer.head_dim};
  const auto* keys = static_cast<const T*>(layer.keys);
  const auto* values = static_cast<const T*>(layer.values);
  const auto source = layer.token_major != 0
                          ? StridedKeyValues<T>::token_major(keys, values, shape, layer.tokens)
                          : StridedKeyValues<T>::head_major(keys, values, shape, layer.tokens);
  const Exact sampler;
  const DecodePlan<Exact> plan{.shape = shape, .sampler = &sampler};
  const Status status = source.ok() ? validate(plan) : source.status();
  if (!status.ok()) return status;
  const auto dim = static_cast<std::size_t>(layer.head_dim);
  const std::size_t size = static_cast<std::size_t>(layer.query_heads) * dim;
  decoder.states.clear();
  for (std::size_t i = 0; i < size; i += dim) {
    decoder.states.push_back({.out = {layer.out + i, dim}});
  }
  decoder.workspace.resize(workspace_bytes(plan, layer.tokens, decoder.threads->workers()));
  const Request<StridedKeyValues<T>> requests[] = {
      {.key_values = &*source, .query = {layer.queries, size}, .states = decoder.states}};
  return decode(make_backend<HighwayOps>(*decoder.threads), plan, requests, decoder.workspace);
}

static Status decode_any(Decoder& decoder, const Layer& layer) {
  switch (layer.dtype) {
    case 0:
      return decode_layer<float>(decoder, layer);
    case 1:
      return decode_layer<fp16>(decoder, layer);
    case 2:
      return decode_layer<bf16>(decoder, layer);
    case 3:
      return decode_layer<q8_0>(decoder, layer);
    default:
      return Status::error(ErrorCode::kInvalidArgument, "dtype %d must lie in [0, 3]", layer.dtype);
  }
}

extern "C" {

/// magicpig's version, and the instruction set that Highway was compiled for.
const char* exact_version() noexcept { return MAGICPIG_VERSION_STRING; }
const char* exact_target() noexcept { return highway_target(); }

/// To be given to exact_destroy(). Where it has no threads, each step says why.
Decoder* exact_create(std::int32_t threads) noexcept {
  auto decoder = std::make_unique<Decoder>();
  auto pool = ThreadPool::create(threads);
  decoder->status = pool.status();
  if (pool.ok()) decoder->threads = std::move(*pool);
  return decoder.release();
}

/// Writes layer->out. Returns null, or an error that is there until the next call.
const char* exact_step(Decoder* decoder, const Layer* layer) noexcept {
  if (decoder->threads != nullptr) decoder->status = decode_any(*decoder, *layer);
  return decoder->status.ok() ? nullptr : decoder->status.message();
}

void exact_destroy(Decoder* decoder) noexcept { delete decoder; }

}  // extern "C"

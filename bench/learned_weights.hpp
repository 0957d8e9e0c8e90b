// SPDX-License-Identifier: Apache-2.0
// Weights of learned hashes, read from safetensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/hash/learned_hash.hpp"
#include "safetensors.hpp"

namespace magicpig::bench {

/// The layers of one side, "key" or "query": tensors key.0.weight [networks, out, in] and
/// key.0.bias [networks, out], key.1.weight ..., and what the metadata says of a layer: of "silu"
/// and "residual" those that it is. Floats are the reader's own.
struct WeightsSide {
  std::vector<std::vector<float>> floats;
  std::vector<LearnedLayer> layers;
  int networks = 0;

  /// Errors name the tensor or the entry at fault; no layer at all is none.
  [[nodiscard]] Status read(const Container& container, const std::string& side) {
    for (int i = 0;; ++i) {
      const std::string layer = side + "." + std::to_string(i);
      const Tensor* weight = container.find((layer + ".weight").c_str());
      const Tensor* bias = container.find((layer + ".bias").c_str());
      if (weight == nullptr && bias == nullptr) return Status();
      Status status = add(layer, weight, bias);
      if (status.ok()) status = read_words(container, layer);
      if (!status.ok()) return status;
    }
  }

 private:
  [[nodiscard]] Status add(const std::string& layer, const Tensor* weight, const Tensor* bias) {
    const auto wrong = [&layer](const char* what) {
      return Status::error(ErrorCode::kShapeMismatch, "%.60s: %s", layer.c_str(), what);
    };
    if (weight == nullptr || bias == nullptr) return wrong("must have both .weight and .bias");
    if (weight->shape.size() != 3) return wrong(".weight must have 3 dimensions");
    for (const std::uint64_t size : weight->shape) {
      if (size < 1 || size > kMaxDim) return wrong(".weight: dimensions must lie in [1, 16384]");
    }
    const std::uint64_t count = weight->shape[0];
    if (bias->shape != std::vector{count, weight->shape[1]}) {
      return wrong(".bias must be [networks, out] of .weight");
    }
    if (networks != 0 && count != static_cast<std::uint64_t>(networks)) {
      return wrong("other networks than the layer before");
    }
    networks = static_cast<int>(count);
    Status status = to_floats(*weight, floats.emplace_back());
    if (status.ok()) status = to_floats(*bias, floats.emplace_back());
    if (!status.ok()) return status;
    // Vectors keep their memory when the vector of them grows.
    layers.push_back({.in = static_cast<int>(weight->shape[2]),
                      .out = static_cast<int>(weight->shape[1]),
                      .weights = floats[floats.size() - 2],
                      .biases = floats.back()});
    return Status();
  }

  [[nodiscard]] Status read_words(const Container& container, const std::string& layer) {
    for (const auto& [name, text] : container.metadata) {
      if (name != layer) continue;
      std::istringstream words(text);
      for (std::string word; words >> word;) {
        if (word == "silu") {
          layers.back().silu = true;
        } else if (word == "residual") {
          layers.back().residual = true;
        } else {
          return Status::error(kMalformed, "__metadata__.%.60s: \"%.60s\" is not silu or residual",
                               layer.c_str(), word.c_str());
        }
      }
      return Status();
    }
    return Status::error(kMalformed, "__metadata__: nothing says what %.60s is", layer.c_str());
  }
};

/// A hash of the weights in `file`; without query layers, queries go through the keys' networks.
/// Errors name what is at fault.
[[nodiscard]] inline Result<LearnedHash> parse_learned_hash(std::span<const std::byte> file) {
  const Result<Container> container = parse_safetensors(file);
  if (!container.ok()) return container.status();
  WeightsSide keys;
  WeightsSide queries;
  Status status = keys.read(*container, "key");
  if (status.ok()) status = queries.read(*container, "query");
  if (!status.ok()) return status;
  if (keys.layers.empty()) return Status::error(kMalformed, "key.0.weight: no such tensor");
  return LearnedHash::create({.kv_heads = keys.networks,
                              .key_layers = keys.layers,
                              .query_layers = queries.layers,
                              .query_networks = queries.networks});
}

/// Errors: those of parse_learned_hash(), and a file that cannot be read; the path is part of the
/// message.
[[nodiscard]] inline Result<LearnedHash> read_learned_hash(const std::string& path) {
  std::vector<std::byte> bytes;
  const Status status = read_file(path, bytes);
  if (!status.ok()) return status;
  Result<LearnedHash> hash = parse_learned_hash(bytes);
  if (hash.ok()) return hash;
  return Status::error(hash.status().code(), "%.120s: %s", path.c_str(), hash.status().message());
}

}  // namespace magicpig::bench

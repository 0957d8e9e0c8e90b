// SPDX-License-Identifier: Apache-2.0
// Learned hashes: the signs of a small network's outputs, with the weights that a host brings.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// One layer of several networks alike: y = W x + b, silu(y) = y / (1 + exp(-y)) of it where
/// `silu`, plus x where `residual`.
struct LearnedLayer {
  int in = 0;
  int out = 0;
  std::span<const float> weights = {};  ///< [networks, out, in]
  std::span<const float> biases = {};   ///< [networks, out], or empty: zeros
  bool silu = false;
  bool residual = false;
};

/// The networks of a layer's heads. Spans are read by create() and not kept.
struct LearnedHashConfig {
  int kv_heads = 1;
  std::span<const LearnedLayer> key_layers = {};  ///< a network for each KV head
  std::span<const LearnedLayer> query_layers =
      {};                  ///< empty: queries go through the keys' networks
  int query_networks = 0;  ///< a multiple of kv_heads, such as query_heads; 0: kv_heads
};

/// Codes whose bits are the signs of a network's outputs, 1 above 0. Covers
///   Spotlight      the same network for queries and keys, two residual layers, SiLU in the first;
///                  or W2 silu(W1 x + b1);
///   HashAttention  networks of their own for keys and for each query head, of three layers;
///   random planes  one layer of random weights, with a bias -W c where keys are centred.
/// Inputs are as the host has them, not centred. An output that overflows float32 is of no
/// consequence but for its bit, which is 0 if it is not a number.
///
/// Memory: 4 bytes per weight, rows padded to a multiple of 32. Immutable once made; any number of
/// threads and indexes share one.
/// Source: Spotlight Attention, Li et al. 2025; HashAttention, Desai et al. 2025.
class LearnedHash {
 public:
  static constexpr int kMaxLayers = 8;
  static constexpr int kMaxBits = 1024;

  /// Errors: kv_heads, query_networks, layers or dimensions out of range; layers that do not follow
  /// upon each other; weights of another size than the layer's; queries and keys of different
  /// dimension or bits; a weight that is not finite; memory. Layers are counted from 0.
  [[nodiscard]] static Result<LearnedHash> create(const LearnedHashConfig& config) noexcept {
    if (config.kv_heads < 1 || config.kv_heads >= 1 << 24) {
      return Status::error(ErrorCode::kInvalidArgument, "kv_heads %d must lie in [1, 2^24)",
                           config.kv_heads);
    }
    const int networks = config.query_networks == 0 ? config.kv_heads : config.query_networks;
    if (networks % config.kv_heads != 0 || networks < 1 || networks / config.kv_heads > kMaxGroup) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "query_networks %d must be 1 to %d times kv_heads %d", networks,
                           kMaxGroup, config.kv_heads);
    }
    LearnedHash hash;
    hash.kv_heads_ = config.kv_heads;
    Status status = hash.keys_.create("key", config.key_layers, config.kv_heads);
    if (status.ok() && !config.query_layers.empty()) {
      status = hash.queries_.create("query", config.query_layers, networks);
    } else if (status.ok() && networks != config.kv_heads) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "query_networks %d without query layers: it must be kv_heads %d or 0",
                           networks, config.kv_heads);
    }
    if (!status.ok()) return status;
    const Networks& queries = hash.of_queries();
    if (queries.in() == hash.dim() && queries.out() == hash.bits()) return hash;
    return Status::error(ErrorCode::kShapeMismatch,
                         "queries of dimension %d have %d bits, keys of dimension %d have %d",
                         queries.in(), queries.out(), hash.dim(), hash.bits());
  }

  [[nodiscard]] int dim() const { return keys_.in(); }
  [[nodiscard]] int bits() const { return keys_.out(); }
  /// Words of a code. Bits that the last one has too many are 0.
  [[nodiscard]] int words() const { return (bits() + 31) / 32; }
  [[nodiscard]] int kv_heads() const { return kv_heads_; }
  /// Bytes of all weights.
  [[nodiscard]] std::size_t bytes() const { return keys_.bytes() + queries_.bytes(); }

  /// Floats of scratch for `count` vectors at once.
  [[nodiscard]] std::size_t scratch_floats(int count) const {
    const int widest = keys_.widest() > queries_.widest() ? keys_.widest() : queries_.widest();
    return 2 * static_cast<std::size_t>(count) * static_cast<std::size_t>(widest);
  }

  /// Outputs [count, bits] for keys [count, dim] of a KV head, before their signs are taken. They
  /// lie in `scratch`, of scratch_floats(count).
  template <class Ops>
  const float* key_outputs(int kv_head, const float* keys, int count, float* scratch) const {
    return keys_.template run<Ops>(kv_head, keys, count, scratch);
  }

  /// The same for one query of head g of the group of a KV head. Where there are fewer networks
  /// than heads, head g has the one of number g modulo those of a KV head.
  template <class Ops>
  const float* query_outputs(int kv_head, int g, const float* query, float* scratch) const {
    const Networks& networks = of_queries();
    const int each = networks.count() / kv_heads_;
    return networks.template run<Ops>(kv_head * each + g % each, query, 1, scratch);
  }

  /// Codes [count, words] of outputs [count, bits]: bit b of a code is bit b % 32 of word b / 32.
  void pack(const float* outputs, int count, std::uint32_t* codes) const {
    for (std::int64_t v = 0; v < count; ++v) {
      for (int w = 0; w < words(); ++w) {
        std::uint32_t word = 0;
        for (int b = 32 * w; b < bits() && b < 32 * (w + 1); ++b) {
          word |= static_cast<std::uint32_t>(outputs[v * bits() + b] > 0.0F) << (b % 32);
        }
        codes[v * words() + w] = word;
      }
    }
  }

 private:
  // Networks of the same layers, one after the other.
  class Networks {
   public:
    [[nodiscard]] Status create(const char* side, std::span<const LearnedLayer> layers,
                                int networks) noexcept {
      if (layers.empty() || layers.size() > static_cast<std::size_t>(kMaxLayers)) {
        return Status::error(ErrorCode::kInvalidArgument, "%zu %s layers: 1 to %d are possible",
                             layers.size(), side, kMaxLayers);
      }
      networks_ = networks;
      for (const LearnedLayer& layer : layers) {
        const Status status = add(side, layer);
        if (!status.ok()) return status;
      }
      if (out() > kMaxBits) {
        return Status::error(ErrorCode::kInvalidArgument, "%d bits of the last %s layer exceed %d",
                             out(), side, kMaxBits);
      }
      if (!weights_.resize(floats_ * static_cast<std::size_t>(networks))) {
        return Status::error(ErrorCode::kOutOfMemory, "no memory for %d %s networks", networks,
                             side);
      }
      for (std::size_t i = 0; i < layers.size(); ++i) copy(layers[i], places_[i]);
      return Status();
    }

    [[nodiscard]] int in() const { return layers_ == 0 ? 0 : places_[0].in; }
    [[nodiscard]] int out() const { return layers_ == 0 ? 0 : places_[layers_ - 1].out; }
    [[nodiscard]] int count() const { return networks_; }
    [[nodiscard]] int widest() const { return widest_; }
    [[nodiscard]] std::size_t bytes() const { return weights_.bytes(); }

    template <class Ops>
    const float* run(int network, const float* x, int count, float* scratch) const {
      float* const halves[] = {scratch, scratch + std::int64_t{count} * widest_};
      const float* weights = weights_.data() + static_cast<std::size_t>(network) * floats_;
      for (int i = 0; i < layers_; ++i) {
        const Place& layer = places_[i];
        float* y = halves[i % 2];
        const float* panels = weights + layer.panels;
        Ops::project(Panels{.data = panels, .count = layer.out, .dim = layer.in}, x, count, y);
        const float* biases = panels + Panels::size(layer.out, layer.in);
        for (std::int64_t v = 0; v < count; ++v) {
          activate(layer, biases, x + v * layer.in, y + v * layer.out);
        }
        x = y;
      }
      return x;
    }

   private:
    // A layer, and where its weights begin among those of a network; its biases follow.
    struct Place {
      int in = 0;
      int out = 0;
      bool silu = false;
      bool residual = false;
      std::size_t panels = 0;
    };

    [[nodiscard]] Status add(const char* side, const LearnedLayer& layer) noexcept {
      Status status = check_shape(side, layer);
      if (status.ok()) status = check_numbers(side, "weight", layer.weights);
      if (status.ok()) status = check_numbers(side, "bias", layer.biases);
      if (!status.ok()) return status;
      places_[layers_++] = {.in = layer.in,
                            .out = layer.out,
                            .silu = layer.silu,
                            .residual = layer.residual,
                            .panels = floats_};
      floats_ += Panels::size(layer.out, layer.in) + static_cast<std::size_t>(layer.out);
      widest_ = layer.out > widest_ ? layer.out : widest_;
      return Status();
    }

    [[nodiscard]] Status check_shape(const char* side, const LearnedLayer& layer) const noexcept {
      if (layer.in < 1 || layer.in > kMaxDim || layer.out < 1 || layer.out > kMaxDim) {
        return Status::error(ErrorCode::kInvalidArgument,
                             "%s layer %d: in %d and out %d must lie in [1, %d]", side, layers_,
                             layer.in, layer.out, kMaxDim);
      }
      if (layers_ > 0 && layer.in != out()) {
        return Status::error(ErrorCode::kShapeMismatch,
                             "%s layer %d: in %d is not the out %d of the layer before", side,
                             layers_, layer.in, out());
      }
      if (layer.residual && layer.in != layer.out) {
        return Status::error(ErrorCode::kShapeMismatch,
                             "%s layer %d: residual, but in %d is not out %d", side, layers_,
                             layer.in, layer.out);
      }
      const auto outputs =
          static_cast<std::size_t>(networks_) * static_cast<std::size_t>(layer.out);
      const std::size_t weights = outputs * static_cast<std::size_t>(layer.in);
      if (layer.weights.size() == weights &&
          (layer.biases.empty() || layer.biases.size() == outputs)) {
        return Status();
      }
      return Status::error(ErrorCode::kShapeMismatch,
                           "%s layer %d: %zu weights and %zu biases; %d networks of %d x %d need "
                           "%zu, and %zu or none",
                           side, layers_, layer.weights.size(), layer.biases.size(), networks_,
                           layer.out, layer.in, weights, outputs);
    }

    [[nodiscard]] Status check_numbers(const char* side, const char* what,
                                       std::span<const float> numbers) const noexcept {
      for (std::size_t i = 0; i < numbers.size(); ++i) {
        if (std::isfinite(numbers[i])) continue;
        return Status::error(ErrorCode::kNonFinite, "%s layer %d: %s %zu is not finite", side,
                             layers_, what, i);
      }
      return Status();
    }

    void copy(const LearnedLayer& layer, const Place& place) {
      const float* weights = layer.weights.data();
      for (std::size_t network = 0; network < static_cast<std::size_t>(networks_); ++network) {
        float* panels = weights_.data() + network * floats_ + place.panels;
        const std::size_t size = Panels::size(layer.out, layer.in);
        for (std::size_t i = 0; i < size; ++i) panels[i] = 0.0F;
        for (int p = 0; p < layer.out; ++p) {
          for (int j = 0; j < layer.in; ++j) panels[Panels::place(p, j, layer.in)] = *weights++;
        }
        const auto out = static_cast<std::size_t>(layer.out);
        for (std::size_t p = 0; p < out; ++p) {
          panels[size + p] = layer.biases.empty() ? 0.0F : layer.biases[network * out + p];
        }
      }
    }

    static void activate(const Place& layer, const float* biases, const float* x, float* y) {
      for (int p = 0; p < layer.out; ++p) {
        float sum = y[p] + biases[p];
        if (layer.silu) sum /= 1.0F + ::expf(-sum);
        y[p] = layer.residual ? sum + x[p] : sum;
      }
    }

    Place places_[kMaxLayers];
    int layers_ = 0;
    int networks_ = 0;
    int widest_ = 0;
    std::size_t floats_ = 0;  // of one network
    Buffer<float> weights_;   // [networks, floats]
  };

  LearnedHash() = default;

  [[nodiscard]] const Networks& of_queries() const {
    return queries_.count() == 0 ? keys_ : queries_;
  }

  int kv_heads_ = 0;
  Networks keys_;
  Networks queries_;  // none where they are those of the keys
};

}  // namespace magicpig::inline MAGICPIG_ABI

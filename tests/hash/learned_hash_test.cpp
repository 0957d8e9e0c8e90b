// SPDX-License-Identifier: Apache-2.0
// Learned hashes: networks against a loop in double, codes of their signs, and what is refused.
#include "magicpig/hash/learned_hash.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "backends.hpp"
#include "random.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

// A layer with its own memory.
struct OwnLayer {
  OwnLayer(int networks, int inputs, int outputs, std::uint64_t seed, bool with_biases = true)
      : in(inputs), out(outputs) {
    Random random(seed);
    weights.resize(static_cast<std::size_t>(networks) * static_cast<std::size_t>(in * out));
    biases.resize(with_biases ? static_cast<std::size_t>(networks * out) : 0);
    for (float& w : weights) w = static_cast<float>(random.normal() / std::sqrt(in));
    for (float& b : biases) b = static_cast<float>(random.normal());
  }
  [[nodiscard]] LearnedLayer layer(bool silu, bool residual) const {
    return {.in = in,
            .out = out,
            .weights = weights,
            .biases = biases,
            .silu = silu,
            .residual = residual};
  }
  int in;
  int out;
  std::vector<float> weights;
  std::vector<float> biases;
};

// What the layers of network `network` make of x.
std::vector<double> oracle(const std::vector<LearnedLayer>& layers, int network, const float* x) {
  std::vector<double> from(x, x + layers[0].in);
  for (const LearnedLayer& layer : layers) {
    std::vector<double> to;
    for (int p = 0; p < layer.out; ++p) {
      const auto row = static_cast<std::size_t>(network * layer.out + p);
      double y = layer.biases.empty() ? 0.0 : static_cast<double>(layer.biases[row]);
      for (std::size_t j = 0; j < from.size(); ++j) {
        y += static_cast<double>(layer.weights[row * from.size() + j]) * from[j];
      }
      if (layer.silu) y *= 1.0 / (1.0 + std::exp(-y));
      if (layer.residual) y += from[static_cast<std::size_t>(p)];
      to.push_back(y);
    }
    from = to;
  }
  return from;
}

std::vector<float> make_vectors(int count, int dim) {
  Random random(7);
  std::vector<float> vectors(static_cast<std::size_t>(count * dim));
  for (float& x : vectors) x = static_cast<float>(3.0 * random.normal());
  return vectors;
}

void check_outputs(const float* found, const std::vector<double>& expected) {
  for (std::size_t b = 0; b < expected.size(); ++b) {
    // Sums of at most 40 products in float, three times in a row, of numbers up to some tens.
    REQUIRE(std::fabs(static_cast<double>(found[b]) - expected[b]) < 1e-3);
  }
}

// Both sides of a hash of two KV heads against the oracle, on every backend, 5 keys at once.
void check_hash(const std::vector<LearnedLayer>& keys, const std::vector<LearnedLayer>& queries,
                int query_networks) {
  const auto hash = LearnedHash::create({.kv_heads = 2,
                                         .key_layers = keys,
                                         .query_layers = queries,
                                         .query_networks = query_networks});
  REQUIRE(hash.ok());
  const int dim = hash->dim();
  CHECK(dim == keys.front().in);
  CHECK(hash->bits() == keys.back().out);
  const std::vector<float> vectors = make_vectors(5, dim);
  std::vector<float> scratch(hash->scratch_floats(5));
  for_each_backend([&]<class Ops>() {
    for (int h = 0; h < 2; ++h) {
      const float* found = hash->key_outputs<Ops>(h, vectors.data(), 5, scratch.data());
      for (int v = 0; v < 5; ++v) {
        check_outputs(found + v * hash->bits(), oracle(keys, h, vectors.data() + v * dim));
      }
      for (int g = 0; g < 3; ++g) {
        const float* query = vectors.data() + g * dim;
        const int network = queries.empty() ? h : query_networks == 6 ? 3 * h + g : h;
        check_outputs(hash->query_outputs<Ops>(h, g, query, scratch.data()),
                      oracle(queries.empty() ? keys : queries, network, query));
      }
    }
  });
}

TEST_CASE("LearnedHash.has_the_outputs_of_its_networks") {
  const OwnLayer square(2, 24, 24, 1);
  const OwnLayer next(2, 24, 24, 2);
  // Spotlight as released, and as the paper writes it.
  check_hash({square.layer(true, true), next.layer(false, true)}, {}, 0);
  const OwnLayer hidden(2, 24, 40, 3);
  const OwnLayer last(2, 40, 33, 4, false);
  check_hash({hidden.layer(true, false), last.layer(false, false)}, {}, 2);
  // HashAttention, with a network for each of 3 query heads of a group, and with one for all.
  const OwnLayer middle(2, 40, 40, 5);
  const OwnLayer bits(2, 40, 32, 6);
  const OwnLayer query_in(6, 24, 17, 7);
  const OwnLayer query_out(6, 17, 32, 8);
  const std::vector<LearnedLayer> keys{hidden.layer(true, false), middle.layer(true, false),
                                       bits.layer(false, false)};
  check_hash(keys, {query_in.layer(true, false), query_out.layer(false, false)}, 6);
  check_hash(keys, {hidden.layer(true, false), bits.layer(false, false)}, 2);
  // Random planes, centred on the keys' side.
  const OwnLayer planes(2, 24, 100, 9);
  LearnedLayer uncentred = planes.layer(false, false);
  uncentred.biases = {};
  check_hash({planes.layer(false, false)}, {uncentred}, 0);
}

TEST_CASE("LearnedHash.packs_signs_into_words") {
  const OwnLayer layer(1, 3, 70, 1);
  const LearnedLayer layers[] = {layer.layer(false, false)};
  const auto hash = LearnedHash::create({.key_layers = layers});
  REQUIRE(hash.ok());
  REQUIRE(hash->words() == 3);
  std::vector<float> outputs(140, -1.0F);
  outputs[0] = 1.0F;
  outputs[31] = 1e-30F;
  outputs[32] = std::numeric_limits<float>::infinity();
  outputs[33] = 0.0F;
  outputs[34] = std::numeric_limits<float>::quiet_NaN();
  outputs[69] = 5.0F;
  outputs[70 + 1] = 2.0F;
  std::vector<std::uint32_t> codes(6, 99);
  hash->pack(outputs.data(), 2, codes.data());
  CHECK(codes == std::vector<std::uint32_t>{0x80000001U, 1U, 1U << 5, 2U, 0U, 0U});
}

TEST_CASE("LearnedHash.refuses_what_is_no_network") {
  OwnLayer first(2, 8, 12, 1);
  const OwnLayer second(2, 12, 6, 2);
  const auto refusal = [](const LearnedHashConfig& config, ErrorCode code) {
    const auto refused = LearnedHash::create(config);
    CHECK(refused.status().code() == code);
    return std::string(refused.status().message());
  };
  const auto of_layers = [&](std::vector<LearnedLayer> layers, ErrorCode code) {
    return refusal({.kv_heads = 2, .key_layers = layers}, code);
  };
  const LearnedLayer good = first.layer(true, false);
  const LearnedLayer last = second.layer(false, false);
  constexpr auto kInvalid = ErrorCode::kInvalidArgument;
  constexpr auto kShape = ErrorCode::kShapeMismatch;

  CHECK(of_layers({}, kInvalid) == "0 key layers: 1 to 8 are possible");
  CHECK(of_layers(std::vector<LearnedLayer>(9, good), kInvalid) ==
        "9 key layers: 1 to 8 are possible");
  CHECK(of_layers({last, good}, kShape) ==
        "key layer 1: in 8 is not the out 6 of the layer before");
  LearnedLayer bad = good;
  bad.residual = true;
  CHECK(of_layers({bad}, kShape) == "key layer 0: residual, but in 8 is not out 12");
  bad = good;
  bad.in = 0;
  CHECK(of_layers({bad}, kInvalid) == "key layer 0: in 0 and out 12 must lie in [1, 16384]");
  bad = good;
  bad.weights = bad.weights.first(191);
  CHECK(of_layers({bad}, kShape) ==
        "key layer 0: 191 weights and 24 biases; 2 networks of 12 x 8 need 192, and 24 or none");
  bad = good;
  bad.biases = bad.biases.first(12);
  CHECK(of_layers({bad}, kShape) ==
        "key layer 0: 192 weights and 12 biases; 2 networks of 12 x 8 need 192, and 24 or none");
  first.weights[5] = std::numeric_limits<float>::quiet_NaN();
  CHECK(of_layers({good, last}, ErrorCode::kNonFinite) == "key layer 0: weight 5 is not finite");
  first.weights[5] = 0.0F;
  first.biases[23] = std::numeric_limits<float>::infinity();
  CHECK(of_layers({good, last}, ErrorCode::kNonFinite) == "key layer 0: bias 23 is not finite");
  first.biases[23] = 0.0F;
  const OwnLayer wide(1, 2, LearnedHash::kMaxBits + 1, 3);
  const LearnedLayer wide_layers[] = {wide.layer(false, false)};
  CHECK(refusal({.key_layers = wide_layers}, kInvalid) ==
        "1025 bits of the last key layer exceed 1024");

  const LearnedLayer keys[] = {good, last};
  CHECK(refusal({.kv_heads = 0, .key_layers = keys}, kInvalid) ==
        "kv_heads 0 must lie in [1, 2^24)");
  CHECK(refusal({.kv_heads = 2, .key_layers = keys, .query_networks = 3}, kInvalid) ==
        "query_networks 3 must be 1 to 32 times kv_heads 2");
  CHECK(refusal({.kv_heads = 2, .key_layers = keys, .query_networks = 4}, kInvalid) ==
        "query_networks 4 without query layers: it must be kv_heads 2 or 0");
  const LearnedLayer queries[] = {good};
  CHECK(refusal({.kv_heads = 2, .key_layers = keys, .query_layers = queries}, kShape) ==
        "queries of dimension 8 have 12 bits, keys of dimension 8 have 6");
  CHECK(LearnedHash::create({.kv_heads = 2, .key_layers = keys, .query_layers = keys}).ok());
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Files of learned weights: what the reader makes of them, what it refuses, and whether the shipped
// ones find at least twice as much as random planes of the same length.
#include "learned_weights.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "capture.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/sample/agreement_scores.hpp"
#include "magicpig/sample/exact_scores.hpp"
#include "magicpig/sample/token_scores.hpp"
#include "random.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;
using bench::Capture;

// A file of tensors of float, for tests to spoil.
struct File {
  void add(const std::string& name, const std::vector<int>& shape, float value) {
    int count = 1;
    for (const int size : shape) count *= size;
    const std::size_t begin = data.size();
    for (int i = 0; i < count; ++i) {
      const float x = value + static_cast<float>(i);
      data.append(reinterpret_cast<const char*>(&x), sizeof x);
    }
    header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }
  [[nodiscard]] Result<LearnedHash> parse() const {
    const std::string text = header.dump();
    std::string bytes;
    for (int i = 0; i < 8; ++i) {
      bytes += static_cast<char>((std::uint64_t{text.size()} >> (8 * i)) & 0xffU);
    }
    bytes += text + data;
    return bench::parse_learned_hash(std::as_bytes(std::span(bytes)));
  }
  [[nodiscard]] std::string refusal() const {
    const auto refused = parse();
    CHECK_FALSE(refused.ok());
    return refused.status().message();
  }
  nlohmann::ordered_json header;
  std::string data;
};

File good_file() {
  File file;
  file.add("key.0.weight", {1, 2, 2}, 1.0F);
  file.add("key.0.bias", {1, 2}, -10.0F);
  file.header["__metadata__"] = {{"key.0", "silu residual"}, {"shape", "any"}};
  return file;
}

TEST_CASE("read_learned_hash.has_the_layers_of_the_file") {
  const auto hash = good_file().parse();
  REQUIRE(hash.ok());
  CHECK(hash->dim() == 2);
  CHECK(hash->bits() == 2);
  const float x[] = {2.0F, 3.0F};
  std::vector<float> scratch(hash->scratch_floats(1));
  const float* found = hash->key_outputs<ScalarOps>(0, x, 1, scratch.data());
  // (1 2; 3 4) x + (-10, -9) = (-2, 9).
  CHECK(found[0] == doctest::Approx(2.0 - 2.0 / (1.0 + std::exp(2.0))));
  CHECK(found[1] == doctest::Approx(3.0 + 9.0 / (1.0 + std::exp(-9.0))));
}

TEST_CASE("read_learned_hash.reads_networks_of_queries") {
  File file = good_file();
  file.add("query.0.weight", {3, 5, 2}, 1.0F);
  file.add("query.0.bias", {3, 5}, 0.0F);
  file.add("query.1.weight", {3, 2, 5}, 1.0F);
  file.add("query.1.bias", {3, 2}, 0.0F);
  file.header["__metadata__"]["query.0"] = "silu";
  CHECK(file.refusal() == "__metadata__: nothing says what query.1 is");
  file.header["__metadata__"]["query.1"] = "";
  const auto hash = file.parse();
  REQUIRE(hash.ok());
  const float x[] = {1.0F, -1.0F};
  std::vector<float> scratch(hash->scratch_floats(1));
  // Network 2: rows (21, 22), (23, 24) ... and biases 10 to 14 give 9 to 13, through SiLU and rows
  // (21 ... 25), (26 ... 30) of biases 4, 5.
  double first = 4.0;
  for (int j = 0; j < 5; ++j) first += (21.0 + j) * (9.0 + j) / (1.0 + std::exp(-9.0 - j));
  CHECK(hash->query_outputs<ScalarOps>(0, 2, x, scratch.data())[0] == doctest::Approx(first));
}

TEST_CASE("read_learned_hash.names_what_is_wrong_with_a_file") {
  CHECK(bench::read_learned_hash("absent.safetensors").status().message() ==
        std::string("absent.safetensors: cannot be opened"));
  File file;
  CHECK(file.refusal().find("header") != std::string::npos);
  file.header["__metadata__"] = {{"key.0", ""}};
  CHECK(file.refusal() == "key.0.weight: no such tensor");
  file.add("key.0.weight", {1, 2, 2}, 1.0F);
  CHECK(file.refusal() == "key.0: must have both .weight and .bias");
  file.add("key.0.bias", {1, 3}, 1.0F);
  CHECK(file.refusal() == "key.0: .bias must be [networks, out] of .weight");
  file = good_file();
  file.header["__metadata__"]["key.0"] = "silu relu";
  CHECK(file.refusal() == "__metadata__.key.0: \"relu\" is not silu or residual");
  file = good_file();
  file.add("key.1.weight", {2, 2, 2}, 1.0F);
  file.add("key.1.bias", {2, 2}, 1.0F);
  CHECK(file.refusal() == "key.1: other networks than the layer before");
  file = good_file();
  file.add("key.1.weight", {2, 2}, 1.0F);
  file.add("key.1.bias", {2, 2}, 1.0F);
  CHECK(file.refusal() == "key.1: .weight must have 3 dimensions");
  file = good_file();
  file.add("key.1.weight", {1, 2, 3}, 1.0F);
  file.add("key.1.bias", {1, 2}, 1.0F);
  file.header["__metadata__"]["key.1"] = "";
  CHECK(file.refusal() == "key layer 1: in 3 is not the out 2 of the layer before");
}

// What is common to two selections of the same number of tokens over what is in either.
double overlap(const std::vector<TokenId>& a, const std::vector<TokenId>& b) {
  std::vector<TokenId> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return static_cast<double>(both.size()) / static_cast<double>(a.size() + b.size() - both.size());
}

// For every query row and head of a capture the top 2 % of its middle.
class Judge {
 public:
  explicit Judge(const Capture& capture)
      : capture_(capture),
        middle_({.begin = 4, .end = capture.tokens() - capture.query_rows() - 64}),
        wanted_(select(ExactScores(),
                       RangeIndex(middle_, capture.shape().kv_heads, capture.shape().head_dim))),
        mean_(static_cast<std::size_t>(capture.shape().head_dim)) {
    capture.with_key_values([&](const auto& key_values) {
      for (TokenId t = middle_.begin; t < middle_.end; ++t) {
        for (std::size_t j = 0; j < mean_.size(); ++j) {
          mean_[j] += static_cast<double>(to_float(key_values.key(0, t)[j])) / middle_.size();
        }
      }
    });
  }

  /// Mean over heads and rows of the overlap of what codes find with the true top.
  [[nodiscard]] double overlap_of(const LearnedHash& hash) const {
    SignCodes index(hash);
    SerialExecutor executor;
    capture_.with_key_values([&](const auto& key_values) {
      REQUIRE(index.build(make_backend<HighwayOps>(executor), key_values, middle_).ok());
    });
    const auto found = select(AgreementScores(hash), index);
    double sum = 0.0;
    for (std::size_t i = 0; i < found.size(); ++i) sum += overlap(found[i], wanted_[i]);
    return sum / static_cast<double>(found.size());
  }

  /// Random planes through 0, or through the mean of the keys.
  [[nodiscard]] LearnedHash planes(int bits, bool centred, std::uint64_t seed) const {
    const int dim = capture_.shape().head_dim;
    Random random(seed);
    std::vector<float> weights(static_cast<std::size_t>(bits * dim));
    for (float& w : weights) w = static_cast<float>(random.normal());
    std::vector<float> biases;
    for (int b = 0; b < bits; ++b) {
      double sum = 0.0;
      for (int j = 0; j < dim && centred; ++j) {
        sum += static_cast<double>(weights[static_cast<std::size_t>(b * dim + j)]) *
               mean_[static_cast<std::size_t>(j)];
      }
      biases.push_back(static_cast<float>(-sum));
    }
    const LearnedLayer keys[] = {{.in = dim, .out = bits, .weights = weights, .biases = biases}};
    const LearnedLayer queries[] = {{.in = dim, .out = bits, .weights = weights}};
    return std::move(*LearnedHash::create({.key_layers = keys, .query_layers = queries}));
  }

 private:
  template <class Scores, class Index>
  [[nodiscard]] std::vector<std::vector<TokenId>> select(const Scores& scores,
                                                         const Index& index) const {
    const Shape& shape = capture_.shape();
    const DrawLimits limits{.group = shape.group(), .tokens = middle_.size()};
    Arena counting;
    (void)scores.carve(counting, limits);
    std::vector<std::byte> memory(counting.bytes_needed());
    Arena arena{std::span<std::byte>(memory)};
    const auto scratch = scores.carve(arena, limits);
    const TokenId n = middle_.size();
    const TokenId top = Budget{.fraction = 0.02}.of(n);
    std::vector<TokenId> order(static_cast<std::size_t>(n));
    std::vector<std::vector<TokenId>> all;
    capture_.with_key_values([&](const auto& key_values) {
      using Source = std::remove_cvref_t<decltype(key_values)>;
      for (int row = 0; row < capture_.query_rows(); ++row) {
        const DrawInput<Source, Index> input{.key_values = key_values,
                                             .index = index,
                                             .kv_head = 0,
                                             .queries = {.data = capture_.query(row).data(),
                                                         .count = shape.group(),
                                                         .dim = shape.head_dim},
                                             .scale = capture_.scale(),
                                             .noise = {}};
        const float* found = scores.template compute<HighwayOps>(input, scratch);
        for (int g = 0; g < shape.group(); ++g) {
          rank_tokens(found + std::int64_t{g} * n, n, top, order.data());
          all.emplace_back(order.begin(), order.begin() + top);
          std::sort(all.back().begin(), all.back().end());
        }
      }
    });
    return all;
  }

  const Capture& capture_;
  TokenRange middle_;
  std::vector<std::vector<TokenId>> wanted_;
  std::vector<double> mean_;  // of the keys
};

// The claim of examples/learned_codes: neither queries nor keys of the captures were trained on.
TEST_CASE("shipped_weights.find_twice_what_random_planes_of_their_length_do") {
  const std::string captures = MAGICPIG_TEST_DATA_DIR;
  for (const std::string name :
       {"spotlight/prose-l12", "spotlight/prose-l20", "hashattention/prose-l12"}) {
    CAPTURE(name);
    const auto hash =
        bench::read_learned_hash(captures + "/../learned_codes/" + name + ".safetensors");
    INFO(std::string(hash.status().message()));
    REQUIRE(hash.ok());
    const auto capture = Capture::read(captures + name.substr(name.find('/')) + ".safetensors");
    REQUIRE(capture.ok());
    const Judge judge(*capture);
    const double learned = judge.overlap_of(*hash);
    for (const bool centred : {false, true}) {
      constexpr int kSeeds = 8;
      double sum = 0.0;
      double squares = 0.0;
      for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
        const double found = judge.overlap_of(judge.planes(hash->bits(), centred, seed));
        sum += found;
        squares += found * found;
      }
      const double mean = sum / kSeeds;
      const double variance = (squares - kSeeds * mean * mean) / (kSeeds - 1);
      const double upper = mean + 1.895 * std::sqrt(variance / kSeeds);  // 95 %, t of 7
      MESSAGE(name << ", " << hash->bits() << " bits: " << learned << "; "
                   << std::string(centred ? "centred planes " : "planes ") << mean << ", at most "
                   << upper);
      CHECK(learned >= 2.0 * upper);
    }
  }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Fingerprints tell families and quantisers apart, and a trained quantiser comes back from its
// blob.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/hash/cross_polytope.hpp"
#include "magicpig/hash/haar.hpp"
#include "magicpig/hash/orthogonal.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "magicpig/hash/rademacher.hpp"
#include "problem.hpp"
#include "reseal.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

void check_all_differ(const std::vector<std::uint64_t>& prints) {
  for (std::size_t i = 0; i < prints.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      CAPTURE(i);
      CAPTURE(j);
      CHECK(prints[i] != prints[j]);
    }
  }
}

template <class Family>
std::uint64_t print_of(const HashConfig& config) {
  const auto family = Family::create(config);
  const auto again = Family::create(config);
  CHECK(family->fingerprint() == again->fingerprint());
  return family->fingerprint();
}

TEST_CASE("HashFamily.fingerprints_differ_where_codes_do") {
  const HashConfig base{.dim = 24, .bits = 4, .tables = 6, .seed = 3};
  const auto polytope = [](int bits, int parts) {
    return CrossPolytope::create({.dim = 24, .bits = bits, .tables = 6, .parts = parts, .seed = 3})
        ->fingerprint();
  };
  check_all_differ(std::vector{
      print_of<SimHash>(base), print_of<RademacherHash>(base), print_of<OrthogonalHash>(base),
      print_of<SimHash>({.dim = 24, .bits = 4, .tables = 6, .seed = 4}),
      print_of<SimHash>({.dim = 24, .bits = 4, .tables = 6, .seed = 3, .layer = 1}),
      print_of<SimHash>({.dim = 24, .bits = 6, .tables = 4, .seed = 3}),
      print_of<SimHash>({.dim = 23, .bits = 4, .tables = 6, .seed = 3}), polytope(4, 1),
      polytope(4, 2), polytope(4, 4)});
}

template <class R>
std::uint64_t print_of(int dim, int bits, std::uint64_t seed) {
  return ScalarQuantiser<R>::create(dim, bits, seed)->fingerprint();
}

TEST_CASE("ScalarQuantiser.fingerprints_differ_where_codes_do") {
  check_all_differ(
      std::vector{print_of<HadamardRotation>(24, 2, 1), print_of<HadamardRotation>(24, 2, 2),
                  print_of<HadamardRotation>(24, 3, 1), print_of<HadamardRotation>(23, 2, 1),
                  print_of<HadamardRotation>(64, 2, 1), print_of<HaarRotation>(24, 2, 1)});
}

struct Trained {
  Problem<float> problem{
      {.shape = {.query_heads = 2, .kv_heads = 2, .head_dim = 20, .value_dim = 8},
       .tokens = 400,
       .key_offset = 0.5}};
  SerialExecutor executor;

  [[nodiscard]] ProductQuantiser train(int bits, std::uint64_t seed = 0) {
    auto made = ProductQuantiser::train(make_backend<ScalarOps>(executor), problem.source(),
                                        {0, 400}, {.kv_heads = 2, .bits = bits, .seed = seed});
    CHECK(made.ok());
    return std::move(*made);
  }
};

std::vector<std::byte> save(const ProductQuantiser& quantiser) {
  std::vector<std::byte> bytes(quantiser.saved_bytes());
  CHECK(quantiser.save(bytes).ok());
  return bytes;
}

TEST_CASE("ProductQuantiser.comes_back_from_its_blob_and_makes_the_same_codes") {
  Trained setting;
  std::vector<std::uint64_t> prints;
  for (const int bits : {1, 2, 3, 4}) {
    CAPTURE(bits);
    const ProductQuantiser quantiser = setting.train(bits);
    const auto loaded = ProductQuantiser::load(save(quantiser));
    REQUIRE_MESSAGE(loaded.ok(), loaded.status().message());
    CHECK(loaded->shape() == quantiser.shape());
    CHECK(loaded->kv_heads() == 2);
    CHECK(loaded->fingerprint() == quantiser.fingerprint());
    CHECK(save(*loaded) == save(quantiser));
    std::vector<std::int32_t> scratch(static_cast<std::size_t>(quantiser.shape().query_scratch));
    std::vector<std::int32_t> sums(static_cast<std::size_t>(quantiser.shape().rows) * 16);
    auto other = sums;
    for (int h = 0; h < 2; ++h) {
      const double unit =
          quantiser.tabulate(h, setting.problem.query(h), scratch.data(), sums.data());
      CHECK(loaded->tabulate(h, setting.problem.query(h), scratch.data(), other.data()) == unit);
      CHECK(sums == other);
    }
    prints.push_back(quantiser.fingerprint());
    prints.push_back(setting.train(bits, 7).fingerprint());
  }
  check_all_differ(prints);
}

TEST_CASE("ProductQuantiser.refuses_blobs_that_say_what_cannot_be") {
  Trained setting;
  const ProductQuantiser quantiser = setting.train(1);
  const auto good = save(quantiser);
  const auto refused = [&](std::size_t at, auto value, const char* words) {
    auto bytes = good;
    std::memcpy(bytes.data() + at, &value, sizeof value);
    reseal(bytes);
    const auto loaded = ProductQuantiser::load(bytes);
    CHECK_FALSE(loaded.ok());
    CHECK(loaded.status().code() == ErrorCode::kBadBlob);
    CHECK_MESSAGE(std::string(loaded.status().message()).find(words) != std::string::npos,
                  std::string(loaded.status().message()));
  };
  constexpr std::size_t kFirst = sizeof(BlobHeader);
  refused(kFirst, 0, "dim 0 is out of bounds");
  refused(kFirst, 1 << 30, "dim 1073741824 is out of bounds");
  refused(kFirst, 25, "axes: 2 times 2048 bytes are wanted");  // more axes than there are
  refused(kFirst + 4, 5, "bits 5 is out of bounds");
  refused(kFirst + 8, 0, "kv_heads 0 is out of bounds");
  refused(kFirst + 8, (1 << 24) - 1, "axes: 16777215 times 1152 bytes");
  refused(kFirst + 8, 1, "bytes behind the last field");
  refused(kFirst + 12, std::int16_t{-32768}, "axis 0 is out of bounds");
  refused(good.size() - 4, 101, "exponent 101 is out of bounds");
  refused(good.size() - 10, std::int16_t{-32768}, "centroid");
  std::vector<std::byte> small(good.size() - 1);
  const Status status = quantiser.save(small);
  CHECK(status.code() == ErrorCode::kWorkspaceTooSmall);
  CHECK_FALSE(ProductQuantiser::load(std::span(good).first(100)).ok());
  CHECK_FALSE(ProductQuantiser::load({}).ok());
}

}  // namespace

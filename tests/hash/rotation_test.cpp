// SPDX-License-Identifier: Apache-2.0
// Random rotations in integers.
#include "magicpig/hash/rotation.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "random.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

struct Image {
  std::vector<std::int32_t> integers;
  Rotated result;

  [[nodiscard]] double at(std::size_t j) const { return result.unit * integers[j]; }
};

Image image_of(const HadamardRotation& rotation, const std::vector<float>& x) {
  Image image{.integers = std::vector<std::int32_t>(static_cast<std::size_t>(rotation.padded())),
              .result = {}};
  image.result = rotation.rotate(x.data(), image.integers.data());
  return image;
}

std::vector<float> normals(int dim, std::uint64_t seed, double scale = 1.0) {
  Random random(seed);
  std::vector<float> x(static_cast<std::size_t>(dim));
  for (float& v : x) v = static_cast<float>(scale * random.normal());
  return x;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0;
  for (std::size_t j = 0; j < a.size(); ++j) {
    sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  }
  return sum;
}

constexpr int kDims[] = {1, 3, 8, 64, 65, 72, 80, 128, 129, 257, 1000};

TEST_CASE("HadamardRotation.keeps_inner_products_and_norms_of_any_dimension_and_size") {
  for (const int dim : kDims) {
    const auto rotation = HadamardRotation::create(dim, 7);
    REQUIRE(rotation.ok());
    CHECK(rotation->padded() == (dim + 7) / 8 * 8);
    for (const double scale : {1.0, 1e-20, 1e15}) {
      CAPTURE(dim);
      CAPTURE(scale);
      const std::vector<float> x = normals(dim, 1, scale);
      const std::vector<float> y = normals(dim, 2, 3.0);
      const Image rx = image_of(*rotation, x);
      const Image ry = image_of(*rotation, y);
      double product = 0.0;
      double square = 0.0;
      for (std::size_t j = 0; j < rx.integers.size(); ++j) {
        product += rx.at(j) * ry.at(j);
        square += static_cast<double>(rx.integers[j]) * rx.integers[j];
      }
      const double size = std::sqrt(dot(x, x) * dot(y, y));
      // Each coordinate is rounded to 2^-input_bits of the largest, some 2^-20 here, at most six
      // times more on the way: 1e-5 is ten times what that comes to.
      CHECK(std::abs(product - dot(x, y)) <= 1e-5 * size);
      CHECK(static_cast<double>(rx.result.square) == square);
      const double norm = rx.result.unit * std::sqrt(square);
      CHECK(norm == doctest::Approx(std::sqrt(dot(x, x))).epsilon(1e-5));
    }
  }
}

TEST_CASE("HadamardRotation.of_single_coordinates_does_not_overflow") {
  for (const int dim : {8, 1000, 1024, 16384}) {
    const auto rotation = HadamardRotation::create(dim, 3);
    REQUIRE(rotation.ok());
    for (const int at : {0, dim / 2, dim - 1}) {
      for (const float size : {1.0F, 3e38F, 1e-25F}) {
        std::vector<float> x(static_cast<std::size_t>(dim));
        x[static_cast<std::size_t>(at)] = size;
        const Image image = image_of(*rotation, x);
        const double norm = image.result.unit * std::sqrt(static_cast<double>(image.result.square));
        CAPTURE(dim);
        CAPTURE(at);
        // 16 bits go in at 16,384 dimensions, where a coordinate is a few of their units.
        CHECK(norm == doctest::Approx(static_cast<double>(size)).epsilon(dim > 1024 ? .05 : 1e-3));
      }
    }
    // All coordinates as large as they can be.
    const Image full =
        image_of(*rotation, std::vector<float>(static_cast<std::size_t>(dim), 3e38F));
    const double norm = full.result.unit * std::sqrt(static_cast<double>(full.result.square));
    CHECK(norm == doctest::Approx(3e38 * std::sqrt(dim)).epsilon(1e-3));
  }
}

TEST_CASE("HadamardRotation.of_the_zero_vector_is_zero") {
  const auto rotation = HadamardRotation::create(5, 1);
  for (const float tiny : {0.0F, 1e-35F}) {
    const Image image = image_of(*rotation, std::vector<float>(5, tiny));
    CHECK(image.result.unit == 0.0);
    CHECK(image.result.square == 0);
    for (const std::int32_t x : image.integers) CHECK(x == 0);
  }
}

// A uniform direction has coordinates of mean 0 and variance |x|^2 / d, any two uncorrelated.
TEST_CASE("HadamardRotation.spreads_a_vector_evenly_over_coordinates_and_seeds") {
  const int dim = 72;  // 64 and a rest, so that two windows overlap
  std::vector<float> x(static_cast<std::size_t>(dim));
  x[3] = 1.0F;
  std::vector<Sample> first(9), second(9);
  Sample product;
  const int seeds = replications(2000);
  INFO("seed ", first_seed());
  for (int s = 0; s < seeds; ++s) {
    const auto rotation =
        HadamardRotation::create(dim, first_seed() + static_cast<std::uint64_t>(s));
    const Image image = image_of(*rotation, x);
    for (std::size_t i = 0; i < first.size(); ++i) {
      first[i].add(image.at(8 * i));
      second[i].add(image.at(8 * i) * image.at(8 * i));
    }
    product.add(image.at(0) * image.at(71));
  }
  for (std::size_t i = 0; i < first.size(); ++i) {
    CHECK(std::abs(first[i].z(0.0)) < kZ);
    CHECK(second[i].mean() == doctest::Approx(1.0 / dim).epsilon(0.25));
  }
  CHECK(std::abs(product.z(0.0)) < kZ);
}

TEST_CASE("HadamardRotation.is_a_function_of_its_seed") {
  const std::vector<float> x = normals(64, 5);
  const auto one = HadamardRotation::create(64, 1);
  const auto again = HadamardRotation::create(64, 1);
  const auto other = HadamardRotation::create(64, 2);
  CHECK(image_of(*one, x).integers == image_of(*again, x).integers);
  CHECK(image_of(*one, x).integers != image_of(*other, x).integers);
}

// The same numbers on every machine: FNV-1a of all coordinates of three vectors.
TEST_CASE("HadamardRotation.has_the_same_bits_everywhere") {
  std::uint64_t hash = 14695981039346656037ULL;
  for (const int dim : {64, 65, 257}) {
    const auto rotation = HadamardRotation::create(dim, 11);
    std::vector<float> x;
    for (int j = 0; j < dim; ++j) x.push_back(static_cast<float>((j * 7919) % 1009 - 504) / 64.0F);
    for (const std::int32_t v : image_of(*rotation, x).integers) {
      hash = (hash ^ static_cast<std::uint32_t>(v)) * 1099511628211ULL;
    }
  }
  CHECK(hash == 1270898924749725939ULL);
}

TEST_CASE("HadamardRotation.refuses_dimensions_out_of_range") {
  for (const int dim : {0, -1, kMaxDim + 1}) {
    const auto rotation = HadamardRotation::create(dim, 1);
    REQUIRE(!rotation.ok());
    CHECK(rotation.status().code() == ErrorCode::kInvalidArgument);
  }
}

}  // namespace

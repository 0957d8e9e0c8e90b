// SPDX-License-Identifier: Apache-2.0
// What every model of Rotation must do, and what Haar's alone does.
#include "magicpig/hash/rotation.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/hash/haar.hpp"
#include "random.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

// A model; beside kMaxDim the largest dimension that is quick to make; one to average over many
// seeds in; the hash of its bits.
template <class R, int quick, int averaged, std::uint64_t bits>
struct Model {
  using Rotation = R;
  static constexpr int kQuickDim = quick;
  static constexpr int kAveragedDim = averaged;
  static constexpr std::uint64_t kBits = bits;
};
// 72 is 64 and a rest, so that two windows overlap.
struct Hadamard : Model<HadamardRotation, kMaxDim, 72, 1270898924749725939ULL> {};
struct Haar : Model<HaarRotation, 257, 24, 1211441678218311703ULL> {};
#define MAGICPIG_ROTATIONS Hadamard, Haar

struct Image {
  std::vector<std::int32_t> integers;
  Rotated result;

  [[nodiscard]] double at(std::size_t j) const { return result.unit * integers[j]; }
};

template <Rotation R>
Image image_of(const R& rotation, const std::vector<float>& x) {
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

TEST_CASE_TEMPLATE("Rotation.keeps_inner_products_and_norms_of_any_dimension_and_size", M,
                   MAGICPIG_ROTATIONS) {
  for (const int dim : kDims) {
    if (dim > M::kQuickDim) continue;
    const auto rotation = M::Rotation::create(dim, 7);
    REQUIRE(rotation.ok());
    CHECK(rotation->dim() == dim);
    CHECK(rotation->padded() == (dim + 7) / 8 * 8);
    for (const double scale : {1.0, 1e-20, 1e15}) {
      CAPTURE(dim);
      CAPTURE(scale);
      const std::vector<float> x = normals(dim, 1, scale);
      const std::vector<float> y = normals(dim, 2, 3.0);
      const Image rx = image_of(*rotation, x);
      const Image ry = image_of(*rotation, y);
      double product = 0.0;
      std::int64_t square = 0;
      for (std::size_t j = 0; j < rx.integers.size(); ++j) {
        product += rx.at(j) * ry.at(j);
        square += std::int64_t{rx.integers[j]} * rx.integers[j];
      }
      const double size = std::sqrt(dot(x, x) * dot(y, y));
      // Each coordinate is rounded to 2^-input_bits of the largest, some 2^-20 here, at most six
      // times more on the way: 1e-5 is ten times what that comes to.
      CHECK(std::abs(product - dot(x, y)) <= 1e-5 * size);
      CHECK(rx.result.square == square);
      const double norm = rx.result.unit * std::sqrt(static_cast<double>(square));
      CHECK(norm == doctest::Approx(std::sqrt(dot(x, x))).epsilon(1e-5));
    }
  }
}

TEST_CASE_TEMPLATE("Rotation.of_single_coordinates_does_not_overflow", M, MAGICPIG_ROTATIONS) {
  for (const int dim : {8, 1000, 1024, 16384}) {
    if (dim > M::kQuickDim && dim != M::Rotation::kMaxDim) continue;
    const auto rotation = M::Rotation::create(dim, 3);
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
    for (const std::int32_t v : full.integers) REQUIRE(std::abs(v) < (1 << 30));
  }
}

TEST_CASE_TEMPLATE("Rotation.of_the_zero_vector_is_zero", M, MAGICPIG_ROTATIONS) {
  const auto rotation = M::Rotation::create(5, 1);
  for (const float tiny : {0.0F, 1e-35F}) {
    const Image image = image_of(*rotation, std::vector<float>(5, tiny));
    CHECK(image.result.unit == 0.0);
    CHECK(image.result.square == 0);
    for (const std::int32_t x : image.integers) CHECK(x == 0);
  }
}

// A uniform direction has coordinates of mean 0 and variance |x|^2 / d, any two uncorrelated.
TEST_CASE_TEMPLATE("Rotation.spreads_a_vector_evenly_over_coordinates_and_seeds", M,
                   MAGICPIG_ROTATIONS) {
  constexpr int dim = M::kAveragedDim;
  std::vector<float> x(static_cast<std::size_t>(dim));
  x[3] = 1.0F;
  std::vector<Sample> first(9), second(9);
  Sample product;
  const int seeds = replications(2000);
  INFO("seed ", first_seed());
  for (int s = 0; s < seeds; ++s) {
    const auto rotation = M::Rotation::create(dim, first_seed() + static_cast<std::uint64_t>(s));
    const Image image = image_of(*rotation, x);
    for (std::size_t i = 0; i < first.size(); ++i) {
      const double coordinate = image.at(i * dim / first.size());
      first[i].add(coordinate);
      second[i].add(coordinate * coordinate);
    }
    product.add(image.at(0) * image.at(dim - 1));
  }
  for (std::size_t i = 0; i < first.size(); ++i) {
    CHECK(std::abs(first[i].z(0.0)) < kZ);
    CHECK(second[i].mean() == doctest::Approx(1.0 / dim).epsilon(0.25));
  }
  CHECK(std::abs(product.z(0.0)) < kZ);
}

TEST_CASE_TEMPLATE("Rotation.is_a_function_of_its_seed", M, MAGICPIG_ROTATIONS) {
  const std::vector<float> x = normals(64, 5);
  const auto one = M::Rotation::create(64, 1);
  const auto again = M::Rotation::create(64, 1);
  const auto other = M::Rotation::create(64, 2);
  CHECK(image_of(*one, x).integers == image_of(*again, x).integers);
  CHECK(image_of(*one, x).integers != image_of(*other, x).integers);
}

// The same numbers on every machine: FNV-1a of all coordinates of three vectors.
TEST_CASE_TEMPLATE("Rotation.has_the_same_bits_everywhere", M, MAGICPIG_ROTATIONS) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (const int dim : {64, 65, 257}) {
    const auto rotation = M::Rotation::create(dim, 11);
    std::vector<float> x;
    for (int j = 0; j < dim; ++j) x.push_back(static_cast<float>((j * 7919) % 1009 - 504) / 64.0F);
    for (const std::int32_t v : image_of(*rotation, x).integers) {
      hash = (hash ^ static_cast<std::uint32_t>(v)) * 1099511628211ULL;
    }
  }
  CHECK(hash == M::kBits);
}

TEST_CASE_TEMPLATE("Rotation.refuses_dimensions_out_of_range", M, MAGICPIG_ROTATIONS) {
  for (const int dim : {0, -1, M::Rotation::kMaxDim + 1}) {
    const auto rotation = M::Rotation::create(dim, 1);
    REQUIRE(!rotation.ok());
    CHECK(rotation.status().code() == ErrorCode::kInvalidArgument);
  }
}

// The moments of Haar measure up to the fourth, in which a rotation of other rows than normal ones
// differs. Source: Collins and Sniady 2006.
TEST_CASE("HaarRotation.has_the_moments_of_haar_measure") {
  constexpr int d = 8;
  Sample fourth, same_row, other_row, cycle;
  INFO("seed ", first_seed());
  for (int s = 0; s < replications(16000); ++s) {
    const auto rotation = HaarRotation::create(d, first_seed() + static_cast<std::uint64_t>(s));
    const Image a = image_of(*rotation, {1, 0, 0, 0, 0, 0, 0, 0});
    const Image b = image_of(*rotation, {0, 1, 0, 0, 0, 0, 0, 0});
    const auto square = [](double x) { return x * x; };
    double fourths = 0.0, squares = 0.0;
    for (std::size_t j = 0; j < d; ++j) {
      fourths += square(square(a.at(j))) / d;
      squares += square(a.at(j) * b.at(j)) / d;
    }
    fourth.add(fourths);
    same_row.add(squares);
    other_row.add(square(a.at(0) * b.at(1)));
    cycle.add(a.at(0) * a.at(1) * b.at(0) * b.at(1));
  }
  CHECK(std::abs(fourth.z(3.0 / (d * (d + 2)))) < kZ);
  CHECK(std::abs(same_row.z(1.0 / (d * (d + 2)))) < kZ);
  CHECK(std::abs(other_row.z((d + 1.0) / ((d - 1) * d * (d + 2)))) < kZ);
  CHECK(std::abs(cycle.z(-1.0 / ((d - 1) * d * (d + 2)))) < kZ);
}

// What signatures are made from: E <sign(R x), R q> = d E|u| <x, q> / |x|, u being a coordinate of
// a uniform direction; E|u| = gamma(d / 2) / (sqrt(pi) gamma((d + 1) / 2)).
TEST_CASE("HaarRotation.has_products_with_signs_of_the_mean_that_geometry_says") {
  constexpr int d = 24;
  const double factor = d * std::exp(std::lgamma(d / 2.0) - std::lgamma((d + 1) / 2.0)) /
                        std::sqrt(3.141592653589793);
  const std::vector<float> x = normals(d, 3);
  const std::vector<float> q = normals(d, 4);
  std::vector<float> one(d);
  one[0] = 1.0F;
  Sample dense, sparse;
  INFO("seed ", first_seed());
  for (int s = 0; s < replications(4000); ++s) {
    const auto rotation = HaarRotation::create(d, first_seed() + static_cast<std::uint64_t>(s));
    const Image rx = image_of(*rotation, x);
    const Image rq = image_of(*rotation, q);
    const Image r1 = image_of(*rotation, one);
    double dense_product = 0.0, sparse_product = 0.0;
    for (std::size_t j = 0; j < d; ++j) {
      dense_product += std::copysign(rq.at(j), rq.at(j) * rx.at(j));
      sparse_product += std::copysign(rx.at(j), rx.at(j) * r1.at(j));
    }
    dense.add(dense_product);
    sparse.add(sparse_product);
  }
  CHECK(std::abs(dense.z(factor * dot(x, q) / std::sqrt(dot(x, x)))) < kZ);
  CHECK(std::abs(sparse.z(factor * static_cast<double>(x[0]))) < kZ);
}

TEST_CASE("IntegerNormals.are_normal") {
  constexpr int kCells = 96;  // an eighth wide, from -6 to 6
  const int count = replications(400000);
  std::vector<double> observed(kCells), expected(kCells);
  INFO("seed ", first_seed());
  IntegerNormals draws(RandomStream({.seed = first_seed(), .purpose = Purpose::kRotation}));
  std::int32_t largest = 0;
  double lag = 0.0, last = 0.0;
  for (int i = 0; i < count; ++i) {
    const std::int32_t integer = draws.next();
    largest = std::max(largest, std::abs(integer));
    const double x = static_cast<double>(integer) / IntegerNormals::kUnit;
    const auto cell = static_cast<int>(std::floor(8.0 * x)) + kCells / 2;
    if (cell >= 0 && cell < kCells) observed[static_cast<std::size_t>(cell)] += 1.0;
    lag += x * last;
    last = x;
  }
  CHECK(largest < IntegerNormals::kBound);
  const auto below = [](double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); };
  for (int c = 0; c < kCells; ++c) {
    const double left = (c - kCells / 2) / 8.0;
    expected[static_cast<std::size_t>(c)] = count * (below(left + 0.125) - below(left));
  }
  CHECK(std::abs(chi_square_z(observed, expected)) < kZ);
  CHECK(std::abs(lag) < kZ * std::sqrt(count));
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// What every model of Rotation must do, and what Haar's alone does.
#include "magicpig/hash/rotation.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/hash/haar.hpp"
#include "magicpig/hash/hadamard.hpp"
#include "random.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

// A model; beside kMaxDim the largest dimension that is quick to make; the hash of its bits; and
// dimensions to average over many seeds in.
template <class R, int quick, std::uint64_t bits>
struct Model {
  using Rotation = R;
  static constexpr int kQuickDim = quick;
  static constexpr std::uint64_t kBits = bits;
};
struct Hadamard : Model<HadamardRotation, kMaxDim, 1263468725836661629ULL> {
  // A power of two, and windows that share most, half and hardly any of their coordinates.
  static constexpr std::array kAveragedDims = {64, 72, 80, 96, 120, 136};
};
struct Haar : Model<HaarRotation, 257, 10788853578443798977ULL> {
  static constexpr std::array kAveragedDims = {24};
};
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

constexpr int kDims[] = {1, 3, 8, 64, 65, 72, 80, 120, 128, 129, 257, 1000};

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
  for (const int dim : {8, 136, 1000, 1024, 16376, 16384}) {
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
    std::int64_t together = 0;
    for (const std::int32_t v : full.integers) {
      REQUIRE(std::abs(v) < (1 << 30));
      together += std::abs(v);
    }
    REQUIRE(together < std::int64_t{1} << 31);
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

// Scores of the first and second moments of all coordinates, over seeds, against those of a uniform
// direction of d dimensions: u_i / sqrt(d) with E u_i = 0, E u_i u_j = 1 if i = j, else 0, and
// variance 2 (d - 1) / (d + 2) of u_i^2. The u_i^2 add up to d, so that one of them is not free.
struct Spread {
  double means = 0.0;
  double squares = 0.0;
  double neighbours = 0.0;  // u_i u_{i + 1}, of variance d / (d + 2), and uncorrelated
};

template <Rotation R>
Spread spread_of(const std::vector<float>& x, int seeds) {
  const auto dim = static_cast<int>(x.size());
  std::vector<double> mean(x.size()), square(x.size()), neighbour(x.size());
  const double size = std::sqrt(dim / dot(x, x));
  for (int s = 0; s < seeds; ++s) {
    const auto rotation = R::create(dim, first_seed() + static_cast<std::uint64_t>(s));
    const Image image = image_of(*rotation, x);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double u = size * image.at(i);
      mean[i] += u / seeds;
      square[i] += u * u / seeds;
      neighbour[i] += u * size * image.at((i + 1) % x.size()) / seeds;
    }
  }
  const double d = dim;
  double means = 0.0, squares = 0.0, neighbours = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    means += seeds * mean[i] * mean[i];
    squares += seeds * (square[i] - 1.0) * (square[i] - 1.0) * (d + 2) / (2 * d);
    neighbours += seeds * neighbour[i] * neighbour[i] * (d + 2) / d;
  }
  return {.means = chi_square_z(means, dim),
          .squares = chi_square_z(squares, dim - 1),
          .neighbours = chi_square_z(neighbours, dim)};
}

// Single coordinates, where what one transform does another may undo.
TEST_CASE_TEMPLATE("Rotation.spreads_a_vector_evenly_over_coordinates_and_seeds", M,
                   MAGICPIG_ROTATIONS) {
  INFO("seed ", first_seed());
  for (const int dim : M::kAveragedDims) {
    for (const int at : {3, dim - 1}) {
      CAPTURE(dim);
      CAPTURE(at);
      std::vector<float> x(static_cast<std::size_t>(dim));
      x[static_cast<std::size_t>(at)] = 1.0F;
      const Spread spread = spread_of<typename M::Rotation>(x, replications(2000));
      CHECK(std::abs(spread.means) < kZ);
      CHECK(std::abs(spread.squares) < kZ);
      CHECK(std::abs(spread.neighbours) < kZ);
    }
  }
}

TEST_CASE_TEMPLATE("Rotation.is_a_function_of_its_seed", M, MAGICPIG_ROTATIONS) {
  const std::vector<float> x = normals(64, 5);
  const auto one = M::Rotation::create(64, 1);
  const auto again = M::Rotation::create(64, 1);
  const auto other = M::Rotation::create(64, 2);
  CHECK(image_of(*one, x).integers == image_of(*again, x).integers);
  CHECK(image_of(*one, x).integers != image_of(*other, x).integers);
}

// The same numbers on every machine: FNV-1a of all coordinates of four vectors.
TEST_CASE_TEMPLATE("Rotation.has_the_same_bits_everywhere", M, MAGICPIG_ROTATIONS) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (const int dim : {64, 65, 130, 257}) {
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

// SPDX-License-Identifier: Apache-2.0
// What every hash family must do, and that its codes collide as often as it says.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "backends.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/hash/orthogonal.hpp"
#include "magicpig/hash/rademacher.hpp"
#include "magicpig/hash/simhash.hpp"
#include "planes.hpp"
#include "random.hpp"

// One line per model.
#define MAGICPIG_HASH_FAMILIES magicpig::SimHash, magicpig::RademacherHash, magicpig::OrthogonalHash

namespace {

using namespace magicpig;
using test::for_each_backend;
using test::planes_of;
using test::Random;

template <class Family>
Family make(const HashConfig& config) {
  Result<Family> family = Family::create(config);
  REQUIRE(family.ok());
  return std::move(*family);
}

template <class Ops = ScalarOps, class Family>
std::vector<Code> codes_of(const Family& family, const std::vector<float>& vectors) {
  const auto count = vectors.size() / static_cast<std::size_t>(family.dim());
  std::vector<Code> codes(count * static_cast<std::size_t>(family.tables()), Code{0xffff});
  std::vector<float> scratch(family.scratch_floats(static_cast<int>(count)));
  family.template hash<Ops>(vectors.data(), static_cast<int>(count), codes.data(), scratch.data());
  return codes;
}

std::vector<float> random_vectors(Random& random, int count, int dim) {
  std::vector<float> vectors;
  for (int i = 0; i < count * dim; ++i) vectors.push_back(static_cast<float>(random.normal()));
  return vectors;
}

// Two dense vectors of unit length at an angle, in random directions.
std::pair<std::vector<float>, std::vector<float>> pair_at(double cosine, int dim, Random& random) {
  std::vector<double> u, v;
  double uu = 0.0, uv = 0.0, vv = 0.0;
  for (int i = 0; i < dim; ++i) {
    u.push_back(random.normal());
    v.push_back(random.normal());
    uu += u.back() * u.back();
    uv += u.back() * v.back();
    vv += v.back() * v.back();
  }
  const double v_norm = std::sqrt(vv - uv * uv / uu);  // of v without its share of u
  const double sine = std::sqrt(1.0 - cosine * cosine);
  std::pair<std::vector<float>, std::vector<float>> pair;
  for (std::size_t i = 0; i < u.size(); ++i) {
    const double along = u[i] / std::sqrt(uu);
    const double across = (v[i] - uv / uu * u[i]) / v_norm;
    pair.first.push_back(static_cast<float>(along));
    pair.second.push_back(static_cast<float>(cosine * along + sine * across));
  }
  return pair;
}

int flipped_bits(Code a, Code b) {
  int flips = 0;
  for (unsigned difference = static_cast<unsigned>(a ^ b); difference != 0; difference >>= 1) {
    flips += static_cast<int>(difference & 1U);
  }
  return flips;
}

TEST_CASE_TEMPLATE("a family models the concept and answers with what it was made from", Family,
                   MAGICPIG_HASH_FAMILIES) {
  static_assert(HashFamily<Family>);
  static_assert(HashFamilyOver<Family, ScalarOps>);
  static_assert(HashFamilyOver<Family, HighwayOps>);
  const auto family = make<Family>({.dim = 20, .bits = 7, .tables = 33});
  CHECK(family.dim() == 20);
  CHECK(family.bits() == 7);
  CHECK(family.tables() == 33);
  CHECK(planes_of(family).size() == 7 * 33 * 20);
  CHECK(family.scratch_floats(3) == 3 * 7 * 33);
  CHECK(family.bytes() == 4 * 256 * 20);  // 231 planes in 8 panels of 32
  CHECK(bucket_count(family.bits()) == 128);
}

TEST_CASE_TEMPLATE("the same seed and layer give the same planes, another seed or layer others",
                   Family, MAGICPIG_HASH_FAMILIES) {
  const HashConfig config{.dim = 24, .bits = 6, .tables = 40, .seed = 5, .layer = 2};
  const auto family = make<Family>(config);
  const auto again = make<Family>(config);
  Random random(1);
  const std::vector<float> vectors = random_vectors(random, 4, 24);
  CHECK(codes_of(family, vectors) == codes_of(again, vectors));
  HashConfig other_seed = config;
  other_seed.seed = 6;
  HashConfig high_seed = config;
  high_seed.seed += std::uint64_t{1} << 32;
  HashConfig other_layer = config;
  other_layer.layer = 3;
  for (const HashConfig& other : {other_seed, high_seed, other_layer}) {
    const auto different = make<Family>(other);
    const std::vector<float> planes = planes_of(family);
    const std::vector<float> other_planes = planes_of(different);
    std::size_t same_signs = 0;
    for (std::size_t i = 0; i < planes.size(); ++i) {
      same_signs += (planes[i] > 0.0F) == (other_planes[i] > 0.0F);
    }
    // Independent planes share half of their 5,760 signs, within 6 standard deviations of 38.
    CHECK(std::fabs(static_cast<double>(same_signs) - 2880.0) < 228.0);
    CHECK(codes_of(family, vectors) != codes_of(different, vectors));
  }
}

TEST_CASE_TEMPLATE("every plane of a family differs from every other", Family,
                   MAGICPIG_HASH_FAMILIES) {
  const auto family = make<Family>({.dim = 64, .bits = 10, .tables = 30, .seed = 3});
  const std::vector<float> planes = planes_of(family);
  int equal = 0;
  for (std::size_t a = 0; a < 300; ++a) {
    for (std::size_t b = 0; b < a; ++b) {
      std::size_t same = 0;
      for (std::size_t j = 0; j < 64; ++j) {
        same += planes[a * 64 + j] == planes[b * 64 + j];
      }
      equal += same == 64;
    }
  }
  CHECK(equal == 0);
}

TEST_CASE_TEMPLATE("codes stay below the number of buckets and use all of their bits", Family,
                   MAGICPIG_HASH_FAMILIES) {
  Random random(2);
  for (const int bits : {1, 2, 9, 15}) {
    CAPTURE(bits);
    const auto family = make<Family>({.dim = 16, .bits = bits, .tables = 50});
    Code all = 0;
    bool below = true;
    for (const Code code : codes_of(family, random_vectors(random, 20, 16))) {
      below = below && code < bucket_count(bits);
      all = static_cast<Code>(all | code);
    }
    CHECK(below);
    CHECK(all == bucket_count(bits) - 1);
  }
}

TEST_CASE_TEMPLATE("a zero vector has code 0 in every table", Family, MAGICPIG_HASH_FAMILIES) {
  const auto family = make<Family>({.dim = 33, .bits = 10, .tables = 40});
  const std::vector<Code> zeros(80, Code{0});
  CHECK(codes_of<ScalarOps>(family, std::vector<float>(66, 0.0F)) == zeros);
  CHECK(codes_of<HighwayOps>(family, std::vector<float>(66, -0.0F)) == zeros);
}

TEST_CASE_TEMPLATE("codes do not depend on a vector's length, and all bits flip with its sign",
                   Family, MAGICPIG_HASH_FAMILIES) {
  const auto family = make<Family>({.dim = 48, .bits = 8, .tables = 60});
  Random random(3);
  const std::vector<float> vector = random_vectors(random, 1, 48);
  const std::vector<Code> codes = codes_of(family, vector);
  for (const int exponent : {-40, -1, 1, 40}) {  // powers of 2: no rounding anywhere
    CAPTURE(exponent);
    std::vector<float> scaled = vector;
    for (float& x : scaled) x = std::ldexp(x, exponent);
    CHECK(codes_of<ScalarOps>(family, scaled) == codes);
  }
  std::vector<float> opposite = vector;
  for (float& x : opposite) x = -x;
  std::vector<Code> flipped = codes;
  for (Code& code : flipped) code = static_cast<Code>(code ^ 0xffU);
  CHECK(codes_of(family, opposite) == flipped);  // no projection of a dense vector is exactly 0
}

template <class Ops, class Family>
void check_batches(const Family& family) {
  Random random(4);
  const int dim = family.dim();
  const std::vector<float> vectors = random_vectors(random, kHashBatch, dim);
  std::vector<Code> single;
  for (int v = 0; v < kHashBatch; ++v) {
    const auto* begin = vectors.data() + v * dim;
    for (const Code c : codes_of<Ops>(family, std::vector<float>(begin, begin + dim))) {
      single.push_back(c);
    }
  }
  for (int count = 0; count <= kHashBatch; ++count) {
    CAPTURE(count);
    const std::vector<float> first(vectors.data(), vectors.data() + count * dim);
    const std::vector<Code> expected(single.data(), single.data() + count * family.tables());
    CHECK(codes_of<Ops>(family, first) == expected);
  }
}

TEST_CASE_TEMPLATE("vectors hashed together have the codes they have alone", Family,
                   MAGICPIG_HASH_FAMILIES) {
  const auto family = make<Family>({.dim = 37, .bits = 9, .tables = 31});
  for_each_backend([&]<class Ops>() { check_batches<Ops>(family); });
}

// Bits must follow the sign of the projection in double wherever that is further from 0 than the
// rounding of `dim` products and sums in float can move it.
template <class Ops, class Family>
void check_bits(const Family& family, const std::vector<float>& vectors, int* uncertain) {
  const auto dim = static_cast<std::size_t>(family.dim());
  const auto tables = static_cast<std::size_t>(family.tables());
  const std::vector<Code> codes = codes_of<Ops>(family, vectors);
  const std::vector<float> planes = planes_of(family);
  int wrong = 0;
  for (std::size_t v = 0; v < vectors.size() / dim; ++v) {
    for (std::size_t plane = 0; plane < planes.size() / dim; ++plane) {
      double projection = 0.0;
      double magnitude = 0.0;
      for (std::size_t j = 0; j < dim; ++j) {
        const double product = static_cast<double>(planes[plane * dim + j]) *
                               static_cast<double>(vectors[v * dim + j]);
        projection += product;
        magnitude += std::fabs(product);
      }
      if (std::fabs(projection) <= 1.01 * static_cast<double>(dim + 1) * 0x1p-24 * magnitude) {
        ++*uncertain;
        continue;
      }
      const Code code = codes[v * tables + plane % tables];
      wrong += ((code >> (plane / tables)) & 1) != (projection > 0.0 ? 1 : 0);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE(
    "bit b of table l is the sign of plane b L + l, and backends agree beyond rounding", Family,
    MAGICPIG_HASH_FAMILIES) {
  Random random(5);
  for (const int dim : {2, 31, 128}) {
    CAPTURE(dim);
    const auto family = make<Family>({.dim = dim, .bits = 10, .tables = 50, .seed = 8});
    const std::vector<float> vectors = random_vectors(random, 20, dim);
    for_each_backend([&]<class Ops>() {
      int uncertain = 0;
      check_bits<Ops>(family, vectors, &uncertain);
      CHECK(uncertain < 10);  // of 10,000: else the comparison would say little
    });
  }
}

// Planes are independent draws, so the number of agreeing bits is binomial given the vectors. 4.9
// standard deviations are exceeded with probability 1e-6. Blocks of orthogonal planes vary less.
// Coin planes follow the law only in the limit of many dimensions: their symmetry leaves an error
// of the order of the fourth moment of the coordinates, 1 / dim for dense vectors.
template <class Family>
double law_margin(int dim) {
  return std::is_same_v<Family, RademacherHash> ? 1.0 / dim : 0.0;
}

TEST_CASE_TEMPLATE("a bit of two vectors agrees with probability 1 - angle / pi", Family,
                   MAGICPIG_HASH_FAMILIES) {
  constexpr int kDim = 128;
  constexpr std::uint64_t kSeed = 21;
  CAPTURE(kSeed);
  const auto family = make<Family>({.dim = kDim, .bits = 15, .tables = 1024, .seed = kSeed});
  Random random(kSeed);
  for (const double cosine : {-0.99, -0.7, -0.2, 0.0, 0.3, 0.6, 0.9, 0.99, 0.9999}) {
    CAPTURE(cosine);
    const auto [x, y] = pair_at(cosine, kDim, random);
    const std::vector<Code> a = codes_of<HighwayOps>(family, x);
    const std::vector<Code> b = codes_of<HighwayOps>(family, y);
    int agreeing = 0;
    for (std::size_t l = 0; l < a.size(); ++l) agreeing += 15 - flipped_bits(a[l], b[l]);
    constexpr double kBits = 15.0 * 1024.0;
    const double p = 1.0 - std::acos(cosine) / 3.14159265358979324;
    CHECK(std::fabs(agreeing / kBits - p) <
          4.9 * std::sqrt(p * (1.0 - p) / kBits) + law_margin<Family>(kDim));
  }
}

TEST_CASE_TEMPLATE("codes differ in at most r bits as often as table_collision() says", Family,
                   MAGICPIG_HASH_FAMILIES) {
  constexpr int kDim = 128;
  constexpr int kSeeds = 12;
  constexpr double kTables = 1024.0 * kSeeds;
  constexpr std::array kCosines = {0.2, 0.6, 0.9};
  constexpr std::array kRadii = {0, 1, 3};
  int collisions[kCosines.size()][kRadii.size()] = {};
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const auto family = make<Family>({.dim = kDim, .bits = 5, .tables = 1024, .seed = seed});
    for (std::size_t c = 0; c < kCosines.size(); ++c) {
      Random random(seed);
      const auto [x, y] = pair_at(kCosines[c], kDim, random);
      const std::vector<Code> a = codes_of<HighwayOps>(family, x);
      const std::vector<Code> b = codes_of<HighwayOps>(family, y);
      for (std::size_t l = 0; l < a.size(); ++l) {
        for (std::size_t r = 0; r < kRadii.size(); ++r) {
          collisions[c][r] += flipped_bits(a[l], b[l]) <= kRadii[r] ? 1 : 0;
        }
      }
    }
  }
  const auto family = make<Family>({.dim = kDim, .bits = 5, .tables = 1024, .seed = 1});
  for (std::size_t c = 0; c < kCosines.size(); ++c) {
    for (std::size_t r = 0; r < kRadii.size(); ++r) {
      CAPTURE(kCosines[c]);
      CAPTURE(kRadii[r]);
      const double p = family.table_collision(kCosines[c], kRadii[r]);
      // The margin of each of 5 bits adds up.
      CHECK(std::fabs(collisions[c][r] / kTables - p) <
            4.9 * std::sqrt(p * (1.0 - p) / kTables) + 5.0 * law_margin<Family>(kDim));
    }
  }
}

TEST_CASE_TEMPLATE(
    "table_collision() is exact at both ends, clamps, and grows with cosine and radius", Family,
    MAGICPIG_HASH_FAMILIES) {
  const auto family = make<Family>({.dim = 8, .bits = 10, .tables = 3});
  // Where p saturates it grows by less than it is rounded: 10 for the power of a rounded angle, 10
  // for the sum and 4 for a term, in half units of the last place.
  constexpr double kRounding = 24 * 0x1p-53;
  for (int radius = 0; radius <= 10; ++radius) {
    CAPTURE(radius);
    CHECK(family.table_collision(1.0, radius) == 1.0);
    CHECK(family.table_collision(7.0, radius) == 1.0);
    CHECK(family.table_collision(-1.0, radius) == (radius == 10 ? 1.0 : 0.0));
    CHECK(family.table_collision(-7.0, radius) == (radius == 10 ? 1.0 : 0.0));
    double before = 0.0;
    int falls = 0;
    int wider_is_less = 0;
    for (int i = -1000; i <= 1000; ++i) {
      const double p = family.table_collision(i / 1000.0, radius);
      falls += p < before * (1 - 2 * kRounding);
      before = p;
      if (radius > 0) {
        wider_is_less += p < family.table_collision(i / 1000.0, radius - 1) * (1 - 2 * kRounding);
      }
    }
    CHECK(falls == 0);
    CHECK(wider_is_less == 0);
  }
  // At a right angle every bit is a fair coin.
  CHECK(family.table_collision(0.0, 0) == doctest::Approx(0x1p-10).epsilon(1e-13));
  CHECK(family.table_collision(0.0, 1) == doctest::Approx(11.0 * 0x1p-10).epsilon(1e-13));
}

TEST_CASE_TEMPLATE("a config outside its bounds is refused with the value and the bound", Family,
                   MAGICPIG_HASH_FAMILIES) {
  const auto refusal = [](const HashConfig& config) -> std::string {
    const Result<Family> family = Family::create(config);
    if (family.ok()) return "accepted";
    CHECK(family.status().code() == ErrorCode::kInvalidArgument);
    return family.status().message();
  };
  CHECK(refusal({.dim = 0}) == "dim 0 must lie in [1, 16384]");
  CHECK(refusal({.dim = -4}) == "dim -4 must lie in [1, 16384]");
  CHECK(refusal({.dim = 16385}) == "dim 16385 must lie in [1, 16384]");
  CHECK(refusal({.dim = 4, .bits = 0}) == "bits (K) 0 must lie in [1, 15]");
  CHECK(refusal({.dim = 4, .bits = 16}) == "bits (K) 16 must lie in [1, 15]");
  CHECK(refusal({.dim = 4, .tables = 0}) == "tables (L) 0 must lie in [1, 1024]");
  CHECK(refusal({.dim = 4, .tables = 1025}) == "tables (L) 1025 must lie in [1, 1024]");
  CHECK(refusal({.dim = 1, .bits = 1, .tables = 1}) == "accepted");
  CHECK(refusal({.dim = 3, .bits = 15, .tables = 1024}) == "accepted");
}

}  // namespace

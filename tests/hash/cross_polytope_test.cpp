// SPDX-License-Identifier: Apache-2.0
// Cross-polytope hashing: which corner a code names, that codes collide as often as stated, and
// what is refused.
#include "magicpig/hash/cross_polytope.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/cpu/highway.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/sample/collision.hpp"
#include "random.hpp"

namespace {

using namespace magicpig;
using test::Random;

CrossPolytope make(const CrossPolytopeConfig& config) {
  Result<CrossPolytope> family = CrossPolytope::create(config);
  REQUIRE(family.ok());
  return std::move(*family);
}

template <class Ops = ScalarOps>
std::vector<Code> codes_of(const CrossPolytope& family, const std::vector<float>& vectors) {
  const auto count = vectors.size() / static_cast<std::size_t>(family.dim());
  std::vector<Code> codes(count * static_cast<std::size_t>(family.tables()), Code{0xffff});
  std::vector<float> scratch(family.scratch_floats(static_cast<int>(count)));
  family.hash<Ops>(vectors.data(), static_cast<int>(count), codes.data(), scratch.data());
  return codes;
}

std::vector<float> random_vectors(Random& random, int count, int dim) {
  std::vector<float> vectors;
  for (int i = 0; i < count * dim; ++i) vectors.push_back(static_cast<float>(random.normal()));
  return vectors;
}

TEST_CASE("CrossPolytope.answers_with_what_it_was_made_from") {
  static_assert(HashFamilyOver<CrossPolytope, ScalarOps>);
  static_assert(HashFamilyOver<CrossPolytope, HighwayOps>);
  const CrossPolytope family = make({.dim = 20, .bits = 6, .tables = 33, .parts = 2});
  CHECK(family.dim() == 20);
  CHECK(family.bits() == 6);
  CHECK(family.tables() == 33);
  CHECK(family.parts() == 2);
  CHECK(family.axes() == 4);
  CHECK(family.scratch_floats(3) == 3 * 33 * 2 * 4);
  CHECK(family.bytes() == 4 * 288 * 20);  // 264 rows in 9 panels of 32
}

// The corner of each part in double; `margin` by how much its coordinate is the largest.
unsigned oracle_code(const CrossPolytope& family, const float* vector, int table, double* margin) {
  unsigned code = 0;
  *margin = 1e9;
  for (int p = 0; p < family.parts(); ++p) {
    std::vector<double> y(static_cast<std::size_t>(family.axes()));
    for (std::size_t i = 0; i < y.size(); ++i) {
      const int plane = (table * family.parts() + p) * family.axes() + static_cast<int>(i);
      for (int j = 0; j < family.dim(); ++j) {
        y[i] += static_cast<double>(family.plane(plane, j)) * static_cast<double>(vector[j]);
      }
    }
    std::size_t best = 0;
    for (std::size_t i = 1; i < y.size(); ++i)
      best = std::fabs(y[i]) > std::fabs(y[best]) ? i : best;
    for (std::size_t i = 0; i < y.size(); ++i) {
      if (i != best) *margin = std::min(*margin, std::fabs(y[best]) - std::fabs(y[i]));
    }
    *margin = std::min(*margin, std::fabs(y[best]));
    const auto own = static_cast<unsigned>(2 * best + (y[best] < 0.0 ? 1 : 0));
    code |= own << (p * family.bits() / family.parts());
  }
  return code;
}

template <class Ops>
void check_codes(const CrossPolytope& family, int count) {
  Random random(5);
  const std::vector<float> vectors = random_vectors(random, count, family.dim());
  const std::vector<Code> codes = codes_of<Ops>(family, vectors);
  int uncertain = 0;
  for (int v = 0; v < count; ++v) {
    for (int l = 0; l < family.tables(); ++l) {
      double margin = 0.0;
      const unsigned expected = oracle_code(family, vectors.data() + v * family.dim(), l, &margin);
      const Code code = codes[static_cast<std::size_t>(v * family.tables() + l)];
      REQUIRE(code < bucket_count(family.bits()));
      if (margin < 1e-4) {
        ++uncertain;
        continue;
      }
      REQUIRE(code == expected);
    }
  }
  CHECK(uncertain * 100 < count * family.tables());
}

TEST_CASE("CrossPolytope.names_the_largest_coordinate_and_its_sign_in_any_batch") {
  for (const std::pair<int, int>& design : {std::pair{1, 1}, {2, 2}, {8, 1}, {9, 3}, {15, 3}}) {
    const int bits = design.first;
    const int parts = design.second;
    CAPTURE(bits);
    const CrossPolytope family =
        make({.dim = 31, .bits = bits, .tables = 11, .parts = parts, .seed = 8});
    check_codes<ScalarOps>(family, 20);
    check_codes<HighwayOps>(family, kHashBatch);
    check_codes<HighwayOps>(family, 1);
  }
}

TEST_CASE("CrossPolytope.codes_depend_on_direction_seed_and_layer_and_zero_has_code_0") {
  const CrossPolytopeConfig config{.dim = 24, .bits = 8, .tables = 40, .parts = 2, .seed = 5};
  const CrossPolytope family = make(config);
  Random random(3);
  const std::vector<float> vector = random_vectors(random, 1, 24);
  const std::vector<Code> codes = codes_of(family, vector);
  CHECK(codes_of(make(config), vector) == codes);
  std::vector<float> scaled = vector;
  for (float& x : scaled) x = std::ldexp(x, -40);
  CHECK(codes_of(family, scaled) == codes);
  // The opposite end of the same axis of each part.
  for (float& x : scaled) x = -x;
  std::vector<Code> flipped = codes;
  for (Code& code : flipped) code = static_cast<Code>(code ^ 0x11U);
  CHECK(codes_of(family, scaled) == flipped);
  CHECK(codes_of(family, std::vector<float>(24, 0.0F)) == std::vector<Code>(40, Code{0}));
  CHECK(codes_of<HighwayOps>(family, std::vector<float>(24, -0.0F)) ==
        std::vector<Code>(40, Code{0}));
  CrossPolytopeConfig other_seed = config;
  other_seed.seed = 6;
  CrossPolytopeConfig other_layer = config;
  other_layer.layer = 1;
  CHECK(codes_of(make(other_seed), vector) != codes);
  CHECK(codes_of(make(other_layer), vector) != codes);
}

// The integral as it stands, by Simpson's rule: P(|X| < u, |Y| < v) from Phi, and that over u, v.
double by_simpson(int axes, double cosine) {
  constexpr int kSteps = 160;
  constexpr double kEnd = 8.0;
  const double step = kEnd / kSteps;
  const double sine = std::sqrt(1.0 - cosine * cosine);
  const auto weight = [&](int i, int steps) {
    return i == 0 || i == steps ? 1.0 : i % 2 == 1 ? 4.0 : 2.0;
  };
  const auto normal = [](double x) { return std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI); };
  double sum = 0.0;
  for (int k = 1; k <= kSteps; ++k) {
    const double v = k * step;
    // int_0^u by Simpson over two halves of each step.
    double inside = 0.0;
    const auto across = [&](double x) {
      return normal(x) * (std::erf((v - cosine * x) / sine / std::sqrt(2.0)) +
                          std::erf((v + cosine * x) / sine / std::sqrt(2.0)));
    };
    for (int i = 1; i <= kSteps; ++i) {
      const double u = i * step;
      inside += step / 6.0 * (across(u - step) + 4.0 * across(u - step / 2.0) + across(u));
      const double density = normal(u) * normal((v - cosine * u) / sine) / sine;
      sum += weight(i, kSteps) * weight(k, kSteps) * density * std::pow(inside, axes - 1);
    }
  }
  return 2.0 * axes * sum * step * step / 9.0;
}

TEST_CASE("cross_polytope_collision.is_the_integral_it_is_defined_by") {
  for (const int axes : {4, 16, 128}) {
    CAPTURE(axes);
    for (const double cosine : {-0.5, -0.2, 0.1, 0.4, 0.7, 0.9}) {
      CAPTURE(cosine);
      // Simpson's rule is off by 1e-6 with the narrowest ridge; of probabilities below 1e-5 less.
      CHECK(cross_polytope_collision(axes, cosine) ==
            doctest::Approx(by_simpson(axes, cosine)).epsilon(axes == 4 ? 2e-4 : 5e-5).scale(1e-4));
    }
  }
  // What 60,000 draws of another program have, within 2 %.
  CHECK(cross_polytope_collision(128, 0.2) == doctest::Approx(0.0163).epsilon(0.02));
  CHECK(cross_polytope_collision(128, 0.95) == doctest::Approx(0.572).epsilon(0.02));
  CHECK(cross_polytope_collision(32, 0.7) == doctest::Approx(0.252).epsilon(0.02));
  CHECK(cross_polytope_collision(16, -0.25) == doctest::Approx(0.0085).epsilon(0.03));
}

TEST_CASE("cross_polytope_collision.has_the_limits_it_must_have_and_grows") {
  for (const int axes : {1, 2, 3, 8, 64, 512}) {
    CAPTURE(axes);
    CHECK(cross_polytope_collision(axes, 1.0) == 1.0);
    CHECK(cross_polytope_collision(axes, 3.0) == 1.0);
    CHECK(cross_polytope_collision(axes, -1.0) == 0.0);
    CHECK(cross_polytope_collision(axes, -3.0) == 0.0);
    // At a right angle the corners are independent.
    CHECK(cross_polytope_collision(axes, 0.0) == doctest::Approx(0.5 / axes).epsilon(5e-5));
    CHECK(cross_polytope_collision(axes, 1.0 - 1e-12) == doctest::Approx(1.0).epsilon(1e-4));
    double before = 0.0;
    for (int i = -90; i <= 100; ++i) {
      const double now = cross_polytope_collision(axes, i / 100.0);
      CHECK(now >= before);
      before = now;
    }
  }
  // Two axes turned by an eighth are two signs.
  const double agree = 1.0 - std::acos(0.3) / M_PI;
  CHECK(cross_polytope_collision(1, 0.3) == doctest::Approx(agree).epsilon(1e-12));
  CHECK(cross_polytope_collision(2, 0.3) == doctest::Approx(agree * agree).epsilon(1e-12));
  const CrossPolytope family = make({.dim = 4, .bits = 9, .tables = 1, .parts = 3});
  CHECK(family.table_collision(0.3, 0) ==
        doctest::Approx(std::pow(cross_polytope_collision(4, 0.3), 3)).epsilon(1e-12));
}

TEST_CASE("CrossPolytope.codes_collide_as_often_as_stated") {
  constexpr int kDim = 48;
  constexpr int kSeeds = 12;
  constexpr double kTables = 1024.0 * kSeeds;
  constexpr double kCosines[] = {-0.2, 0.0, 0.3, 0.6, 0.9};
  for (const std::pair<int, int>& design : {std::pair{2, 1}, {5, 1}, {8, 2}}) {
    const int bits = design.first;
    const int parts = design.second;
    CAPTURE(bits);
    int collisions[5] = {};
    for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
      const CrossPolytope family =
          make({.dim = kDim, .bits = bits, .tables = 1024, .parts = parts, .seed = seed});
      Random random(seed);
      for (int c = 0; c < 5; ++c) {
        std::vector<float> x = random_vectors(random, 2, kDim);
        double uu = 0.0, uv = 0.0, vv = 0.0;
        for (std::size_t j = 0; j < kDim; ++j) {
          const auto u = static_cast<double>(x[j]);
          const auto v = static_cast<double>(x[kDim + j]);
          uu += u * u, uv += u * v, vv += v * v;
        }
        const double sine = std::sqrt(1.0 - kCosines[c] * kCosines[c]);
        for (std::size_t j = 0; j < kDim; ++j) {
          const auto u = static_cast<double>(x[j]);
          const double across = static_cast<double>(x[kDim + j]) - uv / uu * u;
          x[kDim + j] = static_cast<float>(kCosines[c] * u / std::sqrt(uu) +
                                           sine * across / std::sqrt(vv - uv * uv / uu));
        }
        const std::vector<Code> codes = codes_of<HighwayOps>(family, x);
        for (std::size_t l = 0; l < 1024; ++l) collisions[c] += codes[l] == codes[1024 + l] ? 1 : 0;
      }
    }
    const CrossPolytope family = make({.dim = kDim, .bits = bits, .tables = 1, .parts = parts});
    for (int c = 0; c < 5; ++c) {
      CAPTURE(kCosines[c]);
      const double p = family.table_collision(kCosines[c], 0);
      // 4.9 standard deviations: exceeded with probability 1e-6.
      CHECK(std::fabs(collisions[c] / kTables - p) < 4.9 * std::sqrt(p * (1.0 - p) / kTables));
    }
  }
}

TEST_CASE("CrossPolytope.refuses_configs_outside_their_bounds_and_probing") {
  const auto refusal = [](const CrossPolytopeConfig& config) -> std::string {
    const Result<CrossPolytope> family = CrossPolytope::create(config);
    if (family.ok()) return "accepted";
    CHECK(family.status().code() == ErrorCode::kInvalidArgument);
    return family.status().message();
  };
  CHECK(refusal({.dim = 0}) == "dim 0 must lie in [1, 16384]");
  CHECK(refusal({.dim = 4, .bits = 16}) == "bits (K) 16 must lie in [1, 15]");
  CHECK(refusal({.dim = 4, .tables = 0}) == "tables (L) 0 must lie in [1, 1024]");
  CHECK(refusal({.dim = 4, .bits = 8, .parts = 3}) ==
        "parts 3 must divide bits (K) 8 into parts of 1 to 10");
  CHECK(refusal({.dim = 4, .bits = 11}) == "parts 1 must divide bits (K) 11 into parts of 1 to 10");
  CHECK(refusal({.dim = 4, .bits = 8, .parts = 0}) != "accepted");
  CHECK(refusal({.dim = 1, .bits = 10, .tables = 1}) == "accepted");
  const CrossPolytope family = make({.dim = 4, .bits = 4, .tables = 5});
  const auto probing = Collisions::create(family, {.probe_radius = 1});
  CHECK(probing.status().code() == ErrorCode::kInvalidArgument);
  CHECK(std::string(probing.status().message()).find("probing radius 1 must be 0") == 0);
}

}  // namespace

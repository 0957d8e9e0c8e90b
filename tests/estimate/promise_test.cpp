// SPDX-License-Identifier: Apache-2.0
// Bounds of an output's error, against simulated errors and the equations that define them.
#include "magicpig/estimate/promise.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "random.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

TEST_CASE("normal_quantile.agrees_with_tables") {
  CHECK(normal_quantile(0.5) == doctest::Approx(0.0).epsilon(1e-12));
  CHECK(normal_quantile(0.025) == doctest::Approx(1.959963984540054).epsilon(1e-11));
  CHECK(normal_quantile(0.975) == doctest::Approx(-1.959963984540054).epsilon(1e-11));
  CHECK(normal_quantile(1e-6) == doctest::Approx(4.753424308822899).epsilon(1e-11));
  CHECK(normal_quantile(1e-20) == doctest::Approx(9.262340089798408).epsilon(1e-11));
}

// Share of normal vectors of a diagonal covariance that are longer than `bound`.
double beyond(const std::vector<double>& variances, double bound, int draws) {
  Random random(first_seed());
  int count = 0;
  for (int d = 0; d < draws; ++d) {
    double square = 0.0;
    for (const double variance : variances) {
      const double x = random.normal();
      square += variance * x * x;
    }
    count += square > bound * bound ? 1 : 0;
  }
  return static_cast<double>(count) / draws;
}

OutputError error_of(const std::vector<double>& variances) {
  double trace = 0.0;
  double squares = 0.0;
  for (const double variance : variances) {
    trace += variance;
    squares += variance * variance;
  }
  return {.trace = trace, .frobenius = std::sqrt(squares)};
}

TEST_CASE("OutputError.normal_is_exceeded_delta_of_the_time_whatever_the_directions") {
  const std::vector<std::vector<double>> spectra{
      {1.0},
      {1.0, 1.0},
      {1.0, 0.3, 0.1, 0.03},
      {1.0, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01},
      std::vector<double>(8, 0.5),
      std::vector<double>(64, 2.0)};
  const int draws = replications(40000);
  for (const std::vector<double>& spectrum : spectra) {
    CAPTURE(spectrum.size());
    for (const double delta : {0.05, 0.0125}) {
      const double share = beyond(spectrum, error_of(spectrum).normal(delta), draws);
      // Never above delta but for chance, and not far below: at 64 equal directions a bound for one
      // direction would be exceeded less than once in 10^9 times.
      CHECK(frequency_z(share, delta, draws) < kZ);
      CHECK(share > 0.03 * delta);
    }
  }
}

TEST_CASE("OutputError.normal_widens_as_the_variance_rests_on_fewer_terms") {
  OutputError error{.trace = 1.0, .frobenius = 1.0};
  const double sure = error.normal(0.05);
  CHECK(sure == doctest::Approx(1.959964));
  error.terms = 20.0;
  // Student's 97.5 % quantile of 20 degrees of freedom is 2.0860, of 5 it is 2.5706.
  CHECK(error.normal(0.05) == doctest::Approx(2.0860).epsilon(0.005));
  error.terms = 5.0;
  CHECK(error.normal(0.05) == doctest::Approx(2.5706).epsilon(0.06));
  CHECK(OutputError{}.normal(0.05) == 0.0);
}

TEST_CASE("OutputError.bernstein_solves_its_equation_and_exceeds_the_normal_bound") {
  for (const double range : {0.0, 0.1, 5.0}) {
    for (const double delta : {0.2, 0.05, 1e-6}) {
      const OutputError error{.trace = 0.7, .frobenius = 0.3, .range = range};
      const double t = error.bernstein(delta);
      CHECK(2.0 * std::exp(-t * t / (2.0 * error.trace + 2.0 * t * range / 3.0)) ==
            doctest::Approx(delta).epsilon(1e-9));
      CHECK(t > error.normal(delta));
      CHECK(error.bound(ErrorBound::kBernstein, delta) == t);
      CHECK(error.bound(ErrorBound::kNormal, delta) == error.normal(delta));
    }
  }
}

TEST_CASE("Promise.spends_no_more_than_delta_over_all_looks") {
  const Promise promise{.epsilon = 0.1, .delta = 0.05};
  double spent = 0.0;
  for (int look = 0; look < 31; ++look) {
    CHECK(promise.delta_of(look) > 0.0);
    spent += promise.delta_of(look);
  }
  CHECK(spent <= 0.05);
  CHECK(spent > 0.0499);
}

TEST_CASE("Promise.refuses_what_means_nothing") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(Promise{}.check().ok());
  CHECK(!Promise{}.asked());
  CHECK(Promise{.epsilon = 0.1}.check().ok());
  for (const double epsilon : {-0.1, nan, 1e31}) CHECK(!Promise{.epsilon = epsilon}.check().ok());
  for (const double delta : {0.0, 1.0, -1.0, nan}) {
    CHECK(!Promise{.epsilon = 0.1, .delta = delta}.check().ok());
  }
  for (const double share : {0.0, 1.5, nan}) {
    CHECK(!Promise{.epsilon = 0.1, .dense_above = share}.check().ok());
  }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// What the comparison measures with: exact attention in double, errors, quantiles, means.
#include "compare/measure.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <vector>

#include "compare/report.hpp"
#include "magicpig/core/views.hpp"
#include "relative_error.hpp"

namespace {

using magicpig::bench::Outcome;
using magicpig::bench::ResultRow;

}  // namespace

TEST_SUITE("Comparison") {
  TEST_CASE("attends in double over two tokens as worked out by hand") {
    // Logits 0 and ln 3, so that the tokens weigh 1/4 and 3/4 and the lse is ln 4.
    const std::array<float, 2> keys{0.0F, 1.0F};
    const std::array<float, 4> values{4.0F, 8.0F, 0.0F, -8.0F};
    const auto source = magicpig::StridedKeyValues<float>::head_major(
        keys.data(), values.data(), {.head_dim = 1, .value_dim = 2}, 2);
    REQUIRE(source.ok());
    const std::array<double, 1> query{std::log(3.0)};
    std::array<double, 2> out{};
    const double lse = magicpig::bench::attend_in_double(*source, 0, query, out);
    // A few roundings of double.
    CHECK(lse == doctest::Approx(std::log(4.0)).epsilon(1e-14));
    CHECK(out[0] == doctest::Approx(1.0).epsilon(1e-14));
    CHECK(out[1] == doctest::Approx(-4.0).epsilon(1e-14));
  }

  TEST_CASE("measures errors relative to the exact output") {
    const std::array<float, 2> out{3.0F, 0.0F};
    CHECK(magicpig::bench::relative_error(out, std::array{3.0, 4.0}) == 0.8);
    CHECK(magicpig::bench::relative_error(out, std::array{3.0, 0.0}) == 0.0);
    const std::array<float, 2> zero{};
    CHECK(magicpig::bench::relative_error(zero, std::array{0.0, 0.0}) == 0.0);
    CHECK(std::isinf(magicpig::bench::relative_error(out, std::array{0.0, 0.0})));
  }

  TEST_CASE("takes quantiles between neighbours, of values in any order") {
    const std::vector<double> x{5.0, 1.0, 3.0, 2.0, 4.0};
    CHECK(magicpig::bench::quantile(x, 0.0) == 1.0);
    CHECK(magicpig::bench::quantile(x, 0.5) == 3.0);
    CHECK(magicpig::bench::quantile(x, 0.95) == doctest::Approx(4.8));
    CHECK(magicpig::bench::quantile(x, 1.0) == 5.0);
    CHECK(magicpig::bench::quantile(std::array{7.0}, 0.95) == 7.0);
  }

  TEST_CASE("summarises errors by their mean, median and 95th percentile") {
    const Outcome outcome{.errors = {0.1, 0.2, 0.6},
                          .error_sums = {0.3, -0.4},
                          .lse_errors = {1.0, 3.0},
                          .rows = {0.02, 0.03, 0.04},
                          .bytes_read = {10.0, 14.0},
                          .index_bytes_per_token = 300.0,
                          .us_per_kv_head = 9.0};
    ResultRow row;
    row.capture = "a";
    magicpig::bench::summarise(outcome, 3, row);
    CHECK(row.error_by_seed == std::vector<double>{0.1, 0.2, 0.6});
    CHECK(row.error_mean == doctest::Approx(0.3));
    CHECK(row.bias_mean == doctest::Approx(0.5 / 3.0));
    CHECK(row.error_median == 0.2);
    CHECK(row.error_p95 == doctest::Approx(0.56));
    CHECK(row.lse_error_mean == 2.0);
    CHECK(row.rows == doctest::Approx(0.03));
    CHECK(row.index_bytes_per_token == 300.0);
    CHECK(row.bytes_read_per_token == 12.0);
    CHECK(row.us_per_kv_head == 9.0);
    CHECK(row.capture == "a");
  }

  TEST_CASE("means errors by KV head, each with its group of query heads") {
    // Two queries, two KV heads, two query heads each.
    const Outcome outcome{.errors = {1.0, 3.0, 10.0, 30.0, 5.0, 7.0, 50.0, 70.0},
                          .lse_errors = {0.0},
                          .rows = {0.1, 0.1, 0.1, 0.1},
                          .bytes_read = {1.0},
                          .kv_heads = 2};
    ResultRow row;
    magicpig::bench::summarise(outcome, 1, row);
    CHECK(row.error_by_kv_head == std::vector<double>{4.0, 40.0});
  }

  TEST_CASE("means over captures go by method and setting") {
    std::vector<ResultRow> rows;
    for (const char* capture : {"a", "b"}) {
      for (const char* setting : {"x", "y"}) {
        const double error = (*capture == 'a' ? 1.0 : 3.0) * (*setting == 'x' ? 1.0 : 10.0);
        rows.push_back(
            {.capture = capture, .method = "m", .setting = setting, .error_mean = error});
      }
    }
    const auto means = magicpig::bench::mean_over_captures(rows);
    REQUIRE(means.size() == 2);
    CHECK(means[0].setting == "x");
    CHECK(means[0].error_mean == 2.0);
    CHECK(means[1].setting == "y");
    CHECK(means[1].error_mean == 20.0);
  }
}

// SPDX-License-Identifier: Apache-2.0
// error_95 of draws from tables on a shipped capture, over tables: it holds about as often as it
// says, and what it would be if draws were independent does not.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "capture.hpp"
#include "compare/measure.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"
#include "statistics.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::bench;
using magicpig::test::first_seed;
using magicpig::test::replications;

/// Draws what Collisions draw, and does not say that they come from tables.
struct AsIfIndependent {
  static constexpr bool kUnbiased = true;
  using Scratch = Collisions::Scratch;
  Collisions collisions;

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    return collisions.carve(arena, limits);
  }
  template <class Ops, class Source, class Index>
  [[nodiscard]] auto draw(const DrawInput<Source, Index>& input, Scratch& scratch) const {
    auto candidates = collisions.draw<Ops>(input, scratch);
    candidates.groups = {};
    return candidates;
  }
};

constexpr int kQueries = 16;

struct Case {
  explicit Case(const char* name) {
    Result<Capture> read = Capture::read(std::string(MAGICPIG_TEST_DATA_DIR) + "/" + name);
    REQUIRE(read.ok());
    capture.emplace(std::move(*read));
    for (int i = 0; i < kQueries; ++i) rows.push_back(i * (capture->query_rows() - 1) / 15);
    SerialExecutor serial;
    exact = make_reference(*capture, rows, serial);
  }

  // Whether error_95 held, for each query and head.
  template <class Sampler>
  void count(const Sampler& sampler, const BucketTables<SimHash>& index, double& held,
             double& outputs) const {
    const Shape& shape = capture->shape();
    const auto heads = static_cast<std::size_t>(shape.query_heads);
    const auto dim = static_cast<std::size_t>(shape.value_dim);
    capture->with_key_values([&](const auto& all) {
      using Source = std::remove_cvref_t<decltype(all)>;
      const DecodePlan<Sampler> plan{
          .shape = shape, .sampler = &sampler, .scale = capture->scale(), .exact_below = 0};
      SerialExecutor serial;
      std::vector<std::byte> workspace(workspace_bytes(plan, all.tokens(), 1));
      std::vector<float> out(heads * dim);
      std::vector<AttentionState> states;
      for (std::size_t h = 0; h < heads; ++h) {
        states.push_back({.out = std::span(out).subspan(h * dim, dim)});
      }
      std::vector<HeadReport> reports(heads);
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const Source source = all.first(capture->visible(rows[i]));
        const Request<Source, BucketTables<SimHash>> request{.key_values = &source,
                                                             .index = &index,
                                                             .query = capture->query(rows[i]),
                                                             .states = states,
                                                             .reports = reports};
        REQUIRE(
            decode(make_backend<HighwayOps>(serial), plan, std::span(&request, 1), workspace).ok());
        for (std::size_t h = 0; h < heads; ++h) {
          const double* expected = exact.outputs.data() + (i * heads + h) * dim;
          double difference = 0.0;
          double square = 0.0;
          for (std::size_t j = 0; j < dim; ++j) {
            const double off = static_cast<double>(states[h].out[j]) - expected[j];
            difference += off * off;
            square += expected[j] * expected[j];
          }
          const auto bound = static_cast<double>(reports[h].error_95);
          held += difference <= bound * bound * square ? 1.0 : 0.0;
          outputs += 1.0;
        }
      }
    });
  }

  std::optional<Capture> capture;
  std::vector<int> rows;
  Reference exact;
};

TEST_CASE("error_95 of draws from tables holds on a capture, that of independent ones does not") {
  for (const char* name : {"common-words-l24.safetensors", "prose-l12.safetensors"}) {
    CAPTURE(name);
    const Case c(name);
    const Shape& shape = c.capture->shape();
    const TokenRange middle{.begin = 4, .end = c.capture->visible(c.rows[0]) - 64};
    double held[3] = {};
    double outputs[3] = {};
    for (int s = 0; s < replications(40); ++s) {
      const auto family = SimHash::create({.dim = shape.head_dim,
                                           .bits = 8,
                                           .tables = 75,
                                           .seed = first_seed() + static_cast<std::uint64_t>(s)});
      REQUIRE(family.ok());
      auto index = BucketTables<SimHash>::create(*family, {.kv_heads = shape.kv_heads});
      REQUIRE(index.ok());
      SerialExecutor serial;
      c.capture->with_key_values([&](const auto& source) {
        REQUIRE(index->build(make_backend<HighwayOps>(serial), source, middle).ok());
      });
      const auto sampler = [&] {
        return std::move(*Collisions::create(*family, {.min_collisions = 2}));
      };
      c.count(sampler(), *index, held[0], outputs[0]);
      const auto both = Defensive<Collisions>::create(sampler(), {.fraction = 0.005});
      REQUIRE(both.ok());
      c.count(*both, *index, held[1], outputs[1]);
      c.count(AsIfIndependent{sampler()}, *index, held[2], outputs[2]);
    }
    // One draw of tables serves all queries: five of them know these shares to about .02.
    for (const int with : {0, 1}) {
      CHECK(held[with] / outputs[with] > 0.86);
      CHECK(held[with] / outputs[with] < 0.998);
    }
    CHECK(held[2] / outputs[2] < 0.75);
  }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Which settings are chosen for an error and a memory budget.
#include "magicpig/plan/choice.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "random.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

using Choices = std::vector<std::size_t>;

// Settings 0 (exact) to 3 on two heads: error, bytes read, bytes of the index.
constexpr HeadPoint kPoints[] = {{0.0, 100.0, 0}, {0.01, 50.0, 8}, {0.06, 20.0, 4}, {0.2, 5.0, 0},
                                 {0.0, 100.0, 0}, {0.01, 60.0, 8}, {0.04, 30.0, 4}, {0.5, 5.0, 0}};
constexpr HeadPoints kTwoHeads{.points = kPoints, .settings = 4};

// Empty where there is none.
Choices choose(const HeadPoints& points, const PlanGoal& goal) {
  auto choice = SettingChoice::create(points, goal);
  REQUIRE(choice.ok());
  const auto chosen = choice->choose();
  if (!chosen.ok()) return {};
  return {chosen->begin(), chosen->end()};
}

std::string refusal(const HeadPoints& points, const PlanGoal& goal) {
  auto choice = SettingChoice::create(points, goal);
  if (!choice.ok()) return choice.status().message();
  return choice->choose().status().message();
}

bool keeps(const HeadPoints& points, const PlanGoal& goal, const Choices& choices) {
  const HeadPoint sum = SettingChoice::together(points, choices);
  bool each = true;
  for (std::size_t h = 0; h < choices.size(); ++h) {
    each = each && points.at(h, choices[h]).error <= goal.aim();
  }
  return sum.index_bytes <= goal.index_bytes && (goal.mean ? sum.error <= goal.aim() : each);
}

// The fewest bytes of all choices that keep the goal, by trying all of them.
double fewest_bytes(const HeadPoints& points, const PlanGoal& goal) {
  double fewest = std::numeric_limits<double>::infinity();
  Choices choices(points.heads(), 0);
  for (bool more = true; more;) {
    if (keeps(points, goal, choices)) {
      fewest = std::fmin(fewest, SettingChoice::together(points, choices).bytes);
    }
    std::size_t h = 0;
    while (h < choices.size() && ++choices[h] == points.settings) choices[h++] = 0;
    more = h < choices.size();
  }
  return fewest;
}

// Heads of which more bytes, read or held, buy less error, as indexes do; setting 0 is exact.
std::vector<HeadPoint> random_points(Random& random, std::size_t heads, std::size_t settings) {
  std::vector<HeadPoint> points;
  for (std::size_t i = 0; i < heads * settings; ++i) {
    const double rows = std::exp2(-6.0 * random.uniform());
    const auto index = static_cast<std::size_t>(16.0 * random.uniform());
    const double hard = 1.0 + static_cast<double>(i / settings);
    points.push_back({.error = 0.05 * hard / std::sqrt(rows) / static_cast<double>(1 + index),
                      .bytes = 256.0 * rows + static_cast<double>(index),
                      .index_bytes = index});
    if (i % settings == 0) points.back() = {.error = 0.0, .bytes = 256.0, .index_bytes = 0};
  }
  return points;
}

TEST_SUITE("Choice of settings") {
  TEST_CASE("each head takes its cheapest setting that keeps the error, or is exact") {
    CHECK(choose(kTwoHeads, {.error = 0.05, .margin = 0.0}) == Choices{1, 2});
    CHECK(choose(kTwoHeads, {.error = 0.06, .margin = 0.0}) == Choices{2, 2});
    CHECK(choose(kTwoHeads, {.error = 0.001, .margin = 0.0}) == Choices{0, 0});
    // A quarter of .06 in hand leaves .045.
    CHECK(choose(kTwoHeads, {.error = 0.06, .margin = 0.25}) == Choices{1, 2});
  }

  TEST_CASE("one head's error may pay for another's where only the mean counts") {
    const auto mean = [](double error) {
      return choose(kTwoHeads, {.error = error, .margin = 0.0, .mean = true});
    };
    // (0.06, 0.04) means 0.05 at 25 bytes; each by itself would read 40.
    CHECK(mean(0.05) == Choices{2, 2});
    CHECK(SettingChoice::together(kTwoHeads, mean(0.05)).bytes == doctest::Approx(25.0));
    CHECK(mean(0.0) == Choices{0, 0});
    CHECK(mean(1.0) == Choices{3, 3});
  }

  TEST_CASE("one setting for all keeps the mean, or every head's error") {
    const auto one = [](double error, bool mean) {
      return choose(kTwoHeads, {.error = error, .margin = 0.0, .mean = mean, .one_for_all = true});
    };
    CHECK(one(0.05, true) == Choices{2, 2});
    CHECK(one(0.05, false) == Choices{1, 1});
    CHECK(one(0.06, false) == Choices{2, 2});
  }

  TEST_CASE("indexes hold no more than the budget, and use it where it saves most") {
    const auto within = [](std::size_t bytes) {
      return choose(kTwoHeads, {.error = 0.05, .margin = 0.0, .index_bytes = bytes});
    };
    CHECK(within(12) == Choices{1, 2});
    CHECK(within(11) == Choices{0, 2});  // 4 bytes save 70 there, 8 but 50 on the first head
    CHECK(within(7) == Choices{0, 2});
    CHECK(within(3) == Choices{0, 0});
    CHECK(choose(kTwoHeads, {.error = 0.5, .margin = 0.0, .index_bytes = 0}) == Choices{3, 3});
  }

  TEST_CASE("of all choices the goal is kept, at bytes near the fewest there are") {
    int goals = 0;
    int least = 0;
    double excess = 0.0;
    for (std::uint64_t seed = 1; seed <= 100; ++seed) {
      CAPTURE(seed);
      Random random(seed);
      const std::vector<HeadPoint> all = random_points(random, 3, 9);
      const HeadPoints points{.points = all, .settings = 9};
      for (const bool mean : {false, true}) {
        for (const std::size_t budget :
             {std::size_t{0}, std::size_t{9}, std::size_t{20}, SIZE_MAX}) {
          const PlanGoal goal{.error = 0.06, .mean = mean, .index_bytes = budget};
          const Choices chosen = choose(points, goal);
          REQUIRE(chosen.size() == 3);
          CHECK(keeps(points, goal, chosen));
          const double bytes = SettingChoice::together(points, chosen).bytes;
          const double fewest = fewest_bytes(points, goal);
          CHECK(bytes >= fewest);
          ++goals;
          least += bytes == fewest ? 1 : 0;
          excess += bytes / fewest - 1.0;
          // Without a budget each head's own choice is the best of all.
          if (!mean && budget == SIZE_MAX) CHECK(bytes == fewest);
        }
      }
    }
    CHECK(goals == 800);
    CHECK(least > 640);
    CHECK(excess / goals < 0.04);
  }

  TEST_CASE("what cannot be kept is told, with the goal") {
    const HeadPoints without_exact{.points = std::span(kPoints).subspan(1, 3), .settings = 3};
    CHECK(refusal(without_exact, {.error = 0.001, .margin = 0.0}) ==
          "no settings of 1 KV heads have an error of at most 0.001 and indexes of at most "
          "18446744073709551615 bytes");
    CHECK(refusal(kTwoHeads, {.error = -1.0}) == "error -1 must not be below 0");
    CHECK(refusal(kTwoHeads, {.error = NAN}).find("must not be below 0") != std::string::npos);
    CHECK(refusal(kTwoHeads, {.margin = 1.0}) == "margin 1 must lie in [0, 1)");
    CHECK(refusal({.points = kPoints, .settings = 3}, {}) ==
          "8 points are not those of 3 settings");
    CHECK(refusal({}, {}) == "0 points are not those of 0 settings");
  }
}

}  // namespace

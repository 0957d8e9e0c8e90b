// SPDX-License-Identifier: Apache-2.0
// The choice of settings by their measured errors and bytes.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "magicpig/core/head_setting.hpp"

namespace magicpig::bench {

/// What a setting did on one KV head, mean over queries, query heads and seeds.
struct Point {
  double error = 0.0;  ///< relative L2 of the output
  double bytes = 0.0;  ///< read per token of the middle
};

/// The points of one KV head, one per setting, the same settings in the same order for all heads.
using HeadPoints = std::vector<Point>;

/// The setting of fewest bytes whose error is at most `error`; of equals the first. None where
/// there is no such setting.
[[nodiscard]] inline std::optional<std::size_t> cheapest(std::span<const Point> points,
                                                         double error) {
  std::optional<std::size_t> best;
  for (std::size_t i = 0; i < points.size(); ++i) {
    if (!(points[i].error <= error)) continue;
    if (!best.has_value() || points[i].bytes < points[*best].bytes) best = i;
  }
  return best;
}

/// The setting that minimises bytes + price * error.
[[nodiscard]] inline std::size_t cheapest_at(std::span<const Point> points, double price) {
  std::size_t best = 0;
  const auto cost = [&](std::size_t i) { return points[i].bytes + price * points[i].error; };
  for (std::size_t i = 1; i < points.size(); ++i) best = cost(i) < cost(best) ? i : best;
  return best;
}

/// Mean over heads of what each has with its choice.
[[nodiscard]] inline Point mean_of(std::span<const HeadPoints> heads,
                                   std::span<const std::size_t> choices) {
  Point mean;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    mean.error += heads[h][choices[h]].error / static_cast<double>(heads.size());
    mean.bytes += heads[h][choices[h]].bytes / static_cast<double>(heads.size());
  }
  return mean;
}

/// A setting for each head: the cheapest whose own error is at most `error`. Every head has a point
/// of error 0: it may be exact.
[[nodiscard]] inline std::vector<std::size_t> choose_each(std::span<const HeadPoints> heads,
                                                          double error) {
  std::vector<std::size_t> choices;
  for (const HeadPoints& points : heads) choices.push_back(cheapest(points, error).value_or(0));
  return choices;
}

/// A setting for each head such that the mean error is at most `error` and bytes are near the
/// fewest: every head minimises bytes + price * error, with the smallest price, common to all, that
/// meets the mean. Exact on the lower convex hull of the points (Lagrange; Everett 1963).
[[nodiscard]] inline std::vector<std::size_t> choose_mean(std::span<const HeadPoints> heads,
                                                          double error) {
  const auto choose = [&](double price) {
    std::vector<std::size_t> choices;
    for (const HeadPoints& points : heads) choices.push_back(cheapest_at(points, price));
    return choices;
  };
  double low = std::log(1e-6);
  double high = std::log(1e12);  // no error is worth any bytes
  std::vector<std::size_t> best = choose(std::exp(high));
  for (int round = 0; round < 60; ++round) {
    const double middle = (low + high) / 2.0;
    std::vector<std::size_t> choices = choose(std::exp(middle));
    const bool met = mean_of(heads, choices).error <= error;
    (met ? high : low) = middle;
    if (met) best = choices;
  }
  return best;
}

/// One setting for all heads, by its mean: as cheapest().
[[nodiscard]] inline std::optional<std::size_t> choose_global(std::span<const HeadPoints> heads,
                                                              double error) {
  std::vector<Point> means;
  for (std::size_t i = 0; !heads.empty() && i < heads.front().size(); ++i) {
    means.push_back(mean_of(heads, std::vector<std::size_t>(heads.size(), i)));
  }
  return cheapest(means, error);
}

/// One setting for all heads with which the error of every one of them is at most `error`.
[[nodiscard]] inline std::optional<std::size_t> choose_global_for_each(
    std::span<const HeadPoints> heads, double error) {
  std::vector<Point> worst;
  for (std::size_t i = 0; !heads.empty() && i < heads.front().size(); ++i) {
    worst.push_back(mean_of(heads, std::vector<std::size_t>(heads.size(), i)));
    for (const HeadPoints& points : heads) {
      worst[i].error = points[i].error > worst[i].error ? points[i].error : worst[i].error;
    }
  }
  return cheapest(worst, error);
}

}  // namespace magicpig::bench

// SPDX-License-Identifier: Apache-2.0
// The choice of a setting for each KV head, by what was measured of all of them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What a setting did on one KV head.
struct HeadPoint {
  double error = 0.0;  ///< of the output, relative L2, mean over queries, query heads and seeds
  double bytes = 0.0;  ///< that a step reads of index and rows, per indexed token
  std::size_t index_bytes = 0;  ///< that its index holds
};

/// The points of several KV heads, [heads, settings], the same settings for all heads.
struct HeadPoints {
  std::span<const HeadPoint> points;
  std::size_t settings = 0;

  [[nodiscard]] std::size_t heads() const { return settings == 0 ? 0 : points.size() / settings; }
  [[nodiscard]] const HeadPoint& at(std::size_t head, std::size_t setting) const {
    return points[head * settings + setting];
  }
};

/// What is wanted of a profile, at the fewest bytes read.
struct PlanGoal {
  double error = 0.05;  ///< that every KV head is to keep: HeadPoint::error
  /// Share of `error` that is kept in hand: a setting that is chosen for its small error on some
  /// queries has a larger one on others. In [0, 1).
  double margin = 0.1;
  bool mean = false;         ///< only the mean over the KV heads is to keep `error`
  bool one_for_all = false;  ///< all KV heads get the same setting
  /// Most that the indexes of all KV heads together may hold, in bytes.
  std::size_t index_bytes = SIZE_MAX;

  [[nodiscard]] double aim() const { return error * (1.0 - margin); }
  /// Error: `error` below 0 or not a number, `margin` outside [0, 1).
  [[nodiscard]] Status check() const noexcept {
    if (!(error >= 0.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "error %g must not be below 0", error);
    }
    if (margin >= 0.0 && margin < 1.0) return Status();
    return Status::error(ErrorCode::kInvalidArgument, "margin %g must lie in [0, 1)", margin);
  }
};

/// Chooses settings that keep a goal. Each KV head takes the setting of least bytes + p * index
/// bytes + e * error, with prices p and e common to all heads and as low as the goal allows
/// (Lagrange multipliers; Everett 1963), of those that keep the error where every head has to. That
/// is the best there is on the lower convex hull of the points; what the prices leave unused is
/// spent by exchanging one head's setting after the other as long as bytes fall.
class SettingChoice {
 public:
  /// `points` stays the caller's, and in place. Errors: PlanGoal::check(), points that are no
  /// table, memory.
  [[nodiscard]] static Result<SettingChoice> create(const HeadPoints& points,
                                                    const PlanGoal& goal) noexcept {
    const Status status = goal.check();
    if (!status.ok()) return status;
    if (points.heads() == 0 || points.points.size() % points.settings != 0 ||
        points.settings > static_cast<std::size_t>(INT32_MAX)) {
      return Status::error(ErrorCode::kShapeMismatch, "%zu points are not those of %zu settings",
                           points.points.size(), points.settings);
    }
    SettingChoice made(points, goal);
    if (made.best_.resize(points.heads()) && made.tried_.resize(points.heads())) return made;
    return Status::error(ErrorCode::kOutOfMemory, "no memory to choose for %zu KV heads",
                         points.heads());
  }

  /// The number of each KV head's setting, [heads]; valid as long as this lives. Error: no choice
  /// keeps the goal; with HeadKind::kExact among the settings there is always one.
  [[nodiscard]] Result<std::span<const std::size_t>> choose() noexcept {
    found_ = false;
    if (goal_.one_for_all) {
      for (std::size_t s = 0; s < points_.settings; ++s) {
        for (std::size_t& choice : tried_.span()) choice = s;
        keep_if_better();
      }
    } else {
      choose_by_prices();
      if (found_) exchange();
    }
    if (found_) return std::span<const std::size_t>(best_.data(), best_.size());
    return Status::error(ErrorCode::kInvalidArgument,
                         "no settings of %zu KV heads have an error of at most %g and indexes of "
                         "at most %zu bytes",
                         points_.heads(), goal_.aim(), goal_.index_bytes);
  }

  /// Of all heads together with these settings: error and bytes in the mean, index bytes summed.
  [[nodiscard]] static HeadPoint together(const HeadPoints& points,
                                          std::span<const std::size_t> choices) noexcept {
    HeadPoint sum;
    for (std::size_t h = 0; h < choices.size(); ++h) {
      const HeadPoint& point = points.at(h, choices[h]);
      sum.error += point.error / static_cast<double>(choices.size());
      sum.bytes += point.bytes / static_cast<double>(choices.size());
      sum.index_bytes += point.index_bytes;
    }
    return sum;
  }

 private:
  // Prices are tried in powers of two, from what is worth nothing to what decides alone, and then
  // halved as often.
  static constexpr int kRounds = 60;
  static constexpr double kLeast = -60.0;
  static constexpr double kMost = 80.0;

  SettingChoice(const HeadPoints& points, const PlanGoal& goal) : points_(points), goal_(goal) {}

  [[nodiscard]] bool keeps_error(const HeadPoint& point) const {
    return point.error <= goal_.aim();
  }
  [[nodiscard]] bool keeps_goal(std::span<const std::size_t> choices) const {
    const HeadPoint sum = together(points_, choices);
    if (sum.index_bytes > goal_.index_bytes) return false;
    if (goal_.mean) return keeps_error(sum);
    for (std::size_t h = 0; h < choices.size(); ++h) {
      if (!keeps_error(points_.at(h, choices[h]))) return false;
    }
    return true;
  }
  void keep_if_better() {
    if (!keeps_goal(tried_.span())) return;
    const double bytes = together(points_, tried_.span()).bytes;
    if (found_ && !(bytes < together(points_, best_.span()).bytes)) return;
    for (std::size_t h = 0; h < tried_.size(); ++h) best_.data()[h] = tried_.data()[h];
    found_ = true;
  }

  // The setting of each head at these prices, to tried_.
  void take_cheapest(double index_price, double error_price) {
    for (std::size_t h = 0; h < points_.heads(); ++h) {
      const auto cost = [&](std::size_t s) {
        const HeadPoint& point = points_.at(h, s);
        if (!goal_.mean && !keeps_error(point)) return static_cast<double>(INFINITY);
        return point.bytes + index_price * static_cast<double>(point.index_bytes) +
               error_price * point.error;
      };
      std::size_t cheapest = 0;
      for (std::size_t s = 1; s < points_.settings; ++s) {
        if (cost(s) < cost(cheapest)) cheapest = s;
      }
      tried_.data()[h] = cheapest;
    }
  }

  // With the least price of errors at which their mean is kept; false where none is.
  bool choose_at(double index_price) {
    take_cheapest(index_price, 0.0);
    if (!goal_.mean || keeps_error(together(points_, tried_.span()))) return true;
    double low = kLeast;
    double high = kMost;
    for (int round = 0; round < kRounds; ++round) {
      const double middle = (low + high) / 2.0;
      take_cheapest(index_price, std::exp2(middle));
      (keeps_error(together(points_, tried_.span())) ? high : low) = middle;
    }
    take_cheapest(index_price, std::exp2(high));
    return keeps_error(together(points_, tried_.span()));
  }

  void choose_by_prices() {
    if (choose_at(0.0)) keep_if_better();
    if (found_) return;
    double low = kLeast;
    double high = kMost;
    for (int round = 0; round < kRounds; ++round) {
      const double middle = (low + high) / 2.0;
      const bool met = choose_at(std::exp2(middle)) && keeps_goal(tried_.span());
      if (met) keep_if_better();
      (met ? high : low) = middle;
    }
  }

  // Exchanges the setting of the head that saves most by it, while one saves anything.
  void exchange() {
    for (bool better = true; better;) {
      better = false;
      std::size_t head = 0;
      std::size_t setting = 0;
      double saved = 0.0;
      for (std::size_t h = 0; h < points_.heads(); ++h) {
        const std::size_t own = best_.data()[h];
        for (std::size_t s = 0; s < points_.settings; ++s) {
          const double less = points_.at(h, own).bytes - points_.at(h, s).bytes;
          if (!(less > saved)) continue;
          best_.data()[h] = s;
          if (keeps_goal(best_.span())) {
            head = h;
            setting = s;
            saved = less;
            better = true;
          }
          best_.data()[h] = own;
        }
      }
      if (better) best_.data()[head] = setting;
    }
  }

  HeadPoints points_;
  PlanGoal goal_;
  Buffer<std::size_t> best_;   // [heads]
  Buffer<std::size_t> tried_;  // [heads]
  bool found_ = false;
};

}  // namespace magicpig::inline MAGICPIG_ABI

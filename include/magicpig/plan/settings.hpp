// SPDX-License-Identifier: Apache-2.0
// The settings that are worth trying on a KV head.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/head_setting.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Kinds of settings that may be chosen; HeadKind::kExact is always one.
struct PlanKinds {
  bool uniform = true;
  bool signatures = false;  ///< in a random rotation: where nothing is to be trained
  bool trained_signatures = true;
  bool tables = true;
};

/// Exact; uniform at 26 budgets; signatures of 1 to 4 bits, with the norms of values and without,
/// at 26 budgets, for 1 and 2 bits at three temperatures; tables of five (K, L, t, r), each alone
/// and with half a percent of the tokens drawn uniformly beside. Settings that share an index are
/// neighbours.
class PlanSettings {
 public:
  /// Error: memory.
  [[nodiscard]] static Result<PlanSettings> create(const PlanKinds& kinds) noexcept {
    PlanSettings made;
    bool done = made.add({});
    for (int i = 0; i < kBudgets && kinds.uniform; ++i) {
      done = done && made.add({.kind = HeadKind::kUniform, .budget = budget(i)});
    }
    for (int bits = 1; bits <= 4 && done; ++bits) {
      if (kinds.signatures) {
        done =
            made.add_codes({.kind = HeadKind::kSignatures, .bits = bits}, code_temperature(bits));
      }
      if (kinds.trained_signatures && done) {
        done = made.add_codes({.kind = HeadKind::kTrainedSignatures, .bits = bits},
                              ProductQuantiser::temperature_of(bits));
      }
    }
    if (kinds.tables) done = done && made.add_tables();
    if (done) return made;
    return Status::error(ErrorCode::kOutOfMemory, "no memory for the settings to try");
  }

  [[nodiscard]] std::span<const HeadSetting> all() const { return settings_.span(); }

 private:
  // From 1 row in 400 to 4 in 5, three budgets to an octave.
  static constexpr int kBudgets = 26;
  static double budget(int i) { return 0.0025 * std::exp2(i / 3.0); }

  [[nodiscard]] bool add(const HeadSetting& setting) noexcept {
    const std::size_t count = settings_.size();
    if (count == settings_.bytes() / sizeof(HeadSetting) && !settings_.reserve(2 * count + 64)) {
      return false;
    }
    if (!settings_.resize(count + 1)) return false;
    settings_.data()[count] = setting;
    return true;
  }

  // Where few bits say little of a logit, at some temperatures about their own, too.
  [[nodiscard]] bool add_codes(HeadSetting setting, double temperature) noexcept {
    for (const bool norms : {true, false}) {
      for (const double factor : {1.0, 0.85, 1.15}) {
        if (factor != 1.0 && setting.bits > 2) continue;
        for (int i = 0; i < kBudgets; ++i) {
          setting.budget = budget(i);
          setting.temperature = std::round(temperature * factor * 1e4) / 1e4;
          setting.value_norms = norms;
          if (!add(setting)) return false;
        }
      }
    }
    return true;
  }

  // The published two, one collision of few tables, and two with probing.
  [[nodiscard]] bool add_tables() noexcept {
    struct Rule {
      int functions;
      int tables;
      int min_collisions;
      int probe_radius;
    };
    for (const Rule& rule :
         {Rule{8, 75, 2, 0}, {10, 150, 2, 0}, {10, 60, 1, 0}, {12, 60, 2, 1}, {14, 110, 1, 1}}) {
      for (const double uniform_part : {0.0, 0.005}) {
        if (!add({.kind = HeadKind::kTables,
                  .functions = rule.functions,
                  .tables = rule.tables,
                  .min_collisions = rule.min_collisions,
                  .probe_radius = rule.probe_radius,
                  .uniform_part = uniform_part})) {
          return false;
        }
      }
    }
    return true;
  }

  Buffer<HeadSetting> settings_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// Methods on bucket tables: the published rule, and settings of (K, L, t, r, rho) beyond it.
#include <array>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "compare/methods.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"

namespace magicpig::bench {
namespace {

// At least `min_collisions` of `tables` tables of `bits` bits, buckets within `radius` flips.
struct TableSetting {
  int bits = 10;
  int tables = 150;
  int min_collisions = 2;
  int radius = 0;
  double rho = 0.0;    ///< share of uniform draws beside; 0 for none
  float floor = 0.0F;  ///< added to the probability, as the published code does; 0 for none

  [[nodiscard]] std::string label() const {
    std::array<char, 96> text;
    int used =
        std::snprintf(text.data(), text.size(), "K=%d L=%d t=%d", bits, tables, min_collisions);
    const auto add = [&](const char* name, double value) {
      const auto at = static_cast<std::size_t>(used);
      if (value != 0.0) {
        used += std::snprintf(text.data() + at, text.size() - at, " %s=%g", name, value);
      }
    };
    add("r", radius);
    add("rho", rho);
    add("floor", static_cast<double>(floor));
    return text.data();
  }
};

Status run_tables(const TableSetting& setting, Trial& trial) {
  const auto tables = trial.workbench().tables(setting.bits, setting.tables, trial.seed());
  if (!tables.ok()) return tables.status();
  const BucketTables<SimHash>& index = *(*tables)->index;
  trial.note_index_bytes(index.bytes());
  Result<Collisions> sampler = Collisions::create(
      *(*tables)->family,
      {.min_collisions = setting.min_collisions, .probe_radius = setting.radius});
  if (!sampler.ok()) return sampler.status();
  if (setting.floor > 0.0F) {
    return trial.decode(*sampler, index, Floored{.floor = setting.floor});
  }
  if (setting.rho == 0.0) return trial.decode(*sampler, index);
  const auto defensive =
      Defensive<Collisions>::create(std::move(*sampler), {.fraction = setting.rho});
  if (!defensive.ok()) return defensive.status();
  return trial.decode(*defensive, index);
}

std::vector<Setting> settings_of(std::span<const TableSetting> list) {
  std::vector<Setting> settings;
  for (const TableSetting& setting : list) {
    settings.push_back({.label = setting.label(),
                        .run = [setting](Trial& trial) { return run_tables(setting, trial); }});
  }
  return settings;
}

}  // namespace

// The rule as published, t = 2: its default, its larger budget, and the floor of its code.
std::vector<Setting> published_settings(std::span<const double>) {
  static constexpr std::array<TableSetting, 4> kSettings{
      {{.bits = 10, .tables = 150},
       {.bits = 8, .tables = 75},
       {.bits = 10, .tables = 150, .floor = 1e-4F},
       {.bits = 8, .tables = 75, .floor = 1e-4F}}};
  return settings_of(kSettings);
}

// Tables beyond the published rule: other thresholds, probing, and the defensive union.
std::vector<Setting> table_settings(std::span<const double>) {
  static constexpr std::array<TableSetting, 12> kSettings{{
      {.bits = 10, .tables = 5, .min_collisions = 1},
      {.bits = 10, .tables = 17, .min_collisions = 1},
      {.bits = 10, .tables = 75, .min_collisions = 2},
      {.bits = 10, .tables = 110, .min_collisions = 2},
      {.bits = 10, .tables = 150, .min_collisions = 3},
      {.bits = 9, .tables = 150, .min_collisions = 3},
      {.bits = 12, .tables = 30, .min_collisions = 2, .radius = 1},
      {.bits = 12, .tables = 48, .min_collisions = 2, .radius = 1},
      {.bits = 14, .tables = 110, .min_collisions = 2, .radius = 1},
      {.bits = 10, .tables = 75, .min_collisions = 2, .rho = 0.005},
      {.bits = 10, .tables = 150, .min_collisions = 2, .rho = 0.005},
      {.bits = 14, .tables = 110, .min_collisions = 2, .radius = 1, .rho = 0.005},
  }};
  return settings_of(kSettings);
}

// Cross-polytopes, at least 2 collisions: of 8 bits each, and two of 5 to a code.
std::vector<Setting> cross_polytope_settings(std::span<const double>) {
  struct Polytopes {
    int bits;
    int tables;
    int parts;
  };
  std::vector<Setting> settings;
  for (const auto& [bits, tables, parts] : {Polytopes{8, 35, 1}, {8, 75, 1}, {10, 120, 2}}) {
    std::array<char, 64> label;
    (void)std::snprintf(label.data(), label.size(), "K=%d%s L=%d t=2", bits,
                        parts == 2 ? " in 2 parts" : "", tables);
    // Its curve takes about a second and is the same for every capture and seed.
    const auto kept = std::make_shared<std::optional<Collisions>>();
    const auto run = [=, bits = bits, tables = tables, parts = parts](Trial& trial) {
      const auto made = trial.workbench().cross_polytope_tables(bits, tables, parts, trial.seed());
      if (!made.ok()) return made.status();
      trial.note_index_bytes((*made)->index->bytes());
      if (!kept->has_value()) {
        auto sampler = Collisions::create(*(*made)->family, {});
        if (!sampler.ok()) return sampler.status();
        kept->emplace(std::move(*sampler));
      }
      return trial.decode(**kept, *(*made)->index);
    };
    settings.push_back({.label = label.data(), .run = run});
  }
  return settings;
}

}  // namespace magicpig::bench

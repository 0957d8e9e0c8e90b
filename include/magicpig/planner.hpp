// SPDX-License-Identifier: Apache-2.0
// The planner: from a memory budget and an error to a setting for each KV head of a layer.
#pragma once

// What it does, in the order of its parts:
//
//   settings     plan/settings.hpp      what is worth trying: kind of index, bits or (K, L, t, r),
//                                       rows
//   measurement  plan/measurement.hpp   error, bytes read and bytes held of each, on a sample of
//                                       the host's own keys, values and queries
//   choice       plan/choice.hpp        the fewest bytes read at an error and a memory budget

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/head_setting.hpp"
#include "magicpig/plan/choice.hpp"
#include "magicpig/plan/measurement.hpp"
#include "magicpig/plan/settings.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A profile, and what its settings did on the sample that it was made from.
struct ProfilePlan {
  Buffer<HeadSetting> profile;  ///< [kv_heads], for HeadHashes::create()
  Buffer<HeadPoint> heads;      ///< [kv_heads]
  HeadPoint together;           ///< error and bytes in the mean, index_bytes of all heads

  [[nodiscard]] std::span<const HeadSetting> settings() const { return profile.span(); }
};

/// Chooses for each KV head of the sample's layer how it is read: of all PlanSettings of `kinds`,
/// those that read the fewest bytes, keep `goal.error` on the sample, and whose indexes together
/// hold at most `goal.index_bytes` at `config.tokens` tokens. Where nothing else does both, a head
/// is exact, which holds nothing and reads everything.
///
/// Errors are told of the sample's length and queries; longer contexts have other ones (docs/
/// autotune.md). Time: decodes of all rows for each of up to 453 settings and each seed, about 9 s
/// of one thread per KV head of 8,000 tokens, 32 rows and 2 seeds; made once per model, and kept.
/// The backend's threads are used. `progress(done, of)` is called in between. Deterministic, for
/// any number of threads. Errors: those of PlanGoal, PlanSample, MeasureConfig and decode(),
/// memory.
template <class Backend, KeyValueSource Source, class Progress>
[[nodiscard]] Result<ProfilePlan> plan_profile(const Backend& backend,
                                               const PlanSample<Source>& sample,
                                               const PlanGoal& goal, const PlanKinds& kinds,
                                               const MeasureConfig& config,
                                               const Progress& progress) noexcept {
  Status status = goal.check();
  if (!status.ok()) return status;
  const auto settings = PlanSettings::create(kinds);
  if (!settings.ok()) return settings.status();
  auto measurement = Measurement<Backend, Source>::create(backend, sample, config);
  if (!measurement.ok()) return measurement.status();
  const auto heads = static_cast<std::size_t>(sample.shape.kv_heads);
  const std::span<const HeadSetting> all = settings->all();
  Buffer<HeadPoint> points;
  ProfilePlan plan;
  if (!points.resize(heads * all.size()) || !plan.profile.resize(heads) ||
      !plan.heads.resize(heads)) {
    return Status::error(ErrorCode::kOutOfMemory, "no memory for the points of %zu settings",
                         all.size());
  }
  status = measurement->run(all, points.span(), progress);
  if (!status.ok()) return status;
  const HeadPoints table{.points = points.span(), .settings = all.size()};
  auto choice = SettingChoice::create(table, goal);
  if (!choice.ok()) return choice.status();
  const auto chosen = choice->choose();
  if (!chosen.ok()) return chosen.status();
  for (std::size_t h = 0; h < heads; ++h) {
    plan.profile.data()[h] = all[(*chosen)[h]];
    plan.heads.data()[h] = table.at(h, (*chosen)[h]);
  }
  plan.together = SettingChoice::together(table, *chosen);
  return plan;
}

/// The same without word of its progress.
template <class Backend, KeyValueSource Source>
[[nodiscard]] Result<ProfilePlan> plan_profile(const Backend& backend,
                                               const PlanSample<Source>& sample,
                                               const PlanGoal& goal, const PlanKinds& kinds = {},
                                               const MeasureConfig& config = {}) noexcept {
  return plan_profile(backend, sample, goal, kinds, config, [](int, int) {});
}

}  // namespace magicpig::inline MAGICPIG_ABI

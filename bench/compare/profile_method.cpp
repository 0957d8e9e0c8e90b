// SPDX-License-Identifier: Apache-2.0
// The method of a profile: a way of its own for each KV head.
#include <span>
#include <utility>
#include <vector>

#include "compare/methods.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/per_head.hpp"

namespace magicpig::bench {
namespace {

Status run_profile(const Profile& profile, Trial& trial) {
  const auto layer = profile.layer(trial.capture_name());
  if (!layer.ok()) return layer.status();
  const auto made = trial.workbench().profiled((*layer)->heads, trial.seed());
  if (!made.ok()) {
    return Status::error(made.status().code(), "%.100s: %s", trial.capture_name().c_str(),
                         made.status().message());
  }
  trial.note_index_bytes(made->index->bytes());
  const auto sampler = PerHead::create(*made->hashes);
  if (!sampler.ok()) return sampler.status();
  return trial.decode(*sampler, *made->index);
}

}  // namespace

Setting profile_setting(Profile profile) {
  return {.label = "by head", .run = [profile = std::move(profile)](Trial& trial) {
            return run_profile(profile, trial);
          }};
}

}  // namespace magicpig::bench

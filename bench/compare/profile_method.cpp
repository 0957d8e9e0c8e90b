// SPDX-License-Identifier: Apache-2.0
// The method of a profile: a way of its own for each KV head.
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "compare/methods.hpp"
#include "compare/table_reads.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/per_head.hpp"

namespace magicpig::bench {
namespace {

// A draw scans the codes of its head, or looks up its tables and reads the norm of each candidate.
IndexReads reads_of(const PerHeadIndex& index, const Workbench& bench) {
  IndexReads reads;
  for (int h = 0; h < index.kv_heads(); ++h) {
    reads.row_bytes_of_head.push_back(index.tables(h) != nullptr ? sizeof(float) : 0.0);
  }
  for (const int row : bench.rows()) {
    for (int h = 0; h < index.kv_heads(); ++h) {
      const auto* tables = index.tables(h);
      const double scan = static_cast<double>(index.bytes_per_token(h)) * index.indexed().size();
      reads.lookups.push_back(tables == nullptr
                                  ? scan
                                  : lookup_bytes(*tables, 0, queries_of(bench.capture(), row, h),
                                                 index.setting(h).probe_radius));
    }
  }
  return reads;
}

Status run_profile(const Profile& profile, Trial& trial) {
  const auto layer = profile.layer(trial.capture_name());
  if (!layer.ok()) return layer.status();
  const auto made = trial.workbench().profiled((*layer)->heads, trial.seed());
  if (!made.ok()) {
    return Status::error(made.status().code(), "%.100s: %s", trial.capture_name().c_str(),
                         made.status().message());
  }
  trial.note_index_bytes(made->index->bytes());
  trial.note_index_reads(reads_of(*made->index, trial.workbench()));
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

// SPDX-License-Identifier: Apache-2.0
// A profile's layer on a workload: its index, how it is drawn from, and what that reads.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/sample/per_head.hpp"
#include "profile.hpp"
#include "workload.hpp"

namespace magicpig::bench {

/// The settings of a layer's KV heads, repeated over those of a workload, and what they need.
struct ProfiledLayer {
  std::unique_ptr<HeadHashes> hashes;  // stay where they are: the index refers to them
  PerHeadIndex index;
  PerHead sampler;

  template <class T>
  [[nodiscard]] static ProfiledLayer make(const Workload<T>& workload, const LayerProfile& layer,
                                          ThreadPool& pool) {
    std::vector<HeadSetting> heads;
    for (std::size_t h = 0; h < kKvHeads; ++h) heads.push_back(layer.heads[h % layer.heads.size()]);
    const auto backend = make_backend<Ops>(pool);
    auto hashes = HeadHashes::create(backend, workload.view(), workload.middle(), heads, 1);
    if (!hashes.ok()) fail(hashes.status().message());
    auto kept = std::make_unique<HeadHashes>(std::move(*hashes));
    auto index = PerHeadIndex::create(*kept, {.memory_advice = workload.pages().index});
    if (!index.ok()) fail(index.status().message());
    const Status status = index->build(backend, workload.view(), workload.middle());
    if (!status.ok()) fail(status.message());
    auto sampler = PerHead::create(*kept);
    if (!sampler.ok()) fail(sampler.status().message());
    return {.hashes = std::move(kept), .index = std::move(*index), .sampler = std::move(*sampler)};
  }
};

/// What a step reads: codes, or buckets with the norms of candidates, and exact and drawn rows.
template <class T>
[[nodiscard]] Traffic profile_traffic(Workload<T>& workload, const ProfiledLayer& layer) {
  SamplerScratch<PerHead> scratch(layer.sampler, workload);
  const double indexed = workload.middle().size();
  Traffic traffic;
  for (int h = 0; h < kKvHeads; ++h) {
    const DrawInput<StridedKeyValues<T>, PerHeadIndex> input{.key_values = workload.view(),
                                                             .index = layer.index,
                                                             .kv_head = h,
                                                             .queries = workload.queries(h),
                                                             .scale = workload.scale(),
                                                             .noise = {}};
    const auto drawn = layer.sampler.draw<Ops>(input, *scratch);
    traffic.rows += static_cast<double>(drawn.tokens.size()) / (indexed * kKvHeads);
    const auto* tables = layer.index.tables(h);
    const float* norms = tables == nullptr ? nullptr : tables->norms(0);
    traffic.bytes += gather_bytes(workload, h, drawn, norms);
    traffic.bytes += static_cast<double>(layer.index.bytes_per_token(h)) * indexed;
    if (tables == nullptr) continue;
    traffic.bytes +=
        table_bytes(*tables, 0, workload.queries(h), layer.index.setting(h).probe_radius);
  }
  traffic.bytes += window_bytes(workload);
  return traffic;
}

}  // namespace magicpig::bench

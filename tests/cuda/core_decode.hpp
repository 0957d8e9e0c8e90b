// SPDX-License-Identifier: Apache-2.0
// Decode steps on the host, computed anew in each file that includes this: with a type of its own,
// so that the linker makes no two of them one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "magicpig/attention.hpp"
#include "random.hpp"

namespace magicpig::test {

/// The same by the host's compiler alone.
std::vector<float> core_decode_by_host_compiler();

namespace {

struct OwnOps : ScalarOps {};

constexpr Shape kCoreShape{.query_heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64};
constexpr TokenId kCoreTokens = 3000;

// Appends outputs and lse of two query rows with soft cap, sinks, a window and reports.
template <class Sampler, class Index>
bool append_step(const Sampler& sampler, const Index& index, const StridedKeyValues<float>& source,
                 const std::vector<float>& queries, std::vector<float>& to) {
  const std::vector<float> sinks(8, 0.5F);
  DecodePlan<Sampler> plan;
  plan.shape = kCoreShape;
  plan.sampler = &sampler;
  plan.layer = 2;
  plan.logits.soft_cap = 20.0F;
  plan.logits.sink_logits = sinks;
  std::vector<float> out(2 * 8 * 64);
  std::vector<AttentionState> states(2 * 8);
  std::vector<HeadReport> reports(2 * 8);
  for (std::size_t h = 0; h < states.size(); ++h) {
    states[h].out = std::span(out).subspan(h * 64, 64);
  }
  const Request<StridedKeyValues<float>, Index> requests[] = {{.key_values = &source,
                                                               .index = &index,
                                                               .query = queries,
                                                               .states = states,
                                                               .reports = reports,
                                                               .seed = 11,
                                                               .step = 7,
                                                               .query_rows = 2,
                                                               .first_visible = 100}};
  SerialExecutor serial;
  std::vector<std::byte> workspace(workspace_bytes(plan, kCoreTokens, 1, 2));
  if (!decode(make_backend<OwnOps>(serial), plan, requests, workspace).ok()) return false;
  to.insert(to.end(), out.begin(), out.end());
  for (std::size_t h = 0; h < states.size(); ++h) {
    to.push_back(states[h].lse);
    to.push_back(static_cast<float>(reports[h].drawn));
    to.push_back(static_cast<float>(reports[h].error_95));
  }
  return true;
}

// By signatures and by tables; empty if something failed.
std::vector<float> core_decode() {
  Random random(5);
  const auto normals = [&](std::size_t size) {
    std::vector<float> to(size);
    for (float& x : to) x = static_cast<float>(random.normal());
    return to;
  };
  const auto keys = normals(2 * kCoreTokens * 64);
  const auto values = normals(2 * kCoreTokens * 64);
  const auto queries = normals(2 * 8 * 64);
  const auto source =
      StridedKeyValues<float>::head_major(keys.data(), values.data(), kCoreShape, kCoreTokens);
  const auto quantiser = HadamardQuantiser::create(64, 2, 1);
  const auto family = SimHash::create({.dim = 64, .bits = 8, .tables = 75, .seed = 3});
  if (!source.ok() || !quantiser.ok() || !family.ok()) return {};
  const auto poisson = Poisson::create(*quantiser, {.budget = {.fraction = 0.05}});
  const auto systematic = Systematic::create(*quantiser, {.budget = {.fraction = 0.05}});
  const auto collisions = Collisions::create(*family, {.min_collisions = 2});
  auto signatures = Signatures<HadamardQuantiser>::create(*quantiser, {.kv_heads = 2});
  auto tables = BucketTables<SimHash>::create(*family, {.kv_heads = 2});
  if (!poisson.ok() || !systematic.ok() || !collisions.ok() || !signatures.ok() || !tables.ok()) {
    return {};
  }
  SerialExecutor serial;
  const auto backend = make_backend<OwnOps>(serial);
  const TokenRange middle{.begin = 4, .end = kCoreTokens - 64};
  std::vector<float> all;
  const bool ok = signatures->build(backend, *source, middle).ok() &&
                  tables->build(backend, *source, middle).ok() &&
                  append_step(*poisson, *signatures, *source, queries, all) &&
                  append_step(*systematic, *signatures, *source, queries, all) &&
                  append_step(*collisions, *tables, *source, queries, all);
  return ok ? all : std::vector<float>();
}

}  // namespace
}  // namespace magicpig::test

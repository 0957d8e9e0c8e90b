// SPDX-License-Identifier: Apache-2.0
// Times attention over the candidates of each sampler under each estimator, per candidate.
#include <benchmark/benchmark.h>

#include <string>
#include <utility>

#include "magicpig/attention.hpp"
#include "stages.hpp"
#include "workload.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::bench;
using ::benchmark::State;

constexpr WorkloadShape kShape{.tokens = 32768, .head_dim = 128, .group = 4};

/// Rows gathered per KV head, and bytes read for them: rows, norms, and the candidate list.
template <class T, class Sampler>
Traffic candidate_traffic(Workload<T>& workload, const Sampler& sampler, double* candidates) {
  SamplerScratch<Sampler> scratch(sampler, workload);
  Traffic traffic;
  *candidates = 0.0;
  for (int h = 0; h < kKvHeads; ++h) {
    const auto drawn = sampler.template draw<Ops>(workload.draw_input(h), *scratch);
    const float* norms = std::is_same_v<Sampler, Uniform> ? nullptr : workload.index().norms(h);
    *candidates += static_cast<double>(drawn.tokens.size());
    traffic.bytes += gather_bytes(workload, h, drawn, norms) +
                     static_cast<double>(drawn.tokens.size_bytes() + drawn.members.size_bytes());
  }
  traffic.rows = *candidates / (static_cast<double>(workload.middle().size()) * kKvHeads);
  return traffic;
}

template <class Sampler, class Estimator>
void time_pair(State& state, Harness& harness, const Sampler& sampler, const Estimator& estimator) {
  auto& workload = harness.workload<bf16>(kShape);
  double candidates = 0.0;
  const Traffic traffic = candidate_traffic(workload, sampler, &candidates);
  const double fastest = time_candidates(state, harness, workload, sampler, estimator, traffic);
  state.counters["candidates"] = candidates / kKvHeads;
  state.counters["ns_per_candidate"] = fastest / candidates * 1e9;
  state.counters["bytes_per_candidate"] = traffic.bytes / candidates;
}

/// `make(family)` makes the sampler: the family belongs to the workload, which may not exist yet.
template <class Make>
void register_sampler(Harness& harness, const std::string& sampler_name, const Make& make) {
  const auto add = [&](const char* estimator_name, auto estimator) {
    ::benchmark::RegisterBenchmark(("estimate/" + sampler_name + "/" + estimator_name).c_str(),
                                   [&harness, make, estimator](State& state) {
                                     auto& workload = harness.workload<bf16>(kShape);
                                     const auto sampler = make(workload.family());
                                     time_pair(state, harness, sampler, estimator);
                                   })
        ->Unit(::benchmark::kMicrosecond)
        ->UseManualTime()
        ->Iterations(kColdSteps);
  };
  add("self_normalised", SelfNormalised{});
  add("floored", Floored{});
  add("uncorrected", Uncorrected{});
}

template <class Sampler>
Sampler made(Result<Sampler> sampler) {
  if (!sampler.ok()) fail(sampler.status().message());
  return std::move(*sampler);
}

}  // namespace

int main(int argc, char** argv) {
  Harness harness(argc, argv);
  for (const int t : {1, 2, 3}) {
    register_sampler(harness, "collisions_t" + std::to_string(t),
                     [t](const SimHash& family) { return make_collisions(family, t); });
  }
  register_sampler(harness, "uniform",
                   [](const SimHash&) { return made(Uniform::create({.fraction = 0.06})); });
  register_sampler(harness, "defensive", [](const SimHash& family) {
    return made(Defensive<Collisions>::create(make_collisions(family, 2), {.fraction = 0.005}));
  });
  return run_benchmarks(harness, argc, argv);
}

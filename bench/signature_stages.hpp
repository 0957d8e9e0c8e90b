// SPDX-License-Identifier: Apache-2.0
// Benchmarks of the stages of a step with signatures, on one thread unless the name says more.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <limits>
#include <string>

#include "magicpig/attention.hpp"
#include "signature_workload.hpp"
#include "stages.hpp"
#include "workload.hpp"

namespace magicpig::bench {

/// Scan and draw for all KV heads of a layer.
template <class T>
void time_draw_signatures(::benchmark::State& state, Harness& harness, const WorkloadShape& shape,
                          const SignatureSetting& setting) {
  auto& workload = harness.workload<T>(shape, false);
  const SignatureIndex& own = signature_index(harness, workload, setting.bits);
  const Systematic sampler = own.sampler(setting);
  Traffic traffic = drawn_traffic(workload, own, setting);
  traffic.bytes = scan_bytes(workload, own);
  SamplerScratch<Systematic> scratch(sampler, workload);
  time_cold(state, harness, harness.pool(1), traffic, [&] {
    for (int h = 0; h < kKvHeads; ++h) {
      const auto drawn = sampler.draw<Ops>(own.draw_input(workload, h), *scratch);
      ::benchmark::DoNotOptimize(drawn.tokens.data());
    }
  });
}

/// Attention to the tokens that were drawn, without the draw.
template <class T>
void time_attend_signatures(::benchmark::State& state, Harness& harness, const WorkloadShape& shape,
                            const SignatureSetting& setting) {
  auto& workload = harness.workload<T>(shape, false);
  const SignatureIndex& own = signature_index(harness, workload, setting.bits);
  const Systematic sampler = own.sampler(setting);
  const Traffic traffic = drawn_traffic(workload, own, setting);
  time_candidates(state, harness, workload, sampler, SelfNormalised{}, traffic,
                  [&](int h) { return own.draw_input(workload, h); });
}

/// An index over the middle of one layer, from nothing but its quantiser. `key_reads` is its time
/// over that of reading the keys at the measured bandwidth.
template <class T, class Q>
void time_build_signatures(::benchmark::State& state, Harness& harness, const WorkloadShape& shape,
                           int bits, int threads) {
  auto& workload = harness.workload<T>(shape, false);
  auto own = QuantisedIndex<Q>::empty(workload, bits);
  FastestIteration fastest;
  for (auto _ : state) {
    fastest.start();
    own.build(workload, harness.pool(threads));
    fastest.stop();
  }
  const double keys = static_cast<double>(workload.middle().size()) * kKvHeads *
                      static_cast<double>(row_bytes<T>(static_cast<std::size_t>(shape.head_dim)));
  const double bandwidth = harness.cold_memory().read_bandwidth(harness.pool(threads));
  state.counters["bytes"] = static_cast<double>(own.index.bytes());
  state.counters["fastest_us"] = fastest.seconds() * 1e6;
  state.counters["key_reads"] = fastest.seconds() * bandwidth / keys;
}

/// The stages at one shape, with the settings of decode/signatures_*.
inline void register_signature_stages(Harness& harness, const WorkloadShape& shape, bool all) {
  if (!all && !(shape.tokens == 98304 && shape.head_dim == 128 && shape.group == 4)) return;
  using ::benchmark::State;
  for (const SignatureSetting setting :
       {SignatureSetting{.bits = 1, .rows = 0.02}, SignatureSetting{.bits = 2, .rows = 0.01}}) {
    const std::string size = "/bits:" + std::to_string(setting.bits) +
                             "/n:" + std::to_string(shape.tokens) +
                             "/dim:" + std::to_string(shape.head_dim) +
                             "/group:" + std::to_string(shape.group) + "/bf16";
    register_stage("draw_signatures" + size, [&harness, shape, setting](State& s) {
      time_draw_signatures<bf16>(s, harness, shape, setting);
    })->Iterations(kColdSteps);
    register_stage("attend/signatures" + size,
                   [&harness, shape, setting](State& s) {
                     time_attend_signatures<bf16>(s, harness, shape, setting);
                   })
        ->UseManualTime()
        ->Iterations(kColdSteps);
    for (const int threads : {1, 2}) {
      register_stage("build_signatures" + size + "/threads:" + std::to_string(threads),
                     [&harness, shape, setting, threads](State& s) {
                       time_build_signatures<bf16, HadamardQuantiser>(s, harness, shape,
                                                                      setting.bits, threads);
                     });
      register_stage("build_trained" + size + "/threads:" + std::to_string(threads),
                     [&harness, shape, setting, threads](State& s) {
                       time_build_signatures<bf16, ProductQuantiser>(s, harness, shape,
                                                                     setting.bits, threads);
                     });
    }
  }
}

}  // namespace magicpig::bench

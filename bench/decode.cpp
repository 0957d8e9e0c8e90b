// SPDX-License-Identifier: Apache-2.0
// Times one decode step of one layer, whole (decode/...) and by stage (stage/...).
#include <benchmark/benchmark.h>

#include <array>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

#include "magicpig/attention.hpp"
#include "stages.hpp"
#include "workload.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::bench;
using ::benchmark::State;

struct Run {
  WorkloadShape shape;
  int threads = 1;
};

std::string run_name(const char* method, const Run& run, const char* dtype) {
  return std::string("decode/") + method + "/n:" + std::to_string(run.shape.tokens) +
         "/dim:" + std::to_string(run.shape.head_dim) +
         "/group:" + std::to_string(run.shape.group) + "/" + dtype +
         "/threads:" + std::to_string(run.threads);
}

/// decode() of one request, layer after layer.
template <class T, class Sampler>
void time_decode(State& state, Workload<T>& workload, ThreadPool& pool, const Sampler& sampler,
                 const Rotation& rotation) {
  const auto backend = make_backend<Ops>(pool);
  const DecodePlan<Sampler> plan{.shape = workload.attention_shape(), .sampler = &sampler};
  constexpr bool kIndexed = !std::is_same_v<Sampler, Exact>;
  std::vector<std::byte> workspace(
      workspace_bytes(plan, kIndexed ? workload.middle().size() : 0, pool.workers()));
  const auto dim = static_cast<std::size_t>(plan.shape.value_dim);
  std::vector<float> out(static_cast<std::size_t>(plan.shape.query_heads) * dim);
  std::vector<AttentionState> states;
  for (std::size_t i = 0; i < out.size(); i += dim) {
    states.push_back({.out = std::span<float>(out).subspan(i, dim)});
  }
  FastestIteration fastest;
  for (auto _ : state) {
    const int layer = workload.next_layer(rotation.layers);
    const std::array requests{
        Request<StridedKeyValues<T>, Tables>{.key_values = &workload.view(layer),
                                             .index = kIndexed ? &workload.index(layer) : nullptr,
                                             .query = workload.queries(),
                                             .states = states}};
    fastest.start();
    const Status status = decode(backend, plan, requests, workspace);
    fastest.stop();
    if (!status.ok()) return state.SkipWithError(status.message());
    ::benchmark::ClobberMemory();
  }
  set_counters(state, rotation, fastest);
}

template <class T>
void exact(State& state, Harness& harness, const Run& run) {
  auto& workload = harness.workload<T>(run.shape);
  const Rotation& rotation = harness.rotation("exact", [&] {
    return make_rotation(workload, run_name("exact", run, dtype_name<T>()), exact_traffic(workload),
                         false);
  });
  time_decode(state, workload, harness.pool(run.threads), Exact{}, rotation);
}

template <class T>
void tables(State& state, Harness& harness, const Run& run) {
  auto& workload = harness.workload<T>(run.shape);
  const Collisions sampler = make_collisions(workload.family(), 2);
  const Rotation& rotation = tables_rotation(harness, workload, sampler);
  time_decode(state, workload, harness.pool(run.threads), sampler, rotation);
}

/// A method of decode/...: its name and how it is run. A new method is a function like the two
/// above and a line in methods().
template <class T>
struct Method {
  const char* name;
  void (*run)(State& state, Harness& harness, const Run& run);
};

template <class T>
constexpr std::array<Method<T>, 2> methods() {
  return {{{"exact", exact<T>}, {"tables", tables<T>}}};
}

template <class T>
void register_run(Harness& harness, const Run& run) {
  for (const Method<T>& method : methods<T>()) {
    // Not UseRealTime(): it appends to the name. The times shown are wall-clock times all the same;
    // only how often a step is repeated follows from the calling thread's CPU time.
    ::benchmark::RegisterBenchmark(
        run_name(method.name, run, dtype_name<T>()).c_str(),
        [&harness, run, method](State& state) { method.run(state, harness, run); })
        ->Unit(::benchmark::kMicrosecond);
  }
}

void register_decode(Harness& harness, const WorkloadShape& shape, bool all) {
  const bool usual =
      (shape.tokens == 32768 || shape.tokens == 98304) && shape.head_dim == 128 && shape.group == 4;
  for (const int threads : {1, 2}) {
    const Run run{.shape = shape, .threads = threads};
    if (all || usual) register_run<bf16>(harness, run);
  }
  for (const int threads : {1, 2}) {
    const Run run{.shape = shape, .threads = threads};
    if (all) register_run<fp16>(harness, run);
    if (all) register_run<float>(harness, run);
  }
}

// Shape by shape, since a workload lives until another one is wanted.
void register_all(Harness& harness, bool all) {
  for (const TokenId tokens : {8192, 32768, 98304, 131072}) {
    for (const int dim : {64, 128}) {
      for (const int group : {1, 4, 8}) {
        const WorkloadShape shape{.tokens = tokens, .head_dim = dim, .group = group};
        register_stages(harness, shape, all);
        register_decode(harness, shape, all);
      }
    }
  }
  register_merge();
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = wants_all(argc, argv);
  Harness harness;
  register_all(harness, all);
  return run_benchmarks(harness, argc, argv);
}

// SPDX-License-Identifier: Apache-2.0
// Benchmarks of the stages of one step of one layer, each on one thread unless its name says more.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "workload.hpp"

namespace magicpig::bench {

/// The rotation of methods that draw from (10, 150) tables, made once per workload.
template <class T>
[[nodiscard]] const Rotation& tables_rotation(Harness& harness, Workload<T>& workload,
                                              const Collisions& sampler) {
  return harness.rotation("tables", [&] {
    const WorkloadShape& shape = workload.shape();
    const std::string name = "tables/n:" + std::to_string(shape.tokens) +
                             "/dim:" + std::to_string(shape.head_dim) +
                             "/group:" + std::to_string(shape.group) + "/" + dtype_name<T>();
    return make_rotation(workload, name, tables_traffic(workload, sampler), true);
  });
}

/// Scratch of attention for one KV head, and outputs for all.
template <class T>
struct AttendMemory {
  explicit AttendMemory(const Workload<T>& workload) {
    const Shape shape = workload.attention_shape();
    Arena measure;
    (void)AttendScratch::carve(measure, shape.group(), shape.value_dim);
    (void)AttendTotals::carve(measure, shape.group(), shape.value_dim);
    memory.resize(measure.bytes_needed());
    Arena arena(memory);
    scratch = AttendScratch::carve(arena, shape.group(), shape.value_dim);
    totals = AttendTotals::carve(arena, shape.group(), shape.value_dim);
    const auto dim = static_cast<std::size_t>(shape.value_dim);
    out.resize(static_cast<std::size_t>(shape.group()) * dim);
    for (std::size_t i = 0; i < out.size(); i += dim) {
      states.push_back({.out = std::span<float>(out).subspan(i, dim)});
    }
  }

  std::vector<std::byte> memory;
  AttendScratch scratch;
  AttendTotals totals;
  std::vector<float> out;
  std::vector<AttentionState> states;  // [group]
};

/// The queries of all KV heads of a layer to codes. The planes are shared by all layers.
inline void time_hash(::benchmark::State& state, Harness& harness, const WorkloadShape& shape) {
  auto& workload = harness.workload<bf16>(shape);
  const RememberingHash& family = workload.family();
  std::vector<Code> codes(static_cast<std::size_t>(shape.group * shape.index.tables));
  std::vector<float> scratch(family.scratch_floats(shape.group));
  FastestIteration fastest;
  for (auto _ : state) {
    fastest.start();
    for (int h = 0; h < kKvHeads; ++h) {
      const QueryGroup queries = workload.queries(h);
      family.hash<Ops>(queries.data, queries.count, codes.data(), scratch.data());
      ::benchmark::DoNotOptimize(codes.data());
      ::benchmark::ClobberMemory();
    }
    fastest.stop();
  }
  state.counters["fastest_us"] = fastest.seconds() * 1e6;
}

/// Collisions::draw for all KV heads of a layer; hashing the queries is part of it.
template <class T>
void time_retrieve(::benchmark::State& state, Harness& harness, const WorkloadShape& shape) {
  auto& workload = harness.workload<T>(shape);
  const Collisions sampler = make_collisions(workload);
  Rotation rotation = tables_rotation(harness, workload, sampler);
  rotation.traffic.bytes = 0.0;
  for (int h = 0; h < kKvHeads; ++h) rotation.traffic.bytes += table_bytes(workload, h);
  SamplerScratch<Collisions> scratch(sampler, workload);
  FastestIteration fastest;
  for (auto _ : state) {
    const int layer = workload.next_layer(rotation.layers);
    fastest.start();
    for (int h = 0; h < kKvHeads; ++h) {
      const auto candidates = sampler.draw<Ops>(workload.draw_input(layer, h), *scratch);
      ::benchmark::DoNotOptimize(candidates.tokens.data());
    }
    fastest.stop();
  }
  set_counters(state, rotation, fastest);
}

/// Attention to every token of one layer, all KV heads.
template <class T>
void time_attend_exact(::benchmark::State& state, Harness& harness, const WorkloadShape& shape) {
  auto& workload = harness.workload<T>(shape, false);
  const Rotation& rotation = harness.rotation("exact", [&] {
    return make_rotation(workload, "stage/attend/exact", exact_traffic(workload), false);
  });
  AttendMemory<T> memory(workload);
  FastestIteration fastest;
  for (auto _ : state) {
    const int layer = workload.next_layer(rotation.layers);
    fastest.start();
    for (int h = 0; h < kKvHeads; ++h) {
      Attend<Ops, StridedKeyValues<T>> attend({.key_values = workload.view(layer),
                                               .kv_head = h,
                                               .queries = workload.queries(h),
                                               .scale = workload.scale()},
                                              memory.scratch, memory.totals);
      attend.add_exact({.begin = 0, .end = shape.tokens});
      attend.finish();
      memory.totals.write(memory.states.data(), nullptr);
    }
    fastest.stop();
    ::benchmark::ClobberMemory();
  }
  set_counters(state, rotation, fastest);
}

/// Makes an inclusion read norms elsewhere.
inline void move_norms(CosineInclusion& inclusion, const float* norms) { inclusion.norms = norms; }
inline void move_norms(ConstantInclusion&, const float*) {}
template <class Inner>
void move_norms(UnionInclusion<Inner>& inclusion, const float* norms) {
  move_norms(inclusion.inner, norms);
}

/// Attention to one sampler's candidates of one layer, all KV heads; returns the seconds of the
/// fastest step. Each head's draw comes before, outside of the time and from the first layer's
/// index (all are the same); rows and norms come from the layer's own memory.
template <class T, class Sampler, class Estimator>
double time_candidates(::benchmark::State& state, Workload<T>& workload, const Sampler& sampler,
                       const Estimator& estimator, const Rotation& rotation) {
  workload.make_norms(rotation.layers);
  SamplerScratch<Sampler> scratch(sampler, workload);
  AttendMemory<T> memory(workload);
  double fastest = std::numeric_limits<double>::infinity();
  for (auto _ : state) {
    const int layer = workload.next_layer(rotation.layers);
    double seconds = 0.0;
    for (int h = 0; h < kKvHeads; ++h) {
      const auto input = workload.draw_input(0, h);
      auto candidates = sampler.template draw<Ops>(input, *scratch);
      move_norms(candidates.inclusion, workload.norms(layer, h));
      const double start = seconds_now();
      Attend<Ops, StridedKeyValues<T>> attend({.key_values = workload.view(layer),
                                               .kv_head = h,
                                               .queries = input.queries,
                                               .scale = input.scale},
                                              memory.scratch, memory.totals);
      attend.add_candidates(candidates, estimator);
      attend.finish();
      memory.totals.write(memory.states.data(), nullptr);
      seconds += seconds_now() - start;
      ::benchmark::ClobberMemory();
    }
    state.SetIterationTime(seconds);
    fastest = std::min(fastest, seconds);
  }
  state.counters["rows"] = rotation.traffic.rows;
  state.counters["bytes"] = rotation.traffic.bytes;
  state.counters["layers"] = rotation.layers;
  state.counters["fastest_us"] = fastest * 1e6;
  state.counters["fastest_GB_per_s"] = rotation.traffic.bytes / fastest * 1e-9;
  return fastest;
}

/// Attention to the candidates of (10, 150), t = 2.
template <class T>
void time_attend_candidates(::benchmark::State& state, Harness& harness,
                            const WorkloadShape& shape) {
  auto& workload = harness.workload<T>(shape);
  const Collisions sampler = make_collisions(workload);
  Rotation rotation = tables_rotation(harness, workload, sampler);
  rotation.traffic.bytes = 0.0;
  SamplerScratch<Collisions> scratch(sampler, workload);
  for (int h = 0; h < kKvHeads; ++h) {
    const auto candidates = sampler.draw<Ops>(workload.draw_input(0, h), *scratch);
    rotation.traffic.bytes += gather_bytes(workload, h, candidates, true);
  }
  time_candidates(state, workload, sampler, SelfNormalised{}, rotation);
}

/// An index over the middle of one layer, from nothing. `bytes` are those of the index.
template <class T>
void time_build(::benchmark::State& state, Harness& harness, const WorkloadShape& shape,
                int threads) {
  auto& workload = harness.workload<T>(shape);
  const auto backend = make_backend<Ops>(harness.pool(threads));
  auto index = Tables::create(workload.family(), {.kv_heads = kKvHeads});
  if (!index.ok()) return state.SkipWithError(index.status().message());
  FastestIteration fastest;
  for (auto _ : state) {
    fastest.start();
    const Status status = index->build(backend, workload.view(0), workload.middle());
    fastest.stop();
    if (!status.ok()) return state.SkipWithError(status.message());
  }
  state.counters["bytes"] = static_cast<double>(index->bytes());
  state.counters["fastest_us"] = fastest.seconds() * 1e6;
}

/// What an index of one layer takes without the library: a plain loop for the projections,
/// std::sort of (code, token) for each table. One thread, one pass: it takes minutes.
template <class T>
void time_plain_build(::benchmark::State& state, Harness& harness, const WorkloadShape& shape) {
  auto& workload = harness.workload<T>(shape);
  const TokenRange middle = workload.middle();
  const int dim = shape.head_dim;
  const int tables = shape.index.tables;
  const auto tokens = static_cast<std::size_t>(middle.size());
  std::vector<float> planes;
  for (int p = 0; p < tables * shape.index.bits; ++p) {
    for (int j = 0; j < dim; ++j) planes.push_back(workload.family().plane(p, j));
  }
  std::vector<std::pair<Code, TokenId>> sorted(tokens * static_cast<std::size_t>(tables));
  for (auto _ : state) {
    for (int h = 0; h < kKvHeads; ++h) {
      for (std::size_t t = 0; t < tokens; ++t) {
        const T* key = workload.view(0).key(h, middle.begin + static_cast<TokenId>(t));
        for (int l = 0; l < tables; ++l) {
          unsigned code = 0;
          for (int b = 0; b < shape.index.bits; ++b) {
            const float* plane = planes.data() + std::int64_t{b * tables + l} * dim;
            float sum = 0.0F;
            for (int j = 0; j < dim; ++j) sum += plane[j] * to_float(key[j]);
            code |= (sum > 0.0F ? 1U : 0U) << b;
          }
          sorted[static_cast<std::size_t>(l) * tokens + t] = {static_cast<Code>(code),
                                                              static_cast<TokenId>(t)};
        }
      }
      for (int l = 0; l < tables; ++l) {
        const auto first = sorted.begin() + static_cast<std::ptrdiff_t>(l) * middle.size();
        std::sort(first, first + middle.size());
      }
      ::benchmark::DoNotOptimize(sorted.data());
    }
  }
}

/// Taking over 1,024 more tokens into an index of one layer; the last segment is rewritten.
template <class T>
void time_append(::benchmark::State& state, Harness& harness, const WorkloadShape& shape,
                 int threads) {
  constexpr TokenId kMore = 1024;
  auto& workload = harness.workload<T>(shape);
  const auto backend = make_backend<Ops>(harness.pool(threads));
  const TokenRange middle = workload.middle();
  const TokenRange before{.begin = middle.begin, .end = middle.end - kMore};
  auto index = Tables::create(workload.family(), {.kv_heads = kKvHeads, .seal_tokens = kMore});
  if (!index.ok()) return state.SkipWithError(index.status().message());
  Status status = index->build(backend, workload.view(0), before);
  FastestIteration fastest;
  for (auto _ : state) {
    if (status.ok()) status = index->truncate(before.end);
    const double start = seconds_now();
    fastest.start();
    if (status.ok()) status = index->append(backend, workload.view(0), middle.end);
    fastest.stop();
    state.SetIterationTime(seconds_now() - start);
    if (!status.ok()) return state.SkipWithError(status.message());
  }
  state.counters["bytes"] = static_cast<double>(index->bytes());
  state.counters["fastest_us"] = fastest.seconds() * 1e6;
}

/// merge() of two states for each of 32 query heads.
inline void time_merge(::benchmark::State& state, int dim) {
  constexpr std::size_t kHeads = 32;
  const auto size = kHeads * static_cast<std::size_t>(dim);
  std::vector<float> out(size, 1.0F);
  std::vector<float> part(size, 2.0F);
  FastestIteration fastest;
  for (auto _ : state) {
    fastest.start();
    for (std::size_t h = 0; h < kHeads; ++h) {
      const std::size_t at = h * static_cast<std::size_t>(dim);
      const auto length = static_cast<std::size_t>(dim);
      AttentionState into{.out = std::span<float>(out).subspan(at, length), .lse = 0.0F};
      merge(into, {.out = std::span<float>(part).subspan(at, length), .lse = 0.5F});
      ::benchmark::DoNotOptimize(into.lse);
    }
    fastest.stop();
    ::benchmark::ClobberMemory();
  }
  state.counters["fastest_us"] = fastest.seconds() * 1e6;
}

/// Registers `function(state)` as stage/<name>, in microseconds.
template <class Function>
::benchmark::internal::Benchmark* register_stage(const std::string& name,
                                                 const Function& function) {
  return ::benchmark::RegisterBenchmark(("stage/" + name).c_str(), function)
      ->Unit(::benchmark::kMicrosecond);
}

inline void register_layer_stages(Harness& harness, const WorkloadShape& shape) {
  const std::string size = "/n:" + std::to_string(shape.tokens) +
                           "/dim:" + std::to_string(shape.head_dim) +
                           "/group:" + std::to_string(shape.group) + "/bf16";
  using ::benchmark::State;
  register_stage("retrieve" + size,
                 [&harness, shape](State& s) { time_retrieve<bf16>(s, harness, shape); });
  register_stage("attend/candidates" + size, [&harness, shape](State& s) {
    time_attend_candidates<bf16>(s, harness, shape);
  })->UseManualTime();
  register_stage("attend/exact" + size,
                 [&harness, shape](State& s) { time_attend_exact<bf16>(s, harness, shape); });
}

inline void register_index_stages(Harness& harness, const WorkloadShape& shape) {
  using ::benchmark::State;
  for (const int threads : {1, 2}) {
    const std::string size = "/n:" + std::to_string(shape.tokens) +
                             "/dim:" + std::to_string(shape.head_dim) +
                             "/bf16/threads:" + std::to_string(threads);
    register_stage("build" + size, [&harness, shape, threads](State& s) {
      time_build<bf16>(s, harness, shape, threads);
    });
    register_stage("append/tokens:1024" + size, [&harness, shape, threads](State& s) {
      time_append<bf16>(s, harness, shape, threads);
    })->UseManualTime();
  }
}

inline void register_plain_build(Harness& harness, const WorkloadShape& shape) {
  register_stage(
      "build_plain/n:" + std::to_string(shape.tokens) + "/dim:" + std::to_string(shape.head_dim) +
          "/bf16",
      [&harness, shape](::benchmark::State& s) { time_plain_build<bf16>(s, harness, shape); })
      ->Iterations(1);
}

/// The stages at one shape: all of them, or those that run by default.
inline void register_stages(Harness& harness, const WorkloadShape& shape, bool all) {
  const bool usual = shape.head_dim == 128 && shape.group == 4;
  if (all || (usual && (shape.tokens == 32768 || shape.tokens == 98304))) {
    register_layer_stages(harness, shape);
  }
  if (shape.group == 4 && (all || (usual && shape.tokens == 8192))) {
    register_index_stages(harness, shape);
    register_plain_build(harness, shape);
  }
  if (shape.tokens == 8192 && (all || usual)) {
    register_stage(
        "hash/dim:" + std::to_string(shape.head_dim) + "/group:" + std::to_string(shape.group),
        [&harness, shape](::benchmark::State& s) { time_hash(s, harness, shape); });
  }
}

inline void register_merge() {
  for (const int dim : {64, 128}) {
    register_stage("merge/heads:32/dim:" + std::to_string(dim),
                   [dim](::benchmark::State& s) { time_merge(s, dim); });
  }
}

}  // namespace magicpig::bench

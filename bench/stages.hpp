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

  /// For one KV head; the memory serves one at a time.
  [[nodiscard]] Attend<Ops, StridedKeyValues<T>> attend(const Workload<T>& workload, int kv_head) {
    return {{.key_values = workload.view(),
             .kv_head = kv_head,
             .queries = workload.queries(kv_head),
             .logits = {.scale = workload.scale()}},
            scratch,
            totals};
  }
  void finish(Attend<Ops, StridedKeyValues<T>>& attend) {
    attend.finish();
    totals.write(states.data(), nullptr, nullptr);
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
  const SimHash& family = workload.family();
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
  Traffic traffic = tables_traffic(workload, sampler);
  traffic.bytes = 0.0;
  for (int h = 0; h < kKvHeads; ++h) traffic.bytes += table_bytes(workload, h);
  SamplerScratch<Collisions> scratch(sampler, workload);
  time_cold(state, harness, harness.pool(1), traffic, [&] {
    for (int h = 0; h < kKvHeads; ++h) {
      const auto candidates = sampler.draw<Ops>(workload.draw_input(h), *scratch);
      ::benchmark::DoNotOptimize(candidates.tokens.data());
    }
  });
}

/// Attention to every token of one layer, all KV heads.
template <class T>
void time_attend_exact(::benchmark::State& state, Harness& harness, const WorkloadShape& shape) {
  auto& workload = harness.workload<T>(shape, false);
  AttendMemory<T> memory(workload);
  time_cold(state, harness, harness.pool(1), exact_traffic(workload), [&] {
    for (int h = 0; h < kKvHeads; ++h) {
      auto attend = memory.attend(workload, h);
      attend.add_exact({.begin = 0, .end = shape.tokens});
      memory.finish(attend);
    }
  });
}

/// Attention to one sampler's candidates of one layer, all KV heads; returns the seconds of the
/// fastest step. Candidates are drawn once, before; their lists are cached when a head's turn
/// comes, as they are after a draw.
template <class T, class Sampler, class Estimator, class MakeInput>
double time_candidates(::benchmark::State& state, Harness& harness, Workload<T>& workload,
                       const Sampler& sampler, const Estimator& estimator, const Traffic& traffic,
                       const MakeInput& input) {
  std::vector<SamplerScratch<Sampler>> scratch;
  for (int h = 0; h < kKvHeads; ++h) scratch.emplace_back(sampler, workload);
  const auto draw = [&](int h) {
    return sampler.template draw<Ops>(input(h), *scratch[static_cast<std::size_t>(h)]);
  };
  std::vector<decltype(draw(0))> drawn;
  for (int h = 0; h < kKvHeads; ++h) drawn.push_back(draw(h));
  AttendMemory<T> memory(workload);
  double fastest = std::numeric_limits<double>::infinity();
  for (auto _ : state) {
    harness.cold_memory().empty_caches(harness.pool(1));
    double seconds = 0.0;
    for (int h = 0; h < kKvHeads; ++h) {
      const auto& candidates = drawn[static_cast<std::size_t>(h)];
      std::uint64_t sum = 0;
      for (const TokenId token : candidates.tokens) sum += static_cast<std::uint64_t>(token);
      for (const std::uint32_t members : candidates.members) sum += members;
      ::benchmark::DoNotOptimize(sum);
      const double start = seconds_now();
      auto attend = memory.attend(workload, h);
      attend.add_candidates(candidates, estimator);
      memory.finish(attend);
      seconds += seconds_now() - start;
      ::benchmark::ClobberMemory();
    }
    state.SetIterationTime(seconds);
    fastest = std::min(fastest, seconds);
  }
  set_counters(state, traffic, fastest);
  return fastest;
}

template <class T, class Sampler, class Estimator>
double time_candidates(::benchmark::State& state, Harness& harness, Workload<T>& workload,
                       const Sampler& sampler, const Estimator& estimator, const Traffic& traffic) {
  return time_candidates(state, harness, workload, sampler, estimator, traffic,
                         [&](int h) { return workload.draw_input(h); });
}

/// Attention to the candidates of (10, 150), t = 2.
template <class T>
void time_attend_candidates(::benchmark::State& state, Harness& harness,
                            const WorkloadShape& shape) {
  auto& workload = harness.workload<T>(shape);
  const Collisions sampler = make_collisions(workload);
  Traffic traffic = tables_traffic(workload, sampler);
  traffic.bytes = 0.0;
  SamplerScratch<Collisions> scratch(sampler, workload);
  for (int h = 0; h < kKvHeads; ++h) {
    const auto candidates = sampler.draw<Ops>(workload.draw_input(h), *scratch);
    traffic.bytes += gather_bytes(workload, h, candidates, workload.index().norms(h));
  }
  time_candidates(state, harness, workload, sampler, SelfNormalised{}, traffic);
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
    const Status status = index->build(backend, workload.view(), workload.middle());
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
        const T* key = workload.view().key(h, middle.begin + static_cast<TokenId>(t));
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
  Status status = index->build(backend, workload.view(), before);
  FastestIteration fastest;
  for (auto _ : state) {
    if (status.ok()) status = index->truncate(before.end);
    const double start = seconds_now();
    fastest.start();
    if (status.ok()) status = index->append(backend, workload.view(), middle.end);
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
  register_stage("retrieve" + size, [&harness, shape](State& s) {
    time_retrieve<bf16>(s, harness, shape);
  })->Iterations(kColdSteps);
  register_stage("attend/candidates" + size,
                 [&harness, shape](State& s) { time_attend_candidates<bf16>(s, harness, shape); })
      ->UseManualTime()
      ->Iterations(kColdSteps);
  register_stage("attend/exact" + size, [&harness, shape](State& s) {
    time_attend_exact<bf16>(s, harness, shape);
  })->Iterations(kColdSteps);
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

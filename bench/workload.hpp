// SPDX-License-Identifier: Apache-2.0
// A layer of a synthetic model, what one decode step reads of it, and what benchmarks share.
#pragma once

#include <algorithm>
#include <any>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "machine.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/core/huge_pages.hpp"
#include "magicpig/cpu/highway.hpp"
#include "synthetic.hpp"

namespace magicpig::bench {

using Ops = HighwayOps;
inline constexpr int kKvHeads = 8;

/// Hash tables of an index, and how far they are probed.
struct TableSetting {
  int bits = 10;
  int tables = 150;
  int radius = 0;
  friend bool operator==(const TableSetting&, const TableSetting&) = default;
};
inline constexpr TableSetting kPublished{};
/// A third of the memory at about the same error.
inline constexpr TableSetting kProbing{.bits = 12, .tables = 48, .radius = 1};

template <class T>
[[nodiscard]] constexpr const char* dtype_name() {
  if constexpr (std::is_same_v<T, bf16>) return "bf16";
  if constexpr (std::is_same_v<T, fp16>) return "fp16";
  if constexpr (std::is_same_v<T, float>) return "f32";
  if constexpr (std::is_same_v<T, q8_0>) return "q8_0";
}

struct WorkloadShape {
  TokenId tokens = 0;
  int head_dim = 0;
  int group = 1;
  TableSetting index = kPublished;
  friend bool operator==(const WorkloadShape&, const WorkloadShape&) = default;
};

using Tables = BucketTables<SimHash>;

/// What one step of one layer reads.
struct Traffic {
  double rows = 0.0;  ///< rows read per KV head, as a fraction of the middle
  double bytes = 0.0;
};

/// Distinct cache lines.
class LineSet {
 public:
  void add(const void* data, std::size_t bytes) {
    add_place(reinterpret_cast<std::uintptr_t>(data), bytes);
  }
  /// The same for a place in an array that begins with a line.
  void add_place(std::uintptr_t place, std::size_t bytes) {
    if (bytes == 0) return;
    for (std::uintptr_t line = place / kLine; line <= (place + bytes - 1) / kLine; ++line) {
      lines_.push_back(line);
    }
  }
  [[nodiscard]] double bytes() {
    std::sort(lines_.begin(), lines_.end());
    const auto end = std::unique(lines_.begin(), lines_.end());
    return static_cast<double>(end - lines_.begin()) * kLine;
  }

 private:
  static constexpr std::size_t kLine = 64;
  std::vector<std::uintptr_t> lines_;
};

/// The advice on memory that nothing keeps in cache.
struct Pages {
  MemoryAdvice index = nullptr;  ///< of hash tables
  MemoryAdvice cache = nullptr;  ///< of keys and values
};

/// One layer: keys, values and queries, and an index over the middle once one is wanted.
template <class T>
class Workload {
 public:
  using Source = StridedKeyValues<T>;
  using Input = DrawInput<Source, Tables>;

  Workload(const WorkloadShape& shape, ThreadPool& builders, const Pages& pages)
      : shape_(shape), builders_(builders), pages_(pages), family_(make_family(shape)) {
    auto context = SyntheticContext<T>::create(builders, {.tokens = shape.tokens,
                                                          .kv_heads = kKvHeads,
                                                          .group = shape.group,
                                                          .head_dim = shape.head_dim,
                                                          .memory_advice = pages.cache});
    if (!context.ok()) fail(context.status().message());
    context_.emplace(std::move(*context));
    view_.emplace(context_->view());
  }

  [[nodiscard]] const WorkloadShape& shape() const { return shape_; }
  [[nodiscard]] Shape attention_shape() const { return context_->shape(); }
  [[nodiscard]] TokenRange middle() const { return Window{}.middle(shape_.tokens); }
  [[nodiscard]] const SimHash& family() const { return family_; }
  [[nodiscard]] std::span<const float> queries() const { return context_->queries(); }
  [[nodiscard]] QueryGroup queries(int kv_head) const {
    const std::int64_t size = std::int64_t{shape_.group} * shape_.head_dim;
    return {
        .data = queries().data() + kv_head * size, .count = shape_.group, .dim = shape_.head_dim};
  }
  [[nodiscard]] const Pages& pages() const { return pages_; }
  [[nodiscard]] const Source& view() const { return *view_; }
  [[nodiscard]] float scale() const {
    return 1.0F / std::sqrt(static_cast<float>(shape_.head_dim));
  }

  /// Made when it is asked for first.
  [[nodiscard]] const Tables& index() {
    if (!index_.has_value()) {
      auto made = Tables::create(family_, {.kv_heads = kKvHeads, .memory_advice = pages_.index});
      if (!made.ok()) fail(made.status().message());
      index_.emplace(std::move(*made));
      const Status status = index_->build(make_backend<Ops>(builders_), view(), middle());
      if (!status.ok()) fail(status.message());
    }
    return *index_;
  }
  [[nodiscard]] Input draw_input(int kv_head) {
    return {.key_values = view(),
            .index = index(),
            .kv_head = kv_head,
            .queries = queries(kv_head),
            .scale = scale(),
            .noise = {}};
  }

 private:
  static SimHash make_family(const WorkloadShape& shape) {
    auto family = SimHash::create(
        {.dim = shape.head_dim, .bits = shape.index.bits, .tables = shape.index.tables, .seed = 1});
    if (!family.ok()) fail(family.status().message());
    return std::move(*family);
  }

  WorkloadShape shape_;
  ThreadPool& builders_;
  Pages pages_;
  SimHash family_;
  std::optional<SyntheticContext<T>> context_;
  std::optional<Source> view_;
  std::optional<Tables> index_;
};

/// Scratch of a sampler for one KV head, in memory of its own.
template <class Sampler>
class SamplerScratch {
 public:
  template <class T>
  SamplerScratch(const Sampler& sampler, const Workload<T>& workload) {
    const DrawLimits limits{.group = workload.shape().group, .tokens = workload.shape().tokens};
    Arena measure;
    (void)sampler.carve(measure, limits);
    memory_.resize(measure.bytes_needed());
    Arena arena(memory_);
    scratch_ = sampler.carve(arena, limits);
  }
  [[nodiscard]] typename Sampler::Scratch& operator*() { return scratch_; }

 private:
  std::vector<std::byte> memory_;
  typename Sampler::Scratch scratch_;
};

/// Exact attention reads every row once for all heads of a group.
template <class T>
[[nodiscard]] Traffic exact_traffic(const Workload<T>& workload) {
  const WorkloadShape& shape = workload.shape();
  return {.rows = 1.0,
          .bytes = 2.0 * kKvHeads * static_cast<double>(shape.tokens) *
                   static_cast<double>(row_bytes<T>(static_cast<std::size_t>(shape.head_dim)))};
}

/// Reads of hash tables for the queries of one KV head, number `kv_head` in `index`: ids and
/// offsets of the buckets within `radius` flips of its query heads'.
[[nodiscard]] inline double table_bytes(const Tables& index, int kv_head, const QueryGroup& queries,
                                        int radius) {
  const SimHash& family = index.family();
  const auto ball = HammingBall::create(family.bits(), radius);
  if (!ball.ok()) fail(ball.status().message());
  std::vector<Code> codes(static_cast<std::size_t>(queries.count * family.tables()));
  std::vector<float> scratch(family.scratch_floats(queries.count));
  family.template hash<Ops>(queries.data, queries.count, codes.data(), scratch.data());
  double bytes = 0.0;
  for (int s = 0; s < index.segment_count(); ++s) {
    const Segment& segment = index.segment(s, kv_head);
    LineSet ids;
    LineSet offsets;  // by place in the array [tables, buckets + 1], which starts a line
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const int table = static_cast<int>(i) % family.tables();
      for (const Code mask : ball->masks()) {
        const int code = codes[i] ^ mask;
        const auto bucket = segment.bucket(table, code);
        ids.add(bucket.data(), bucket.size_bytes());
        const std::size_t place =
            static_cast<std::size_t>(table * (bucket_count(family.bits()) + 1) + code) *
            sizeof(std::uint16_t);
        offsets.add_place(place, 2 * sizeof(std::uint16_t));
      }
    }
    bytes += ids.bytes() + offsets.bytes();
  }
  return bytes;
}
template <class T>
[[nodiscard]] double table_bytes(Workload<T>& workload, int kv_head) {
  return table_bytes(workload.index(), kv_head, workload.queries(kv_head),
                     workload.shape().index.radius);
}

/// Rows that candidates of one KV head make decode() gather, with the norms that collisions need:
/// `norms` of the middle, or null.
template <class T, class Candidates>
[[nodiscard]] double gather_bytes(const Workload<T>& workload, int kv_head,
                                  const Candidates& candidates, const float* norms) {
  LineSet lines;
  const auto& view = workload.view();
  const std::size_t row = row_bytes<T>(static_cast<std::size_t>(workload.shape().head_dim));
  for (const TokenId token : candidates.tokens) {
    lines.add(view.key(kv_head, token), row);
    lines.add(view.value(kv_head, token), row);
    if (norms != nullptr) lines.add(norms + (token - workload.middle().begin), sizeof *norms);
  }
  return lines.bytes();
}

/// The rows beside the middle.
template <class T>
[[nodiscard]] double window_bytes(const Workload<T>& workload) {
  const TokenId exact = workload.shape().tokens - workload.middle().size();
  return 2.0 * kKvHeads * exact *
         static_cast<double>(row_bytes<T>(static_cast<std::size_t>(workload.shape().head_dim)));
}

/// What a step with collisions of (K, L) tables reads: exact and drawn rows, norms, ids, offsets.
template <class T>
[[nodiscard]] Traffic tables_traffic(Workload<T>& workload, const Collisions& sampler) {
  SamplerScratch<Collisions> scratch(sampler, workload);
  Traffic traffic;
  for (int h = 0; h < kKvHeads; ++h) {
    const auto candidates = sampler.draw<Ops>(workload.draw_input(h), *scratch);
    traffic.rows += static_cast<double>(candidates.tokens.size()) /
                    (static_cast<double>(workload.middle().size()) * kKvHeads);
    traffic.bytes +=
        gather_bytes(workload, h, candidates, workload.index().norms(h)) + table_bytes(workload, h);
  }
  traffic.bytes += window_bytes(workload);
  return traffic;
}

/// Whether an argument begins with `prefix`.
[[nodiscard]] inline bool has_argument(int argc, char** argv, const char* prefix) {
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]).rfind(prefix, 0) == 0) return true;
  }
  return false;
}

/// Pages of --huge_pages=index (hash tables alone) or --huge_pages=all (keys and values, too).
[[nodiscard]] inline Pages wanted_pages(int argc, char** argv) {
  if (has_argument(argc, argv, "--huge_pages=index")) return {.index = advise_huge_pages};
  if (!has_argument(argc, argv, "--huge_pages=all")) return {};
  return {.index = advise_huge_pages, .cache = advise_huge_pages};
}

/// Keeps what benchmarks share: the newest workload, and a warmed pool for each number of threads.
class Harness {
 public:
  Harness(int argc, char** argv) : pages_(wanted_pages(argc, argv)) {}

  /// The workload of this type and shape; any other is dropped first. Who needs no hash tables
  /// takes it whatever tables it has, and so runs beside each method that has them.
  template <class T>
  [[nodiscard]] Workload<T>& workload(WorkloadShape shape, bool with_index = true) {
    auto& slot = std::get<std::unique_ptr<Workload<T>>>(workloads_);
    if (slot != nullptr && !with_index) shape.index = slot->shape().index;
    if (slot == nullptr || !(slot->shape() == shape)) {
      std::apply([](auto&... any) { (any.reset(), ...); }, workloads_);
      kept_.clear();
      const auto cpus = static_cast<int>(allowed_cpus().size());
      slot = std::make_unique<Workload<T>>(shape, pool(std::max(1, cpus)), pages_);
    }
    return *slot;
  }

  /// What is kept under this name for the present workload, or what `make` makes of it.
  template <class Thing, class Make>
  [[nodiscard]] Thing& keep(const std::string& name, const Make& make) {
    std::any& place = kept_[name];
    if (!place.has_value()) place = std::make_shared<Thing>(make());
    return *std::any_cast<std::shared_ptr<Thing>&>(place);
  }

  [[nodiscard]] ThreadPool& pool(int workers) {
    for (const auto& known : pools_) {
      if (known->workers() == workers) return *known;
    }
    return *pools_.emplace_back(make_warm_pool(workers));
  }

  [[nodiscard]] const Pages& pages() const { return pages_; }
  [[nodiscard]] ColdMemory& cold_memory() { return cold_memory_; }

 private:
  Pages pages_;
  ColdMemory cold_memory_;
  std::vector<std::unique_ptr<ThreadPool>> pools_;  // outlive the workloads that use them
  std::tuple<std::unique_ptr<Workload<bf16>>, std::unique_ptr<Workload<fp16>>,
             std::unique_ptr<Workload<float>>, std::unique_ptr<Workload<q8_0>>>
      workloads_;
  std::map<std::string, std::any> kept_;
};

/// Collisions in at least t tables, on the family of a workload.
[[nodiscard]] inline Collisions make_collisions(const SimHash& family, int min_collisions,
                                                int radius = 0) {
  auto sampler =
      Collisions::create(family, {.min_collisions = min_collisions, .probe_radius = radius});
  if (!sampler.ok()) fail(sampler.status().message());
  return std::move(*sampler);
}
template <class T>
[[nodiscard]] Collisions make_collisions(const Workload<T>& workload) {
  return make_collisions(workload.family(), 2, workload.shape().index.radius);
}

/// Puts the machine's facts into the header of every report and measures its read bandwidth.
inline void describe_machine(Harness& harness) {
  char text[64];
  ::benchmark::AddCustomContext("cpu", cpu_model());
  ::benchmark::AddCustomContext("highway_target", highway_target());
  std::snprintf(text, sizeof text, "%.1f", static_cast<double>(last_level_cache()) / 1048576.0);
  ::benchmark::AddCustomContext("last_level_cache_MiB", text);
  for (const int threads : {1, 2}) {
    std::snprintf(text, sizeof text, "%.1f",
                  harness.cold_memory().read_bandwidth(harness.pool(threads)) * 1e-9);
    ::benchmark::AddCustomContext(
        threads == 1 ? "read_GB_per_s_1_thread" : "read_GB_per_s_2_threads", text);
  }
  std::snprintf(text, sizeof text, "%.1f", multiply_add_rate() * 1e-9);
  ::benchmark::AddCustomContext("G_multiply_adds_per_s_1_thread", text);
  ::benchmark::AddCustomContext("huge_pages", harness.pages().index == nullptr   ? "none"
                                              : harness.pages().cache == nullptr ? "index"
                                                                                 : "all");
  ::benchmark::AddCustomContext("threads", "one warmed pool per number, each thread pinned");
}

/// Times each iteration by itself; the fastest is what other work on the machine disturbed least.
class FastestIteration {
 public:
  void start() { start_ = seconds_now(); }
  void stop() { fastest_ = std::min(fastest_, seconds_now() - start_); }
  [[nodiscard]] double seconds() const { return fastest_; }

 private:
  double start_ = 0.0;
  double fastest_ = std::numeric_limits<double>::infinity();
};

/// The counters of a step: see bench/README.md.
inline void set_counters(::benchmark::State& state, const Traffic& traffic, double fastest) {
  state.counters["rows"] = traffic.rows;
  state.counters["bytes"] = traffic.bytes;
  state.counters["fastest_us"] = fastest * 1e6;
  state.counters["fastest_GB_per_s"] = traffic.bytes / fastest * 1e-9;
}

/// Steps of a benchmark that empties the caches before each: emptying takes longer than a step, and
/// Google Benchmark, which does not count it, would ask for thousands of short ones.
inline constexpr int kColdSteps = 20;

/// Times step() with nothing of the layer in a cache. The caches are emptied by the threads that
/// run the step, so that they are awake.
template <class Step>
void time_cold(::benchmark::State& state, Harness& harness, ThreadPool& pool,
               const Traffic& traffic, const Step& step) {
  FastestIteration fastest;
  for (auto _ : state) {
    state.PauseTiming();
    harness.cold_memory().empty_caches(pool);
    state.ResumeTiming();
    fastest.start();
    step();
    fastest.stop();
    ::benchmark::ClobberMemory();
  }
  set_counters(state, traffic, fastest.seconds());
}

/// Whether all runs are to be registered: a filter or a list was asked for.
[[nodiscard]] inline bool wants_all(int argc, char** argv) {
  return has_argument(argc, argv, "--benchmark_filter") ||
         has_argument(argc, argv, "--benchmark_list_tests") ||
         std::getenv("BENCHMARK_FILTER") != nullptr;
}

/// The rest of main(): describes the machine unless only names are wanted, and runs what is
/// registered.
inline int run_benchmarks(Harness& harness, int argc, char** argv) {
  const bool names_only = has_argument(argc, argv, "--benchmark_list_tests");
  argc = static_cast<int>(std::remove_if(argv + 1, argv + argc,
                                         [](const char* argument) {
                                           return std::string(argument) == "--huge_pages=index" ||
                                                  std::string(argument) == "--huge_pages=all";
                                         }) -
                          argv);
  ::benchmark::Initialize(&argc, argv);
  if (::benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  if (!names_only) describe_machine(harness);
  ::benchmark::RunSpecifiedBenchmarks();
  ::benchmark::Shutdown();
  return 0;
}

}  // namespace magicpig::bench

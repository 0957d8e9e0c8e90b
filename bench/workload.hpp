// SPDX-License-Identifier: Apache-2.0
// Layers of a synthetic model to rotate over, and what one decode step of one layer reads of them.
#pragma once

#include <algorithm>
#include <any>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
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

/// Bytes of keys, values and indexes that a workload holds at most: 12 GiB, or half of what the
/// system has left.
[[nodiscard]] inline std::size_t memory_cap() {
  std::size_t cap = std::size_t{12} << 30;
  std::ifstream info("/proc/meminfo");
  std::string word;
  for (std::size_t kib = 0; info >> word;) {
    if (word == "MemAvailable:" && info >> kib) cap = std::min(cap, kib * 1024 / 2);
  }
  return cap;
}

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

/// SimHash that can be told to remember. All layers have the same keys, and hashing them is most of
/// the work of an index: with this, only the first index pays for it, and the others still are
/// built by the library, into memory of their own.
class RememberingHash {
 public:
  explicit RememberingHash(SimHash family)
      : family_(std::move(family)), memory_(std::make_unique<Memory>()) {}

  [[nodiscard]] int dim() const { return family_.dim(); }
  [[nodiscard]] int bits() const { return family_.bits(); }
  [[nodiscard]] int tables() const { return family_.tables(); }
  [[nodiscard]] float plane(int number, int j) const { return family_.plane(number, j); }
  [[nodiscard]] double table_collision(double cosine, int radius) const {
    return family_.table_collision(cosine, radius);
  }
  [[nodiscard]] std::size_t scratch_floats(int count) const {
    return family_.scratch_floats(count);
  }

  template <class Ops>
  void hash(const float* vectors, int count, Code* codes, float* scratch) const {
    if (!remembering_) return family_.hash<Ops>(vectors, count, codes, scratch);
    const auto size = static_cast<std::size_t>(count) * static_cast<std::size_t>(tables());
    const std::uint64_t key = fingerprint(vectors, count);
    {
      const std::lock_guard lock(memory_->mutex);
      const auto known = memory_->codes.find(key);
      if (known != memory_->codes.end() && known->second.size() == size) {
        std::memcpy(codes, known->second.data(), size * sizeof(Code));
        return;
      }
    }
    family_.hash<Ops>(vectors, count, codes, scratch);
    const std::lock_guard lock(memory_->mutex);
    memory_->codes.insert_or_assign(key, std::vector<Code>(codes, codes + size));
  }

  /// While on, every batch is looked up first. Not to be changed while others hash.
  void remember(bool on) { remembering_ = on; }

 private:
  struct Memory {
    std::mutex mutex;
    std::unordered_map<std::uint64_t, std::vector<Code>> codes;  // by fingerprint of the batch
  };

  // FNV-1a over the words of all vectors.
  [[nodiscard]] std::uint64_t fingerprint(const float* vectors, int count) const {
    std::uint64_t value = 0xcbf29ce484222325U;
    for (std::int64_t i = 0; i < std::int64_t{count} * dim(); ++i) {
      value = (value ^ std::bit_cast<std::uint32_t>(vectors[i])) * 0x100000001b3U;
    }
    return value;
  }

  SimHash family_;
  std::unique_ptr<Memory> memory_;
  bool remembering_ = false;
};

using Tables = BucketTables<RememberingHash>;

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

/// Layers with the same numbers in memory of their own: the second and later ones are copies of the
/// first, each with its own index. A program makes one at a time.
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
    layers_.emplace_back();
    layers_[0].view.emplace(context_->view());
  }

  [[nodiscard]] const WorkloadShape& shape() const { return shape_; }
  [[nodiscard]] Shape attention_shape() const { return context_->shape(); }
  [[nodiscard]] TokenRange middle() const { return Window{}.middle(shape_.tokens); }
  [[nodiscard]] const RememberingHash& family() const { return family_; }
  [[nodiscard]] std::span<const float> queries() const { return context_->queries(); }
  [[nodiscard]] QueryGroup queries(int kv_head) const {
    const std::int64_t size = std::int64_t{shape_.group} * shape_.head_dim;
    return {
        .data = queries().data() + kv_head * size, .count = shape_.group, .dim = shape_.head_dim};
  }
  [[nodiscard]] const Pages& pages() const { return pages_; }
  [[nodiscard]] const Source& view(int layer) const { return *at(layer).view; }
  [[nodiscard]] const Tables& index(int layer) const { return *at(layer).index; }
  [[nodiscard]] float scale() const {
    return 1.0F / std::sqrt(static_cast<float>(shape_.head_dim));
  }
  [[nodiscard]] Input draw_input(int layer, int kv_head) const {
    return {.key_values = view(layer),
            .index = index(layer),
            .kv_head = kv_head,
            .queries = queries(kv_head),
            .scale = scale(),
            .noise = {}};
  }

  /// Makes the indexes of the first `count` layers.
  void make_indexes(int count) {
    const auto backend = make_backend<Ops>(builders_);
    make_layers(count);
    family_.remember(true);
    for (int l = 0; l < count; ++l) {
      auto& index = layers_[static_cast<std::size_t>(l)].index;
      if (index.has_value()) continue;
      auto made = Tables::create(family_, {.kv_heads = kKvHeads, .memory_advice = pages_.index});
      if (!made.ok()) fail(made.status().message());
      index.emplace(std::move(*made));
      const Status status = index->build(backend, view(l), middle());
      if (!status.ok()) fail(status.message());
    }
    family_.remember(false);
  }

  void make_layers(int count) {
    while (static_cast<int>(layers_.size()) < count) {
      layers_.emplace_back();
      Layer& layer = layers_.back();
      if (!copy(context_->keys(), layer.keys) || !copy(context_->values(), layer.values)) {
        fail("no memory for another layer");
      }
      layer.view.emplace(*Source::head_major(layer.keys.data(), layer.values.data(),
                                             attention_shape(), shape_.tokens));
    }
  }

  /// Gives the first `count` layers norms of their own without an index, for norms().
  void make_norms(int count) {
    make_layers(count);
    make_indexes(1);
    const auto size = static_cast<std::size_t>(middle().size());
    for (int l = 0; l < count; ++l) {
      Buffer<float>& norms = layers_[static_cast<std::size_t>(l)].norms;
      if (norms.size() != 0) continue;
      if (!norms.resize(size * kKvHeads, pages_.index)) fail("no memory for norms");
      for (int h = 0; h < kKvHeads; ++h) {
        std::memcpy(norms.data() + static_cast<std::size_t>(h) * size, index(0).norms(h),
                    size * sizeof(float));
      }
    }
  }
  [[nodiscard]] const float* norms(int layer, int kv_head) const {
    return at(layer).norms.data() + std::int64_t{kv_head} * middle().size();
  }

  /// Bytes of keys, values and, where wanted, index of one layer.
  [[nodiscard]] std::size_t layer_bytes(bool indexed) {
    if (indexed) make_indexes(1);
    return context_->keys().size_bytes() + context_->values().size_bytes() +
           (indexed ? index(0).bytes() : 0);
  }

  /// A layer for the next step; successive calls go round `count` layers, whatever benchmark
  /// makes them, so that a benchmark which is started again does not find its first layer warm.
  [[nodiscard]] int next_layer(int count) { return static_cast<int>(turn_++ % count); }

 private:
  struct Layer {
    Buffer<T> keys;  // of copies; the first layer's are the context's
    Buffer<T> values;
    std::optional<Source> view;
    std::optional<Tables> index;
    Buffer<float> norms;  // [kv_heads, middle]
  };

  static RememberingHash make_family(const WorkloadShape& shape) {
    auto family = SimHash::create(
        {.dim = shape.head_dim, .bits = shape.index.bits, .tables = shape.index.tables, .seed = 1});
    if (!family.ok()) fail(family.status().message());
    return RememberingHash(std::move(*family));
  }

  bool copy(std::span<const T> from, Buffer<T>& to) const {
    if (!to.resize(from.size(), pages_.cache)) return false;
    std::memcpy(to.data(), from.data(), from.size_bytes());
    return true;
  }

  [[nodiscard]] const Layer& at(int layer) const {
    return layers_[static_cast<std::size_t>(layer)];
  }

  WorkloadShape shape_;
  ThreadPool& builders_;
  Pages pages_;
  RememberingHash family_;
  std::optional<SyntheticContext<T>> context_;
  std::deque<Layer> layers_;
  std::int64_t turn_ = 0;
};

/// Scratch of a sampler for one KV head, in memory of its own.
template <class Sampler>
class SamplerScratch {
 public:
  template <class T>
  SamplerScratch(const Sampler& sampler, const Workload<T>& workload) {
    const DrawLimits limits{.head_dim = workload.shape().head_dim,
                            .group = workload.shape().group,
                            .tokens = workload.shape().tokens};
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

/// Reads of the hash tables for one KV head: ids and offsets of the buckets of its query heads.
template <class T>
[[nodiscard]] double table_bytes(const Workload<T>& workload, int kv_head) {
  const QueryGroup queries = workload.queries(kv_head);
  const Tables& index = workload.index(0);
  const TableSetting& setting = workload.shape().index;
  const auto ball = HammingBall::create(setting.bits, setting.radius);
  if (!ball.ok()) fail(ball.status().message());
  std::vector<Code> codes(static_cast<std::size_t>(queries.count * setting.tables));
  std::vector<float> scratch(workload.family().scratch_floats(queries.count));
  workload.family().template hash<Ops>(queries.data, queries.count, codes.data(), scratch.data());
  double bytes = 0.0;
  for (int s = 0; s < index.segment_count(); ++s) {
    const Segment& segment = index.segment(s, kv_head);
    LineSet ids;
    LineSet offsets;  // by place in the array [tables, buckets + 1], which starts a line
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const int table = static_cast<int>(i) % setting.tables;
      for (const Code mask : ball->masks()) {
        const int code = codes[i] ^ mask;
        const auto bucket = segment.bucket(table, code);
        ids.add(bucket.data(), bucket.size_bytes());
        const std::size_t place =
            static_cast<std::size_t>(table * (bucket_count(setting.bits) + 1) + code) *
            sizeof(std::uint16_t);
        offsets.add_place(place, 2 * sizeof(std::uint16_t));
      }
    }
    bytes += ids.bytes() + offsets.bytes();
  }
  return bytes;
}

/// Rows that candidates of one KV head make decode() gather, with the norms that collisions need.
template <class T, class Candidates>
[[nodiscard]] double gather_bytes(const Workload<T>& workload, int kv_head,
                                  const Candidates& candidates, bool norms) {
  LineSet lines;
  const auto& view = workload.view(0);
  const std::size_t row = row_bytes<T>(static_cast<std::size_t>(workload.shape().head_dim));
  for (const TokenId token : candidates.tokens) {
    lines.add(view.key(kv_head, token), row);
    lines.add(view.value(kv_head, token), row);
    if (!norms) continue;
    const float* norm = workload.index(0).norms(kv_head) + (token - workload.middle().begin);
    lines.add(norm, sizeof *norm);
  }
  return lines.bytes();
}

/// What a step with collisions of (K, L) tables reads: exact and drawn rows, norms, ids, offsets.
template <class T>
[[nodiscard]] Traffic tables_traffic(Workload<T>& workload, const Collisions& sampler) {
  workload.make_indexes(1);
  SamplerScratch<Collisions> scratch(sampler, workload);
  Traffic traffic;
  for (int h = 0; h < kKvHeads; ++h) {
    const auto candidates = sampler.draw<Ops>(workload.draw_input(0, h), *scratch);
    traffic.rows += static_cast<double>(candidates.tokens.size()) /
                    (static_cast<double>(workload.middle().size()) * kKvHeads);
    traffic.bytes += gather_bytes(workload, h, candidates, true) + table_bytes(workload, h);
  }
  const TokenId exact = workload.shape().tokens - workload.middle().size();
  const std::size_t row = row_bytes<T>(static_cast<std::size_t>(workload.shape().head_dim));
  traffic.bytes += 2.0 * kKvHeads * static_cast<double>(row) * exact;
  return traffic;
}

/// How many layers a benchmark goes round.
struct Rotation {
  Traffic traffic;
  int layers = 1;
};

/// As many layers as it takes for the bytes read between two uses of one layer to exceed 4
/// last-level caches, as they do in a real model, or as many as the memory cap allows. Makes them,
/// and prints how many they are.
template <class T>
[[nodiscard]] Rotation make_rotation(Workload<T>& workload, const std::string& name,
                                     const Traffic& traffic, bool indexed) {
  const double wanted = 4.0 * static_cast<double>(last_level_cache());
  const std::size_t each = workload.layer_bytes(indexed);
  const std::size_t cap = memory_cap();
  const auto needed = 1 + static_cast<std::int64_t>(std::ceil(wanted / traffic.bytes));
  const auto most = static_cast<std::int64_t>(cap / each);
  const auto layers = static_cast<int>(std::max<std::int64_t>(1, std::min(needed, most)));
  constexpr double kMiB = 1048576.0;
  std::fprintf(stderr,
               "%s: %d layers of %.0f MiB, %.1f MiB read per step, %.0f MiB between two uses of a "
               "layer (4 last-level caches: %.0f MiB)%s\n",
               name.c_str(), layers, static_cast<double>(each) / kMiB, traffic.bytes / kMiB,
               (layers - 1) * traffic.bytes / kMiB, wanted / kMiB,
               layers < needed ? "; fewer layers than wanted, for want of memory" : "");
  workload.make_layers(layers);
  if (indexed) workload.make_indexes(layers);
  return {.traffic = traffic, .layers = layers};
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
      rotations_.clear();
      kept_.clear();
      const auto cpus = static_cast<int>(allowed_cpus().size());
      slot = std::make_unique<Workload<T>>(shape, pool(std::max(1, cpus)), pages_);
    }
    return *slot;
  }

  /// The rotation made under this name for the present workload, or the one that `make` makes.
  template <class Make>
  [[nodiscard]] const Rotation& rotation(const std::string& name, const Make& make) {
    for (const auto& known : rotations_) {
      if (known.first == name) return known.second;
    }
    return rotations_.emplace_back(name, make()).second;
  }

  /// Something else kept under this name for the present workload, or what `make` makes of it.
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

 private:
  Pages pages_;
  std::vector<std::unique_ptr<ThreadPool>> pools_;  // outlive the workloads that use them
  std::tuple<std::unique_ptr<Workload<bf16>>, std::unique_ptr<Workload<fp16>>,
             std::unique_ptr<Workload<float>>, std::unique_ptr<Workload<q8_0>>>
      workloads_;
  std::deque<std::pair<std::string, Rotation>> rotations_;
  std::map<std::string, std::any> kept_;
};

/// Collisions in at least t tables, on the family of a workload.
[[nodiscard]] inline Collisions make_collisions(const RememberingHash& family, int min_collisions,
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
    std::snprintf(text, sizeof text, "%.1f", read_bandwidth(harness.pool(threads)) * 1e-9);
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
inline void set_counters(::benchmark::State& state, const Rotation& rotation,
                         const FastestIteration& fastest) {
  state.counters["rows"] = rotation.traffic.rows;
  state.counters["bytes"] = rotation.traffic.bytes;
  state.counters["layers"] = rotation.layers;
  state.counters["fastest_us"] = fastest.seconds() * 1e6;
  state.counters["fastest_GB_per_s"] = rotation.traffic.bytes / fastest.seconds() * 1e-9;
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

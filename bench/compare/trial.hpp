// SPDX-License-Identifier: Apache-2.0
// One capture prepared for trials, and a trial: one setting of one method with one seed, on
// decode().
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <typeindex>
#include <utility>
#include <vector>

#include "capture.hpp"
#include "compare/measure.hpp"
#include "learned_weights.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/hash/cross_polytope.hpp"
#include "magicpig/index/hash_codes.hpp"
#include "magicpig/index/key_clusters.hpp"
#include "magicpig/index/label_cache.hpp"
#include "magicpig/index/page_bounds.hpp"
#include "magicpig/index/per_head_index.hpp"
#include "magicpig/index/sign_codes.hpp"
#include "query_rows.hpp"
#include "relative_error.hpp"

namespace magicpig::bench {

/// The operations that everything is measured with.
using Ops = HighwayOps;

/// What stays exact, and how many rows of a capture are asked.
struct TrialConfig {
  TokenId sink = 4;
  TokenId local = 64;
  int queries = 16;
  std::string learned = {};  ///< file of learned weights, or empty
  RowSet row_set = RowSet::kAll;
};

/// (K, L) hash codes over the middle of a capture, in tables or as they are, with their planes.
template <template <class> class IndexOf, class Family = SimHash>
struct Hashed {
  std::unique_ptr<Family> family;  // stays where it is: the index refers to it
  std::optional<IndexOf<Family>> index;
};
using Tables = Hashed<BucketTables>;
using CrossPolytopeTables = Hashed<BucketTables, CrossPolytope>;
using CodeRows = Hashed<HashCodes>;

/// Codes over the middle of a capture, with their quantiser.
template <class Quantiser>
struct Codes {
  std::unique_ptr<Quantiser> quantiser;  // stays where it is: the index refers to it
  std::optional<Signatures<Quantiser>> index;
};

/// The indexes of a profile over the middle of a capture, with their quantisers and planes.
struct Profiled {
  std::unique_ptr<HeadHashes> hashes;  // stay where they are: the index refers to them
  std::optional<PerHeadIndex> index;
};

/// Pages over the middle of a capture.
struct Pages {
  std::optional<PageBounds<fp16>> index;
};

/// Learned codes over the middle of a capture, with their networks.
struct LearnedRows {
  std::unique_ptr<LearnedHash> hash;  // stays where it is: the index refers to it
  std::optional<SignCodes> index;
};

/// Labels over the middle of a capture.
struct Labels {
  std::optional<LabelCache> index;
};

/// Clusters of keys over the middle of a capture.
struct Clusters {
  std::optional<KeyClusters> index;
};

/// A capture with its query rows, middle and exact attention, and the indexes of the current seed.
class Workbench {
 public:
  /// Error: no token between sink and local window.
  [[nodiscard]] static Result<std::unique_ptr<Workbench>> create(const Capture& capture,
                                                                 const TrialConfig& config,
                                                                 ThreadPool& pool) {
    const Result<TokenRange> middle = middle_of(capture, config.sink, config.local);
    if (!middle.ok()) return middle.status();
    std::unique_ptr<Workbench> bench(new Workbench(capture, pool));
    bench->middle_ = *middle;
    bench->learned_ = config.learned;
    bench->rows_ = choose_rows(capture, config.queries, config.row_set);
    bench->reference_ = make_reference(capture, bench->rows_, pool);
    return bench;
  }

  [[nodiscard]] const Capture& capture() const { return capture_; }
  [[nodiscard]] const Reference& reference() const { return reference_; }
  [[nodiscard]] ThreadPool& pool() const { return pool_; }
  /// Tokens that are drawn from: the same for every query.
  [[nodiscard]] TokenRange middle() const { return middle_; }
  /// Query rows, ascending.
  [[nodiscard]] std::span<const int> rows() const { return rows_; }

  [[nodiscard]] RangeIndex range_index() const {
    return {middle_, capture_.shape().kv_heads, capture_.shape().head_dim};
  }

  /// Tables of K = `bits` and L = `tables` whose planes come from `seed`; built when first asked
  /// for, and kept until something of another seed is.
  [[nodiscard]] Result<const Tables*> tables(int bits, int tables, std::uint64_t seed) {
    const HashConfig config{
        .dim = capture_.shape().head_dim, .bits = bits, .tables = tables, .seed = seed};
    return kept<Tables>({bits, tables}, seed, [&](Tables& made) {
      return build(config, made, {.kv_heads = capture_.shape().kv_heads});
    });
  }

  /// The same of cross-polytopes, `parts` of them to a code.
  [[nodiscard]] Result<const CrossPolytopeTables*> cross_polytope_tables(int bits, int tables,
                                                                         int parts,
                                                                         std::uint64_t seed) {
    const CrossPolytopeConfig config{.dim = capture_.shape().head_dim,
                                     .bits = bits,
                                     .tables = tables,
                                     .parts = parts,
                                     .seed = seed};
    return kept<CrossPolytopeTables>(
        {bits * 16 + parts, tables}, seed, [&](CrossPolytopeTables& made) {
          return build(config, made, {.kv_heads = capture_.shape().kv_heads});
        });
  }

  /// The same codes as they are, of keys that are centred or not, with the norms of values.
  [[nodiscard]] Result<const CodeRows*> hash_codes(int bits, int tables, bool centred,
                                                   std::uint64_t seed) {
    const HashConfig config{
        .dim = capture_.shape().head_dim, .bits = bits, .tables = tables, .seed = seed};
    return kept<CodeRows>({bits, centred ? -tables : tables}, seed, [&](CodeRows& made) {
      return build(config, made,
                   {.kv_heads = capture_.shape().kv_heads,
                    .value_dim = capture_.shape().value_dim,
                    .centred = centred});
    });
  }

  /// Bounds of pages of `page` tokens; they have no seed but are kept as long as what has one.
  [[nodiscard]] Result<const Pages*> pages(int page, std::uint64_t seed) {
    return kept<Pages>({page, 0}, seed, [&](Pages& made) { return build(page, made); });
  }

  /// Codes by the weights that the capture came with, kept likewise. Error: none, or others.
  [[nodiscard]] Result<const LearnedRows*> learned(std::uint64_t seed) {
    return kept<LearnedRows>({0, 0}, seed, [&](LearnedRows& made) {
      Result<LearnedHash> hash = read_learned_hash(learned_);
      if (!hash.ok()) return hash.status();
      made.hash = std::make_unique<LearnedHash>(std::move(*hash));
      made.index.emplace(*made.hash);
      const Status status = build_middle(*made.index);
      if (status.ok()) return status;
      return Status::error(status.code(), "%.120s: %s", learned_.c_str(), status.message());
    });
  }

  /// Labels of `channels` channels, calibrated on the query rows that are not asked or on the keys
  /// alone; as pages(), they have no seed.
  [[nodiscard]] Result<const Labels*> labels(int channels, bool by_queries, std::uint64_t seed) {
    return kept<Labels>({channels, by_queries ? 1 : 0}, seed,
                        [&](Labels& made) { return build(channels, by_queries, made); });
  }

  /// Clusters around `lists` centroids per KV head, found from `seed`.
  [[nodiscard]] Result<const Clusters*> clusters(int lists, std::uint64_t seed) {
    return kept<Clusters>({lists, 0}, seed, [&](Clusters& made) {
      auto index = KeyClusters::create({.kv_heads = capture_.shape().kv_heads,
                                        .dim = capture_.shape().head_dim,
                                        .lists = lists,
                                        .seed = seed});
      if (!index.ok()) return index.status();
      made.index.emplace(std::move(*index));
      return build_middle(*made.index);
    });
  }

  /// What each KV head needs for its setting of a profile, made anew for each call.
  [[nodiscard]] Result<Profiled> profiled(std::span<const HeadSetting> profile,
                                          std::uint64_t seed) const {
    return capture_.with_key_values([&](const auto& key_values) -> Result<Profiled> {
      auto hashes =
          HeadHashes::create(make_backend<Ops>(pool_), key_values, middle_, profile, seed);
      if (!hashes.ok()) return hashes.status();
      Profiled made;
      made.hashes = std::make_unique<HeadHashes>(std::move(*hashes));
      auto index = PerHeadIndex::create(*made.hashes);
      if (!index.ok()) return index.status();
      made.index.emplace(std::move(*index));
      const Status status = build_middle(*made.index);
      if (!status.ok()) return status;
      return made;
    });
  }

  /// The same of codes of `bits` bits per dimension, with the norms of values or without.
  template <class Quantiser>
  [[nodiscard]] Result<const Codes<Quantiser>*> codes(int bits, std::uint64_t seed,
                                                      bool norms = true) {
    const int value_dim = norms ? capture_.shape().value_dim : 0;
    return kept<Codes<Quantiser>>({bits, value_dim}, seed, [&](Codes<Quantiser>& made) {
      return build(bits, seed, value_dim, made);
    });
  }

 private:
  Workbench(const Capture& capture, ThreadPool& pool) : capture_(capture), pool_(pool) {}

  // What build(made) made with these settings and this seed; all of another seed is forgotten.
  template <class Made, class Build>
  Result<const Made*> kept(std::pair<int, int> settings, std::uint64_t seed, const Build& build) {
    if (seed != seed_) kept_.clear();
    seed_ = seed;
    std::shared_ptr<void>& slot = kept_[{std::type_index(typeid(Made)), settings}];
    if (slot == nullptr) {
      auto made = std::make_shared<Made>();
      const Status status = build(*made);
      if (!status.ok()) return status;
      slot = std::move(made);
    }
    return static_cast<const Made*>(slot.get());
  }

  // Drawn at random, or trained on the middle.
  template <class Quantiser>
  Result<Quantiser> make_quantiser(int bits, std::uint64_t seed) const {
    if constexpr (requires { Quantiser::create(1, bits, seed); }) {
      return Quantiser::create(capture_.shape().head_dim, bits, seed);
    } else {
      return capture_.with_key_values([&](const auto& key_values) {
        return Quantiser::train(
            make_backend<Ops>(pool_), key_values, middle_,
            {.kv_heads = capture_.shape().kv_heads, .bits = bits, .seed = seed});
      });
    }
  }

  template <class Quantiser>
  Status build(int bits, std::uint64_t seed, int value_dim, Codes<Quantiser>& codes) const {
    Result<Quantiser> quantiser = make_quantiser<Quantiser>(bits, seed);
    if (!quantiser.ok()) return quantiser.status();
    codes.quantiser = std::make_unique<Quantiser>(std::move(*quantiser));
    auto index = Signatures<Quantiser>::create(
        *codes.quantiser, {.kv_heads = capture_.shape().kv_heads, .value_dim = value_dim});
    if (!index.ok()) return index.status();
    codes.index.emplace(std::move(*index));
    return build_middle(*codes.index);
  }

  template <class FamilyConfig, template <class> class IndexOf, class Family>
  Status build(const FamilyConfig& config, Hashed<IndexOf, Family>& hashed,
               const typename IndexOf<Family>::Config& index_config) const {
    Result<Family> family = Family::create(config);
    if (!family.ok()) return family.status();
    hashed.family = std::make_unique<Family>(std::move(*family));
    auto index = IndexOf<Family>::create(*hashed.family, index_config);
    if (!index.ok()) return index.status();
    hashed.index.emplace(std::move(*index));
    return build_middle(*hashed.index);
  }

  Status build(int page, Pages& pages) const {
    auto index = PageBounds<fp16>::create(
        {.kv_heads = capture_.shape().kv_heads, .dim = capture_.shape().head_dim, .page = page});
    if (!index.ok()) return index.status();
    pages.index.emplace(std::move(*index));
    return build_middle(*pages.index);
  }

  Status build(int channels, bool by_queries, Labels& labels) const {
    auto index = LabelCache::create({.kv_heads = capture_.shape().kv_heads,
                                     .dim = capture_.shape().head_dim,
                                     .channels = channels},
                                    by_queries ? channel_importance() : std::vector<float>());
    if (!index.ok()) return index.status();
    labels.index.emplace(std::move(*index));
    return build_middle(*labels.index);
  }

  // [kv_heads, dim] the mean of |q_j k_j| over the keys of the middle and the queries of the group
  // in rows that are not asked, or in all where all are.
  [[nodiscard]] std::vector<float> channel_importance() const {
    const Shape& shape = capture_.shape();
    const auto dim = static_cast<std::size_t>(shape.head_dim);
    const auto width = static_cast<std::size_t>(shape.group()) * dim;
    std::vector<double> queries(static_cast<std::size_t>(shape.kv_heads) * dim);
    for (int row = 0; row < capture_.query_rows(); ++row) {
      const bool asked = std::binary_search(rows_.begin(), rows_.end(), row);
      if (asked && static_cast<int>(rows_.size()) < capture_.query_rows()) continue;
      const auto query = capture_.query(row);
      for (std::size_t i = 0; i < query.size(); ++i) {
        queries[i / width * dim + i % dim] += std::fabs(static_cast<double>(query[i]));
      }
    }
    std::vector<float> importance;
    capture_.with_key_values([&](const auto& key_values) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        for (int j = 0; j < shape.head_dim; ++j) {
          double keys = 0.0;
          for (TokenId t = middle_.begin; t < middle_.end; ++t) {
            keys += std::fabs(static_cast<double>(to_float(key_values.key(h, t)[j])));
          }
          importance.push_back(
              static_cast<float>(queries[importance.size()] * keys / middle_.size()));
        }
      }
    });
    return importance;
  }

  template <class IndexType>
  Status build_middle(IndexType& index) const {
    return capture_.with_key_values([&](const auto& key_values) {
      return index.build(make_backend<Ops>(pool_), key_values, middle_);
    });
  }

  const Capture& capture_;
  ThreadPool& pool_;
  TokenRange middle_;
  std::vector<int> rows_;
  std::string learned_;
  Reference reference_;
  std::uint64_t seed_ = 0;
  std::map<std::pair<std::type_index, std::pair<int, int>>, std::shared_ptr<void>> kept_;
};

/// One seed of one setting. A method makes its sampler and calls decode(), once.
class Trial {
 public:
  struct Config {
    std::uint64_t seed = 0;
    bool timed = false;        ///< decode again, without reports, and note the least time
    std::string capture = {};  ///< its name
    Promise promise = {};
  };

  Trial(Workbench& workbench, const Config& config, Outcome& outcome)
      : workbench_(workbench), config_(config), outcome_(outcome) {}

  [[nodiscard]] const std::string& capture_name() const { return config_.capture; }

  [[nodiscard]] Workbench& workbench() const { return workbench_; }
  [[nodiscard]] std::uint64_t seed() const { return config_.seed; }

  /// All query rows, each as one request; adds what came out to the outcome.
  template <class Sampler, class IndexType, class Estimator = SelfNormalised>
  Status decode(const Sampler& sampler, const IndexType& index, const Estimator& estimator = {}) {
    const Capture& capture = workbench_.capture();
    return capture.with_key_values([&](const auto& key_values) {
      using Source = std::remove_cvref_t<decltype(key_values)>;
      const DecodePlan<Sampler, Estimator> plan{.shape = capture.shape(),
                                                .sampler = &sampler,
                                                .estimator = estimator,
                                                .scale = capture.scale(),
                                                .exact_below = 0,
                                                .promise = config_.promise};
      Batch<Source, IndexType> batch(workbench_, key_values, index, config_.seed);
      const auto backend = make_backend<Ops>(workbench_.pool());
      std::vector<std::byte> workspace(workspace_bytes(
          plan, key_values.tokens(), backend.executor.workers(), batch.requests.size()));
      Status status = magicpig::decode(backend, plan, batch.requests, workspace);
      if (!status.ok()) return status;
      const auto& shape = capture.shape();
      score(batch.states, batch.reports,
            row_bytes<typename Source::KeyScalar>(static_cast<std::size_t>(shape.head_dim)) +
                row_bytes<typename Source::ValueScalar>(static_cast<std::size_t>(shape.value_dim)));
      if (!config_.timed) return status;
      for (auto& request : batch.requests) request.reports = {};
      for (int i = 0; i < kTimings && status.ok(); ++i) {
        const auto start = std::chrono::steady_clock::now();
        status = magicpig::decode(backend, plan, batch.requests, workspace);
        note_time(std::chrono::steady_clock::now() - start);
      }
      return status;
    });
  }

  /// Notes what the index of the method holds; its planes, shared by all layers, are not counted.
  void note_index_bytes(std::size_t bytes) {
    outcome_.index_bytes_per_token = static_cast<double>(bytes) / workbench_.middle().size() /
                                     workbench_.capture().shape().kv_heads;
  }

 private:
  static constexpr int kTimings = 5;

  // The requests of all query rows, with the memory they refer to.
  template <class Source, class IndexType>
  struct Batch {
    Batch(const Workbench& bench, const Source& all, const IndexType& index, std::uint64_t seed) {
      const Capture& capture = bench.capture();
      const auto heads = static_cast<std::size_t>(capture.shape().query_heads);
      const auto dim = static_cast<std::size_t>(capture.shape().value_dim);
      const std::size_t count = bench.rows().size();
      reports.resize(count * heads);
      outputs.resize(count * heads * dim);
      for (std::size_t i = 0; i < count * heads; ++i) {
        states.push_back({.out = std::span(outputs).subspan(i * dim, dim)});
      }
      for (const int row : bench.rows()) sources.push_back(all.first(capture.visible(row)));
      for (std::size_t i = 0; i < count; ++i) {
        requests.push_back({.key_values = &sources[i],
                            .index = &index,
                            .query = capture.query(bench.rows()[i]),
                            .states = std::span(states).subspan(i * heads, heads),
                            .reports = std::span(reports).subspan(i * heads, heads),
                            .seed = seed,
                            .step = static_cast<std::uint32_t>(bench.rows()[i])});
      }
    }

    std::vector<float> outputs;  // [queries, query_heads, value_dim]
    std::vector<AttentionState> states;
    std::vector<HeadReport> reports;
    std::vector<Source> sources;
    std::vector<Request<Source, IndexType>> requests;
  };

  // `row_size` is the bytes of a key and a value.
  void score(std::span<const AttentionState> states, std::span<const HeadReport> reports,
             std::size_t row_size) {
    const Reference& exact = workbench_.reference();
    const auto heads = static_cast<std::size_t>(workbench_.capture().shape().query_heads);
    const auto group = static_cast<std::size_t>(workbench_.capture().shape().group());
    const std::int64_t middle = workbench_.middle().size();
    outcome_.kv_heads = static_cast<std::size_t>(workbench_.capture().shape().kv_heads);
    for (std::size_t i = 0; i < states.size(); ++i) {
      const std::size_t dim = states[i].out.size();
      outcome_.errors.push_back(
          relative_error(states[i].out, std::span(exact.outputs).subspan(i * dim, dim)));
      note_difference(i, states[i].out, std::span(exact.outputs).subspan(i * dim, dim));
      outcome_.bounds_95.push_back(static_cast<double>(reports[i].error_95));
      outcome_.lse_errors.push_back(std::fabs(static_cast<double>(states[i].lse) - exact.lse[i]));
      if (i % group != 0) continue;
      // Exact attention reads the middle, too: what it took exactly beyond the window around it.
      const int row = workbench_.rows()[i / heads];
      const std::int64_t window = workbench_.capture().visible(row) - middle;
      const auto rows = static_cast<double>(reports[i].rows_read + reports[i].exact - window);
      outcome_.rows.push_back(rows / static_cast<double>(middle));
      const std::int64_t bytes = reports[i].bytes - window * static_cast<std::int64_t>(row_size);
      outcome_.bytes_read.push_back(static_cast<double>(bytes) / static_cast<double>(middle));
      outcome_.looks.push_back(reports[i].looks);
      outcome_.dense.push_back(reports[i].promise == PromiseOutcome::kDense ? 1.0 : 0.0);
    }
  }

  // Adds what output number `at` is off by, relative to the exact one's length.
  void note_difference(std::size_t at, std::span<const float> out, std::span<const double> exact) {
    std::vector<double>& sums = outcome_.error_sums;
    if (sums.size() < (at + 1) * out.size()) sums.resize((at + 1) * out.size());
    double square = 0.0;
    for (const double x : exact) square += x * x;
    for (std::size_t j = 0; j < out.size(); ++j) {
      sums[at * out.size() + j] += (static_cast<double>(out[j]) - exact[j]) / std::sqrt(square);
    }
  }

  // Time of one worker per KV head and query, the least so far: all workers are busy with the tasks
  // of the batch.
  void note_time(std::chrono::steady_clock::duration wall) {
    const double us = std::chrono::duration<double, std::micro>(wall).count();
    const double each = us * workbench_.pool().workers() /
                        static_cast<double>(workbench_.rows().size()) /
                        workbench_.capture().shape().kv_heads;
    const double least = outcome_.us_per_kv_head;
    outcome_.us_per_kv_head = least > 0.0 && least < each ? least : each;
  }

  Workbench& workbench_;
  Config config_;
  Outcome& outcome_;
};

}  // namespace magicpig::bench

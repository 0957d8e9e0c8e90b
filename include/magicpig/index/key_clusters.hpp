// SPDX-License-Identifier: Apache-2.0
// Keys in clusters around centroids: an index that knows of a key which centroid it is nearest to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What clusters of keys are made of.
struct KeyClustersConfig {
  int kv_heads = 1;
  int dim = 0;             ///< head_dim of the keys
  int lists = 0;           ///< centroids of a KV head, up to 65,536; 0 for default_lists()
  int samples = 1 << 15;   ///< keys of each KV head that k-means learns from, spread evenly
  int rounds = 10;         ///< of k-means
  std::uint64_t seed = 0;  ///< chooses the keys that k-means starts from
  MemoryAdvice memory_advice = nullptr;
};

/// The coarse half of an inverted file: per KV head centroids of its keys, less their mean c, by
/// k-means, and of every token the list it is in, that of the nearest centroid. They are learnt
/// from the tokens of the first append; tokens appended later join the list that is nearest and
/// move no centroid, so that an index is best built over a prompt.
///
/// Memory: 2 bytes per token and 4 (dim + 1) per list of a KV head. Threads: reads from any number
/// of them; build, append and truncate one at a time, with no reader. Results are the same for any
/// number of workers; of two backends that round otherwise a key between two centroids may join
/// either. Source: Sivic and Zisserman 2003; Jegou, Douze and Schmid 2011.
class KeyClusters {
 public:
  static constexpr int kMaxLists = 1 << 16;

  /// A list for each 64 tokens, up to 4,096, so that centroids take as many bytes per token at any
  /// length. Of 8,000 tokens 125: at 2 % of the rows an error of .186, with the square root of the
  /// tokens, 89, .199, with a list for each 16 tokens .158 (magicpig_compare --methods ivf).
  [[nodiscard]] static constexpr int default_lists(TokenId tokens) {
    const int lists = tokens / 64 + (tokens % 64 != 0 ? 1 : 0);
    return lists < 4096 ? lists : 4096;
  }

  /// An empty index. Errors: a config value out of range, memory.
  [[nodiscard]] static Result<KeyClusters> create(const KeyClustersConfig& config) noexcept {
    const Status status = check(config);
    if (!status.ok()) return status;
    KeyClusters index(config);
    if (!index.reserve_heads()) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", config.kv_heads);
    }
    return index;
  }

  /// Replaces the content by the tokens of `range`, with centroids learnt from them. Errors: source
  /// and config disagree, range outside the source, a key that is not finite, memory, a backend
  /// without workers; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Status status = check_range(range);
    if (!status.ok()) return status;
    Result<KeyClusters> fresh = create(config_);
    if (!fresh.ok()) return fresh.status();
    fresh->range_ = {.begin = range.begin, .end = range.begin};
    status = check_source(source, kv_heads(), dim(), range.end);
    if (status.ok()) status = fresh->append(backend, source, range.end);
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  /// Takes over tokens [indexed().end, end). An `end` at or below indexed().end changes nothing.
  /// Errors: as build().
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    const TokenRange fresh{.begin = range_.end, .end = end};
    Status status = check_source(source, kv_heads(), dim(), end);
    if (status.ok()) status = check_workers(backend);
    if (!status.ok()) return status;
    KeyReader<Source> keys(source);
    const bool readable = keys.reserve(backend.executor.workers(), kMeanSlots);
    if (readable) status = check_finite_keys(backend, keys, fresh);
    if (!status.ok()) return status;
    const int wanted = config_.lists > 0 ? config_.lists : default_lists(fresh.size());
    const int lists = !range_.empty() ? lists_ : wanted < fresh.size() ? wanted : fresh.size();
    Arena counting;
    (void)carve(counting, lists);
    const std::size_t size = counting.bytes_needed();
    Buffer<std::byte> memory;
    Buffer<double> sums;
    if (!readable || !sums.resize(centres_.size()) ||
        !memory.resize(size * static_cast<std::size_t>(backend.executor.workers())) ||
        !reserve(end - range_.begin, lists)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to index %d tokens", fresh.size());
    }
    const auto scratch_of = [&](int worker) {
      Arena arena({memory.data() + static_cast<std::size_t>(worker) * size, size});
      return carve(arena, lists);
    };
    using Ops = typename Backend::Ops;
    if (range_.empty()) {
      lists_ = lists;
      mean_of_rows(backend, kv_heads(), dim(), fresh, keys, sums.data(), centres_.data());
      backend.executor.parallel_for(kv_heads(), [&](int h, int worker) {
        const auto key = [&](TokenId t) { return keys.row(h, t, worker); };
        learn<Ops>(key, h, fresh, scratch_of(worker));
      });
    }
    const int parts = (fresh.size() - 1) / kTaskTokens + 1;
    backend.executor.parallel_for(parts * kv_heads(), [&](int task, int worker) {
      const int h = task / parts;
      const TokenId begin = fresh.begin + task % parts * kTaskTokens;
      const TokenId last = end - begin < kTaskTokens ? end : begin + kTaskTokens;
      const auto key = [&](TokenId t) { return keys.row(h, t, worker); };
      assign<Ops>(key, h, {.begin = begin, .end = last}, scratch_of(worker));
    });
    range_.end = end;
    return status;
  }

  /// Forgets tokens from `end` on; centroids stay. An `end` at or beyond indexed().end changes
  /// nothing; one at or below indexed().begin leaves an empty index, whose centroids the next
  /// append learns anew. Error: a negative `end`, and nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    if (range_.empty()) lists_ = 0;
    return status;
  }

  [[nodiscard]] TokenRange indexed() const { return range_; }
  [[nodiscard]] int kv_heads() const { return config_.kv_heads; }
  [[nodiscard]] int dim() const { return config_.dim; }
  /// Lists of a KV head; 0 where nothing is indexed.
  [[nodiscard]] int lists() const { return lists_; }
  /// The list of token indexed().begin + i at [i].
  [[nodiscard]] const std::uint16_t* list_of(int kv_head) const {
    return heads_[static_cast<std::size_t>(kv_head)].list_of.data();
  }
  /// The centroids of k - c, one row for each list.
  [[nodiscard]] Panels centroids(int kv_head) const {
    return {.data = heads_[static_cast<std::size_t>(kv_head)].centroids.data(),
            .count = lists_,
            .dim = dim()};
  }
  /// c, [dim].
  [[nodiscard]] const float* centre(int kv_head) const {
    return centres_.data() + std::int64_t{kv_head} * dim();
  }

  /// Bytes of one KV head that scoring every token reads: its list, and all centroids.
  [[nodiscard]] std::int64_t scan_bytes() const {
    return range_.size() * static_cast<std::int64_t>(sizeof(std::uint16_t)) +
           std::int64_t{lists_} * dim() * static_cast<std::int64_t>(sizeof(float));
  }

  /// Bytes held.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = centres_.bytes();
    for (int h = 0; h < kv_heads(); ++h) {
      const Head& head = heads_[static_cast<std::size_t>(h)];
      sum += head.list_of.bytes() + head.centroids.bytes() + head.half_norms.bytes();
    }
    return sum;
  }

 private:
  struct Head {
    Buffer<std::uint16_t> list_of;  // [tokens]
    Buffer<float> centroids;        // [lists, dim] as Panels lays them out
    Buffer<float> half_norms;       // [lists] |centroid|^2 / 2
  };

  static constexpr int kBatch = 32;  // keys whose products with centroids are taken at once
  static constexpr TokenId kTaskTokens = 1024;

  // Of one worker.
  struct Scratch {
    float* keys = nullptr;           // [kBatch, dim] centred
    float* products = nullptr;       // [kBatch, lists]
    double* sums = nullptr;          // [lists, dim]
    std::int32_t* counts = nullptr;  // [lists]
  };
  [[nodiscard]] Scratch carve(Arena& arena, int lists) const {
    const auto count = static_cast<std::size_t>(lists);
    const auto width = static_cast<std::size_t>(dim());
    return {.keys = arena.take<float>(kBatch * width),
            .products = arena.take<float>(kBatch * count),
            .sums = arena.take<double>(count * width),
            .counts = arena.take<std::int32_t>(count)};
  }

  explicit KeyClusters(const KeyClustersConfig& config) : config_(config) {}

  [[nodiscard]] static Status check(const KeyClustersConfig& config) {
    const Status status = check_kv_heads(config.kv_heads);
    if (!status.ok()) return status;
    if (config.dim < 1 || config.dim > kMaxDim) {
      return Status::error(ErrorCode::kInvalidArgument, "dim %d must lie in [1, %d]", config.dim,
                           kMaxDim);
    }
    if (config.lists < 0 || config.lists > kMaxLists) {
      return Status::error(ErrorCode::kInvalidArgument, "lists %d must lie in [0, %d]",
                           config.lists, kMaxLists);
    }
    if (config.samples < 1 || config.rounds < 0) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "samples %d must be at least 1, rounds %d must not be negative",
                           config.samples, config.rounds);
    }
    return Status();
  }

  bool reserve_heads() noexcept {
    const auto count = static_cast<std::size_t>(kv_heads());
    heads_.reset(new (std::nothrow) Head[count]);
    return heads_ != nullptr && centres_.resize(count * static_cast<std::size_t>(dim()));
  }

  // Room for `tokens` tokens in all, and for the centroids; what there is stays. Twice as much as
  // there was, so that appending token by token copies each list number a few times.
  bool reserve(TokenId tokens, int lists) noexcept {
    const auto size = static_cast<std::size_t>(tokens);
    for (int h = 0; h < kv_heads(); ++h) {
      Head& head = heads_[static_cast<std::size_t>(h)];
      const std::size_t twice = 2 * head.list_of.size();
      if ((size > head.list_of.bytes() / sizeof(std::uint16_t) &&
           !head.list_of.reserve(size > twice ? size : twice, config_.memory_advice)) ||
          !head.list_of.resize(size) || !head.centroids.resize(Panels::size(lists, dim())) ||
          !head.half_norms.resize(static_cast<std::size_t>(lists))) {
        return false;
      }
    }
    return true;
  }

  template <class Scalar>
  void centre_key(const Scalar* key, int kv_head, float* out) const {
    const float* c = centre(kv_head);
    for (int j = 0; j < dim(); ++j) out[j] = scalar_at(key, j) - c[j];
  }

  // visit(i, list) with the nearest centroid of each of `count` keys, the first of several; key(i)
  // is a row, valid until the next is asked for, keys i to i + kBatch of which are centred in
  // scratch.keys meanwhile.
  template <class Ops, class Key, class Visit>
  void find_nearest(int kv_head, int count, const Key& key, const Scratch& scratch,
                    const Visit& visit) const {
    const float* half_norms = heads_[static_cast<std::size_t>(kv_head)].half_norms.data();
    for (int first = 0; first < count; first += kBatch) {
      const int batch = count - first < kBatch ? count - first : kBatch;
      for (int i = 0; i < batch; ++i) {
        centre_key(key(first + i), kv_head, scratch.keys + std::int64_t{i} * dim());
      }
      Ops::project(centroids(kv_head), scratch.keys, batch, scratch.products);
      for (int i = 0; i < batch; ++i) {
        const float* products = scratch.products + std::int64_t{i} * lists_;
        int best = 0;
        for (int l = 1; l < lists_; ++l) {
          if (products[l] - half_norms[l] > products[best] - half_norms[best]) best = l;
        }
        visit(first + i, best, scratch.keys + std::int64_t{i} * dim());
      }
    }
  }

  // k-means from keys that are chosen at random, no two the same; a centroid that no key is nearest
  // to stays.
  template <class Ops, class KeyOf>
  void learn(const KeyOf& key_of, int kv_head, TokenRange tokens, const Scratch& scratch) {
    const int wanted = config_.samples > lists_ ? config_.samples : lists_;
    const int samples = tokens.size() < wanted ? tokens.size() : wanted;
    const auto key = [&](int i) {
      const auto at = static_cast<TokenId>(std::int64_t{i} * tokens.size() / samples);
      return key_of(tokens.begin + at);
    };
    start(kv_head, samples, key, scratch);
    for (int round = 0; round < config_.rounds; ++round) {
      for (std::int64_t i = 0; i < std::int64_t{lists_} * dim(); ++i) scratch.sums[i] = 0.0;
      for (int l = 0; l < lists_; ++l) scratch.counts[l] = 0;
      find_nearest<Ops>(kv_head, samples, key, scratch, [&](int, int list, const float* x) {
        double* sums = scratch.sums + std::int64_t{list} * dim();
        for (int j = 0; j < dim(); ++j) sums[j] += static_cast<double>(x[j]);
        ++scratch.counts[list];
      });
      for (int l = 0; l < lists_; ++l) {
        if (scratch.counts[l] == 0) continue;
        const double* sums = scratch.sums + std::int64_t{l} * dim();
        place(kv_head, l, [&](int j) { return static_cast<float>(sums[j] / scratch.counts[l]); });
      }
    }
  }

  // Floyd's choice of lists() out of `samples` keys as the first centroids.
  template <class Key>
  void start(int kv_head, int samples, const Key& key, const Scratch& scratch) {
    float* data = heads_[static_cast<std::size_t>(kv_head)].centroids.data();
    for (std::size_t i = 0; i < Panels::size(lists_, dim()); ++i) data[i] = 0.0F;
    const RandomStream random({.seed = config_.seed,
                               .head = static_cast<std::uint32_t>(kv_head),
                               .purpose = Purpose::kClusters});
    std::int32_t* chosen = scratch.counts;
    for (int l = 0; l < lists_; ++l) {
      const int last = samples - lists_ + l;
      auto own = static_cast<std::int32_t>(
          random.below(static_cast<std::uint32_t>(l), static_cast<std::uint32_t>(last) + 1));
      for (int i = 0; i < l; ++i) own = chosen[i] == own ? last : own;
      chosen[l] = own;
      centre_key(key(own), kv_head, scratch.keys);
      place(kv_head, l, [&](int j) { return scratch.keys[j]; });
    }
  }

  // Centroid l and half its squared norm.
  template <class Coordinate>
  void place(int kv_head, int l, const Coordinate& coordinate) {
    Head& head = heads_[static_cast<std::size_t>(kv_head)];
    double square = 0.0;
    for (int j = 0; j < dim(); ++j) {
      const float x = coordinate(j);
      head.centroids.data()[Panels::place(l, j, dim())] = x;
      square += static_cast<double>(x) * static_cast<double>(x);
    }
    head.half_norms.data()[l] = static_cast<float>(square / 2.0);
  }

  template <class Ops, class KeyOf>
  void assign(const KeyOf& key_of, int kv_head, TokenRange tokens, const Scratch& scratch) {
    std::uint16_t* lists =
        heads_[static_cast<std::size_t>(kv_head)].list_of.data() + (tokens.begin - range_.begin);
    find_nearest<Ops>(
        kv_head, tokens.size(), [&](int i) { return key_of(tokens.begin + i); }, scratch,
        [&](int i, int list, const float*) { lists[i] = static_cast<std::uint16_t>(list); });
  }

  KeyClustersConfig config_;
  TokenRange range_;
  int lists_ = 0;
  std::unique_ptr<Head[]> heads_;  // [kv_heads]
  Buffer<float> centres_;          // [kv_heads, dim]
};

}  // namespace magicpig::inline MAGICPIG_ABI

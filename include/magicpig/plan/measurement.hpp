// SPDX-License-Identifier: Apache-2.0
// What settings do on a sample of a layer's keys, values and queries: their errors and bytes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>

#include "magicpig/attention.hpp"
#include "magicpig/core/buffer.hpp"
#include "magicpig/core/first_tokens.hpp"
#include "magicpig/core/head_setting.hpp"
#include "magicpig/hash/head_hashes.hpp"
#include "magicpig/index/per_head_index.hpp"
#include "magicpig/plan/choice.hpp"
#include "magicpig/sample/per_head.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Keys, values and queries of one layer as they come up in the host's own work: of one long
/// prompt, and of queries at its end.
template <KeyValueSource SourceType>
struct PlanSample {
  using Source = SourceType;

  Shape shape;
  const Source* key_values = nullptr;
  TokenRange indexed;              ///< what is drawn from; all other tokens are exact
  std::span<const float> queries;  ///< [rows, query_heads, head_dim], unscaled
  /// [rows] row i sees tokens [0, seen[i]), at least those that are indexed; or empty: it sees all.
  std::span<const TokenId> seen = {};
  float scale = 0.0F;      ///< as DecodePlan::scale
  LogitTerms logits = {};  ///< as DecodePlan::logits

  [[nodiscard]] std::size_t row_size() const {
    return static_cast<std::size_t>(shape.query_heads) * static_cast<std::size_t>(shape.head_dim);
  }
  [[nodiscard]] std::size_t rows() const {
    return row_size() == 0 ? 0 : queries.size() / row_size();
  }
  [[nodiscard]] TokenId seen_by(std::size_t row) const {
    return seen.empty() ? key_values->tokens() : seen[row];
  }

  /// Errors: no keys and values, no token to draw from, queries of no whole rows or of none, rows
  /// that see more tokens than there are or not all that are indexed. decode() looks at the rest.
  [[nodiscard]] Status check() const noexcept {
    if (key_values == nullptr) {
      return Status::error(ErrorCode::kInvalidArgument, "the sample has no keys and values");
    }
    const TokenId tokens = key_values->tokens();
    if (indexed.begin < 0 || indexed.empty() || indexed.end > tokens) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "indexed [%d, %d) must be some of the sample's %d tokens", indexed.begin,
                           indexed.end, tokens);
    }
    if (shape.query_heads < 1 || shape.head_dim < 1 || rows() == 0 ||
        queries.size() % row_size() != 0 || (!seen.empty() && seen.size() != rows())) {
      return Status::error(ErrorCode::kShapeMismatch,
                           "%zu query values and %zu numbers of tokens seen are not rows of %d "
                           "query heads of %d",
                           queries.size(), seen.size(), shape.query_heads, shape.head_dim);
    }
    for (std::size_t i = 0; i < seen.size(); ++i) {
      if (seen[i] >= indexed.end && seen[i] <= tokens) continue;
      return Status::error(ErrorCode::kInvalidArgument,
                           "query row %zu sees %d tokens, not from %d, which are indexed, to %d", i,
                           seen[i], indexed.end, tokens);
    }
    return Status();
  }
};

/// How settings are measured.
struct MeasureConfig {
  int seeds = 2;                     ///< of codes, planes and draws, at least 1
  std::uint64_t first_seed = 1'001;  ///< the others follow
  /// Of a request, for HeadPoint::index_bytes; 0 for as many as the sample has indexed.
  TokenId tokens = 0;
};

/// Of one sample: requests of all its query rows, and their exact outputs. `sample` and what it
/// refers to must stay in place.
template <class Backend, KeyValueSource Source>
class Measurement {
 public:
  /// Attends to all tokens exactly. Errors: PlanSample::check(), fewer than one seed, a negative
  /// number of tokens, those of decode(), memory.
  [[nodiscard]] static Result<Measurement> create(const Backend& backend,
                                                  const PlanSample<Source>& sample,
                                                  const MeasureConfig& config) noexcept {
    Status status = sample.check();
    if (!status.ok()) return status;
    if (config.seeds < 1 || config.tokens < 0) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "seeds %d must be at least 1, and tokens %d not negative", config.seeds,
                           config.tokens);
    }
    const Exact exact;
    status = validate(DecodePlan<Exact>{.shape = sample.shape, .sampler = &exact});
    if (!status.ok()) return status;
    Measurement made(backend, sample, config);
    if (!made.reserve()) return made.no_memory();
    made.make_requests();
    status = made.attend_exactly();
    if (!status.ok()) return status;
    return made;
  }

  /// The points of `settings`, [kv_heads, settings], to `points`. After each setting and seed
  /// `progress(done, of)` is called. Errors: another size of `points`, check_head(), those of the
  /// indexes, memory.
  template <class Progress>
  Status run(std::span<const HeadSetting> settings, std::span<HeadPoint> points,
             const Progress& progress) noexcept {
    if (points.size() != profile_.size() * settings.size()) {
      return Status::error(ErrorCode::kShapeMismatch,
                           "%zu points do not fit %zu settings of %zu KV heads", points.size(),
                           settings.size(), profile_.size());
    }
    for (HeadPoint& point : points) point = {};
    const int of = static_cast<int>(settings.size()) * config_.seeds;
    int done = 0;
    for (int i = 0; i < config_.seeds; ++i) {
      std::optional<Indexed> indexed;
      for (std::size_t s = 0; s < settings.size(); ++s) {
        for (HeadSetting& head : profile_.span()) head = settings[s];
        const std::uint64_t seed = config_.first_seed + static_cast<std::uint64_t>(i);
        Status status;
        if (s == 0 || !settings[s].shares_index(settings[s - 1])) status = make(seed, indexed);
        if (status.ok()) status = measure(seed, *indexed, {points, settings.size(), s});
        if (!status.ok()) return status;
        progress(++done, of);
      }
    }
    return Status();
  }

 private:
  using Seen = FirstTokens<Source>;
  using RequestType = Request<Seen, PerHeadIndex>;

  // What settings that follow one another share.
  struct Indexed {
    HeadHashes hashes;
    std::optional<PerHeadIndex> index;
  };
  // Where the points of one setting go.
  struct Column {
    std::span<HeadPoint> points;
    std::size_t settings = 0;
    std::size_t number = 0;

    [[nodiscard]] HeadPoint& of(std::size_t head) const { return points[head * settings + number]; }
  };

  Measurement(const Backend& backend, const PlanSample<Source>& sample, const MeasureConfig& config)
      : backend_(backend), sample_(&sample), config_(config) {}

  [[nodiscard]] Status no_memory() const {
    return Status::error(ErrorCode::kOutOfMemory, "no memory to measure %zu query rows",
                         sample_->rows());
  }
  [[nodiscard]] std::size_t heads() const {
    return sample_->rows() * static_cast<std::size_t>(sample_->shape.query_heads);
  }
  [[nodiscard]] std::size_t value_dim() const {
    return static_cast<std::size_t>(sample_->shape.value_dim);
  }

  [[nodiscard]] bool reserve() {
    seen_.reset(new (std::nothrow) std::optional<Seen>[sample_->rows()]);
    requests_.reset(new (std::nothrow) RequestType[sample_->rows()]);
    return seen_ != nullptr && requests_ != nullptr && states_.resize(heads()) &&
           reports_.resize(heads()) && outputs_.resize(heads() * value_dim()) &&
           exact_.resize(heads() * value_dim()) &&
           profile_.resize(static_cast<std::size_t>(sample_->shape.kv_heads));
  }

  void make_requests() {
    for (std::size_t i = 0; i < heads(); ++i) {
      reports_.data()[i] = {};
      states_.data()[i] = {.out = outputs_.span().subspan(i * value_dim(), value_dim())};
    }
    const auto each = static_cast<std::size_t>(sample_->shape.query_heads);
    for (std::size_t row = 0; row < sample_->rows(); ++row) {
      seen_[row].emplace(*sample_->key_values, sample_->seen_by(row));
      auto& request = requests_[row];
      request.key_values = &*seen_[row];
      request.query = sample_->queries.subspan(row * sample_->row_size(), sample_->row_size());
      request.states = states_.span().subspan(row * each, each);
      request.reports = reports_.span().subspan(row * each, each);
      request.step = static_cast<std::uint32_t>(row);
    }
  }

  // Hashes and index of profile_.
  Status make(std::uint64_t seed, std::optional<Indexed>& made) {
    made.reset();
    auto hashes =
        HeadHashes::create(backend_, *sample_->key_values, sample_->indexed, profile_.span(), seed);
    if (!hashes.ok()) return hashes.status();
    made.emplace(Indexed{.hashes = std::move(*hashes), .index = {}});
    auto index = PerHeadIndex::create(made->hashes);
    if (!index.ok()) return index.status();
    made->index.emplace(std::move(*index));
    return made->index->build(backend_, *sample_->key_values, sample_->indexed);
  }

  // All rows by profile_.
  Status decode_all(std::uint64_t seed, const Indexed& indexed) {
    const auto sampler = PerHead::create(indexed.hashes, profile_.span());
    if (!sampler.ok()) return sampler.status();
    const DecodePlan<PerHead> plan{.shape = sample_->shape,
                                   .sampler = &*sampler,
                                   .scale = sample_->scale,
                                   .exact_below = 0,
                                   .logits = sample_->logits};
    const std::size_t bytes = workspace_bytes<Seen>(plan, sample_->key_values->tokens(),
                                                    backend_.executor.workers(), sample_->rows());
    if (!workspace_.reserve(bytes)) return no_memory();
    const auto requests = std::span(requests_.get(), sample_->rows());
    for (RequestType& request : requests) {
      request.index = &*indexed.index;
      request.seed = seed;
    }
    return decode(backend_, plan, requests, std::span(workspace_.data(), bytes));
  }

  Status attend_exactly() {
    for (HeadSetting& head : profile_.span()) head = {};
    std::optional<Indexed> indexed;
    Status status = make(0, indexed);
    if (status.ok()) status = decode_all(0, *indexed);
    for (std::size_t i = 0; i < outputs_.size(); ++i) exact_.data()[i] = outputs_.data()[i];
    return status;
  }

  Status measure(std::uint64_t seed, const Indexed& indexed, const Column& column) {
    const Status status = decode_all(seed, indexed);
    if (!status.ok()) return status;
    const Shape& shape = sample_->shape;
    const double times = static_cast<double>(sample_->rows()) * config_.seeds;
    for (std::size_t i = 0; i < heads(); ++i) {
      const auto head = i % static_cast<std::size_t>(shape.query_heads);
      const auto group = static_cast<std::size_t>(shape.group());
      HeadPoint& point = column.of(head / group);
      point.error += error_of(i) / times / shape.group();
      if (head % group == 0) point.bytes += middle_bytes(i) / times;
    }
    const TokenId tokens = config_.tokens > 0 ? config_.tokens : sample_->indexed.size();
    for (int h = 0; h < shape.kv_heads; ++h) {
      column.of(static_cast<std::size_t>(h)).index_bytes =
          PerHeadIndex::estimate_bytes(indexed.hashes, {}, h, tokens);
    }
    return status;
  }

  // Relative L2 of an output; 0 where both are zero.
  [[nodiscard]] double error_of(std::size_t head) const {
    double difference = 0.0;
    double norm = 0.0;
    for (std::size_t j = 0; j < value_dim(); ++j) {
      const auto exact = static_cast<double>(exact_.data()[head * value_dim() + j]);
      const double d = static_cast<double>(states_.data()[head].out[j]) - exact;
      difference += d * d;
      norm += exact * exact;
    }
    return difference == 0.0 ? 0.0 : std::sqrt(difference / norm);
  }

  // Bytes read per indexed token, those of the tokens around them left out.
  [[nodiscard]] double middle_bytes(std::size_t head) const {
    const Shape& shape = sample_->shape;
    const auto row =
        row_bytes<typename Source::KeyScalar>(static_cast<std::size_t>(shape.head_dim)) +
        row_bytes<typename Source::ValueScalar>(value_dim());
    const TokenId around = sample_->seen_by(head / static_cast<std::size_t>(shape.query_heads)) -
                           sample_->indexed.size();
    const std::int64_t bytes =
        reports_.data()[head].bytes - around * static_cast<std::int64_t>(row);
    return static_cast<double>(bytes) / sample_->indexed.size();
  }

  Backend backend_;
  const PlanSample<Source>* sample_;
  MeasureConfig config_;
  std::unique_ptr<std::optional<Seen>[]> seen_;  // [rows]
  std::unique_ptr<RequestType[]> requests_;      // [rows]
  Buffer<AttentionState> states_;                // [rows, query_heads]
  Buffer<HeadReport> reports_;                   // [rows, query_heads]
  Buffer<float> outputs_;                        // [rows, query_heads, value_dim]
  Buffer<float> exact_;                          // [rows, query_heads, value_dim]
  Buffer<HeadSetting> profile_;                  // [kv_heads]
  Buffer<std::byte> workspace_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

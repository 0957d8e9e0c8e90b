// SPDX-License-Identifier: Apache-2.0
#include "layer_attention.hpp"

#include <algorithm>
#include <magicpig/attention.hpp>
#include <magicpig/cpu/highway.hpp>
#include <magicpig/cpu/openmp.hpp>
#include <magicpig/index/page_bounds.hpp>
#include <magicpig/sample/page_scores.hpp>
#include <magicpig/sample/top_k.hpp>
#include <memory>
#include <utility>
#include <vector>

namespace magicpig::llama {
namespace {

// Cells behind a written one that are taken over anew with it, where that is cheaper than copying
// the segment that it lies in.
constexpr TokenId kShortTail = 128;

/// What a sampler draws from and hashes with; the hash must stay where it is.
struct NoHash {};
template <class Sampler, class Index, class Hash>
struct Drawing {
  std::unique_ptr<const Hash> hash;
  Sampler sampler;
  Index index;
};

template <class Index>
concept FollowsChanges = requires(Index& index) {
  index.clear();
};

/// Makes `index` one of the middle's cells as they are now, of which `visible` are seen.
template <class Index, class Backend, class Source>
Status follow(Index& index, const Backend& backend, const Source& source, TokenRange middle,
              TokenId visible, CellSet& written) {
  // Another request, or keys that were rotated: cheaper anew, and with a centre of its own.
  const bool is_other = written.count_before(index.indexed().end) > visible / 2;
  if (index.indexed().empty() || is_other) {
    const Status status = index.build(backend, source, middle);
    if (status.ok()) written.remove_before(index.indexed().end);
    return status;
  }
  // A cache of fewer cells than before: those behind them are in use no more.
  Status status = index.truncate(source.tokens());
  for (TokenId from = index.indexed().begin; status.ok();) {
    const TokenRange run = written.first_run(from, index.indexed().end);
    if (run.empty()) break;
    if constexpr (FollowsChanges<Index>) {
      if (index.indexed().end - run.begin > kShortTail) {
        status = index.rehash(backend, source, run);
        from = run.end;
        continue;
      }
    }
    status = index.truncate(run.begin);
    from = run.end;
  }
  if (status.ok()) status = index.append(backend, source, middle.end);
  if (status.ok()) written.remove_before(index.indexed().end);
  return status;
}

/// A range needs no more than its bounds.
template <class Backend, class Source>
Status follow(RangeIndex& index, const Backend&, const Source&, TokenRange middle, TokenId,
              CellSet& written) {
  index = RangeIndex(middle, index.kv_heads(), index.dim());
  written.clear();
  return Status();
}

template <class Index>
Status saved(const Index& index, std::vector<std::byte>& bytes) {
  bytes.resize(index.saved_bytes());
  return index.save(bytes);
}

template <class Sampler, class Index, class Hash>
class DrawnAttention final : public LayerAttention {
 public:
  DrawnAttention(const Settings& settings, int layer, Drawing<Sampler, Index, Hash>&& drawing)
      : settings_(settings), layer_(layer), drawing_(std::move(drawing)) {}

  Status attend(const Step& step, CellSet& written, std::vector<std::byte>& workspace,
                Totals& totals) override {
    const auto visit = [&](const auto& source) {
      return attend_to(source, step, written, workspace, totals);
    };
    return visit_ggml_key_values<CacheTypes>(step.cache.keys, step.cache.values, visit,
                                             step.cache.stream);
  }

  [[nodiscard]] std::size_t index_bytes() const override {
    if constexpr (requires { drawing_.index.bytes(); }) {
      return drawing_.index.bytes();
    } else {
      return 0;
    }
  }

  [[nodiscard]] Status verify(const StreamCache& cache) const override {
    if constexpr (FollowsChanges<Index>) {
      const auto visit = [&](const auto& source) { return compare(source); };
      return visit_ggml_key_values<CacheTypes>(cache.keys, cache.values, visit, cache.stream);
    } else {
      return Status();
    }
  }

 private:
  template <class Source>
  Status attend_to(const Source& source, const Step& step, CellSet& written,
                   std::vector<std::byte>& workspace, Totals& totals) {
    const Result<OpenMpExecutor> executor = OpenMpExecutor::create(step.threads);
    if (!executor.ok()) return executor.status();
    const auto backend = make_backend<HighwayOps>(*executor);
    Index& index = drawing_.index;
    TokenId end = 0;
    TokenId visible = 0;
    for (const StepRow& row : step.rows) {
      end = std::max(end, row.visible->end());
      visible = std::max(visible, row.visible->count());
    }
    const TokenRange middle = settings_.window.middle(end);
    const Status status = follow(index, backend, source, middle, visible, written);
    if (!status.ok()) return status;

    // Other sequences may have cells behind the last that these see; they are hidden.
    const TokenId indexed_end = index.indexed().empty() ? 0 : index.indexed().end;
    const Source cells = source.first(std::max(end, indexed_end));
    const DecodePlan<Sampler> plan{.shape = step.shape,
                                   .sampler = &drawing_.sampler,
                                   .scale = step.scale,
                                   .layer = static_cast<std::uint32_t>(layer_),
                                   .exact_below = settings_.exact_below,
                                   .logits = step.logits};
    const std::size_t needed =
        workspace_bytes<Source>(plan, cells.tokens(), step.threads, step.rows.size());
    // By half more, so that a growing cache does not ask for it at every step.
    if (workspace.size() < needed) workspace.resize(needed + needed / 2);
    const bool reported = settings_.report_every > 0 && !settings_.is_dense(layer_) &&
                          visible % settings_.report_every == 0;
    const auto heads = static_cast<std::size_t>(step.shape.query_heads);
    reports_.resize(reported ? step.rows.size() * heads : 0);
    std::vector<Request<Source, Index>> requests;
    for (std::size_t i = 0; i < step.rows.size(); ++i) {
      const StepRow& row = step.rows[i];
      // As many cells are visible as tokens were before: a number of its own for each step.
      requests.push_back({.key_values = &cells,
                          .index = &index,
                          .query = row.query,
                          .states = row.states,
                          .reports = reported ? std::span(reports_).subspan(i * heads, heads)
                                              : std::span<HeadReport>(),
                          .seed = step.seed,
                          .step = static_cast<std::uint32_t>(row.visible->count()),
                          .hidden = row.visible->hidden()});
    }
    const Status decoded = decode(backend, plan, requests, workspace);
    if (decoded.ok()) count(step.shape, totals);
    return decoded;
  }

  void count(const Shape& shape, Totals& totals) const {
    const auto group = static_cast<std::size_t>(shape.group());
    for (std::size_t h = 0; h < reports_.size(); h += group) {
      if (reports_[h].indexed == 0) continue;
      ++totals.counted;
      totals.bytes += reports_[h].bytes;
      totals.rows_read +=
          static_cast<double>(reports_[h].rows_read) / static_cast<double>(reports_[h].indexed);
    }
  }

  template <class Source>
  Status compare(const Source& source) const {
    const Index& index = drawing_.index;
    if (index.indexed().empty()) return Status();
    SerialExecutor serial;
    const auto backend = make_backend<HighwayOps>(serial);
    Result<Index> other = index.fork();
    if (!other.ok()) return other.status();
    Status status = other->build(backend, source, index.indexed(), index.centres());
    std::vector<std::byte> own;
    std::vector<std::byte> fresh;
    if (status.ok()) status = saved(index, own);
    if (status.ok()) status = saved(*other, fresh);
    if (status.ok() && own != fresh) {
      status = Status::error(ErrorCode::kInvalidArgument,
                             "layer %d: the index of cells [%d, %d) is not the one built at once",
                             layer_, index.indexed().begin, index.indexed().end);
    }
    return status;
  }

  Settings settings_;
  int layer_;
  Drawing<Sampler, Index, Hash> drawing_;
  std::vector<HeadReport> reports_;
};

template <class Sampler, class Index, class Hash>
Result<std::unique_ptr<LayerAttention>> made(const Settings& settings, int layer,
                                             std::unique_ptr<const Hash> hash,
                                             Result<Sampler>&& sampler, Result<Index>&& index) {
  if (!sampler.ok()) return sampler.status();
  if (!index.ok()) return index.status();
  Drawing<Sampler, Index, Hash> drawing{
      .hash = std::move(hash), .sampler = std::move(*sampler), .index = std::move(*index)};
  return std::unique_ptr<LayerAttention>(
      new DrawnAttention<Sampler, Index, Hash>(settings, layer, std::move(drawing)));
}

/// Samplers that need no index.
template <class Sampler>
Result<std::unique_ptr<LayerAttention>> ranged(const Settings& settings, const Shape& shape,
                                               int layer, Result<Sampler>&& sampler) {
  return made(settings, layer, std::make_unique<const NoHash>(), std::move(sampler),
              Result<RangeIndex>(RangeIndex({}, shape.kv_heads, shape.head_dim)));
}

Result<std::unique_ptr<LayerAttention>> signatures(const Settings& settings, const Shape& shape,
                                                   int layer) {
  auto quantiser = HadamardQuantiser::create(shape.head_dim, settings.bits,
                                             settings.seed + static_cast<std::uint64_t>(layer));
  if (!quantiser.ok()) return quantiser.status();
  auto hash = std::make_unique<const HadamardQuantiser>(std::move(*quantiser));
  auto sampler = Systematic::create(*hash, {.budget = {.fraction = settings.rows}});
  auto index = Signatures<HadamardQuantiser>::create(
      *hash, {.kv_heads = shape.kv_heads, .value_dim = shape.value_dim});
  return made(settings, layer, std::move(hash), std::move(sampler), std::move(index));
}

Result<std::unique_ptr<LayerAttention>> tables(const Settings& settings, const Shape& shape,
                                               int layer) {
  auto family = SimHash::create({.dim = shape.head_dim,
                                 .bits = settings.table_bits,
                                 .tables = settings.tables,
                                 .seed = settings.seed,
                                 .layer = static_cast<std::uint32_t>(layer)});
  if (!family.ok()) return family.status();
  auto hash = std::make_unique<const SimHash>(std::move(*family));
  auto sampler = Collisions::create(*hash, {.min_collisions = 2});
  auto index = BucketTables<SimHash>::create(*hash, {.kv_heads = shape.kv_heads});
  return made(settings, layer, std::move(hash), std::move(sampler), std::move(index));
}

Result<std::unique_ptr<LayerAttention>> quest(const Settings& settings, const Shape& shape,
                                              int layer) {
  auto sampler = Quest::create({.fraction = settings.rows}, PageScores(shape.head_dim));
  auto index = PageBounds<fp16>::create(
      {.kv_heads = shape.kv_heads, .dim = shape.head_dim, .page = settings.page});
  return made(settings, layer, std::make_unique<const NoHash>(), std::move(sampler),
              std::move(index));
}

}  // namespace

Result<std::unique_ptr<LayerAttention>> make_layer_attention(const Settings& settings,
                                                             const Shape& shape, int layer) {
  if (settings.is_dense(layer)) return ranged(settings, shape, layer, Result<Exact>(Exact()));
  const Budget budget{.fraction = settings.rows};
  switch (settings.method) {
    case Method::kSignatures:
      return signatures(settings, shape, layer);
    case Method::kTables:
      return tables(settings, shape, layer);
    case Method::kTopK:
      return ranged(settings, shape, layer, TopK<>::create(budget));
    case Method::kQuest:
      return quest(settings, shape, layer);
    case Method::kUniform:
      return ranged(settings, shape, layer, Uniform::create(budget));
    case Method::kExact:
      break;
  }
  return ranged(settings, shape, layer, Result<Exact>(Exact()));
}

}  // namespace magicpig::llama

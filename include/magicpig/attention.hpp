// SPDX-License-Identifier: Apache-2.0
// Sampled attention for one decode step: hash the query, draw candidates, attend to them.
#pragma once

// The map. Everything below is read from top to bottom by decode_head(), the algorithm:
//
//   hash        hash/simhash.hpp, rademacher.hpp, orthogonal.hpp   families of hash functions
//               hash/cross_polytope.hpp
//               hash/scalar_quantiser.hpp, product_quantiser.hpp   codes, random or trained
//   index       index/bucket_tables.hpp                            keys of a layer, by their hashes
//               index/hashed_keys.hpp                              that were made elsewhere
//               index/signatures.hpp                               or by the codes of a quantiser
//   candidates  sample/collision.hpp                               tokens with their probabilities
//               sample/systematic.hpp, poisson.hpp, top_scores.hpp
//               sample/uniform.hpp, defensive.hpp                  without hashes, with both
//   weights     estimate/estimator.hpp                             what a drawn token counts
//   attend      cpu/attend.hpp, attend_totals.hpp                  one softmax over all of them
//   promise     estimate/promise.hpp, cpu/keep_promise.hpp         how far it may be off, and draws
//                                                                  until it is not further
//   tasks       decode_layout.hpp                                  parts for several workers
//   state       core/state.hpp                                     outputs that merge with others
//
// What selects instead of drawing, to compare with, is not included here: sample/top_k.hpp and
// top_p.hpp, by any scores (sample/token_scores.hpp). Nor is what reads each KV head as a profile
// says: sample/per_head.hpp on index/per_head_index.hpp; such profiles are made by planner.hpp.
//
// A host brings its keys and values (core/views.hpp; in other layouts core/paged_key_values.hpp and
// its neighbours, docs/layouts.md), its threads (core/executor.hpp), its memory
// (workspace_bytes below) and a choice of SIMD library (cpu/scalar.hpp here, cpu/highway.hpp).

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/executor.hpp"
#include "magicpig/core/logit_terms.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/state.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cpu/attend.hpp"
#include "magicpig/cpu/attend_totals.hpp"
#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/keep_promise.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/decode_layout.hpp"
#include "magicpig/estimate/estimator.hpp"
#include "magicpig/hash/scalar_quantiser.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/index/index.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/request.hpp"
#include "magicpig/sample/collision.hpp"
#include "magicpig/sample/defensive.hpp"
#include "magicpig/sample/poisson.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/sample/systematic.hpp"
#include "magicpig/sample/top_scores.hpp"
#include "magicpig/sample/uniform.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What a source's rows take where they must be copied.
template <KeyValueSource Source, class Plan>
[[nodiscard]] RowCopies row_copies(const Plan& plan) {
  return RowCopies::of<Source>(plan.shape.head_dim, plan.shape.value_dim);
}

/// Scratch of one worker; a counting arena measures it, another carves it.
template <class Plan>
struct DecodeScratch {
  typename Plan::Sampler::Scratch sampler;
  AttendScratch attend;
  AttendTotals totals;
  AttendTotals exact;  // before anything is drawn, where a promise is asked

  static DecodeScratch carve(Arena& arena, const Plan& plan, TokenId indexed_tokens,
                             const RowCopies& copies) {
    const int group = plan.shape.group();
    const int value_dim = plan.shape.value_dim;
    return {
        .sampler = plan.sampler->carve(
            arena,
            {.group = group, .tokens = indexed_tokens, .value_dim = value_dim, .copies = copies}),
        .attend = AttendScratch::carve(arena, group, value_dim, copies),
        .totals = AttendTotals::carve(arena, group, value_dim),
        .exact =
            plan.promise.asked() ? AttendTotals::carve(arena, group, value_dim) : AttendTotals{}};
  }
};

/// Number of a task's first query head, of all heads of all rows of its request.
template <class Plan>
[[nodiscard]] std::int64_t first_head_of(const Plan& plan, const DecodeTask& at) {
  return std::int64_t{at.row} * plan.shape.query_heads + at.kv_head * plan.shape.group();
}

/// What the logits of one KV head's query heads have beside q.k, for one query row.
template <class Plan, class RequestType>
[[nodiscard]] GroupLogits group_logits(const Plan& plan, const RequestType& request,
                                       const DecodeTask& at) {
  const LogitTerms& terms = plan.logits;
  const std::int64_t head = std::int64_t{at.kv_head} * plan.shape.group();
  const TokenId own = request.visible(at.row).end - 1;  // the row's token
  const bool numbered = request.positions.empty() || own < 0;
  return {.scale = plan.logit_scale(),
          .soft_cap = terms.soft_cap,
          .alibi_slopes = terms.alibi_slopes.empty() ? nullptr : terms.alibi_slopes.data() + head,
          .sinks = terms.sink_logits.empty() ? nullptr : terms.sink_logits.data() + head,
          .positions = numbered ? nullptr : request.positions.data(),
          .query_position = numbered ? own : request.positions[static_cast<std::size_t>(own)]};
}

/// Codes of a KV head's query heads, the first of them number `first_head` of all heads of all
/// rows; null where the request has none.
template <class RequestType>
[[nodiscard]] const Code* group_codes(const RequestType& request, std::int64_t first_head) {
  if constexpr (TableIndex<typename RequestType::Index>) {
    if (!request.query_codes.empty()) {
      return request.query_codes.data() + first_head * request.index->family().tables();
    }
  }
  return nullptr;
}

/// The algorithm, for one KV head of one query row and one part of its exact tokens: sink, local
/// and not yet indexed tokens are exact, the others are drawn, with the first part; all of them
/// meet in one softmax. Tokens that are gone for the query are in neither.
template <class Ops, class Plan, class RequestType>
void decode_head(const Plan& plan, const RequestType& request, const DecodeTask& at,
                 DecodeScratch<Plan>& scratch, const AttendTotals& totals) noexcept {
  using Source = typename RequestType::Source;
  const std::int64_t first_head = first_head_of(plan, at);
  const QueryGroup queries{.data = request.query.data() + first_head * plan.shape.head_dim,
                           .count = plan.shape.group(),
                           .dim = plan.shape.head_dim};
  const ExactParts exact = exact_parts(plan, request, at.row);
  const TokenMask gone = request.gone(at.row);

  Attend<Ops, Source> attend({.key_values = *request.key_values,
                              .kv_head = at.kv_head,
                              .queries = queries,
                              .logits = group_logits(plan, request, at),
                              .gone = gone,
                              .report = !request.reports.empty() || plan.promise.asked()},
                             scratch.attend, totals);
  if (at.part == 0) attend.add_sinks();
  attend.add_exact(exact.before(at.part));
  attend.add_exact(exact.behind(at.part));
  if (at.part == 0 && !exact.sampled.empty()) {
    const DrawInput<Source, typename RequestType::Index> input{
        .key_values = *request.key_values,
        .index = *request.index,
        .kv_head = at.kv_head,
        .queries = queries,
        .scale = plan.logit_scale(),
        .noise = {.seed = request.seed,
                  .step = request.step + static_cast<std::uint32_t>(at.row),
                  .layer = plan.layer},
        .report = !request.reports.empty(),
        .gone = gone,
        .query_codes = group_codes(request, first_head)};
    if (plan.promise.asked()) {
      if constexpr (verifiable<typename Plan::Sampler>()) {
        keep_promise<Ops>(plan, input, scratch, attend, totals, exact.sampled,
                          request.states.data() + first_head);
      }
    } else {
      const auto candidates = plan.sampler->template draw<Ops>(input, scratch.sampler);
      attend.add_candidates(candidates, plan.estimator);
    }
    *totals.indexed = gone.present(exact.sampled);
  }
  attend.finish();
}

/// The workspace of a step without requests yet, on `workers` workers, for indexed ranges of up to
/// `indexed` tokens of keys and values in Source.
template <KeyValueSource Source, class Plan>
[[nodiscard]] DecodeLayout decode_layout(const Plan& plan, TokenId indexed, int workers) {
  Arena arena;
  (void)DecodeScratch<Plan>::carve(arena, plan, indexed, row_copies<Source>(plan));
  return DecodeLayout(plan.shape, arena.bytes_needed(), workers);
}

/// Bytes of workspace that decode() needs, of any alignment: for up to `requests` requests, or
/// query rows of fewer, whose caches hold up to `tokens` tokens, on `workers` workers. The plan
/// must be valid. A source whose rows must be copied is to be named, workspace_bytes<Source>(...);
/// all others need the same.
template <KeyValueSource Source = StridedKeyValues<float>, class Plan>
[[nodiscard]] std::size_t workspace_bytes(const Plan& plan, TokenId tokens, int workers,
                                          std::size_t requests = 1) {
  DecodeLayout layout = decode_layout<Source>(plan, tokens, workers);
  layout.add(requests, {.sampled = {}, .tokens = tokens});
  return layout.bytes();
}

/// Validated requests and workspace of one step. Hosts that own their threads make one and call
/// run_share() from each of them; decode() does so on an executor.
template <class Ops, class Plan, class RequestType>
class DecodeStep {
 public:
  using Requests = std::span<const RequestType>;
  using Source = typename RequestType::Source;

  /// `workspace` of at least workspace_bytes<Source>(plan, largest cache, workers, requests), used
  /// by nobody else while the step runs. Errors: those of validate(), and a workspace that is too
  /// small. Nothing has been written to any output then.
  [[nodiscard]] static Result<DecodeStep> create(const Plan& plan, Requests requests,
                                                 std::span<std::byte> workspace,
                                                 int workers) noexcept {
    Status status = validate(plan);
    TokenId indexed = 0;
    for (std::size_t i = 0; i < requests.size() && status.ok(); ++i) {
      status = validate(plan, requests[i], i);
      if (!status.ok()) break;
      const TokenId size = indexed_range<Plan>(requests[i]).size();
      for (int row = 0; row < requests[i].query_rows && size > indexed; ++row) {
        if (!sampled_range(plan, requests[i], row).empty()) indexed = size;
      }
    }
    if (!status.ok()) return status;
    if (workers < 1) {
      return Status::error(ErrorCode::kInvalidArgument, "workers %d must be at least 1", workers);
    }
    DecodeLayout layout = decode_layout<Source>(plan, indexed, workers);
    for (const RequestType& request : requests) {
      for (int row = 0; row < request.query_rows; ++row) {
        layout.add(1, exact_parts(plan, request, row));
      }
    }
    if (layout.tasks() > static_cast<std::size_t>(INT32_MAX)) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "%zu requests of %d KV heads are 2^31 tasks or more", requests.size(),
                           plan.shape.kv_heads);
    }
    if (!requests.empty() && workspace.size() < layout.bytes()) {
      return Status::error(ErrorCode::kWorkspaceTooSmall,
                           "the workspace has %zu bytes, %zu requests on %d workers with up to %d "
                           "tokens to draw from need %zu",
                           workspace.size(), requests.size(), workers, indexed, layout.bytes());
    }
    layout.fill(plan, requests, workspace);
    return DecodeStep(plan, requests, workspace, indexed, layout);
  }

  /// One task per request, query row, KV head and part of the exact tokens.
  [[nodiscard]] int tasks() const { return static_cast<int>(layout_.tasks()); }

  /// Runs one task with one worker's scratch. Tasks are independent and may run in any order, on
  /// any worker; no two may use the same worker at once.
  void run_task(int task, int worker) const noexcept {
    Arena arena = layout_.scratch(workspace_, worker);
    DecodeScratch<Plan> scratch =
        DecodeScratch<Plan>::carve(arena, plan_, indexed_tokens_, row_copies<Source>(plan_));
    const DecodeTask at = layout_.find(workspace_, task);
    const RequestType& request = requests_[at.request];
    if (at.parts == 1) {
      decode_head<Ops>(plan_, request, at, scratch, scratch.totals);
      write(at, scratch.totals, &scratch.attend.sketch);
    } else {
      decode_head<Ops>(plan_, request, at, scratch, layout_.totals(workspace_, at.slot));
    }
  }

  /// The part of worker `worker` of workers(), each in [0, workers()) to be called once, from any
  /// threads at once. Afterwards, when all are through, finish().
  void run_share(int worker) const noexcept {
    for (int task = worker; task < tasks(); task += workers()) run_task(task, worker);
  }

  /// Once, when all tasks have run: adds up the parts of heads that were cut. Error: an output that
  /// is not finite, from a NaN or infinity in keys or values (or logits beyond float32). It is left
  /// as it came out; outputs of other KV heads are right.
  [[nodiscard]] Status finish() const noexcept {
    for (int task = 0; task < tasks(); ++task) {
      const DecodeTask at = layout_.find(workspace_, task);
      if (at.parts == 1 || at.part > 0) continue;
      const AttendTotals totals = layout_.totals(workspace_, at.slot);
      for (int part = 1; part < at.parts; ++part) {
        totals.add(layout_.totals(workspace_, at.slot + static_cast<std::size_t>(part)));
      }
      write(at, totals, nullptr);
    }
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      for (std::size_t h = 0; h < requests_[i].states.size(); ++h) {
        const AttentionState& state = requests_[i].states[h];
        bool finite = state.lse < -kEmptyLse;  // false for NaN and +inf
        for (const float x : state.out) finite = finite && std::isfinite(x);
        if (finite) continue;
        const auto heads = static_cast<std::size_t>(plan_.shape.query_heads);
        return Status::error(ErrorCode::kNonFinite,
                             "request %zu: the output of row %zu, head %zu is not finite", i,
                             h / heads, h % heads);
      }
    }
    return Status();
  }

  [[nodiscard]] int workers() const { return layout_.workers(); }

 private:
  DecodeStep(const Plan& plan, Requests requests, std::span<std::byte> workspace, TokenId indexed,
             const DecodeLayout& layout)
      : plan_(plan),
        requests_(requests),
        workspace_(workspace),
        indexed_tokens_(indexed),
        layout_(layout) {}

  void write(const DecodeTask& at, const AttendTotals& totals, const ErrorSketch* sketch) const {
    const RequestType& request = requests_[at.request];
    const std::int64_t first_head = first_head_of(plan_, at);
    HeadReport* reports = request.reports.empty() ? nullptr : request.reports.data() + first_head;
    totals.write(request.states.data() + first_head, reports, sketch);
    if (reports == nullptr || error_is_told(*plan_.sampler, at.kv_head)) return;
    for (int g = 0; g < totals.group; ++g) {
      if (reports[g].drawn > 0) reports[g].error_95 = std::numeric_limits<float>::quiet_NaN();
    }
  }

  Plan plan_;
  Requests requests_;
  std::span<std::byte> workspace_;
  TokenId indexed_tokens_;
  DecodeLayout layout_;
};

/// One decode step of one layer: for every request the attention of its query over its keys and
/// values, written to its states as normalised output and natural-log lse, and to its reports.
/// `requests` is an array, vector or span of Request.
///
/// Results are bit-identical for any number of workers, any order of the requests, and from run to
/// run. An empty cache gives zeros and lse -inf. Allocates nothing, throws nothing, takes no lock
/// of its own; indexes and caches are only read, so that other steps may share them.
///
/// Errors: all arguments are validated before anything is written; afterwards an output that is not
/// finite is reported (see DecodeStep::finish).
template <class Backend, class Plan, class Requests>
Status decode(const Backend& backend, const Plan& plan, const Requests& requests,
              std::span<std::byte> workspace) noexcept {
  const auto list = std::span(requests);
  using RequestType = std::remove_const_t<typename decltype(list)::element_type>;
  using Step = DecodeStep<typename Backend::Ops, Plan, RequestType>;
  const Result<Step> step = Step::create(plan, list, workspace, backend.executor.workers());
  if (!step.ok()) return step.status();
  backend.executor.parallel_for(step->tasks(),
                                [&](int task, int worker) { step->run_task(task, worker); });
  return step->finish();
}

}  // namespace magicpig::inline MAGICPIG_ABI

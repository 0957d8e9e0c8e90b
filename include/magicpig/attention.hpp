// SPDX-License-Identifier: Apache-2.0
// Sampled attention for one decode step: hash the query, draw candidates, attend to them.
#pragma once

// The map. Everything below is read from top to bottom by decode_head(), the algorithm:
//
//   hash        hash/simhash.hpp, rademacher.hpp, orthogonal.hpp   families of hash functions
//   index       index/bucket_tables.hpp                            keys of a layer, by their hashes
//   candidates  sample/collision.hpp, uniform.hpp, defensive.hpp   tokens with their probabilities
//   weights     estimate/estimator.hpp                             what a drawn token counts
//   attend      cpu/attend.hpp                                     one softmax over all of them
//   state       core/state.hpp                                     outputs that merge with others
//
// A host brings its keys and values (core/views.hpp), its threads (core/executor.hpp), its memory
// (workspace_bytes below) and a choice of SIMD library (cpu/scalar.hpp here, cpu/highway.hpp).

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/executor.hpp"
#include "magicpig/core/state.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cpu/attend.hpp"
#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/estimate/estimator.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/request.hpp"
#include "magicpig/sample/collision.hpp"
#include "magicpig/sample/defensive.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/sample/uniform.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Scratch of one worker; a counting arena measures it, another carves it.
template <class Plan>
struct DecodeScratch {
  typename Plan::Sampler::Scratch sampler;
  AttendScratch attend;

  static DecodeScratch carve(Arena& arena, const Plan& plan, TokenId indexed_tokens) {
    const DrawLimits limits{
        .head_dim = plan.shape.head_dim, .group = plan.shape.group(), .tokens = indexed_tokens};
    return {.sampler = plan.sampler->carve(arena, limits),
            .attend = AttendScratch::carve(arena, plan.shape.group(), plan.shape.value_dim)};
  }
};

/// The algorithm, for one KV head of one request: sink, local and not yet indexed tokens are
/// exact, the others are drawn; all of them meet in one softmax.
template <class Ops, class Plan, class RequestType>
void decode_head(const Plan& plan, const RequestType& request, int kv_head,
                 DecodeScratch<Plan>& scratch) noexcept {
  using Source = typename RequestType::Source;
  const std::int64_t first_head = std::int64_t{kv_head} * plan.shape.group();
  const QueryGroup queries{.data = request.query.data() + first_head * plan.shape.head_dim,
                           .count = plan.shape.group(),
                           .dim = plan.shape.head_dim};
  const TokenRange sampled = sampled_range<Plan>(request);
  const Source& key_values = *request.key_values;

  Attend<Ops, Source> attend({.key_values = key_values,
                              .kv_head = kv_head,
                              .queries = queries,
                              .scale = plan.logit_scale(),
                              .report = !request.reports.empty()},
                             scratch.attend);
  attend.add_exact({.begin = 0, .end = sampled.begin});
  attend.add_exact({.begin = sampled.end, .end = key_values.tokens()});
  std::size_t read = 0;
  if (!sampled.empty()) {
    const DrawInput<Source, typename RequestType::Index> input{
        .key_values = key_values,
        .index = *request.index,
        .kv_head = kv_head,
        .queries = queries,
        .scale = plan.logit_scale(),
        .noise = {.seed = request.seed, .step = request.step, .layer = plan.layer}};
    const auto candidates = plan.sampler->template draw<Ops>(input, scratch.sampler);
    attend.add_candidates(candidates, plan.estimator);
    read = candidates.tokens.size();
  }
  attend.finish(request.states.data() + first_head,
                request.reports.empty() ? nullptr : request.reports.data() + first_head,
                {.read = static_cast<std::int64_t>(read), .indexed = sampled.size()});
}

/// Bytes of workspace that decode() needs, of any alignment: for requests whose indexes cover up to
/// `indexed_tokens` tokens, on `workers` workers. 0 indexed tokens for exact attention. The plan
/// must be valid.
template <class Plan>
[[nodiscard]] std::size_t workspace_bytes(const Plan& plan, TokenId indexed_tokens, int workers) {
  Arena arena;
  (void)DecodeScratch<Plan>::carve(arena, plan, indexed_tokens);
  return arena.bytes_needed() * static_cast<std::size_t>(workers);
}

/// Validated requests and workspace of one step. Hosts that own their threads make one and call
/// run_share() from each of them; decode() does so on an executor.
template <class Ops, class Plan, class RequestType>
class DecodeStep {
 public:
  using Requests = std::span<const RequestType>;

  /// `workspace` of at least workspace_bytes(plan, largest indexed range, workers), used by nobody
  /// else while the step runs. Errors: those of validate(), and a workspace that is too small.
  /// Nothing has been written then.
  [[nodiscard]] static Result<DecodeStep> create(const Plan& plan, Requests requests,
                                                 std::span<std::byte> workspace,
                                                 int workers) noexcept {
    Status status = validate(plan);
    TokenId indexed = 0;
    for (std::size_t i = 0; i < requests.size() && status.ok(); ++i) {
      status = validate(plan, requests[i], i);
      if (!status.ok()) break;
      const TokenId size = sampled_range<Plan>(requests[i]).size();
      indexed = size > indexed ? size : indexed;
    }
    if (!status.ok()) return status;
    if (workers < 1) {
      return Status::error(ErrorCode::kInvalidArgument, "workers %d must be at least 1", workers);
    }
    if (requests.size() > static_cast<std::size_t>(INT32_MAX / plan.shape.kv_heads)) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "%zu requests of %d KV heads are 2^31 tasks or more", requests.size(),
                           plan.shape.kv_heads);
    }
    const std::size_t needed = requests.empty() ? 0 : workspace_bytes(plan, indexed, workers);
    if (workspace.size() < needed) {
      return Status::error(ErrorCode::kWorkspaceTooSmall,
                           "the workspace has %zu bytes, %d workers on up to %d indexed tokens "
                           "need %zu",
                           workspace.size(), workers, indexed, needed);
    }
    return DecodeStep(plan, requests, workspace, indexed, workers);
  }

  /// One task per request and KV head.
  [[nodiscard]] int tasks() const {
    return static_cast<int>(requests_.size()) * plan_.shape.kv_heads;
  }

  /// Runs one task with one worker's scratch. Tasks are independent and may run in any order, on
  /// any worker; no two may use the same worker at once.
  void run_task(int task, int worker) const noexcept {
    const std::size_t slice = workspace_.size() / static_cast<std::size_t>(workers_);
    Arena arena(workspace_.subspan(slice * static_cast<std::size_t>(worker), slice));
    DecodeScratch<Plan> scratch = DecodeScratch<Plan>::carve(arena, plan_, indexed_tokens_);
    decode_head<Ops>(plan_, requests_[static_cast<std::size_t>(task / plan_.shape.kv_heads)],
                     task % plan_.shape.kv_heads, scratch);
  }

  /// The part of worker `worker` of workers(), each in [0, workers()) to be called once, from any
  /// threads at once. Afterwards, when all are through, finish().
  void run_share(int worker) const noexcept {
    for (int task = worker; task < tasks(); task += workers_) run_task(task, worker);
  }

  /// Error: an output that is not finite, from a NaN or infinity in keys or values (or logits
  /// beyond float32). It is left as it came out; outputs of other KV heads are right.
  [[nodiscard]] Status finish() const noexcept {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      for (std::size_t h = 0; h < requests_[i].states.size(); ++h) {
        const AttentionState& state = requests_[i].states[h];
        bool finite = state.lse < -kEmptyLse;  // false for NaN and +inf
        for (const float x : state.out) finite = finite && std::isfinite(x);
        if (finite) continue;
        return Status::error(ErrorCode::kNonFinite,
                             "request %zu: the output of head %zu is not finite", i, h);
      }
    }
    return Status();
  }

  [[nodiscard]] int workers() const { return workers_; }

 private:
  DecodeStep(const Plan& plan, Requests requests, std::span<std::byte> workspace, TokenId indexed,
             int workers)
      : plan_(plan),
        requests_(requests),
        workspace_(workspace),
        indexed_tokens_(indexed),
        workers_(workers) {}

  Plan plan_;
  Requests requests_;
  std::span<std::byte> workspace_;
  TokenId indexed_tokens_;
  int workers_;
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

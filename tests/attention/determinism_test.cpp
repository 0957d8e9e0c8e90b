// SPDX-License-Identifier: Apache-2.0
// Outputs, lse and reports are the same bits for any number of threads, any batch and any order.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "backends.hpp"
#include "magicpig/attention.hpp"
#include "problem.hpp"

#if defined(_OPENMP)
#include "magicpig/cpu/openmp.hpp"
#endif

namespace magicpig::test {
namespace {

constexpr Shape kShape{.query_heads = 9, .kv_heads = 3, .head_dim = 28, .value_dim = 15};
constexpr TokenId kTokens[] = {700, 0, 1, 333, 130, 70, 512};
constexpr std::size_t kRequests = std::size(kTokens);

using Source = StridedKeyValues<bf16>;
using Tables = BucketTables<SimHash>;
using TablesRequest = Request<Source, Tables>;
using Sampler = Defensive<Collisions>;
using Plan = DecodePlan<Sampler>;

// A batch of sequences of very different lengths, one of them without an index.
struct Batch {
  std::vector<std::unique_ptr<Problem<bf16>>> problems;
  std::vector<Source> sources;
  SimHash family = std::move(*SimHash::create({.dim = 28, .bits = 5, .tables = 24, .seed = 2}));
  std::vector<std::unique_ptr<Tables>> indexes;
  Sampler sampler = std::move(*Sampler::create(
      std::move(*Collisions::create(family, {.min_collisions = 2})), {.fraction = 0.05}));
  Plan plan{.shape = kShape, .sampler = &sampler, .layer = 7, .exact_below = 0};

  template <class Backend>
  explicit Batch(const Backend& backend) {
    for (std::size_t i = 0; i < kRequests; ++i) {
      problems.push_back(std::make_unique<Problem<bf16>>(
          ProblemConfig{.shape = kShape, .tokens = kTokens[i], .seed = 40 + i, .key_offset = 1.0}));
      sources.push_back(problems.back()->source());
      indexes.push_back(std::make_unique<Tables>(
          std::move(*Tables::create(family, {.kv_heads = 3, .segment_tokens = 100}))));
      if (kTokens[i] < 70) continue;
      CHECK(indexes[i]->build(backend, sources[i], {.begin = 3, .end = kTokens[i] - 9}).ok());
    }
  }

  TablesRequest request(std::size_t i, Outputs& outputs) const {
    return make_request(*problems[i], sources[i], i == 3 ? nullptr : indexes[i].get(), outputs,
                        {.seed = i, .step = 11});
  }
};

std::vector<std::unique_ptr<Outputs>> make_outputs() {
  std::vector<std::unique_ptr<Outputs>> outputs;
  for (std::size_t i = 0; i < kRequests; ++i) outputs.push_back(std::make_unique<Outputs>(kShape));
  return outputs;
}

void check_same(const std::vector<std::unique_ptr<Outputs>>& a,
                const std::vector<std::unique_ptr<Outputs>>& b) {
  for (std::size_t i = 0; i < kRequests; ++i) {
    CAPTURE(i);
    CHECK(same_bits(*a[i], *b[i]));
  }
}

// Scratch full of rubbish, at an odd address.
std::vector<std::byte> dirty_workspace(const Plan& plan, int workers) {
  return std::vector<std::byte>(workspace_bytes(plan, 700, workers, kRequests) + 1,
                                std::byte{0xff});
}

template <class Ops>
std::vector<std::unique_ptr<Outputs>> one_by_one(const Batch& batch) {
  auto outputs = make_outputs();
  SerialExecutor serial;
  for (std::size_t i = 0; i < kRequests; ++i) {
    const Status status = decode_one<Ops>(serial, batch.plan, batch.request(i, *outputs[i]));
    CHECK_MESSAGE(status.ok(), status.message());
  }
  return outputs;
}

// Indexes built and a batch decoded on the executor's threads.
template <class Ops, class E>
void check_batch(E& executor, const std::vector<std::unique_ptr<Outputs>>& expected) {
  CAPTURE(executor.workers());
  const Batch batch(make_backend<Ops>(executor));
  for (int repetition = 0; repetition < 3; ++repetition) {
    auto outputs = make_outputs();
    std::vector<TablesRequest> requests;
    for (std::size_t i = 0; i < kRequests; ++i) requests.push_back(batch.request(i, *outputs[i]));
    auto workspace = dirty_workspace(batch.plan, executor.workers());
    const Status status =
        decode(make_backend<Ops>(executor), batch.plan, std::span<const TablesRequest>(requests),
               std::span(workspace).subspan(1));
    REQUIRE_MESSAGE(status.ok(), status.message());
    check_same(outputs, expected);
  }
}

TEST_CASE_TEMPLATE_DEFINE("1, 2, 3 and 7 threads decode a batch to the bits of single requests",
                          Ops, threads) {
  SerialExecutor serial;
  const auto expected = one_by_one<Ops>(Batch(make_backend<Ops>(serial)));
  for (const int workers : {1, 2, 3, 7}) {
    const auto pool = ThreadPool::create(workers);
    REQUIRE(pool.ok());
    check_batch<Ops>(**pool, expected);
#if defined(_OPENMP)
    const auto openmp = OpenMpExecutor::create(workers);
    REQUIRE(openmp.ok());
    check_batch<Ops>(*openmp, expected);
#endif
  }
}
TEST_CASE_TEMPLATE_APPLY(threads, Backends);

TEST_CASE_TEMPLATE_DEFINE("the order of requests and how they are batched change no bit", Ops,
                          batches) {
  SerialExecutor serial;
  const Batch batch(make_backend<Ops>(serial));
  const auto expected = one_by_one<Ops>(batch);
  std::vector<std::size_t> order(kRequests);
  for (std::size_t i = 0; i < kRequests; ++i) order[i] = i;
  Random random(99);
  for (int repetition = 0; repetition < 10; ++repetition) {
    for (std::size_t i = kRequests - 1; i > 0; --i) {
      std::swap(order[i], order[static_cast<std::size_t>(random.below(static_cast<int>(i) + 1))]);
    }
    auto outputs = make_outputs();
    for (std::size_t first = 0; first < kRequests;) {
      const auto size = std::min(kRequests - first, static_cast<std::size_t>(random.between(1, 4)));
      std::vector<TablesRequest> requests;
      for (std::size_t i = first; i < first + size; ++i) {
        requests.push_back(batch.request(order[i], *outputs[order[i]]));
      }
      auto workspace = dirty_workspace(batch.plan, 1);
      REQUIRE(decode(make_backend<Ops>(serial), batch.plan,
                     std::span<const TablesRequest>(requests), workspace)
                  .ok());
      first += size;
    }
    check_same(outputs, expected);
  }
}
TEST_CASE_TEMPLATE_APPLY(batches, Backends);

TEST_CASE_TEMPLATE_DEFINE("shares run by the host's own threads give the bits of decode", Ops,
                          shares) {
  SerialExecutor serial;
  const Batch batch(make_backend<Ops>(serial));
  const auto expected = one_by_one<Ops>(batch);
  for (const int workers : {1, 2, 3, 7, 40}) {
    CAPTURE(workers);
    auto outputs = make_outputs();
    std::vector<TablesRequest> requests;
    for (std::size_t i = 0; i < kRequests; ++i) requests.push_back(batch.request(i, *outputs[i]));
    auto workspace = dirty_workspace(batch.plan, workers);
    using Step = DecodeStep<Ops, Plan, TablesRequest>;
    const auto step = Step::create(batch.plan, requests, workspace, workers);
    REQUIRE_MESSAGE(step.ok(), step.status().message());
    CHECK(step->tasks() == static_cast<int>(kRequests) * kShape.kv_heads);
    std::vector<std::thread> threads;
    for (int worker = workers - 1; worker >= 0; --worker) {
      threads.emplace_back([&step, worker] { step->run_share(worker); });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(step->finish().ok());
    check_same(outputs, expected);
  }
}
TEST_CASE_TEMPLATE_APPLY(shares, Backends);

TEST_CASE("outputs without reports are the bits of outputs with them") {
  SerialExecutor serial;
  const Batch batch(make_backend<ScalarOps>(serial));
  const auto expected = one_by_one<ScalarOps>(batch);
  for (std::size_t i = 0; i < kRequests; ++i) {
    Outputs outputs(kShape);
    TablesRequest request = batch.request(i, outputs);
    request.reports = {};
    REQUIRE(decode_one<ScalarOps>(serial, batch.plan, request).ok());
    for (int h = 0; h < kShape.query_heads; ++h) {
      CHECK(same_bits(outputs.lse(h), expected[i]->lse(h)));
      for (std::size_t j = 0; j < 15; ++j) {
        CHECK(same_bits(outputs.out(h)[j], expected[i]->out(h)[j]));
      }
    }
  }
}

TEST_CASE("fresh draws depend on seed, step and layer, and collisions on none of them") {
  SerialExecutor serial;
  Batch batch(make_backend<ScalarOps>(serial));
  const auto collisions = Collisions::create(batch.family, {.min_collisions = 2});
  const DecodePlan<Collisions> hashed{.shape = kShape, .sampler = &*collisions, .exact_below = 0};
  Outputs drawn(kShape);
  Outputs found(kShape);
  REQUIRE(decode_one<ScalarOps>(serial, batch.plan, batch.request(0, drawn)).ok());
  REQUIRE(decode_one<ScalarOps>(serial, hashed, batch.request(0, found)).ok());
  for (int change = 0; change < 3; ++change) {
    CAPTURE(change);
    Outputs other_drawn(kShape);
    Outputs other_found(kShape);
    TablesRequest request = batch.request(0, other_drawn);
    Plan plan = batch.plan;
    DecodePlan<Collisions> other_hashed = hashed;
    request.seed += change == 0 ? 1U : 0U;
    request.step += change == 1 ? 1U : 0U;
    plan.layer += change == 2 ? 1U : 0U;
    other_hashed.layer = plan.layer;
    REQUIRE(decode_one<ScalarOps>(serial, plan, request).ok());
    request.states = other_found.states;
    request.reports = other_found.reports;
    REQUIRE(decode_one<ScalarOps>(serial, other_hashed, request).ok());
    CHECK_FALSE(same_bits(drawn, other_drawn));
    CHECK(same_bits(found, other_found));
  }
}

}  // namespace
}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// Threads decode from one index while another index of the same family changes: nothing is shared
// that is written. ThreadSanitizer watches.
#include <doctest/doctest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "backends.hpp"
#include "magicpig/attention.hpp"
#include "problem.hpp"

namespace magicpig::test {
namespace {

constexpr int kThreads = 8;
constexpr Shape kShape{.query_heads = 4, .kv_heads = 2, .head_dim = 16, .value_dim = 16};

TEST_CASE_TEMPLATE_DEFINE("eight threads decode from one index while another one is appended to",
                          Ops, sharing) {
  SerialExecutor serial;
  const auto backend = make_backend<Ops>(serial);
  const Problem<float> problem({.shape = kShape, .tokens = 400, .seed = 12});
  const auto source = problem.source();
  const auto family = SimHash::create({.dim = 16, .bits = 5, .tables = 20, .seed = 2});
  const BucketTablesConfig config{.kv_heads = 2, .segment_tokens = 64, .seal_tokens = 16};
  auto shared = BucketTables<SimHash>::create(*family, config);
  REQUIRE(shared->build(backend, source, Window{}.middle(400)).ok());
  auto collisions = Collisions::create(*family, {.min_collisions = 2, .probe_radius = 1});
  const auto sampler = Defensive<Collisions>::create(std::move(*collisions), {.fraction = 0.05});
  const DecodePlan<Defensive<Collisions>> plan{
      .shape = kShape, .sampler = &*sampler, .exact_below = 0};
  Outputs expected(kShape);
  REQUIRE(decode_one<Ops>(serial, plan, make_request(problem, source, &*shared, expected)).ok());

  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      SerialExecutor own;
      bool same = true;
      for (int repetition = 0; repetition < 20; ++repetition) {
        Outputs outputs(kShape);
        same &= decode_one<Ops>(own, plan, make_request(problem, source, &*shared, outputs)).ok();
        same &= same_bits(outputs, expected);
      }
      right.fetch_add(same ? 1 : 0);
    });
  }
  auto growing = BucketTables<SimHash>::create(*family, config);
  bool grown = true;
  for (int repetition = 0; repetition < 5; ++repetition) {
    grown &= growing->build(backend, source, {.begin = 4, .end = 50}).ok();
    for (TokenId end = 60; end <= 400; end += 20) {
      grown &= growing->append(backend, source, end).ok();
    }
    grown &= growing->truncate(100).ok();
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right.load() == kThreads);
  CHECK(grown);
}
TEST_CASE_TEMPLATE_APPLY(sharing, Backends);

TEST_CASE("threads that share one pool are served one after the other") {
  const auto pool = ThreadPool::create(3);
  REQUIRE(pool.ok());
  const Problem<float> problem({.shape = kShape, .tokens = 100, .seed = 13});
  const auto source = problem.source();
  const Exact exact;
  const DecodePlan<> plan{.shape = kShape, .sampler = &exact};
  const RangeIndex* no_index = nullptr;
  Outputs expected(kShape);
  REQUIRE(
      decode_one<ScalarOps>(**pool, plan, make_request(problem, source, no_index, expected)).ok());
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      bool same = true;
      for (int repetition = 0; repetition < 20; ++repetition) {
        Outputs outputs(kShape);
        same &=
            decode_one<ScalarOps>(**pool, plan, make_request(problem, source, no_index, outputs))
                .ok();
        same &= same_bits(outputs, expected);
      }
      right.fetch_add(same ? 1 : 0);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right.load() == kThreads);
}

}  // namespace
}  // namespace magicpig::test

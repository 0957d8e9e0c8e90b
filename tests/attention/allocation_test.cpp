// SPDX-License-Identifier: Apache-2.0
// decode() allocates nothing: this program's operator new counts, and so does malloc where the
// linker can wrap it (the C library's own calls do not count).
#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "allocations.hpp"
#include "backends.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/code_scores.hpp"
#include "magicpig/sample/oracle.hpp"
#include "magicpig/sample/page_scores.hpp"
#include "magicpig/sample/soft_collisions.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/top_p.hpp"
#include "problem.hpp"

namespace {

std::atomic<std::int64_t> allocations{0};
std::atomic<std::int64_t> outstanding{0};  // of operator new
thread_local std::int64_t successes_left = -1;

void* allocate(std::size_t size, std::size_t alignment) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  // aligned_alloc wants a multiple of the alignment.
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded > 0 ? rounded : alignment);
  outstanding.fetch_add(memory != nullptr ? 1 : 0, std::memory_order_relaxed);
  return memory;
}

void* allocate_or_abort(std::size_t size, std::size_t alignment) {
  void* memory = allocate(size, alignment);
  if (memory == nullptr) std::abort();
  return memory;
}

void* allocate_unless_failing(std::size_t size, std::size_t alignment) {
  if (successes_left == 0) return nullptr;
  if (successes_left > 0) --successes_left;
  return allocate(size, alignment);
}

// Not inlined: g++ would take the inlined pair of operator new and free for a mismatch.
[[gnu::noinline]] void release(void* memory) {
  outstanding.fetch_sub(memory != nullptr ? 1 : 0, std::memory_order_relaxed);
  std::free(memory);
}

constexpr std::size_t kDefault = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

std::size_t number(std::align_val_t alignment) { return static_cast<std::size_t>(alignment); }

}  // namespace

#if defined(MAGICPIG_TEST_WRAPS_MALLOC)
// Libraries take memory without operator new, Eigen for one. The linker names these.
extern "C" {
void* __real_malloc(std::size_t size);
void* __real_calloc(std::size_t count, std::size_t size);
void* __real_realloc(void* memory, std::size_t size);
int __real_posix_memalign(void** memory, std::size_t alignment, std::size_t size);

void* __wrap_malloc(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __real_malloc(size);
}
void* __wrap_calloc(std::size_t count, std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __real_calloc(count, size);
}
void* __wrap_realloc(void* memory, std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __real_realloc(memory, size);
}
int __wrap_posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __real_posix_memalign(memory, alignment, size);
}
}
#endif

void* operator new(std::size_t size) { return allocate_or_abort(size, kDefault); }
void* operator new[](std::size_t size) { return allocate_or_abort(size, kDefault); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate_or_abort(size, number(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate_or_abort(size, number(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return allocate_unless_failing(size, kDefault);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return allocate_unless_failing(size, kDefault);
}
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocate_unless_failing(size, number(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocate_unless_failing(size, number(alignment));
}
void operator delete(void* memory) noexcept { release(memory); }
void operator delete[](void* memory) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { release(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { release(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { release(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { release(memory); }
void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept {
  release(memory);
}
void operator delete[](void* memory, std::align_val_t, const std::nothrow_t&) noexcept {
  release(memory);
}

namespace magicpig::test {

std::int64_t allocation_count() { return allocations.load(std::memory_order_relaxed); }

std::int64_t outstanding_allocations() { return outstanding.load(std::memory_order_relaxed); }

void fail_allocations_after(std::int64_t successes) { successes_left = successes; }

namespace {

TEST_CASE("this program's operator new counts and fails as told") {
  const std::int64_t before = allocation_count();
  std::vector<int> numbers(10);
  Buffer<float> buffer;
  CHECK(buffer.reserve(3));
  CHECK(allocation_count() == before + 2);
  fail_allocations_after(1);
  CHECK(buffer.reserve(100));
  CHECK_FALSE(buffer.reserve(1000));
  fail_allocations_after(-1);
  CHECK(buffer.reserve(1000));
}

#if defined(MAGICPIG_TEST_WRAPS_MALLOC)
TEST_CASE("this program's malloc counts, and so what Eigen takes does") {
  const std::int64_t before = allocation_count();
  Eigen::MatrixXf matrix(3, 3);
  void* volatile memory = std::malloc(10);  // volatile: a compiler may drop what nobody sees
  std::free(memory);
  matrix.setOnes();
  CHECK(matrix.sum() == 9.0F);
  CHECK(allocation_count() == before + 2);
}
#endif

// Sizes around those of blocks, tiles and chunks; one array serves as all.
template <class Ops, class T>
void call_row_operations(const std::vector<const T*>& pointers, std::vector<float>& numbers) {
  for (const int dim : {32, 64, 96, 288, 544}) {
    for (const int count : {1, 3, 8, 33}) {
      for (const int group : {1, 4, 7, 32}) {
        const Rows<T> rows{.rows = pointers.data(), .count = count, .dim = dim};
        float* const out = numbers.data() + 32 * 544;
        Ops::dot_rows(rows, numbers.data(), group, out);
        Ops::add_rows(rows, numbers.data(), group, out);
      }
    }
  }
}

template <class Ops>
void call_array_operations(std::vector<float>& numbers) {
  float* const in = numbers.data();
  float* const out = in + 100 * 544;
  for (const int dim : {1, 33, 544}) {
    for (const int count : {1, 4, 7, 33}) {
      Ops::project({.data = in, .count = 70, .dim = dim}, in, count, out);
    }
  }
  for (const int n : {1, 31, 32, 1000}) {
    numbers.front() = (Ops::max)(in, n);
    numbers.front() = Ops::exp_sum(out, n, 1.0F);
    Ops::log_affine_exp(out, n, 0.5F, 0.5F);
    Ops::interpolate({.nodes = in, .segments = 40}, out, n);
  }
}

template <class T, class Ops>
std::int64_t allocations_of_rows(std::vector<float>& numbers) {
  const std::vector<T> row(544);
  const std::vector<const T*> pointers(33, row.data());
  const std::int64_t before = allocation_count();
  call_row_operations<Ops>(pointers, numbers);
  return allocation_count() - before;
}

TEST_CASE_TEMPLATE("no function of a backend allocates, whatever the size", Ops,
                   MAGICPIG_TEST_BACKENDS) {
  std::vector<float> numbers(110 * 544, 0.5F);
  CHECK(allocations_of_rows<float, Ops>(numbers) == 0);
  CHECK(allocations_of_rows<fp16, Ops>(numbers) == 0);
  CHECK(allocations_of_rows<bf16, Ops>(numbers) == 0);
  CHECK(allocations_of_rows<q8_0, Ops>(numbers) == 0);
  CHECK(allocations_of_rows<q4_0, Ops>(numbers) == 0);
  const std::int64_t before = allocation_count();
  call_array_operations<Ops>(numbers);
  CHECK(allocation_count() == before);
}

constexpr Shape kShape{.query_heads = 8, .kv_heads = 2, .head_dim = 24, .value_dim = 20};

template <class Ops, class Executor, class Sampler, class IndexType>
void check_no_allocation(Executor& executor, const Problem<float>& problem, const Sampler& sampler,
                         const IndexType* index) {
  const DecodePlan<Sampler> plan{.shape = kShape, .sampler = &sampler, .exact_below = 0};
  const auto source = problem.source();
  Outputs outputs(kShape);
  const auto request = make_request(problem, source, index, outputs, {.seed = 3, .step = 4});
  using Requests = std::span<const std::remove_const_t<decltype(request)>>;
  std::vector<std::byte> workspace(workspace_bytes(plan, problem.tokens(), executor.workers()));
  const auto backend = make_backend<Ops>(executor);
  const std::int64_t before = allocation_count();
  const Status status = decode(backend, plan, Requests(&request, 1), workspace);
  const std::int64_t after = allocation_count();
  REQUIRE_MESSAGE(status.ok(), status.message());
  CHECK(after == before);
}

// Runs on one worker and on three.
template <class Check>
void on_pools(const Check& check) {
  const Problem<float> problem({.shape = kShape, .tokens = 700, .seed = 5});
  for (const int workers : {1, 3}) {
    const auto pool = ThreadPool::create(workers);
    REQUIRE(pool.ok());
    check(**pool, problem);
  }
}

constexpr Budget kBudget{.fraction = 0.1};

TEST_CASE_TEMPLATE_DEFINE("decode allocates nothing, on any backend, on one thread or three", Ops,
                          allocation_free) {
  on_pools([](ThreadPool& pool, const Problem<float>& problem) {
    const auto source = problem.source();
    check_no_allocation<Ops>(pool, problem, Exact{}, static_cast<RangeIndex*>(nullptr));

    const auto family = SimHash::create({.dim = 24, .bits = 6, .tables = 30, .seed = 1});
    auto index = BucketTables<SimHash>::create(*family, {.kv_heads = 2, .segment_tokens = 128});
    REQUIRE(index->build(make_backend<Ops>(pool), source, Window{}.middle(700)).ok());
    const auto collisions = Collisions::create(*family, {.min_collisions = 2, .probe_radius = 1});
    check_no_allocation<Ops>(pool, problem, *collisions, &*index);

    const auto quantiser = HadamardQuantiser::create(24, 2, 1);
    auto signatures = Signatures<HadamardQuantiser>::create(*quantiser, {.kv_heads = 2});
    REQUIRE(signatures->build(make_backend<Ops>(pool), source, Window{}.middle(700)).ok());
    check_no_allocation<Ops>(pool, problem, *Poisson::create(*quantiser, {.budget = kBudget}),
                             &*signatures);
    check_no_allocation<Ops>(pool, problem, *Systematic::create(*quantiser, {.budget = kBudget}),
                             &*signatures);
  });
}
TEST_CASE_TEMPLATE_APPLY(allocation_free, Backends);

TEST_CASE_TEMPLATE_DEFINE("decode allocates nothing, with any sampler", Ops, samplers) {
  on_pools([](ThreadPool& pool, const Problem<float>& problem) {
    const auto backend = make_backend<Ops>(pool);
    const auto source = problem.source();
    const TokenRange middle = Window{}.middle(700);
    const RangeIndex range(middle, 2, 24);
    check_no_allocation<Ops>(pool, problem, *Uniform::create(kBudget), &range);
    check_no_allocation<Ops>(pool, problem, *TopK<>::create(kBudget), &range);
    check_no_allocation<Ops>(pool, problem, *TopP<>::create(0.5), &range);
    check_no_allocation<Ops>(pool, problem, *OraclePoisson::create(kBudget), &range);
    check_no_allocation<Ops>(pool, problem, *OracleMultinomial::create(kBudget), &range);

    const auto family = SimHash::create({.dim = 24, .bits = 6, .tables = 30, .seed = 1});
    auto index = BucketTables<SimHash>::create(*family, {.kv_heads = 2, .segment_tokens = 128});
    REQUIRE(index->build(backend, source, middle).ok());
    auto collisions = Collisions::create(*family, {.min_collisions = 2});
    check_no_allocation<Ops>(
        pool, problem, *Defensive<Collisions>::create(std::move(*collisions), kBudget), &*index);

    auto pages = PageBounds<>::create({.kv_heads = 2, .dim = 24});
    REQUIRE(pages->build(backend, source, middle).ok());
    check_no_allocation<Ops>(pool, problem, *Quest::create(kBudget, PageScores(24)), &*pages);

    auto codes = HashCodes<SimHash>::create(*family, {.kv_heads = 2, .value_dim = 20});
    REQUIRE(codes->build(backend, source, middle).ok());
    const auto soft = SoftCollisions<SimHash>::create(*family);
    check_no_allocation<Ops>(pool, problem, *TopK<SoftCollisions<SimHash>>::create(kBudget, *soft),
                             &*codes);

    const auto quantiser = HadamardQuantiser::create(24, 2, 1);
    auto signatures = Signatures<HadamardQuantiser>::create(*quantiser, {.kv_heads = 2});
    REQUIRE(signatures->build(backend, source, middle).ok());
    check_no_allocation<Ops>(pool, problem, *TopP<CodeScores>::create(0.5, CodeScores(*quantiser)),
                             &*signatures);
  });
}
TEST_CASE_TEMPLATE_APPLY(samplers, TwoBackends);

TEST_CASE("a refused decode allocates nothing either") {
  const Problem<float> problem({.shape = kShape, .tokens = 20});
  const auto source = problem.source();
  Outputs outputs(kShape);
  const auto request = make_request(problem, source, static_cast<RangeIndex*>(nullptr), outputs);
  SerialExecutor executor;
  const Exact exact;
  const DecodePlan<> plan{.shape = kShape, .sampler = &exact};
  const std::int64_t before = allocation_count();
  const Status status = decode(make_backend<ScalarOps>(executor), plan,
                               std::span<const std::remove_const_t<decltype(request)>>(&request, 1),
                               std::span<std::byte>());
  CHECK(allocation_count() == before);
  CHECK(status.code() == ErrorCode::kWorkspaceTooSmall);
}

}  // namespace
}  // namespace magicpig::test

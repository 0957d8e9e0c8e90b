// SPDX-License-Identifier: Apache-2.0
// decode() over every layout that engines have: exact attention is its definition, and so, but for
// the rounding of another instantiation, is that of the plain layout. Of attention to what is drawn
// this is checked where rows are copied and where they are blocks; what is drawn is compared for
// all layouts and types in layout_ids_test.cpp.
#include "layouts.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "allocations.hpp"
#include "brute_force.hpp"
#include "layout_steps.hpp"
#include "magicpig/attention.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "same_index.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

using Codes = Signatures<HadamardQuantiser>;
using Tables = BucketTables<SimHash>;

// Compilers contract products and sums of one instantiation in other places than of the next.
bool alike(const Outputs& a, const Outputs& b) {
  bool same = a.values.size() == b.values.size();
  for (std::size_t h = 0; h < a.states.size() && same; ++h) {
    const HeadReport& x = a.reports[h];
    const HeadReport& y = b.reports[h];
    const std::vector<double> out(b.states[h].out.begin(), b.states[h].out.end());
    same = relative_error(a.states[h].out, out) < 2e-6 &&
           std::fabs(a.states[h].lse - b.states[h].lse) < 2e-6F && x.exact == y.exact &&
           x.drawn == y.drawn && x.rows_read == y.rows_read && x.indexed == y.indexed;
  }
  return same;
}

// Checks are made in functions that are no templates: they take long to compile.
void check_call(const Status& status, std::int64_t allocations) {
  CHECK_MESSAGE(status.ok(), status.message());
  CHECK(allocations == 0);
}
void check_same(const Outputs& outputs, const Outputs& expected) {
  CHECK(alike(outputs, expected));
}
void check_built(const Status& status, const char* difference) {
  CHECK_MESSAGE(status.ok(), status.message());
  CHECK(difference == nullptr);
}

// decode() of one request, which must not allocate.
template <class Sampler, class Source, class IndexType>
void decode_step(const LayoutStep& step, const Sampler& sampler, const Source& source,
                 const IndexType* index, Outputs& outputs) {
  const DecodePlan<Sampler> plan{.shape = step.shape, .sampler = &sampler, .exact_below = 0};
  const Request<Source, IndexType> request{.key_values = &source,
                                           .index = index,
                                           .query = step.query,
                                           .states = outputs.states,
                                           .reports = outputs.reports,
                                           .seed = 3,
                                           .step = 4};
  SerialExecutor serial;
  std::vector<std::byte> workspace(workspace_bytes<Source>(plan, kLayoutTokens, 1));
  const auto requests = std::span<const Request<Source, IndexType>>(&request, 1);
  const auto backend = make_backend<ScalarOps>(serial);
  const std::int64_t before = allocation_count();
  const Status status = decode(backend, plan, requests, workspace);
  check_call(status, allocation_count() - before);
}

// The plain layout of one shape, and what it gives.
template <class K, class V>
struct Plain {
  explicit Plain(const LayoutStep& of)
      : step(of), rows(of.shape, kLayoutTokens, 17), source(rows.source()), exact(of.shape) {
    decode_step<Exact, StridedKeyValues<K, V>, RangeIndex>(step, Exact(), source, nullptr, exact);
  }
  const LayoutStep& step;
  PlainRows<K, V> rows;
  StridedKeyValues<K, V> source;
  Outputs exact;
};

// Exact attention by its definition. Sums over up to 256 dimensions and 150 tokens are in float.
template <class K, class V>
void check_definition(const Plain<K, V>& plain) {
  const auto everything = every_token({.begin = 0, .end = kLayoutTokens});
  const LayoutStep& step = plain.step;
  for (int head = 0; head < step.shape.query_heads; ++head) {
    const OracleState expected = oracle_attention(
        plain.source,
        {.data = step.query_of(head),
         .kv_head = head / step.shape.group(),
         .scale = static_cast<double>(1.0F / ::sqrtf(static_cast<float>(step.shape.head_dim)))},
        everything);
    CHECK(relative_error(plain.exact.out(head), expected.out) < 1e-5);
    CHECK(std::fabs(static_cast<double>(plain.exact.lse(head)) - expected.lse) < 1e-5);
  }
}

// The outputs with an index over `source` are those of the plain layout with an index over it; both
// are empty as they come.
template <class Sampler, class IndexType, class Source, class PlainSource>
void check_draws(const LayoutStep& step, const Sampler& sampler, Result<IndexType> index,
                 Result<IndexType> expected, const Source& source, const PlainSource& plain) {
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  Status status = index->build(backend, source, kLayoutMiddle);
  if (status.ok()) status = expected->build(backend, plain, kLayoutMiddle);
  check_built(status, index_difference(*index, *expected));
  Outputs outputs(step.shape);
  Outputs plain_outputs(step.shape);
  decode_step(step, sampler, source, &*index, outputs);
  decode_step(step, sampler, plain, &*expected, plain_outputs);
  check_same(outputs, plain_outputs);
}

// Samplers of one head_dim.
struct Samplers {
  explicit Samplers(int dim)
      : quantiser(std::move(*HadamardQuantiser::create(dim, 2, 5))),
        systematic(*Systematic::create(quantiser, {.budget = {.fraction = 0.2}})),
        family(std::move(*SimHash::create({.dim = dim, .bits = 5, .tables = 20, .seed = 6}))),
        collisions(std::move(*Collisions::create(family, {.min_collisions = 2}))) {}
  Samplers(const Samplers&) = delete;
  Samplers& operator=(const Samplers&) = delete;

  HadamardQuantiser quantiser;
  Systematic systematic;
  SimHash family;
  Collisions collisions;
};

template <class Source, class PlainSource>
void check_sampled(const LayoutStep& step, const Source& source, const PlainSource& plain) {
  const Samplers samplers(step.shape.head_dim);
  const auto codes = [&] {
    return Codes::create(samplers.quantiser,
                         {.kv_heads = kLayoutHeads, .value_dim = step.shape.value_dim});
  };
  check_draws(step, samplers.systematic, codes(), codes(), source, plain);
  const auto tables = [&] {
    return Tables::create(samplers.family, {.kv_heads = kLayoutHeads, .segment_tokens = 100});
  };
  check_draws(step, samplers.collisions, tables(), tables(), source, plain);
}

// Whether attention to drawn tokens is compared, too: it takes twice as long to compile.
enum class Draws { kNone, kCompared };

// One layout of one pair of types against the plain one.
template <template <class, class> class Layout, Draws kDraws, class K, class V>
void check_layout(const Plain<K, V>& plain, [[maybe_unused]] bool sampled) {
  const Layout<K, V> layout(plain.rows);
  Outputs exact(plain.step.shape);
  using Source = typename Layout<K, V>::Source;
  decode_step<Exact, Source, RangeIndex>(plain.step, Exact(), layout.source, nullptr, exact);
  check_same(exact, plain.exact);
  if constexpr (kDraws == Draws::kCompared) {
    if (sampled) check_sampled(plain.step, layout.source, plain.source);
  }
}

// All shapes that rows of K and V may have: exact attention in all of them, draws in one for each
// group.
template <class K, class V, Draws kDraws, template <class, class> class... Layouts>
void check_types(LayoutList<Layouts...>) {
  int number = 0;
  for (const int group : kLayoutGroups) {
    const LayoutDims* sampled = &kLayoutDims[number++ % kLayoutDimsCount];
    if (!fits<K, V>(*sampled)) sampled = kLayoutDims;
    for (const LayoutDims& dims : kLayoutDims) {
      if (!fits<K, V>(dims)) continue;
      CAPTURE(group);
      CAPTURE(dims.key);
      CAPTURE(dims.value);
      const LayoutStep step(dims, group);
      const Plain<K, V> plain(step);
      check_definition(plain);
      (check_layout<Layouts, kDraws>(plain, &dims == sampled), ...);
    }
  }
}

TEST_CASE("a wrong page, id, slot or stride is noticed in the output") {
  const LayoutStep step({64, 64}, 2);
  const Plain<float, float> plain(step);
  const auto differs = [&]<class Source>(const Source& source) {
    Outputs exact(step.shape);
    decode_step<Exact, Source, RangeIndex>(step, Exact(), source, nullptr, exact);
    return !alike(exact, plain.exact);
  };
  CHECK(!differs(plain.source));
  CHECK(differs(plain.source.first(kLayoutTokens - 1)));
  Paged16Layout<float, float> paged(plain.rows);
  CHECK(!differs(paged.source));
  paged.table[3] = paged.table[2];
  CHECK(differs(paged.source));
  ListedLayout<float, float> listed(plain.rows);
  CHECK(!differs(listed.source));
  listed.ids[40] = listed.ids[41];
  CHECK(differs(listed.source));
  BlockColumnLayout<float, float> columns(plain.rows);
  CHECK(!differs(columns.source));
  columns.table[3] = columns.table[2];
  CHECK(differs(columns.source));
  const auto strided = [&](std::int64_t key_token, std::int64_t value_head) {
    return *StridedKeyValues<float>::create(
        {.keys = plain.rows.keys.data(),
         .values = plain.rows.values.data(),
         .key_strides = {.head = kLayoutTokens * 64 * 4, .token = key_token},
         .value_strides = {.head = value_head, .token = 64 * 4},
         .kv_heads = kLayoutHeads,
         .head_dim = 64,
         .value_dim = 64,
         .tokens = kLayoutTokens});
  };
  CHECK(!differs(strided(64 * 4, kLayoutTokens * 64 * 4)));
  CHECK(differs(strided(64 * 4 - 4, kLayoutTokens * 64 * 4)));
  CHECK(differs(strided(64 * 4, kLayoutTokens * 64 * 4 - 64 * 4)));
}

// Against the workspace of a source that copies nothing.
TEST_CASE("a workspace without room for copies is refused, with the bytes that are needed") {
  const LayoutStep step({64, 64}, 2);
  const PlainRows<bf16, bf16> rows(step.shape, kLayoutTokens, 1);
  const BlockColumnLayout<bf16, bf16> columns(rows);
  using Source = BlockColumnKeyValues<bf16>;
  const Exact sampler;
  const DecodePlan<Exact> plan{.shape = step.shape, .sampler = &sampler};
  const std::size_t plain = workspace_bytes(plan, kLayoutTokens, 1);
  const std::size_t needed = workspace_bytes<Source>(plan, kLayoutTokens, 1);
  CHECK(needed == plain + std::size_t{kAttendOwnTile} * 64 * sizeof(bf16));
  Outputs outputs(step.shape);
  const Request<Source> request{
      .key_values = &columns.source, .query = step.query, .states = outputs.states};
  SerialExecutor serial;
  std::vector<std::byte> workspace(plain);
  const Status status = decode(make_backend<ScalarOps>(serial), plan,
                               std::span<const Request<Source>>(&request, 1), workspace);
  CHECK(status.code() == ErrorCode::kWorkspaceTooSmall);
  CHECK(std::string(status.message()).find(std::to_string(needed)) != std::string::npos);
}

TEST_CASE("every layout of float32 gives the plain layout's outputs") {
  check_types<float, float, Draws::kNone>(AllLayouts());
}
TEST_CASE("every layout of float16") { check_types<fp16, fp16, Draws::kNone>(AllLayouts()); }
TEST_CASE("every layout of bfloat16") {
  check_types<bf16, bf16, Draws::kNone>(AllLayouts());
  check_types<bf16, bf16, Draws::kCompared>(LayoutList<BlockColumnLayout>());
}
TEST_CASE("every layout of q8_0") { check_types<q8_0, q8_0, Draws::kNone>(BlockLayouts()); }
TEST_CASE("every layout of q4_0") {
  check_types<q4_0, q4_0, Draws::kNone>(BlockLayouts());
  check_types<q4_0, q4_0, Draws::kCompared>(LayoutList<Paged16Layout>());
}
TEST_CASE("keys of q8_0 with values of float16") {
  check_types<q8_0, fp16, Draws::kNone>(LayoutList<GgmlLayout>());
}
TEST_CASE("keys of bfloat16 in columns with values of q4_0") {
  check_types<bf16, q4_0, Draws::kNone>(LayoutList<BlockColumnLayout>());
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Writes what the library does at the published rule, (10, 150) and t = 2, for numpy to recompute.
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "capture.hpp"
#include "compare/trial.hpp"
#include "dump.hpp"
#include "magicpig/attention.hpp"

namespace {

using namespace magicpig;
using bench::Ops;
using bench::Workbench;
using test::Dump;
using test::fail;

constexpr int kBits = 10;
constexpr int kTables = 150;

// key_codes.u16 [kv_heads, tokens, tables], as the buckets hold them.
void dump_key_codes(const BucketTables<SimHash>& index, Dump& dump) {
  const auto tokens = static_cast<std::size_t>(index.indexed().size());
  for (int head = 0; head < index.kv_heads(); ++head) {
    std::vector<std::uint16_t> codes(tokens * kTables, 0xffff);
    for (int s = 0; s < index.segment_count(); ++s) {
      const TokenId first = index.segment_begin(s) - index.indexed().begin;
      for (int table = 0; table < kTables; ++table) {
        for (int code = 0; code < bucket_count(kBits); ++code) {
          const auto bucket = index.segment(s, head).bucket(table, static_cast<Code>(code));
          for (const std::uint16_t id : bucket) {
            codes[static_cast<std::size_t>(first + id) * kTables +
                  static_cast<std::size_t>(table)] = static_cast<std::uint16_t>(code);
          }
        }
      }
    }
    dump.append<std::uint16_t>("key_codes.u16", codes);
  }
}

// query_codes.u16 [queries, query_heads, tables].
void dump_query_codes(const Workbench& bench, const SimHash& family, Dump& dump) {
  const Shape& shape = bench.capture().shape();
  std::vector<Code> codes(kTables);
  std::vector<float> scratch(family.scratch_floats(1));
  for (const int row : bench.rows()) {
    for (int h = 0; h < shape.query_heads; ++h) {
      const float* query = bench.capture().query(row).data() + std::int64_t{h} * shape.head_dim;
      family.hash<Ops>(query, 1, codes.data(), scratch.data());
      dump.append<std::uint16_t>("query_codes.u16", codes);
    }
  }
}

// drawn_counts.i32 [queries, query_heads], and drawn.i32, so many tokens for each of them.
template <class Source>
void dump_drawn(const Workbench& bench, const Source& all, const bench::Tables& tables,
                const Collisions& sampler, Dump& dump) {
  const Shape& shape = bench.capture().shape();
  const DrawLimits limits{.group = shape.group(), .tokens = bench.middle().size()};
  Arena counting;
  (void)sampler.carve(counting, limits);
  std::vector<std::byte> memory(counting.bytes_needed());
  Arena arena(memory);
  auto scratch = sampler.carve(arena, limits);
  for (const int row : bench.rows()) {
    const Source visible = all.first(bench.capture().visible(row));
    for (int kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      const float* queries = bench.capture().query(row).data() +
                             std::int64_t{kv_head} * shape.group() * shape.head_dim;
      const DrawInput<Source, BucketTables<SimHash>> input{
          .key_values = visible,
          .index = *tables.index,
          .kv_head = kv_head,
          .queries = {.data = queries, .count = shape.group(), .dim = shape.head_dim},
          .scale = bench.capture().scale(),
          .noise = {}};
      const auto candidates = sampler.draw<Ops>(input, scratch);
      for (int g = 0; g < shape.group(); ++g) {
        std::vector<std::int32_t> drawn;
        for (std::size_t i = 0; i < candidates.tokens.size(); ++i) {
          if (((candidates.members[i] >> g) & 1U) != 0) drawn.push_back(candidates.tokens[i]);
        }
        const auto count = static_cast<std::int32_t>(drawn.size());
        dump.append<std::int32_t>("drawn_counts.i32", std::span(&count, 1));
        dump.append<std::int32_t>("drawn.i32", drawn);
      }
    }
  }
}

// outputs.f32 [seeds, queries, query_heads, value_dim] and lse.f32 [seeds, queries, query_heads].
template <class Source>
void dump_outputs(Workbench& bench, const Source& all, const bench::Tables& tables,
                  const Collisions& sampler, Dump& dump) {
  const Shape& shape = bench.capture().shape();
  const DecodePlan<Collisions> plan{
      .shape = shape, .sampler = &sampler, .scale = bench.capture().scale(), .exact_below = 0};
  const auto backend = make_backend<Ops>(bench.pool());
  std::vector<std::byte> workspace(workspace_bytes(plan, all.tokens(), backend.executor.workers()));
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  const auto dim = static_cast<std::size_t>(shape.value_dim);
  for (const int row : bench.rows()) {
    std::vector<float> out(heads * dim);
    std::vector<AttentionState> states;
    for (std::size_t h = 0; h < heads; ++h) {
      states.push_back({.out = std::span(out).subspan(h * dim, dim)});
    }
    const Source visible = all.first(bench.capture().visible(row));
    const std::vector<Request<Source, BucketTables<SimHash>>> requests{
        {.key_values = &visible,
         .index = &*tables.index,
         .query = bench.capture().query(row),
         .states = states}};
    const Status status = decode(backend, plan, requests, workspace);
    if (!status.ok()) fail(status.message());
    dump.append<float>("outputs.f32", out);
    for (const AttentionState& state : states) {
      dump.append<float>("lse.f32", std::span(&state.lse, 1));
    }
  }
}

void dump_seed(Workbench& bench, std::uint64_t seed, bool details, Dump& dump) {
  const auto tables = bench.tables(kBits, kTables, seed);
  if (!tables.ok()) fail(tables.status().message());
  const auto sampler = Collisions::create(*(*tables)->family, {});
  if (!sampler.ok()) fail(sampler.status().message());
  if (details) {
    dump_key_codes(*(*tables)->index, dump);
    dump_query_codes(bench, *(*tables)->family, dump);
  }
  bench.capture().with_key_values([&](const auto& all) {
    if (details) dump_drawn(bench, all, **tables, *sampler, dump);
    dump_outputs(bench, all, **tables, *sampler, dump);
  });
}

}  // namespace

// dump_published CAPTURE FOLDER SEEDS QUERIES: into an empty folder; codes and tokens of the first
// seed, outputs of all.
int main(int argc, char** argv) {
  if (argc != 5) fail("needs CAPTURE FOLDER SEEDS QUERIES");
  const Result<bench::Capture> capture = bench::Capture::read(argv[1]);
  if (!capture.ok()) fail(capture.status().message());
  auto pool = ThreadPool::create(1);
  if (!pool.ok()) fail(pool.status().message());
  auto bench = Workbench::create(*capture, {.queries = std::atoi(argv[4])}, **pool);
  if (!bench.ok()) fail(bench.status().message());
  Dump dump(argv[2]);
  dump.append<std::int32_t>("rows.i32", (*bench)->rows());
  for (int seed = 1; seed <= std::atoi(argv[3]); ++seed) {
    dump_seed(**bench, static_cast<std::uint64_t>(seed), seed == 1, dump);
  }
}

// SPDX-License-Identifier: Apache-2.0
// Writes the scores that selections rank tokens by, for numpy to recompute.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "capture.hpp"
#include "compare/trial.hpp"
#include "dump.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/cluster_scores.hpp"
#include "magicpig/sample/label_scores.hpp"
#include "magicpig/sample/page_scores.hpp"
#include "magicpig/sample/soft_collisions.hpp"

namespace {

using namespace magicpig;
using bench::Ops;
using bench::Workbench;
using test::Dump;
using test::fail;

// `name` [queries, query_heads, middle].
template <class Scores, class Index>
void dump_scores(const Workbench& bench, const Scores& scores, const Index& index, const char* name,
                 Dump& dump) {
  const Shape& shape = bench.capture().shape();
  const DrawLimits limits{.group = shape.group(), .tokens = bench.middle().size()};
  Arena counting;
  (void)scores.carve(counting, limits);
  std::vector<std::byte> memory(counting.bytes_needed());
  Arena arena{std::span<std::byte>(memory)};
  const auto scratch = scores.carve(arena, limits);
  bench.capture().with_key_values([&](const auto& key_values) {
    using Source = std::remove_cvref_t<decltype(key_values)>;
    for (const int row : bench.rows()) {
      for (int kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
        const float* queries = bench.capture().query(row).data() +
                               std::int64_t{kv_head} * shape.group() * shape.head_dim;
        const DrawInput<Source, Index> input{
            .key_values = key_values,
            .index = index,
            .kv_head = kv_head,
            .queries = {.data = queries, .count = shape.group(), .dim = shape.head_dim},
            .scale = bench.capture().scale(),
            .noise = {}};
        const float* found = scores.template compute<Ops>(input, scratch);
        dump.append<float>(name, {found, static_cast<std::size_t>(shape.group()) *
                                             static_cast<std::size_t>(limits.tokens)});
      }
    }
  });
}

void dump_pages(Workbench& bench, int page, Dump& dump) {
  const auto pages = bench.pages(page, 1);
  if (!pages.ok()) fail(pages.status().message());
  const std::string name = "quest_" + std::to_string(page) + ".f32";
  dump_scores(bench, PageScores(bench.capture().shape().head_dim), *(*pages)->index, name.c_str(),
              dump);
}

void dump_labels(Workbench& bench, int channels, bool by_queries, Dump& dump) {
  const auto labels = bench.labels(channels, by_queries, 1);
  if (!labels.ok()) fail(labels.status().message());
  const std::string name = std::string("double_sparsity_") + (by_queries ? "queries_" : "keys_") +
                           std::to_string(channels) + ".f32";
  dump_scores(bench, LabelScores(channels), *(*labels)->index, name.c_str(), dump);
}

// ivf_centroids.f32 [kv_heads, lists, dim], and ivf_lists.u16 [kv_heads, middle].
void dump_clusters(Workbench& bench, Dump& dump) {
  const auto clusters = bench.clusters(100, 1);
  if (!clusters.ok()) fail(clusters.status().message());
  const KeyClusters& index = *(*clusters)->index;
  for (int h = 0; h < index.kv_heads(); ++h) {
    std::vector<float> centroids;
    for (int l = 0; l < index.lists(); ++l) {
      for (int j = 0; j < index.dim(); ++j) {
        centroids.push_back(index.centroids(h).data[Panels::place(l, j, index.dim())]);
      }
    }
    dump.append<float>("ivf_centroids.f32", centroids);
    dump.append<std::uint16_t>(
        "ivf_lists.u16", {index.list_of(h), static_cast<std::size_t>(index.indexed().size())});
  }
  dump_scores(bench, ClusterScores(index.lists()), index, "ivf.f32", dump);
}

// socket_planes.f32 [bits * tables, dim], and socket_codes.u16 [kv_heads, tables, middle].
void dump_soft_collisions(Workbench& bench, Dump& dump) {
  const auto hashed = bench.hash_codes(8, 60, false, 1);
  if (!hashed.ok()) fail(hashed.status().message());
  const SimHash& family = *(*hashed)->family;
  const HashCodes<SimHash>& index = *(*hashed)->index;
  std::vector<float> planes;
  for (int plane = 0; plane < family.bits() * family.tables(); ++plane) {
    for (int j = 0; j < family.dim(); ++j) planes.push_back(family.plane(plane, j));
  }
  dump.append<float>("socket_planes.f32", planes);
  for (int h = 0; h < index.kv_heads(); ++h) {
    for (int l = 0; l < family.tables(); ++l) {
      for (int s = 0; s < index.segment_count(); ++s) {
        dump.append<Code>("socket_codes.u16", {index.codes(s, h, l),
                                               static_cast<std::size_t>(index.segment_tokens(s))});
      }
    }
  }
  const auto scores = SoftCollisions<SimHash>::create(family);
  if (!scores.ok()) fail(scores.status().message());
  dump_scores(bench, *scores, index, "socket.f32", dump);
}

}  // namespace

// dump_scores CAPTURE FOLDER QUERIES: into an empty folder.
int main(int argc, char** argv) {
  if (argc != 4) fail("needs CAPTURE FOLDER QUERIES");
  const Result<bench::Capture> capture = bench::Capture::read(argv[1]);
  if (!capture.ok()) fail(capture.status().message());
  auto pool = ThreadPool::create(1);
  if (!pool.ok()) fail(pool.status().message());
  auto bench = Workbench::create(*capture, {.queries = std::atoi(argv[3])}, **pool);
  if (!bench.ok()) fail(bench.status().message());
  Dump dump(argv[2]);
  dump.append<std::int32_t>("rows.i32", (*bench)->rows());
  for (const int page : {16, 32, 64}) dump_pages(**bench, page, dump);
  dump_soft_collisions(**bench, dump);
  dump_clusters(**bench, dump);
  dump_labels(**bench, 8, false, dump);
  dump_labels(**bench, 16, true, dump);
}

// SPDX-License-Identifier: Apache-2.0
// Writes what vAttention draws and what attention over it gives, for numpy to recompute.
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
#include "magicpig/sample/vattention.hpp"

namespace {

using namespace magicpig;
using bench::Ops;
using bench::Workbench;
using test::Dump;
using test::fail;

// Of every query and KV head: counts.i32, tokens.i32 and log_pi.f32 of the draw; then outputs.f32
// [queries, query_heads, value_dim] of decode(), which draws the same.
template <class Source>
void dump_draws(const Workbench& bench, const Source& key_values, const VAttentionConfig& config,
                const std::string& name, Dump& dump) {
  const bench::Capture& capture = bench.capture();
  const Shape& shape = capture.shape();
  const auto sampler = VAttention<>::create(config);
  if (!sampler.ok()) fail(sampler.status().message());
  const RangeIndex index = bench.range_index();
  const DrawLimits limits{
      .group = shape.group(), .tokens = bench.middle().size(), .value_dim = shape.value_dim};
  Arena counting;
  (void)sampler->carve(counting, limits);
  std::vector<std::byte> memory(counting.bytes_needed());
  Arena arena{std::span<std::byte>(memory)};
  auto scratch = sampler->carve(arena, limits);
  const DecodePlan<VAttention<>> plan{
      .shape = shape, .sampler = &*sampler, .scale = capture.scale()};
  for (const int row : bench.rows()) {
    const Source visible = key_values.first(capture.visible(row));
    const std::span<const float> query = capture.query(row);
    for (int kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      const DrawInput<Source, RangeIndex> input{
          .key_values = visible,
          .index = index,
          .kv_head = kv_head,
          .queries = {.data = query.data() + std::int64_t{kv_head} * shape.group() * shape.head_dim,
                      .count = shape.group(),
                      .dim = shape.head_dim},
          .scale = capture.scale(),
          .noise = {.seed = 1, .step = static_cast<std::uint32_t>(row)}};
      const auto drawn = sampler->draw<Ops>(input, scratch);
      const auto count = static_cast<std::int32_t>(drawn.tokens.size());
      dump.append<std::int32_t>((name + "_counts.i32").c_str(), {&count, 1});
      dump.append<TokenId>((name + "_tokens.i32").c_str(), drawn.tokens);
      dump.append<float>((name + "_log_pi.f32").c_str(),
                         {drawn.inclusion.log_pi, drawn.tokens.size()});
    }
    std::vector<float> outputs(static_cast<std::size_t>(shape.query_heads) *
                               static_cast<std::size_t>(shape.value_dim));
    std::vector<AttentionState> states;
    const auto dim = static_cast<std::size_t>(shape.value_dim);
    for (std::size_t at = 0; at < outputs.size(); at += dim) {
      states.push_back({.out = std::span(outputs).subspan(at, dim)});
    }
    SerialExecutor serial;
    std::vector<std::byte> workspace(workspace_bytes(plan, visible.tokens(), 1));
    const Request<Source> request{.key_values = &visible,
                                  .index = &index,
                                  .query = query,
                                  .states = states,
                                  .seed = 1,
                                  .step = static_cast<std::uint32_t>(row)};
    const Status status =
        decode(make_backend<Ops>(serial), plan, std::span(&request, 1), workspace);
    if (!status.ok()) fail(status.message());
    dump.append<float>((name + "_outputs.f32").c_str(), outputs);
  }
}

}  // namespace

// dump_vattention CAPTURE FOLDER QUERIES: into an empty folder.
int main(int argc, char** argv) {
  if (argc != 4) fail("needs CAPTURE FOLDER QUERIES");
  const Result<bench::Capture> capture = bench::Capture::read(argv[1]);
  if (!capture.ok()) fail(capture.status().message());
  auto pool = ThreadPool::create(1);
  if (!pool.ok()) fail(pool.status().message());
  const auto bench = Workbench::create(*capture, {.queries = std::atoi(argv[3])}, **pool);
  if (!bench.ok()) fail(bench.status().message());
  Dump dump(argv[2]);
  dump.append<std::int32_t>("rows.i32", (*bench)->rows());
  capture->with_key_values([&](const auto& key_values) {
    VAttentionConfig config{.epsilon = 0.1, .delta = 0.05};
    dump_draws(**bench, key_values, config, "denominator", dump);
    config.sum = SampledSum::kNumerator;
    dump_draws(**bench, key_values, config, "numerator", dump);
    config.sum = SampledSum::kBoth;
    config.two_sided = false;
    dump_draws(**bench, key_values, config, "both", dump);
  });
}

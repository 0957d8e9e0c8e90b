// SPDX-License-Identifier: Apache-2.0
// Times one decode step of one layer, whole (decode/...) and by stage (stage/...).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "profile.hpp"
#include "profile_workload.hpp"
#include "published.hpp"
#include "relative_error.hpp"
#include "signature_stages.hpp"
#include "signature_workload.hpp"
#include "stages.hpp"
#include "workload.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::bench;
using ::benchmark::State;

struct Run {
  WorkloadShape shape;
  int threads = 1;
};

std::string run_name(const char* method, const Run& run, const char* dtype) {
  return std::string("decode/") + method + "/n:" + std::to_string(run.shape.tokens) +
         "/dim:" + std::to_string(run.shape.head_dim) +
         "/group:" + std::to_string(run.shape.group) + "/" + dtype +
         "/threads:" + std::to_string(run.threads);
}

/// decode() of one request.
template <class T, class Sampler, class IndexType>
void time_decode(State& state, Harness& harness, Workload<T>& workload, int threads,
                 const Sampler& sampler, const IndexType* index, const Traffic& traffic) {
  ThreadPool& pool = harness.pool(threads);
  const auto backend = make_backend<Ops>(pool);
  const DecodePlan<Sampler> plan{
      .shape = workload.attention_shape(), .sampler = &sampler, .exact_below = 0};
  std::vector<std::byte> workspace(workspace_bytes(plan, workload.shape().tokens, pool.workers()));
  const auto dim = static_cast<std::size_t>(plan.shape.value_dim);
  std::vector<float> out(static_cast<std::size_t>(plan.shape.query_heads) * dim);
  std::vector<AttentionState> states;
  for (std::size_t i = 0; i < out.size(); i += dim) {
    states.push_back({.out = std::span<float>(out).subspan(i, dim)});
  }
  const std::array requests{Request<StridedKeyValues<T>, IndexType>{.key_values = &workload.view(),
                                                                    .index = index,
                                                                    .query = workload.queries(),
                                                                    .states = states}};
  time_cold(state, harness, pool, traffic, [&] {
    const Status status = decode(backend, plan, requests, workspace);
    if (!status.ok()) fail(status.message());
  });
}

template <class T>
void exact(State& state, Harness& harness, const Run& run) {
  auto& workload = harness.workload<T>(run.shape, false);
  time_decode(state, harness, workload, run.threads, Exact{}, static_cast<const Tables*>(nullptr),
              exact_traffic(workload));
}

template <class T>
void tables(State& state, Harness& harness, const Run& run) {
  auto& workload = harness.workload<T>(run.shape);
  const Collisions sampler = make_collisions(workload);
  time_decode(state, harness, workload, run.threads, sampler, &workload.index(),
              tables_traffic(workload, sampler));
}

/// Signatures need no hash tables: they run beside whatever there are.
template <class T, SignatureSetting kSetting>
void signatures(State& state, Harness& harness, const Run& run) {
  auto& workload = harness.workload<T>(run.shape, false);
  const SignatureIndex& own = signature_index(harness, workload, kSetting.bits);
  const Systematic sampler = own.sampler(kSetting);
  time_decode(state, harness, workload, run.threads, sampler, &own.index,
              signature_traffic(workload, own, kSetting));
}

/// Ends the program unless `decode` draws the library's tokens and put out what it puts out.
template <class T>
void check_published(Workload<T>& workload, const Collisions& sampler, const PublishedIndex& index,
                     PublishedDecode<T>& decode, std::span<const float> out) {
  SamplerScratch<Collisions> scratch(sampler, workload);
  AttendMemory<T> memory(workload);
  const int group = workload.shape().group;
  const TokenRange middle = workload.middle();
  for (int h = 0; h < kKvHeads; ++h) {
    const auto input = workload.draw_input(h);
    const auto drawn = sampler.draw<Ops>(input, *scratch);
    for (int g = 0; g < group; ++g) {
      std::vector<TokenId> ours;
      for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
        if (((drawn.members[i] >> g) & 1U) != 0) ours.push_back(drawn.tokens[i]);
      }
      const auto found = decode.draw(index, h * group + g, decode.head(0));
      std::vector<TokenId> theirs(found.begin(), found.end());
      std::sort(theirs.begin(), theirs.end());
      if (ours != theirs) fail("the published algorithm and the library draw different tokens");
    }
    auto attend = memory.attend(workload, h);
    attend.add_exact({.begin = 0, .end = middle.begin});
    attend.add_exact({.begin = middle.end, .end = workload.shape().tokens});
    attend.add_candidates(drawn, SelfNormalised{});
    memory.finish(attend);
    const auto theirs =
        out.subspan(static_cast<std::size_t>(h) * memory.out.size(), memory.out.size());
    // Its formula cancels in float where u is small: a few times 1e-7 of u = 1e-4.
    if (!(relative_error(theirs, memory.out) <= 1e-2)) {
      fail("the published algorithm and the library put out different things");
    }
  }
}

/// The published algorithm over an index of its own, after a check that it draws what the library
/// draws and puts out the same.
template <class T>
void published(State& state, Harness& harness, const Run& run) {
  auto& workload = harness.workload<T>(run.shape);
  const Collisions sampler = make_collisions(workload);
  const auto& index = harness.keep<PublishedIndex>("published", [&] {
    return PublishedIndex::copy_of(workload.index(), workload.pages().index);
  });
  Traffic traffic = tables_traffic(workload, sampler);  // and each id once more: 32 bits for 16
  for (int h = 0; h < kKvHeads; ++h) traffic.bytes += table_bytes(workload, h);
  ThreadPool& pool = harness.pool(run.threads);
  PublishedDecode<T> decode(workload, pool.workers());
  std::vector<float> out(workload.queries().size());
  decode.run(pool, index, out);
  check_published(workload, sampler, index, decode, out);
  time_cold(state, harness, pool, traffic, [&] { decode.run(pool, index, out); });
}

/// A method of decode/...: its name, how it is run and the hash tables it needs. A new method is a
/// function like those above and a line in methods().
template <class T>
struct Method {
  const char* name;
  void (*run)(State& state, Harness& harness, const Run& run);
  TableSetting index = kPublished;
};

// The published algorithm is described for rows of scalars.
template <class T>
std::vector<Method<T>> methods() {
  std::vector<Method<T>> list{
      {"exact", exact<T>},
      {"tables", tables<T>},
      {"probing", tables<T>, kProbing},
      {"signatures_1bit", signatures<T, SignatureSetting{.bits = 1, .rows = 0.02}>},
      {"signatures_2bit", signatures<T, SignatureSetting{.bits = 2, .rows = 0.01}>}};
  if constexpr (kScalarsPerElement<T> == 1) list.push_back({"published", published<T>});
  return list;
}

/// The layers of a profile that was asked for, by the name of their runs: `<file's stem>:<layer>`.
using Profiles = std::vector<LayerProfile>;

/// Takes `--profile=FILE` out of the arguments, as often as it is there. Ends the program on a file
/// that is no profile.
Profiles take_profiles(int& argc, char** argv) {
  const std::string option = "--profile=";
  Profiles layers;
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind(option, 0) != 0) {
      argv[kept++] = argv[i];
      continue;
    }
    const std::string path = argument.substr(option.size());
    auto profile = read_profile(path);
    if (!profile.ok()) fail(profile.status().message());
    for (LayerProfile& layer : profile->layers) {
      layer.name = std::filesystem::path(path).stem().string() + ":" + layer.name;
      for (const LayerProfile& other : layers) {
        if (other.name == layer.name) fail((layer.name + " is in two files of one name").c_str());
      }
      layers.push_back(std::move(layer));
    }
  }
  argc = kept;
  return layers;
}

/// A layer of a profile, its settings repeated over the KV heads. It brings its own index.
template <class T>
void profiled(State& state, Harness& harness, const Run& run, const LayerProfile& layer) {
  auto& workload = harness.workload<T>(run.shape, false);
  const auto& own = harness.keep<ProfiledLayer>(
      layer.name, [&] { return ProfiledLayer::make(workload, layer, harness.pool(run.threads)); });
  time_decode(state, harness, workload, run.threads, own.sampler, &own.index,
              profile_traffic(workload, own));
}

// Wall-clock times, without UseRealTime(): it appends to the name.
template <class Function>
void register_step(const std::string& name, const Function& function) {
  ::benchmark::RegisterBenchmark(name.c_str(), function)
      ->Unit(::benchmark::kMicrosecond)
      ->Iterations(kColdSteps);
}

// Of the methods, those that need these hash tables: a workload holds one kind at a time.
template <class T>
void register_run(Harness& harness, Run run, const Profiles& profiles) {
  for (const Method<T>& method : methods<T>()) {
    if (!(method.index == run.shape.index)) continue;
    register_step(run_name(method.name, run, dtype_name<T>()),
                  [&harness, run, method](State& state) { method.run(state, harness, run); });
  }
  if (!(run.shape.index == kPublished)) return;
  for (const LayerProfile& layer : profiles) {
    register_step(
        run_name(layer.name.c_str(), run, dtype_name<T>()),
        [&harness, run, &layer](State& state) { profiled<T>(state, harness, run, layer); });
  }
}

void register_decode(Harness& harness, const WorkloadShape& shape, bool all,
                     const Profiles& profiles) {
  const bool usual =
      (shape.tokens == 32768 || shape.tokens == 98304) && shape.head_dim == 128 && shape.group == 4;
  for (const int threads : {1, 2}) {
    const Run run{.shape = shape, .threads = threads};
    if (all || usual) register_run<bf16>(harness, run, profiles);
  }
  for (const int threads : {1, 2}) {
    const Run run{.shape = shape, .threads = threads};
    if (all) register_run<fp16>(harness, run, profiles);
    if (all) register_run<float>(harness, run, profiles);
    if (all) register_run<q8_0>(harness, run, profiles);
  }
}

// Shape by shape, since a workload lives until another one is wanted.
void register_all(Harness& harness, bool all, const Profiles& profiles) {
  for (const TokenId tokens : {1024, 2048, 4096, 8192, 32768, 98304, 131072, 1048576}) {
    for (const int dim : {64, 128}) {
      for (const int group : {1, 4, 8}) {
        const WorkloadShape shape{.tokens = tokens, .head_dim = dim, .group = group};
        register_stages(harness, shape, all);
        register_decode(harness, shape, all, profiles);
        register_signature_stages(harness, shape, all);
        WorkloadShape probing = shape;
        probing.index = kProbing;
        register_decode(harness, probing, all, profiles);
      }
    }
  }
  register_merge();
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = wants_all(argc, argv);
  const Profiles profiles = take_profiles(argc, argv);
  Harness harness(argc, argv);
  register_all(harness, all, profiles);
  return run_benchmarks(harness, argc, argv);
}

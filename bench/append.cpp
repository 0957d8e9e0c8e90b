// SPDX-License-Identifier: Apache-2.0
// Times changes of indexes: appends of single tokens, the median, the mean and the slowest of them,
// and each of the other changes.
#include <time.h>
#if defined(__linux__)
#include <malloc.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/index/per_head_index.hpp"

namespace {

using namespace magicpig;

constexpr int kHeads = 8;
constexpr int kDim = 128;
constexpr TokenId kPrompt = 1000;
constexpr Shape kShape{
    .query_heads = kHeads, .kv_heads = kHeads, .head_dim = kDim, .value_dim = kDim};

// Of this thread where the system tells, so that others which share its core do not count.
double microseconds_now() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
#else
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
#endif
}

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "error: %s\n", message);
  std::exit(1);
}

void check(const Status& status) {
  if (!status.ok()) fail(status.message());
}

template <class T>
T get(Result<T> result) {
  check(result.status());
  return std::move(*result);
}

// Keys and values in bf16, [tokens, heads, dim].
struct Cache {
  explicit Cache(TokenId tokens)
      : keys(static_cast<std::size_t>(tokens) * kHeads * kDim), values(keys.size()) {
    const RandomStream stream({.seed = 1});
    for (std::size_t i = 0; i < keys.size(); i += 2) {
      const auto two = stream.normals(static_cast<std::uint32_t>(i));
      for (std::size_t j = 0; j < 2; ++j) {
        keys[i + j] = to_bf16(static_cast<float>(two[j]));
        values[i + j] = to_bf16(static_cast<float>(two[1 - j]));
      }
    }
  }

  std::vector<bf16> keys;
  std::vector<bf16> values;
};

// append(token) for each token, one after the other, in runs of the same that begin with start();
// prints what they took: of each token the least of all runs, so that what others do to the machine
// does not count. Memory goes back to the system between runs, and is new in each of them.
template <class Start, class Append>
void measure(const char* name, TokenId tokens, const Start& start, const Append& append) {
  std::vector<double> times(static_cast<std::size_t>(tokens), 1e30);
  for (int run = 0; run < 3; ++run) {
    start();
    for (TokenId t = 0; t < tokens; ++t) {
      const double begin = microseconds_now();
      append(kPrompt + t);
      double& least = times[static_cast<std::size_t>(t)];
      least = std::min(least, microseconds_now() - begin);
    }
  }
  double sum = 0.0;
  for (const double time : times) sum += time;
  const double mean = sum / static_cast<double>(times.size());
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2];
  const double few = times[times.size() - 1 - times.size() / 1000];
  std::printf("%-34s %9.2f %9.2f %9.2f %9.1f %9.1f %8.1f\n", name, median, mean, mean / kHeads, few,
              times.back(), times.back() / median);
}

void give_memory_back() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

void measure_signatures(const Cache& cache, TokenId tokens, int bits, bool norms) {
  const auto quantiser = get(HadamardQuantiser::create(kDim, bits, 1));
  SerialExecutor serial;
  const auto backend = make_backend<HighwayOps>(serial);
  const auto source = get(StridedKeyValues<bf16>::token_major(
      cache.keys.data(), cache.values.data(), kShape, kPrompt + tokens));
  auto index = get(Signatures<HadamardQuantiser>::create(
      quantiser, {.kv_heads = kHeads, .value_dim = norms ? kDim : 0}));
  const auto start = [&] {
    check(index.build(backend, source, {.begin = 0, .end = 0}));
    give_memory_back();
    check(index.build(backend, source, {.begin = 0, .end = kPrompt}));
  };
  char name[64];
  std::snprintf(name, sizeof name, "signatures, %d bits%s", bits, norms ? ", value norms" : "");
  measure(name, tokens, start, [&](TokenId t) { check(index.append(backend, source, t + 1)); });
}

void measure_tables(const Cache& cache, TokenId tokens, int seal_tokens, int seal_steps) {
  const auto family = get(SimHash::create({.dim = kDim, .bits = 8, .tables = 75, .seed = 1}));
  SerialExecutor serial;
  const auto backend = make_backend<HighwayOps>(serial);
  const auto source = get(StridedKeyValues<bf16>::token_major(
      cache.keys.data(), cache.values.data(), kShape, kPrompt + tokens));
  auto index = get(BucketTables<SimHash>::create(
      family, {.kv_heads = kHeads, .seal_tokens = seal_tokens, .seal_steps = seal_steps}));
  const auto start = [&] {
    check(index.build(backend, source, {.begin = 0, .end = 0}));
    give_memory_back();
    check(index.build(backend, source, {.begin = 0, .end = kPrompt}));
  };
  char name[64];
  std::snprintf(name, sizeof name, "tables, sealed by %d in %d", seal_tokens, seal_steps);
  measure(name, tokens, start, [&](TokenId t) { check(index.append(backend, source, t + 1)); });
}

// The fastest of five runs of change(fork), each on a fork of its own that shares everything.
template <class Index, class Change>
double fastest(const Index& index, const Change& change) {
  double least = 1e30;
  for (int run = 0; run < 5; ++run) {
    Index fork = get(index.fork());
    const double start = microseconds_now();
    change(fork);
    const double time = microseconds_now() - start;
    least = time < least ? time : least;
  }
  return least;
}

template <class Index>
void measure_changes(const char* name, const Index& index, const Cache& cache) {
  SerialExecutor serial;
  const auto backend = make_backend<HighwayOps>(serial);
  const TokenId end = index.indexed().end;
  const auto source =
      get(StridedKeyValues<bf16>::token_major(cache.keys.data(), cache.values.data(), kShape, end));
  std::vector<TokenId> some;
  for (TokenId t = 0; t < 1000; ++t) some.push_back(t * (end / 1000));
  const auto run = [&](const char* what, const auto& change) {
    std::printf("%-24s %-28s %12.1f\n", name, what, fastest(index, change));
  };
  run("build", [&](Index& own) { check(own.build(backend, source, {.begin = 0, .end = end})); });
  run("fork", [&](Index& own) { (void)get(own.fork()); });
  run("truncate by 100", [&](Index& own) { check(own.truncate(end - 100)); });
  run("erase 1,000", [&](Index& own) { check(own.erase(some)); });
  run("rehash 1,000",
      [&](Index& own) { check(own.rehash(backend, source, {.begin = 5000, .end = 6000})); });
  run("drift", [&](Index& own) { (void)get(own.drift(backend, source)); });
  run("recentre", [&](Index& own) { check(own.recentre(backend, source)); });
}

void measure_changes(const Cache& cache, TokenId tokens) {
  SerialExecutor serial;
  const auto backend = make_backend<HighwayOps>(serial);
  const auto source = get(
      StridedKeyValues<bf16>::token_major(cache.keys.data(), cache.values.data(), kShape, tokens));
  const auto quantiser = get(HadamardQuantiser::create(kDim, 1, 1));
  auto codes = get(Signatures<HadamardQuantiser>::create(quantiser, {.kv_heads = kHeads}));
  check(codes.build(backend, source, {.begin = 0, .end = tokens}));
  measure_changes("signatures, 1 bit", codes, cache);
  const auto family = get(SimHash::create({.dim = kDim, .bits = 8, .tables = 75, .seed = 1}));
  auto tables = get(BucketTables<SimHash>::create(family, {.kv_heads = kHeads}));
  check(tables.build(backend, source, {.begin = 0, .end = tokens}));
  measure_changes("tables (8, 75)", tables, cache);
  HeadSetting profile[kHeads];  // the first half as the signatures, the other half as the tables
  for (int h = 0; h < kHeads; ++h) {
    profile[h] = {.kind = HeadKind::kTables, .functions = 8, .tables = 75};
    if (h >= kHeads / 2) continue;
    profile[h] = {.kind = HeadKind::kSignatures, .bits = 1, .budget = 0.02, .value_norms = false};
  }
  const auto hashes =
      get(HeadHashes::create(backend, source, {.begin = 0, .end = tokens}, profile));
  auto heads = get(PerHeadIndex::create(hashes));
  check(heads.build(backend, source, {.begin = 0, .end = tokens}));
  measure_changes("profile of both", heads, cache);
}

}  // namespace

int main(int argc, char** argv) {
  const int tokens = argc > 1 ? std::atoi(argv[1]) : 20000;
  if (tokens < 1000) fail("usage: append [tokens, at least 1,000]");
  std::printf(
      "%d tokens one by one after %d, %d KV heads, head_dim %d, bf16, one thread, us of its "
      "time\n\n",
      tokens, kPrompt, kHeads, kDim);
  std::printf("%-34s %9s %9s %9s %9s %9s %8s\n", "index", "median", "mean", "per head", "99.9 %",
              "worst", "w/median");
  const Cache cache(kPrompt + tokens);
  measure_signatures(cache, tokens, 1, false);
  measure_signatures(cache, tokens, 1, true);
  measure_signatures(cache, tokens, 2, false);
  measure_tables(cache, tokens, 1024, 1);
  measure_tables(cache, tokens, 128, 1);
  measure_tables(cache, tokens, 1024, 1024);
  measure_tables(cache, tokens, 512, 512);
  std::printf("\n%-24s %-28s %12s\n", "index", "change of a fork", "us");
  measure_changes(cache, tokens);
  return 0;
}

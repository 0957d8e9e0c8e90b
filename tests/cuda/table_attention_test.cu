// SPDX-License-Identifier: Apache-2.0
// A decode step by hash tables on the device: the draws of the host from the same codes, and its
// output but for rounding.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <vector>

#include "magicpig/cuda/table_attention.cuh"
#include "table_problem.cuh"

namespace magicpig::test {
namespace {

// A step of a problem, with what it needs on the device.
template <class T, class Out = float>
struct TableStep {
  TableStep(TableProblem<T>& own, const CollisionConfig& rule = {}, int splits = 3)
      : problem(own),
        sampler(make_sampler(*own.family, rule)),
        rule_memory(cuda::Collisions::bytes(*sampler)),
        device_sampler(make_rule()),
        out(queries() * dim()),
        lse(queries()),
        drawn(queries() * static_cast<std::size_t>(own.index->view().words())) {
    plan.query_heads = own.config.query_heads;
    plan.sampler = &device_sampler;
    plan.exact_below = 0;
    plan.splits = splits;
    batch.key_values = own.device();
    batch.queries = own.device_queries.data();
    batch.out = out.data();
    batch.lse = lse.data();
    batch.drawn = drawn.data();
  }

  void run() {
    workspace =
        std::make_unique<DeviceArray<std::byte>>(cuda::workspace_bytes(plan, *problem.index));
    require(cuda::decode(plan, *problem.index, batch, workspace->span(), nullptr));
  }

  [[nodiscard]] std::size_t queries() const {
    return static_cast<std::size_t>(problem.config.requests) * heads();
  }
  [[nodiscard]] std::size_t heads() const {
    return static_cast<std::size_t>(problem.config.query_heads);
  }
  [[nodiscard]] std::size_t dim() const { return static_cast<std::size_t>(problem.config.dim); }

  TableProblem<T>& problem;
  std::unique_ptr<Collisions> sampler;
  DeviceArray<std::byte> rule_memory;
  cuda::Collisions device_sampler;
  DeviceArray<Out> out;
  DeviceArray<float> lse;
  DeviceArray<std::uint32_t> drawn;
  cuda::DecodePlan<cuda::Collisions> plan;
  cuda::DecodeBatch<T, Out> batch;
  std::unique_ptr<DeviceArray<std::byte>> workspace;

 private:
  static std::unique_ptr<Collisions> make_sampler(const SimHash& family,
                                                  const CollisionConfig& config) {
    auto made = Collisions::create(family, config);
    require(made.status());
    return std::make_unique<Collisions>(std::move(*made));
  }
  [[nodiscard]] cuda::Collisions make_rule() const {
    const auto made = cuda::Collisions::create(*sampler, rule_memory.span(), nullptr);
    require(made.status());
    return *made;
  }
};

// What the host draws and puts out for one request, from the codes of the device.
template <class T>
struct HostTableStep {
  template <class Out>
  HostTableStep(const TableStep<T, Out>& step, int request, TokenId tokens)
      : source(step.problem.host(request, tokens)),
        index(step.problem.host_index(request)),
        queries(step.problem.host_queries(request)),
        codes(hash(step, request)),
        outputs(step.heads() * step.dim()) {
    states.resize(step.heads());
    for (std::size_t h = 0; h < step.heads(); ++h) {
      states[h].out = std::span(outputs).subspan(h * step.dim(), step.dim());
    }
    plan.shape = step.problem.shape();
    plan.sampler = step.sampler.get();
    plan.scale = step.plan.scale;
    plan.exact_below = step.plan.exact_below;
    using OwnRequest = Request<StridedKeyValues<T>, Index>;
    const std::vector<OwnRequest> requests = {{.key_values = &source,
                                               .index = index.get(),
                                               .query = queries,
                                               .states = states,
                                               .query_codes = codes}};
    SerialExecutor serial;
    std::vector<std::byte> workspace(workspace_bytes(plan, source.tokens(), 1));
    require(decode(make_backend<ScalarOps>(serial), plan, requests, workspace));
  }

  // The tokens that a query head draws, ascending.
  [[nodiscard]] std::vector<TokenId> drawn(int query_head) const {
    const int group = plan.shape.group();
    const int kv_head = query_head / group;
    const DrawInput<StridedKeyValues<T>, Index> input{
        .key_values = source,
        .index = *index,
        .kv_head = kv_head,
        .queries = {.data = queries.data() + std::int64_t{kv_head} * group * plan.shape.head_dim,
                    .count = group,
                    .dim = plan.shape.head_dim},
        .scale = plan.logit_scale(),
        .noise = {},
        .query_codes = codes.data() + std::int64_t{kv_head} * group * index->family().tables()};
    std::vector<TokenId> tokens;
    draw_on_host(*plan.sampler, input, [&](const auto& candidates) {
      for (std::size_t i = 0; i < candidates.tokens.size(); ++i) {
        if (((candidates.members[i] >> (query_head % group)) & 1U) != 0) {
          tokens.push_back(candidates.tokens[i]);
        }
      }
    });
    return tokens;
  }

  using Index = magicpig::BucketTables<SimHash>;
  StridedKeyValues<T> source;
  std::unique_ptr<Index> index;
  std::vector<float> queries;
  std::vector<Code> codes;
  std::vector<float> outputs;
  std::vector<AttentionState> states;
  DecodePlan<Collisions> plan;

 private:
  template <class Step>
  static std::vector<Code> hash(const Step& step, int request) {
    const auto size = step.heads() * static_cast<std::size_t>(step.problem.setting.tables);
    DeviceArray<Code> to(size);
    require(cuda::hash_queries(step.problem.planes,
                               step.problem.device_queries.data() +
                                   static_cast<std::size_t>(request) * step.heads() * step.dim(),
                               static_cast<int>(step.heads()), to.data(), nullptr));
    return to.get();
  }
};

// The tokens that a query head of a request drew, ascending, from what a step wrote.
template <class T, class Out>
std::vector<TokenId> tokens_drawn(const TableStep<T, Out>& step, int request, int query_head,
                                  int count) {
  const auto words = static_cast<std::size_t>(step.problem.index->view().words());
  const auto all = step.drawn.get();
  const std::size_t at =
      (static_cast<std::size_t>(request) * step.heads() + static_cast<std::size_t>(query_head)) *
      words;
  std::vector<TokenId> tokens;
  for (int i = 0; i < count; ++i) {
    if (((all[at + static_cast<std::size_t>(i / 32)] >> (i % 32)) & 1U) != 0) {
      tokens.push_back(step.problem.config.first + i);
    }
  }
  return tokens;
}

// A weight is one over a probability that comes of a cosine, of which each last bit is worth some
// 1e-5 of it where few tokens are drawn.
constexpr double kTableTolerance = 2e-4;

// All requests of a step against the host's; returns how many tokens were drawn.
template <class T, class Out>
std::size_t check_step(const TableStep<T, Out>& step, const std::vector<std::int32_t>& tokens) {
  std::size_t sum = 0;
  for (int r = 0; r < step.problem.config.requests; ++r) {
    CAPTURE(r);
    const HostTableStep<T> host(step, r, tokens[static_cast<std::size_t>(r)]);
    const int count = host.index->indexed().size();
    const bool sampled = count > 0 && count >= step.plan.exact_below;
    for (int h = 0; h < step.problem.config.query_heads && sampled; ++h) {
      CAPTURE(h);
      const auto own = tokens_drawn(step, r, h, count);
      CHECK(own == host.drawn(h));
      sum += own.size();
    }
    check_outputs(step.out.get(), step.lse.get(), r, host.states, kTableTolerance);
  }
  return sum;
}

template <class T>
void check_draws(const DeviceCacheConfig& config, const TableSetting& setting,
                 const CollisionConfig& rule, const std::vector<std::int32_t>& tokens,
                 int splits = 3) {
  CAPTURE(config.dim);
  CAPTURE(config.query_heads);
  TableProblem<T> problem(config, setting);
  problem.set_tokens(tokens);
  std::vector<std::int32_t> ends = tokens;
  for (std::int32_t& end : ends) end = std::max(end - 64, config.first);
  problem.build(ends);
  TableStep<T> step(problem, rule, splits);
  step.run();
  CHECK(check_step(step, tokens) > 0);
}

TEST_CASE("device: collisions and outputs are the host's for all dimensions") {
  for (const int dim : {64, 96, 128, 256}) {
    check_draws<bf16>({.dim = dim, .capacity = 1500}, {}, {}, {1500, 700});
  }
}

TEST_CASE("device: collisions and outputs are the host's for groups of 1 to 16 query heads") {
  for (const int group : {1, 2, 3, 4, 7, 8, 12, 16}) {
    check_draws<bf16>({.requests = 1, .query_heads = 2 * group, .capacity = 1500}, {}, {}, {1500});
  }
}

TEST_CASE("device: collisions and outputs are the host's for each type of keys and values") {
  check_draws<float>({.dim = 128, .capacity = 1500}, {}, {}, {1500, 300});
  check_draws<fp16>({.dim = 128, .capacity = 1500}, {}, {}, {1500, 300});
}

TEST_CASE("device: collisions in one to three tables, with and without probing") {
  for (const int collisions : {1, 2, 3}) {
    for (const int radius : {0, 1, 2}) {
      CAPTURE(collisions);
      CAPTURE(radius);
      check_draws<bf16>({.requests = 1, .capacity = 1500}, {.bits = 5, .tables = 30},
                        {.min_collisions = collisions, .probe_radius = radius}, {1500});
    }
  }
}

TEST_CASE("device: collisions over many rounds and segments") {
  check_draws<bf16>({.requests = 1, .query_heads = 4, .kv_heads = 1, .capacity = 20000},
                    {.bits = 8, .tables = 30, .segment_tokens = 9024}, {}, {20000}, 2);
}

TEST_CASE("device: short and empty caches are exact, whatever the tables have of them") {
  TableProblem<bf16> problem({.requests = 5, .capacity = 1500}, {});
  const std::vector<std::int32_t> tokens = {0, 1, 4, 5, 1299};
  problem.set_tokens(tokens);
  problem.build({4, 4, 4, 5, 1283});  // of the last one 1,279 tokens
  TableStep<bf16> step(problem);
  step.plan.exact_below = 1280;
  step.run();
  CHECK(check_step(step, tokens) == 0);
  const auto lse = step.lse.get();
  CHECK(lse[0] == -std::numeric_limits<float>::infinity());
}

TEST_CASE("device: collisions are with tokens of the cache only, where tables have more") {
  TableProblem<bf16> problem({.requests = 1, .capacity = 1500}, {});
  problem.set_tokens({1500});
  problem.build({1500});
  TableStep<bf16> step(problem);
  step.run();
  const auto whole = tokens_drawn(step, 0, 3, 1496);
  problem.set_tokens({1000});  // the cache was cut, the index not yet
  step.run();
  auto expected = whole;
  std::erase_if(expected, [](TokenId t) { return t >= 1000; });
  CHECK(expected.size() < whole.size());
  // All words of the segment that the cache ends in are written.
  CHECK(tokens_drawn(step, 0, 3, 1024) == expected);
  const auto out = step.out.get();
  CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
}

TEST_CASE("device: tables of pages in any order have the result of rows at strides") {
  TableProblem<bf16> problem({.capacity = 1536}, {});
  problem.set_tokens({1500, 700});
  problem.build({1436, 636});
  TableStep<bf16> step(problem);
  step.run();
  const auto expected = step.out.get();
  const auto words = tokens_drawn(step, 1, 5, 632);
  for (const int page : {16, 64}) {
    CAPTURE(page);
    const PagedCopy<bf16> pages(problem, page);
    step.batch.key_values = pages.of(problem);
    require(problem.index->clear(nullptr));
    for (int r = 0; r < 2; ++r) {
      require(problem.index->build(step.batch.key_values, r, r == 0 ? 1436 : 636,
                                   problem.workspace.span(), problem.blas.get(), nullptr));
    }
    step.run();
    CHECK(step.out.get() == expected);
    CHECK(tokens_drawn(step, 1, 5, 632) == words);
  }
}

TEST_CASE("device: tables with a scale that is given, be it negative") {
  TableProblem<bf16> problem({.requests = 1, .capacity = 1500}, {});
  problem.set_tokens({1500});
  problem.build({1436});
  TableStep<bf16> step(problem);
  for (const float scale : {0.2F, -0.1F}) {
    step.plan.scale = scale;
    step.run();
    CHECK(check_step(step, {1500}) > 0);
  }
}

TEST_CASE("device: a zero query collides where its codes do, at cosine 0") {
  TableProblem<float> problem({.requests = 1, .query_heads = 2, .kv_heads = 1, .capacity = 900},
                              {});
  problem.set_tokens({900});
  problem.build({836});
  for (int j = 0; j < 64; ++j) problem.queries[static_cast<std::size_t>(j)] = 0.0F;
  problem.device_queries.set(problem.queries);
  TableStep<float> step(problem, {.min_collisions = 1});
  step.run();
  CHECK(check_step(step, {900}) > 0);
}

TEST_CASE("device: a key that is not a number is seen, until its request is built anew") {
  TableProblem<float> problem({.query_heads = 4, .kv_heads = 2, .capacity = 700}, {});
  problem.set_tokens({700, 700});
  std::vector<float> keys = problem.keys;
  keys[(700 + 401) * 64 + 3] = std::nanf("");  // of request 0, KV head 1
  problem.device_keys.set(keys);
  problem.build({636, 636});
  TableStep<float> step(problem);
  const auto lost = [&] {
    step.run();
    const auto lse = step.lse.get();
    std::vector<bool> heads;
    for (const float x : lse) heads.push_back(std::isnan(x));
    return heads;
  };
  const std::vector<bool> second_head = {false, false, true, true, false, false, false, false};
  CHECK(lost() == second_head);
  problem.device_keys.set(problem.keys);
  CHECK(lost() == second_head);  // what was hashed is not known
  problem.build({636, 636});
  CHECK(lost() == std::vector<bool>(8, false));
  CHECK(check_step(step, {700, 700}) > 0);
}

TEST_CASE("device: a value that is not finite is seen by the heads that drew it only") {
  TableProblem<float> problem({.requests = 1, .query_heads = 4, .kv_heads = 1, .capacity = 900},
                              {});
  problem.set_tokens({900});
  problem.build({836});
  TableStep<float> step(problem);
  step.run();
  const auto first = tokens_drawn(step, 0, 0, 832);
  const auto second = tokens_drawn(step, 0, 1, 832);
  std::vector<TokenId> alone;
  std::set_difference(first.begin(), first.end(), second.begin(), second.end(),
                      std::back_inserter(alone));
  REQUIRE(!alone.empty());
  std::vector<float> values = problem.values;
  values[static_cast<std::size_t>(alone[0]) * 64 + 5] = std::numeric_limits<float>::infinity();
  problem.device_values.set(values);
  step.run();
  const auto out = step.out.get();
  CHECK(std::isinf(out[5]));
  CHECK(std::isfinite(out[64 + 5]));
}

TEST_CASE("device: how tables' tokens are split changes rounding only") {
  TableProblem<bf16> problem({.capacity = 3000}, {});
  problem.set_tokens({3000, 2900});
  problem.build({2936, 2836});
  TableStep<bf16> one(problem, {}, 1);
  one.run();
  const auto expected = one.out.get();
  for (const int splits : {2, 7, 200}) {
    TableStep<bf16> step(problem, {}, splits);
    step.run();
    const auto out = step.out.get();
    double worst = 0.0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      worst = std::max(worst, static_cast<double>(std::abs(out[i] - expected[i])));
    }
    CHECK(worst < 1e-5);
    step.run();
    CHECK(step.out.get() == out);
  }
}

TEST_CASE("device: a captured graph looks up what queries and caches have become") {
  TableProblem<bf16> problem({.capacity = 1500}, {});
  problem.set_tokens({1400, 1300});
  problem.build({1336, 1236});
  TableStep<bf16> step(problem);
  step.workspace =
      std::make_unique<DeviceArray<std::byte>>(cuda::workspace_bytes(step.plan, *problem.index));
  const CapturedGraph graph([&](cudaStream_t stream) {
    return cuda::decode(step.plan, *problem.index, step.batch, step.workspace->span(), stream);
  });
  for (int i = 0; i < 3 && graph.supported(); ++i) {
    problem.set_tokens({1401 + i, 1301 + 30 * i});
    require(problem.index->append(problem.device(), 1, 1240 + 120 * i, problem.workspace.span(),
                                  problem.blas.get(), nullptr));
    std::rotate(problem.queries.begin(), problem.queries.begin() + 64, problem.queries.end());
    problem.device_queries.set(problem.queries);
    graph.replay();
    const auto out = step.out.get();
    step.run();
    CHECK(step.out.get() == out);
  }
}

TEST_CASE("device: a step by tables refuses what it cannot do") {
  TableProblem<bf16> problem({.requests = 1, .capacity = 300}, {});
  problem.set_tokens({300});
  problem.build({236});
  TableProblem<bf16> other({.requests = 1, .capacity = 300}, {.tables = 21});
  TableStep<bf16> step(problem);
  TableStep<bf16> alien(other);
  step.workspace =
      std::make_unique<DeviceArray<std::byte>>(cuda::workspace_bytes(step.plan, *problem.index));
  const auto run = [&](const auto& plan, const auto& batch, std::size_t less = 0) {
    const auto span = step.workspace->span();
    return cuda::decode(plan, *problem.index, batch, span.first(span.size() - less), nullptr)
        .code();
  };
  CHECK(run(step.plan, step.batch) == ErrorCode::kOk);
  CHECK(run(step.plan, step.batch, 1) == ErrorCode::kWorkspaceTooSmall);
  auto plan = step.plan;
  plan.sampler = &alien.device_sampler;
  CHECK(run(plan, step.batch) == ErrorCode::kShapeMismatch);
  plan = step.plan;
  plan.sampler = nullptr;
  CHECK(run(plan, step.batch) == ErrorCode::kInvalidArgument);
  auto batch = step.batch;
  batch.queries = nullptr;
  CHECK(run(step.plan, batch) == ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// A decode step by signatures on the device: the draws of the host, and its output but for
// rounding.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "magicpig/cuda/signature_attention.cuh"
#include "signature_problem.cuh"

namespace magicpig::test {
namespace {

// A step of a problem, with what it needs on the device.
template <class T, class Out = float>
struct DeviceStep {
  DeviceStep(SignatureProblem<T>& own, const SignatureSamplerConfig& config, int splits = 3)
      : problem(own),
        sampler(make_sampler(*own.quantiser, config)),
        seeds(requests()),
        steps(requests()),
        out(requests() * heads() * dim()),
        lse(requests() * heads()),
        drawn(requests() * static_cast<std::size_t>(own.config.kv_heads) *
              static_cast<std::size_t>(own.index.view().blocks) * 4) {
    plan.query_heads = own.config.query_heads;
    plan.sampler = sampler.get();
    plan.layer = 3;
    plan.exact_below = 0;
    plan.splits = splits;
    batch.key_values = own.device();
    batch.queries = own.device_queries.data();
    batch.seeds = seeds.data();
    batch.steps = steps.data();
    batch.out = out.data();
    batch.lse = lse.data();
    batch.drawn = drawn.data();
    set_step(5);
  }

  void set_step(std::uint32_t step) {
    step_ = step;
    std::vector<std::uint64_t> s(requests());
    std::vector<std::uint32_t> t(requests());
    for (std::size_t r = 0; r < requests(); ++r) {
      s[r] = seed_of(static_cast<int>(r));
      t[r] = step_of(static_cast<int>(r));
    }
    seeds.set(s);
    steps.set(t);
  }
  [[nodiscard]] static std::uint64_t seed_of(int request) {
    return 0x123456789abcdefULL + static_cast<std::uint64_t>(request);
  }
  [[nodiscard]] std::uint32_t step_of(int request) const {
    return step_ + 10U * static_cast<std::uint32_t>(request);
  }

  void run() {
    workspace =
        std::make_unique<DeviceArray<std::byte>>(cuda::workspace_bytes(plan, problem.index));
    require(cuda::decode(plan, problem.index, batch, workspace->span(), nullptr));
  }

  // The tokens of a request's KV head that were drawn, ascending.
  [[nodiscard]] std::vector<TokenId> tokens_drawn(const std::vector<std::uint32_t>& words,
                                                  int request, int kv_head, int count) const {
    const auto blocks = static_cast<std::size_t>(problem.index.view().blocks);
    const std::size_t at =
        static_cast<std::size_t>(request * problem.config.kv_heads + kv_head) * blocks * 4;
    std::vector<TokenId> tokens;
    for (int i = 0; i < count; ++i) {
      const auto word = static_cast<std::size_t>(i / 32);
      if (((words[at + word] >> (i % 32)) & 1U) != 0) {
        tokens.push_back(problem.config.first + i);
      }
    }
    return tokens;
  }

  [[nodiscard]] std::size_t requests() const {
    return static_cast<std::size_t>(problem.config.requests);
  }
  [[nodiscard]] std::size_t heads() const {
    return static_cast<std::size_t>(problem.config.query_heads);
  }
  [[nodiscard]] std::size_t dim() const { return static_cast<std::size_t>(problem.config.dim); }

  SignatureProblem<T>& problem;
  std::unique_ptr<Poisson> sampler;
  DeviceArray<std::uint64_t> seeds;
  DeviceArray<std::uint32_t> steps;
  DeviceArray<Out> out;
  DeviceArray<float> lse;
  DeviceArray<std::uint32_t> drawn;
  cuda::DecodePlan<Poisson> plan;
  cuda::DecodeBatch<T, Out> batch;
  std::unique_ptr<DeviceArray<std::byte>> workspace;

 private:
  static std::unique_ptr<Poisson> make_sampler(const HadamardQuantiser& quantiser,
                                               const SignatureSamplerConfig& config) {
    auto made = Poisson::create(quantiser, config);
    require(made.status());
    return std::make_unique<Poisson>(std::move(*made));
  }

  std::uint32_t step_ = 0;
};

// What the host draws and puts out for one request.
template <class T>
struct HostStep {
  template <class Out>
  HostStep(const DeviceStep<T, Out>& step, int request, TokenId tokens, TokenId indexed_end)
      : source(step.problem.host(request, tokens)),
        index(step.problem.host_index(request, indexed_end)),
        queries(step.problem.host_queries(request)),
        outputs(step.heads() * step.dim()) {
    states.resize(step.heads());
    for (std::size_t h = 0; h < step.heads(); ++h) {
      states[h].out = std::span(outputs).subspan(h * step.dim(), step.dim());
    }
    plan.shape = step.problem.shape();
    plan.sampler = step.sampler.get();
    plan.layer = step.plan.layer;
    plan.exact_below = step.plan.exact_below;
    decode_all(step, request);
    if (sampled()) list_draws(step, request);
  }

  using Index = magicpig::Signatures<HadamardQuantiser>;
  [[nodiscard]] bool sampled() const {
    return !index->indexed().empty() && index->indexed().size() >= plan.exact_below;
  }

  StridedKeyValues<T> source;
  std::unique_ptr<Index> index;
  std::vector<float> queries;
  std::vector<float> outputs;
  std::vector<AttentionState> states;
  DecodePlan<Poisson> plan;
  std::vector<std::vector<TokenId>> drawn;  // of each KV head

 private:
  template <class Step>
  void decode_all(const Step& step, int request) {
    using OwnRequest = Request<StridedKeyValues<T>, Index>;
    const std::vector<OwnRequest> requests = {{.key_values = &source,
                                               .index = index.get(),
                                               .query = queries,
                                               .states = states,
                                               .seed = step.seed_of(request),
                                               .step = step.step_of(request)}};
    SerialExecutor serial;
    const auto backend = make_backend<ScalarOps>(serial);
    std::vector<std::byte> workspace(workspace_bytes(plan, source.tokens(), 1));
    require(decode(backend, plan, requests, workspace));
  }
  template <class Step>
  void list_draws(const Step& step, int request) {
    const int group = plan.shape.group();
    for (int h = 0; h < plan.shape.kv_heads; ++h) {
      const DrawInput<StridedKeyValues<T>, Index> input{
          .key_values = source,
          .index = *index,
          .kv_head = h,
          .queries = {.data = queries.data() + std::int64_t{h} * group * plan.shape.head_dim,
                      .count = group,
                      .dim = plan.shape.head_dim},
          .scale = plan.logit_scale(),
          .noise = {
              .seed = step.seed_of(request), .step = step.step_of(request), .layer = plan.layer}};
      draw_on_host(*plan.sampler, input, [&](const auto& candidates) {
        drawn.emplace_back(candidates.tokens.begin(), candidates.tokens.end());
      });
    }
  }
};

// All requests of a step against the host's. Request r has tokens[r], of which it indexes those
// before ends[r].
template <class T, class Out>
void check_step(DeviceStep<T, Out>& step, const std::vector<std::int32_t>& tokens,
                const std::vector<std::int32_t>& ends) {
  const auto out = step.out.get();
  const auto lse = step.lse.get();
  const auto words = step.drawn.get();
  for (std::size_t r = 0; r < step.requests(); ++r) {
    const int request = static_cast<int>(r);
    CAPTURE(request);
    const HostStep<T> host(step, request, tokens[r], ends[r]);
    for (std::size_t h = 0; h < host.drawn.size(); ++h) {
      CAPTURE(h);
      const auto own =
          step.tokens_drawn(words, request, static_cast<int>(h), host.index->indexed().size());
      CHECK(own == host.drawn[h]);
    }
    check_outputs(out, lse, request, host.states);
  }
}

template <class T>
void check_draws(const DeviceCacheConfig& config, const SignatureSamplerConfig& sampler,
                 const std::vector<std::int32_t>& tokens, int splits = 3) {
  CAPTURE(config.dim);
  CAPTURE(config.bits);
  CAPTURE(config.query_heads);
  SignatureProblem<T> problem(config);
  problem.set_tokens(tokens);
  std::vector<std::int32_t> ends = tokens;
  for (std::int32_t& end : ends) end = std::max(end - 64, config.first);
  problem.build(ends);
  DeviceStep<T> step(problem, sampler, splits);
  step.run();
  check_step(step, tokens, ends);
}

TEST_CASE("device: draws and outputs are the host's for all bits") {
  for (const int bits : {1, 2, 3, 4}) {
    check_draws<bf16>({.bits = bits, .capacity = 3000}, {.budget = {.fraction = 0.05}},
                      {3000, 1400});
  }
}

TEST_CASE("device: draws and outputs are the host's for all dimensions") {
  for (const int dim : {64, 96, 128, 256}) {
    check_draws<bf16>({.dim = dim, .capacity = 1500}, {.budget = {.fraction = 0.1}}, {1500, 700});
  }
}

TEST_CASE("device: draws and outputs are the host's for groups of 1 to 16 query heads") {
  for (const int group : {1, 2, 3, 4, 7, 8, 12, 16}) {
    check_draws<bf16>({.requests = 1, .query_heads = 2 * group, .capacity = 1500},
                      {.budget = {.fraction = 0.1}}, {1500});
  }
}

TEST_CASE("device: draws and outputs are the host's for each type of keys and values") {
  check_draws<float>({.dim = 128, .capacity = 1500}, {.budget = {.fraction = 0.1}}, {1500, 300});
  check_draws<fp16>({.dim = 128, .capacity = 1500}, {.budget = {.fraction = 0.1}}, {1500, 300});
}

TEST_CASE("device: draws are the host's where the pilot reads some of the blocks only") {
  check_draws<bf16>({.requests = 1, .query_heads = 4, .kv_heads = 1, .bits = 2, .capacity = 20000},
                    {.budget = {.fraction = 0.02}}, {20000}, 5);
}

TEST_CASE("device: draws are the host's for budgets in tokens, of nearly all, of all, of one") {
  const DeviceCacheConfig config{.capacity = 1500};
  for (const TokenId budget : {1, 100, 1400, 100000}) {
    CAPTURE(budget);
    check_draws<bf16>(config, {.budget = {.tokens = budget}}, {1500, 900});
  }
}

TEST_CASE("device: draws are the host's with certain tokens, a least probability, a temperature") {
  const DeviceCacheConfig config{.capacity = 1500};
  check_draws<bf16>(config, {.budget = {.fraction = 0.1}, .certain = 0.5}, {1500, 900});
  check_draws<bf16>(config, {.budget = {.fraction = 0.05}, .least = 0.01}, {1500, 900});
  check_draws<bf16>(config, {.budget = {.fraction = 0.1}, .temperature = 0.4}, {1500, 900});
  check_draws<bf16>(config, {.budget = {.fraction = 0.05}, .least = 1.0}, {1500, 900});
}

TEST_CASE("device: short and empty caches are exact, whatever was indexed of them") {
  SignatureProblem<bf16> problem({.requests = 5, .capacity = 1500});
  const std::vector<std::int32_t> tokens = {0, 1, 4, 5, 1299};
  problem.set_tokens(tokens);
  const std::vector<std::int32_t> ends = {4, 4, 4, 5, 1283};  // of the last one 1,279 tokens
  problem.build(ends);
  DeviceStep<bf16> step(problem, {.budget = {.fraction = 0.02}});
  step.plan.exact_below = 1280;
  step.run();
  check_step(step, tokens, ends);
  const auto lse = step.lse.get();
  const auto out = step.out.get();
  CHECK(lse[0] == -std::numeric_limits<float>::infinity());
  CHECK(std::all_of(out.begin(), out.begin() + 8 * 64, [](float x) { return x == 0.0F; }));
}

TEST_CASE("device: tokens are drawn from the cache only, where an index has more") {
  SignatureProblem<bf16> problem({.requests = 1, .capacity = 1500});
  problem.set_tokens({1500});
  problem.build({1500});
  problem.set_tokens({1000});  // the cache was cut, the index not yet
  DeviceStep<bf16> step(problem, {.budget = {.fraction = 0.1}});
  step.run();
  for (int h = 0; h < 2; ++h) {
    const auto own = step.tokens_drawn(step.drawn.get(), 0, h, 996);
    CHECK(own.size() > 50);
  }
  const auto out = step.out.get();
  CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
}

TEST_CASE("device: steps draw anew, and the same step the same") {
  SignatureProblem<bf16> problem({.capacity = 1500});
  problem.set_tokens({1500, 1400});
  problem.build({1436, 1336});
  DeviceStep<bf16> step(problem, {.budget = {.fraction = 0.05}});
  step.run();
  const auto out = step.out.get();
  const auto words = step.drawn.get();
  step.run();
  CHECK(step.out.get() == out);
  step.set_step(6);
  step.run();
  CHECK(step.drawn.get() != words);
  step.set_step(5);
  step.run();
  CHECK(step.out.get() == out);
  SUBCASE("splits change the last bits of outputs only") {
    step.plan.splits = 7;
    step.run();
    CHECK(step.drawn.get() == words);
    const auto other = step.out.get();
    for (std::size_t i = 0; i < out.size(); ++i)
      CHECK(other[i] == doctest::Approx(out[i]).epsilon(1e-4).scale(1.0));
  }
}

TEST_CASE("device: pages in any order have the result of rows at strides") {
  SignatureProblem<bf16> problem({.capacity = 1536});
  const std::vector<std::int32_t> tokens = {1500, 700};
  problem.set_tokens(tokens);
  problem.build({1436, 636});
  DeviceStep<bf16> step(problem, {.budget = {.fraction = 0.05}});
  step.run();
  const auto expected = step.out.get();
  const auto words = step.drawn.get();
  for (const int page : {16, 64}) {
    CAPTURE(page);
    const PagedCopy<bf16> pages(problem, page);
    step.batch.key_values = pages.of(problem);
    require(problem.index.build(step.batch.key_values, problem.ends.data(), 1500, nullptr));
    step.run();
    CHECK(step.out.get() == expected);
    CHECK(step.drawn.get() == words);
  }
}

TEST_CASE("device: outputs of 16 bits are those of 32, rounded") {
  SignatureProblem<bf16> problem({.capacity = 1500});
  problem.set_tokens({1500, 1400});
  problem.build({1436, 1336});
  DeviceStep<bf16> wide(problem, {.budget = {.fraction = 0.05}});
  wide.run();
  DeviceStep<bf16, bf16> narrow(problem, {.budget = {.fraction = 0.05}});
  narrow.run();
  const auto expected = wide.out.get();
  const auto got = narrow.out.get();
  for (std::size_t i = 0; i < got.size(); ++i) CHECK(got[i] == to_bf16(expected[i]));
  CHECK(wide.lse.get() == narrow.lse.get());
}

TEST_CASE("device: a value that is not a number comes out, and a key that is not") {
  SignatureProblem<float> problem(
      {.requests = 1, .query_heads = 2, .kv_heads = 2, .capacity = 300});
  problem.set_tokens({300});
  problem.build({236});
  std::vector<float> values = problem.values;
  values[2 * 64 + 7] = std::nanf("");  // of an attention sink of KV head 0
  problem.device_values.set(values);
  DeviceStep<float> step(problem, {.budget = {.fraction = 0.1}});
  step.run();
  auto out = step.out.get();
  for (std::size_t j = 0; j < 128; ++j) {
    CAPTURE(j);
    CHECK(std::isnan(out[j]) == (j == 7));
  }
  std::vector<float> keys = problem.keys;
  keys[(300 + 299) * 64] = std::nanf("");  // of the newest token of KV head 1
  problem.device_keys.set(keys);
  step.run();
  out = step.out.get();
  for (std::size_t j = 64; j < 128; ++j) CHECK(std::isnan(out[j]));
}

TEST_CASE("device: a captured graph follows tokens, queries and steps that change") {
  SignatureProblem<bf16> problem({.capacity = 1500});
  problem.set_tokens({1400, 1300});
  problem.build({1336, 1236});
  DeviceStep<bf16> step(problem, {.budget = {.fraction = 0.05}});
  step.workspace =
      std::make_unique<DeviceArray<std::byte>>(cuda::workspace_bytes(step.plan, problem.index));
  // The tokens that have left the window are indexed, then the step.
  const CapturedGraph graph([&](cudaStream_t stream) {
    const Status status = problem.index.append(problem.device(), problem.ends.data(), 128, stream);
    if (!status.ok()) return status;
    return cuda::decode(step.plan, problem.index, step.batch, step.workspace->span(), stream);
  });
  for (int i = 0; i < 3 && graph.supported(); ++i) {
    const std::vector<std::int32_t> tokens = {1401 + i, 1301 + 30 * i};
    const std::vector<std::int32_t> ends = {1337 + i, 1237 + 30 * i};
    problem.set_tokens(tokens);
    problem.ends.set(ends);
    step.set_step(static_cast<std::uint32_t>(20 + i));
    graph.replay();
    const auto out = step.out.get();
    step.run();
    CHECK(step.out.get() == out);
  }
}

// Nothing of these is on a device, and nothing gets that far.
struct Refused {
  Refused() {
    batch.key_values =
        cuda::KeyValues<bf16>::head_major(rows.data(), rows.data(), 1, 2, 4, 64, tokens.data());
    batch.queries = rows.data();
    batch.seeds = seeds.data();
    batch.steps = steps.data();
    batch.out = out.data();
    plan = {.query_heads = 8, .sampler = &*sampler};
  }
  [[nodiscard]] ErrorCode code() const {
    return cuda::decode(plan, *index, batch, {}, nullptr).code();
  }

  alignas(16) std::array<bf16, 2 * 4 * 64> rows{};
  std::array<std::int32_t, 1> tokens{};
  std::array<std::uint64_t, 1> seeds{};
  std::array<std::uint32_t, 1> steps{};
  std::array<float, 8 * 64> out{};
  Result<HadamardQuantiser> quantiser = HadamardQuantiser::create(64, 2, 1);
  std::vector<std::byte> memory =
      std::vector<std::byte>(cuda::Signatures::bytes(quantiser->shape(), config()));
  Result<cuda::Signatures> index = cuda::Signatures::create(*quantiser, config(), memory);
  Result<Poisson> sampler = Poisson::create(*quantiser, {.budget = {.fraction = 0.02}});
  cuda::DecodePlan<Poisson> plan;
  cuda::DecodeBatch<bf16> batch;

  static cuda::SignaturesConfig config() { return {.kv_heads = 2, .capacity = 100}; }
};

TEST_CASE("a step refuses arguments that do not fit, and starts nothing") {
  CHECK(Refused().code() == ErrorCode::kWorkspaceTooSmall);  // all else is in order
  const auto code_with = [](const auto& change) {
    Refused step;
    change(step);
    return step.code();
  };
  using enum ErrorCode;
  CHECK(code_with([](Refused& s) { s.plan.query_heads = 7; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.plan.query_heads = 34; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.plan.query_heads = 0; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.plan.sampler = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.plan.scale = NAN; }) == kNonFinite);
  CHECK(code_with([](Refused& s) { s.plan.splits = 0; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.out = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.queries = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.queries = s.rows.data() + 1; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.seeds = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.steps = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.keys = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.tokens = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.page_tokens = 24; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.key_strides.token = 130; }) ==
        kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.requests = 2; }) == kShapeMismatch);
  CHECK(code_with([](Refused& s) { s.batch.key_values.dim = 128; }) == kShapeMismatch);
  const auto others = HadamardQuantiser::create(64, 3, 1);
  REQUIRE(others.ok());
  const auto sampler = Poisson::create(*others, {.budget = {.fraction = 0.02}});
  CHECK(code_with([&](Refused& s) { s.plan.sampler = &*sampler; }) == kShapeMismatch);
}

TEST_CASE("a dimension that has no kernel is refused") {
  const auto quantiser = HadamardQuantiser::create(80, 2, 1);
  REQUIRE(quantiser.ok());
  const cuda::SignaturesConfig config{.kv_heads = 2, .capacity = 100};
  std::vector<std::byte> memory(cuda::Signatures::bytes(quantiser->shape(), config));
  const auto index = cuda::Signatures::create(*quantiser, config, memory);
  REQUIRE(index.ok());
  Refused step;
  step.batch.key_values.dim = 80;
  step.batch.key_values.key_strides =
      step.batch.key_values.value_strides = {.page = 0, .head = 640, .token = 160};
  CHECK(cuda::decode(step.plan, *index, step.batch, {}, nullptr).code() ==
        ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace magicpig::test

// SPDX-License-Identifier: Apache-2.0
// Times each function of the SIMD seam with each backend and scalar type, on data in the
// first-level cache, and prints how far the backends are apart.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "machine.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/cpu/eigen.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/cpu/xsimd.hpp"
#include "synthetic.hpp"

namespace {

using namespace magicpig;
using ::benchmark::State;

constexpr int kCount = 32;  // rows
constexpr int kDim = 128;
constexpr int kGroup = 4;
constexpr int kSegments = 1024;  // of the curve

std::vector<float> normals(std::size_t count, std::uint64_t seed) {
  const RandomStream stream({.seed = seed});
  std::vector<float> numbers(count);
  for (std::size_t i = 0; i < count; ++i) {
    numbers[i] = static_cast<float>(stream.normals(static_cast<std::uint32_t>(i))[0]);
  }
  return numbers;
}

/// Everything that the functions read and write: 10 to 27 KiB, with what they make of it.
template <class T>
struct Data {
  Data() {
    const std::vector<float> scalars = normals(std::size_t{kCount} * kDim, 2);
    for (int i = 0; i < kCount; ++i) {
      T* row = keys.data() + static_cast<std::size_t>(i * kDim / kScalarsPerElement<T>);
      pointers.push_back(row);
      bench::write_row(scalars.data() + std::ptrdiff_t{i} * kDim, kDim, row);
    }
  }
  [[nodiscard]] Rows<T> rows() const {
    return {.rows = pointers.data(), .count = kCount, .dim = kDim};
  }

  std::vector<T> keys = std::vector<T>(std::size_t{kCount} * kDim / kScalarsPerElement<T>);
  std::vector<const T*> pointers;
  std::vector<float> queries = normals(kGroup * kDim, 1);
  std::vector<float> weights = normals(kGroup * kCount, 3);
  std::vector<float> dots = std::vector<float>(kGroup * kCount);
  std::vector<float> sums = std::vector<float>(kGroup * kDim);
};

template <class Call>
void time_calls(State& state, const Call& call) {
  for (auto _ : state) {
    call();
    ::benchmark::ClobberMemory();
  }
}

void add_run(const std::string& name, void (*run)(State&)) {
  ::benchmark::RegisterBenchmark(("ops/" + name).c_str(), run)->MinTime(0.1);
}

template <class Ops, class T>
void add_row_runs(const std::string& backend, const std::string& type) {
  add_run("dot_rows/" + type + "/" + backend, [](State& state) {
    Data<T> data;
    time_calls(state,
               [&] { Ops::dot_rows(data.rows(), data.queries.data(), kGroup, data.dots.data()); });
  });
  add_run("add_rows/" + type + "/" + backend, [](State& state) {
    Data<T> data;
    time_calls(state,
               [&] { Ops::add_rows(data.rows(), data.weights.data(), kGroup, data.sums.data()); });
  });
}

/// Functions that change an array of kGroup * kCount floats in place: each call begins with a copy.
template <class Function>
void time_in_place(State& state, float scale, const Function& function) {
  std::vector<float> x = normals(kGroup * kCount, 4);
  for (float& value : x) value = -std::abs(value) * scale;
  std::vector<float> y(x.size());
  time_calls(state, [&] {
    std::memcpy(y.data(), x.data(), x.size() * sizeof(float));
    function(y.data(), static_cast<int>(y.size()));
  });
}

template <class Ops>
void add_array_runs(const std::string& backend) {
  add_run("max/" + backend, [](State& state) {
    time_in_place(state, 1.0F,
                  [](float* x, int n) { ::benchmark::DoNotOptimize((Ops::max)(x, n)); });
  });
  add_run("exp_sum/" + backend, [](State& state) {
    time_in_place(state, 5.0F,
                  [](float* x, int n) { ::benchmark::DoNotOptimize(Ops::exp_sum(x, n, 0.0F)); });
  });
  add_run("log_affine_exp/" + backend, [](State& state) {
    time_in_place(state, 5.0F, [](float* x, int n) { Ops::log_affine_exp(x, n, 0.02F, 0.98F); });
  });
  add_run("interpolate/" + backend, [](State& state) {
    const std::vector<float> nodes = normals(kSegments + 1, 5);
    time_in_place(state, 0.3F, [&](float* x, int n) {
      Ops::interpolate({.nodes = nodes.data(), .segments = kSegments}, x, n);
    });
  });
}

/// Two blocks of codes of one bit for each of 128 dimensions, and scores of as many tokens.
struct SignatureData {
  static constexpr int kBlocks = 2;
  static constexpr int kTokens = kBlocks * kSignatureBlock;
  static constexpr int kRows = kDim / 4;

  SignatureData() {
    const RandomStream stream({.seed = 6});
    for (std::size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<std::uint8_t>(stream.bits(static_cast<std::uint32_t>(i)));
    }
  }
  [[nodiscard]] CodeBlocks blocks() const {
    return {.codes = codes.data(),
            .factors = factors.data(),
            .norms = norms.data(),
            .blocks = kBlocks,
            .rows = kRows,
            .factor_scale = 20000.0F};
  }
  [[nodiscard]] PartialSums partial() const {
    return {.sums = sums.data(),
            .middles = middles.data(),
            .units = units.data(),
            .multipliers = multipliers.data(),
            .group = kGroup};
  }
  [[nodiscard]] ScoreRows rows() { return {.data = scores.data(), .stride = kTokens}; }

  std::vector<std::uint8_t> codes = std::vector<std::uint8_t>(std::size_t{kBlocks} * kRows * 64);
  std::vector<bf16> factors = std::vector<bf16>(kTokens, to_bf16(1.2F));
  std::vector<std::int16_t> norms = std::vector<std::int16_t>(kTokens, 3);
  std::vector<std::uint8_t> sums = std::vector<std::uint8_t>(std::size_t{kRows} * kGroup * 16, 15);
  std::vector<std::int16_t> middles = std::vector<std::int16_t>(kGroup, 15 * kRows);
  std::vector<std::int16_t> units = std::vector<std::int16_t>(kGroup, 60);
  std::vector<std::int16_t> multipliers = std::vector<std::int16_t>(kGroup, 900);
  std::vector<std::int16_t> scores = std::vector<std::int16_t>(std::size_t{kTokens} * kGroup, 40);
  std::vector<std::int16_t> log_sums = std::vector<std::int16_t>(kTokens, 40);
  std::vector<std::uint16_t> noise = std::vector<std::uint16_t>(kTokens, 30000);
  std::uint16_t tracks[kSystematicTracks] = {};
  std::uint64_t drawn[kTokens / 64] = {};
};

template <class Ops>
void add_signature_runs(const std::string& backend) {
  static constexpr ScoreRule kRule{.tau = 120};
  constexpr int kTokens = SignatureData::kTokens;
  add_run("score_codes/" + backend, [](State& state) {
    SignatureData data;
    time_calls(state, [&] { Ops::score_codes(data.blocks(), data.partial(), data.rows()); });
  });
  add_run("combine_scores/" + backend, [](State& state) {
    SignatureData data;
    time_calls(state, [&] {
      Ops::combine_scores(data.rows(), kTokens, kGroup, data.units.data(), data.log_sums.data());
    });
  });
  add_run("expected/" + backend, [](State& state) {
    SignatureData data;
    time_calls(state, [&] {
      ::benchmark::DoNotOptimize(Ops::expected(data.log_sums.data(), kTokens, kRule));
    });
  });
  add_run("draw_systematic/" + backend, [](State& state) {
    SignatureData data;
    time_calls(state, [&] {
      Ops::draw_systematic(data.log_sums.data(), kTokens, kRule, data.tracks, data.drawn);
    });
  });
  add_run("draw_poisson/" + backend, [](State& state) {
    SignatureData data;
    time_calls(state, [&] {
      Ops::draw_poisson(data.log_sums.data(), kTokens, kRule, data.noise.data(), data.drawn);
    });
  });
  add_run("transform_lanes/" + backend, [](State& state) {
    std::vector<std::int32_t> x(std::size_t{kDim} * kRotationLanes);
    const std::vector<std::int32_t> signs(kDim, -1);
    const LaneTransform transform{.signs = signs.data(), .count = kDim, .shift = 4};
    time_calls(state, [&] { Ops::transform_lanes(transform, x.data()); });
  });
  add_run("pair_lanes/" + backend, [](State& state) {
    const std::vector<std::int32_t> x(std::size_t{kDim} * kRotationLanes, -1);
    std::vector<std::int16_t> pairs(x.size());
    constexpr int kHalf = kDim / 2;
    time_calls(state, [&] {
      Ops::pair_lanes(x.data(), x.data() + kHalf * kRotationLanes, kHalf, 2 * kRotationLanes,
                      pairs.data());
    });
  });
  add_run("project_lanes/" + backend, [](State& state) {
    const std::vector<std::int16_t> matrix(std::size_t{kDim} * kDim, 100);
    const std::vector<std::int16_t> x(std::size_t{kDim} * kRotationLanes, 100);
    std::vector<std::int32_t> y(x.size());
    time_calls(state, [&] { Ops::project_lanes(matrix.data(), kDim, x.data(), 8, y.data()); });
  });
  add_run("nearest_lanes/" + backend, [](State& state) {
    constexpr int kPairs = 2;
    constexpr std::size_t kRows = kDim / 2 / kPairs;
    const std::vector<std::int16_t> values(kRows * 16 * 2 * kPairs, 100);
    const std::vector<std::int32_t> half_norms(kRows * 16, 20000);
    const std::vector<std::int16_t> y(kRows * kRotationLanes * 2 * kPairs, 100);
    const std::vector<std::uint16_t> wanted(kRotationLanes, 15);
    std::vector<std::uint8_t> codes(kRows * CodeLanes::kRowBytes);
    std::int32_t dots[kRotationLanes];
    time_calls(state, [&] {
      Ops::nearest_lanes({.values = values.data(),
                          .half_norms = half_norms.data(),
                          .rows = kRows,
                          .pairs = kPairs},
                         y.data(), {.words = codes.data(), .wanted = wanted.data()}, dots);
    });
  });
}

template <class Ops>
void add_backend(const std::string& backend) {
  add_row_runs<Ops, float>(backend, "f32");
  add_row_runs<Ops, fp16>(backend, "fp16");
  add_row_runs<Ops, bf16>(backend, "bf16");
  add_row_runs<Ops, q8_0>(backend, "q8_0");
  add_run("project/" + backend, [](State& state) {
    Data<float> data;  // kGroup vectors and one panel of kCount rows, whatever is in it
    time_calls(state, [&] {
      Ops::project({.data = data.keys.data(), .count = kCount, .dim = kDim}, data.queries.data(),
                   kGroup, data.dots.data());
    });
  });
  add_array_runs<Ops>(backend);
  add_signature_runs<Ops>(backend);
}

/// Prints runs as they come, as ever, and at the end nanoseconds of all backends side by side: of
/// repetitions the fastest.
class Comparison : public ::benchmark::ConsoleReporter {
 public:
  Comparison() : ConsoleReporter(OO_None) {}

  void ReportRuns(const std::vector<Run>& runs) override {
    ConsoleReporter::ReportRuns(runs);
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration || run.error_occurred) continue;
      const std::string name = run.run_name.function_name;
      const std::size_t slash = name.rfind('/');
      const std::string operation = name.substr(0, slash);
      const std::string backend = name.substr(slash + 1);
      const double ns = run.real_accumulated_time / static_cast<double>(run.iterations) * 1e9;
      if (times_.count(operation) == 0) operations_.push_back(operation);
      if (std::find(backends_.begin(), backends_.end(), backend) == backends_.end()) {
        backends_.push_back(backend);
      }
      const auto [at, is_new] = times_[operation].emplace(backend, ns);
      if (!is_new) at->second = std::min(at->second, ns);
    }
  }

  void print() const {
    std::printf("\n%-18s", "ns");
    for (const std::string& backend : backends_) std::printf("%10s", backend.c_str());
    std::printf("%20s\n", "slowest / fastest");
    for (const std::string& operation : operations_) print_line(operation);
  }

 private:
  void print_line(const std::string& operation) const {
    const std::map<std::string, double>& of_backends = times_.at(operation);
    std::printf("%-18s", operation.c_str());
    double fastest = of_backends.begin()->second;
    double slowest = fastest;
    for (const std::string& backend : backends_) {
      const auto at = of_backends.find(backend);
      if (at == of_backends.end()) {
        std::printf("%10s", "");
        continue;
      }
      std::printf("%10.0f", at->second);
      fastest = std::min(fastest, at->second);
      slowest = std::max(slowest, at->second);
    }
    std::printf("%20.1f\n", slowest / fastest);
  }

  std::vector<std::string> operations_;  // in the order of their first runs
  std::vector<std::string> backends_;
  std::map<std::string, std::map<std::string, double>> times_;
};

}  // namespace

int main(int argc, char** argv) {
  add_backend<ScalarOps>("scalar");
  add_backend<HighwayOps>("highway");
  add_backend<XsimdOps>("xsimd");
  add_backend<EigenOps>("eigen");
  ::benchmark::AddCustomContext("cpu", bench::cpu_model());
  ::benchmark::AddCustomContext("highway_target", highway_target());
  ::benchmark::AddCustomContext("xsimd_arch", xsimd::default_arch::name());
  ::benchmark::AddCustomContext("eigen_simd", Eigen::SimdInstructionSetsInUse());
  ::benchmark::Initialize(&argc, argv);
  if (::benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  Comparison comparison;
  ::benchmark::RunSpecifiedBenchmarks(&comparison);
  ::benchmark::Shutdown();
  comparison.print();
  return 0;
}

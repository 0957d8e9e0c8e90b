// SPDX-License-Identifier: Apache-2.0
// magicpig_tune: a setting for each KV head of captured layers, of fewest bytes at an error.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "capture.hpp"
#include "compare/progress.hpp"
#include "compare/report.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "profile.hpp"
#include "tune/choose.hpp"

namespace magicpig::bench {
namespace {

struct Options {
  std::vector<std::string> captures;
  double error = 0.05;
  double margin = 0.1;
  bool mean = false;
  bool global = false;
  bool untrained = false;
  std::vector<std::string> kinds{"uniform", "signatures", "tables"};
  int seeds = 2;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  std::string profile;
  TrialConfig trial{.queries = 32, .row_set = RowSet::kEven};

  // What is chosen for its small error on these queries has a larger one on others.
  [[nodiscard]] double aim() const { return error * (1.0 - margin); }
  [[nodiscard]] bool wants(const char* kind) const {
    return std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
  }
};

// Not those of magicpig_compare, where a profile is judged: 1, 2 ...
constexpr std::uint64_t kFirstSeed = 1001;

// Budgets from 1 in 400 rows to 4 in 5, three to an octave.
constexpr int kBudgets = 26;
double budget(int i) { return 0.0025 * std::exp2(i / 3.0); }

// Codes of `bits` bits with norms of values and without, at all budgets, and where few bits say
// little of a logit at some temperatures about their own.
void add_codes(HeadKind kind, int bits, std::vector<HeadSetting>& settings) {
  const double own = kind == HeadKind::kSignatures ? code_temperature(bits)
                                                   : ProductQuantiser::temperature_of(bits);
  for (const bool norms : {true, false}) {
    for (const double factor : {1.0, 0.85, 1.15}) {
      if (factor != 1.0 && bits > 2) continue;
      for (int i = 0; i < kBudgets; ++i) {
        settings.push_back({.kind = kind,
                            .bits = bits,
                            .budget = budget(i),
                            .temperature = std::round(own * factor * 1e4) / 1e4,
                            .value_norms = norms});
      }
    }
  }
}

// Tables of (K, L, t, r): the published two, one collision of few tables, and two with probing;
// each alone, and with half a percent of the tokens drawn uniformly beside.
void add_tables(std::vector<HeadSetting>& settings) {
  struct Rule {
    int functions;
    int tables;
    int min_collisions;
    int probe_radius;
  };
  for (const Rule& rule :
       {Rule{8, 75, 2, 0}, {10, 150, 2, 0}, {10, 60, 1, 0}, {12, 60, 2, 1}, {14, 110, 1, 1}}) {
    for (const double uniform_part : {0.0, 0.005}) {
      settings.push_back({.kind = HeadKind::kTables,
                          .functions = rule.functions,
                          .tables = rule.tables,
                          .min_collisions = rule.min_collisions,
                          .probe_radius = rule.probe_radius,
                          .uniform_part = uniform_part});
    }
  }
}

// Exact, and of the kinds that were asked for all.
std::vector<HeadSetting> all_settings(const Options& options) {
  std::vector<HeadSetting> settings{{}};
  for (int i = 0; i < kBudgets && options.wants("uniform"); ++i) {
    settings.push_back({.kind = HeadKind::kUniform, .budget = budget(i)});
  }
  for (int bits = 1; bits <= 4 && options.wants("signatures"); ++bits) {
    add_codes(options.untrained ? HeadKind::kSignatures : HeadKind::kTrainedSignatures, bits,
              settings);
  }
  if (options.wants("tables")) add_tables(settings);
  return settings;
}

template <class Quantiser>
Status run_codes(const HeadSetting& setting, Trial& trial) {
  const auto codes =
      trial.workbench().codes<Quantiser>(setting.bits, trial.seed(), setting.value_norms);
  if (!codes.ok()) return codes.status();
  const auto sampler = Systematic::create(
      *(*codes)->quantiser,
      {.budget = {.fraction = setting.budget}, .temperature = setting.temperature});
  if (!sampler.ok()) return sampler.status();
  return trial.decode(*sampler, *(*codes)->index);
}

// Planes and tables are made once for all settings of one K and L.
Status run_tables(const HeadSetting& setting, Trial& trial) {
  const auto tables = trial.workbench().tables(setting.functions, setting.tables, trial.seed());
  if (!tables.ok()) return tables.status();
  const BucketTables<SimHash>& index = *(*tables)->index;
  Result<Collisions> sampler = Collisions::create(
      *(*tables)->family,
      {.min_collisions = setting.min_collisions, .probe_radius = setting.probe_radius});
  if (!sampler.ok()) return sampler.status();
  if (setting.uniform_part == 0.0) return trial.decode(*sampler, index);
  const auto both =
      Defensive<Collisions>::create(std::move(*sampler), {.fraction = setting.uniform_part});
  if (!both.ok()) return both.status();
  return trial.decode(*both, index);
}

Status run_setting(const HeadSetting& setting, Trial& trial) {
  switch (setting.kind) {
    case HeadKind::kSignatures:
      return run_codes<HadamardQuantiser>(setting, trial);
    case HeadKind::kTrainedSignatures:
      return run_codes<ProductQuantiser>(setting, trial);
    case HeadKind::kTables:
      return run_tables(setting, trial);
    case HeadKind::kUniform: {
      const auto sampler = Uniform::create({.fraction = setting.budget});
      if (!sampler.ok()) return sampler.status();
      return trial.decode(*sampler, trial.workbench().range_index());
    }
    case HeadKind::kExact:
      return trial.decode(Exact(), trial.workbench().range_index());
  }
  return Status();
}

// The point of each KV head, from errors [seeds, queries, query_heads] and bytes [..., kv_heads].
std::vector<Point> points_of(const Outcome& outcome, const Shape& shape) {
  std::vector<Point> points(static_cast<std::size_t>(shape.kv_heads));
  const auto heads = points.size();
  const auto group = static_cast<std::size_t>(shape.group());
  const auto times = static_cast<double>(outcome.bytes_read.size() / heads);
  for (std::size_t i = 0; i < outcome.errors.size(); ++i) {
    points[i / group % heads].error += outcome.errors[i] / times / shape.group();
  }
  for (std::size_t i = 0; i < outcome.bytes_read.size(); ++i) {
    points[i % heads].bytes += outcome.bytes_read[i] / times;
  }
  return points;
}

// Appends the points of each KV head of a capture to `heads`.
Status measure(Workbench& workbench, const std::string& name, const Options& options,
               std::span<const HeadSetting> settings, Progress& progress,
               std::vector<HeadPoints>& heads) {
  const Shape& shape = workbench.capture().shape();
  std::vector<Outcome> outcomes(settings.size());
  for (int seed = 0; seed < options.seeds; ++seed) {
    for (std::size_t i = 0; i < settings.size(); ++i) {
      progress.step(name_of(settings[i].kind), name);
      if (seed > 0 && settings[i].kind == HeadKind::kExact) continue;
      Trial trial(workbench, {.seed = kFirstSeed + static_cast<std::uint64_t>(seed)}, outcomes[i]);
      const Status status = run_setting(settings[i], trial);
      if (!status.ok()) return status;
    }
  }
  const std::size_t first = heads.size();
  heads.resize(first + static_cast<std::size_t>(shape.kv_heads));
  for (std::size_t i = 0; i < settings.size(); ++i) {
    std::vector<Point> points = points_of(outcomes[i], shape);
    // Rounding apart: attention over all tokens is what errors are measured against.
    if (settings[i].kind == HeadKind::kExact) {
      for (Point& point : points) point.error = 0.0;
    }
    for (std::size_t h = 0; h < points.size(); ++h) heads[first + h].push_back(points[h]);
  }
  return Status();
}

std::string describe(const HeadSetting& setting) {
  std::array<char, 96> text{};
  if (setting.kind == HeadKind::kExact) return name_of(setting.kind);
  if (setting.kind == HeadKind::kTables) {
    const int used =
        std::snprintf(text.data(), text.size(), "tables K=%d L=%d t=%d r=%d", setting.functions,
                      setting.tables, setting.min_collisions, setting.probe_radius);
    const auto at = static_cast<std::size_t>(used);
    if (setting.uniform_part > 0.0) {
      (void)std::snprintf(text.data() + at, text.size() - at, " uniform=%g", setting.uniform_part);
    }
  } else if (!setting.has_codes()) {
    (void)std::snprintf(text.data(), text.size(), "uniform rows=%.4g", setting.budget);
  } else {
    (void)std::snprintf(text.data(), text.size(), "%s bits=%d rows=%.4g temperature=%g%s",
                        name_of(setting.kind), setting.bits, setting.budget, setting.temperature,
                        setting.value_norms ? "" : " no norms");
  }
  return text.data();
}

void print_global(const char* what, const std::optional<std::size_t>& choice,
                  std::span<const HeadSetting> settings, std::span<const HeadPoints> heads) {
  if (!choice.has_value()) return;
  const Point mean = mean_of(heads, std::vector<std::size_t>(heads.size(), *choice));
  std::printf("%-46s %8.4f %8.2f  %s\n", what, mean.error, mean.bytes,
              describe(settings[*choice]).c_str());
}

// What was chosen for each head, and what one setting for all would read.
void print(const Profile& profile, const Options& options, std::span<const HeadSetting> settings,
           std::span<const HeadPoints> heads, std::span<const std::size_t> choices) {
  std::printf("%-38s KV head %8s %8s  setting\n", "capture", "error", "bytes");
  std::size_t at = 0;
  for (const LayerProfile& layer : profile.layers) {
    for (std::size_t h = 0; h < layer.heads.size(); ++h, ++at) {
      const Point& point = heads[at][choices[at]];
      std::printf("%-38s %7zu %8.4f %8.2f  %s\n", layer.name.c_str(), h, point.error, point.bytes,
                  describe(layer.heads[h]).c_str());
    }
  }
  const Point mean = mean_of(heads, choices);
  std::printf("%-46s %8.4f %8.2f\n", "mean of all KV heads", mean.error, mean.bytes);
  print_global("one setting for all, mean error", choose_global(heads, options.aim()), settings,
               heads);
  print_global("one setting for all, error of every KV head",
               choose_global_for_each(heads, options.aim()), settings, heads);
}

nlohmann::ordered_json made_with(const Options& options) {
  return {{"version", MAGICPIG_VERSION_STRING},
          {"error", options.error},
          {"margin", options.margin},
          {"of", options.mean ? "mean" : "each KV head"},
          {"seeds", options.seeds},
          {"queries", options.trial.queries},
          {"sink", options.trial.sink},
          {"local", options.trial.local}};
}

// The choice for every head; with --global the same for all.
Result<std::vector<std::size_t>> choose(const Options& options, std::span<const HeadPoints> heads) {
  if (!options.global) {
    return options.mean ? choose_mean(heads, options.aim()) : choose_each(heads, options.aim());
  }
  const auto one = options.mean ? choose_global(heads, options.aim())
                                : choose_global_for_each(heads, options.aim());
  return std::vector<std::size_t>(heads.size(), one.value_or(0));
}

Status run(const Options& options) {
  auto pool = ThreadPool::create(options.threads);
  if (!pool.ok()) return pool.status();
  std::vector<HeadSetting> settings;
  std::vector<HeadPoints> heads;
  std::optional<Progress> progress;
  Profile profile;
  int head_dim = 0;
  for (const std::string& path : options.captures) {
    const Result<Capture> capture = Capture::read(path);
    if (!capture.ok()) return capture.status();
    const Shape& shape = capture->shape();
    if (settings.empty()) {
      head_dim = shape.head_dim;
      settings = all_settings(options);
      progress.emplace(static_cast<int>(settings.size() * options.captures.size()) * options.seeds);
    }
    if (shape.head_dim != head_dim) {
      return Status::error(ErrorCode::kShapeMismatch,
                           "%.120s: its head_dim is %d, that of the first capture %d", path.c_str(),
                           shape.head_dim, head_dim);
    }
    const std::string name = std::filesystem::path(path).stem().string();
    auto workbench = Workbench::create(*capture, options.trial, **pool);
    if (!workbench.ok()) return workbench.status();
    const Status status = measure(**workbench, name, options, settings, *progress, heads);
    if (!status.ok()) return status;
    profile.layers.push_back({.name = name, .heads = {}});
    profile.layers.back().heads.resize(static_cast<std::size_t>(shape.kv_heads));
  }
  progress.reset();
  const auto choices = choose(options, heads);
  if (!choices.ok()) return choices.status();
  std::size_t at = 0;
  for (LayerProfile& layer : profile.layers) {
    for (HeadSetting& setting : layer.heads) setting = settings[(*choices)[at++]];
  }
  print(profile, options, settings, heads, *choices);
  if (options.profile.empty()) return Status();
  return write_file(options.profile, to_json(profile, made_with(options)));
}

void declare(CLI::App& app, Options& options) {
  app.add_option("FILE", options.captures, "captures (safetensors)")->required();
  app.add_option("--error", options.error, "error of the output, relative L2, not to exceed")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--margin", options.margin, "share of the error that is kept in hand")
      ->check(CLI::Range(0.0, 0.9))
      ->capture_default_str();
  app.add_flag("--mean", options.mean, "the mean over all KV heads is not to exceed it, not each");
  app.add_flag("--global", options.global, "one setting for all KV heads, to compare with");
  app.add_flag("--untrained", options.untrained, "codes in a random rotation, not trained on keys");
  app.add_option("--kinds", options.kinds, "what is tried beside exact")
      ->delimiter(',')
      ->check(CLI::IsMember({"uniform", "signatures", "tables"}))
      ->capture_default_str();
  app.add_option("--seeds", options.seeds, "seeds of codes, planes and draws")
      ->check(CLI::Range(1, 10'000))
      ->capture_default_str();
  app.add_option("--queries", options.trial.queries, "query rows per capture, of the even ones")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--sink", options.trial.sink, "first tokens that stay exact")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--local", options.trial.local, "tokens before the query rows that stay exact")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--profile", options.profile, "file to write the profile to");
}

// Error: two files of one stem, which a profile could not tell apart.
Status check_names(const Options& options) {
  std::set<std::string> stems;
  for (const std::string& path : options.captures) {
    if (stems.insert(std::filesystem::path(path).stem().string()).second) continue;
    return Status::error(ErrorCode::kInvalidArgument, "%.200s: another capture has this name",
                         path.c_str());
  }
  return Status();
}

}  // namespace
}  // namespace magicpig::bench

int main(int argc, char** argv) {
  using namespace magicpig;
  bench::Options options;
  if (options.threads < 1) options.threads = 1;  // where the machine does not say
  CLI::App app("Chooses for each KV head of captured layers how it is read.", "magicpig_tune");
  app.footer(
      "Bytes are those a decode step reads of index and rows, per token between sink and\n"
      "local window and KV head. Queries are the even rows of a capture: the odd ones are\n"
      "for judging, with magicpig_compare --profile FILE --row-set odd.");
  bench::declare(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  Status status = bench::check_names(options);
  if (status.ok()) status = bench::run(options);
  if (status.ok()) return 0;
  (void)std::fprintf(stderr, "magicpig_tune: %s\n", status.message());
  return 2;
}

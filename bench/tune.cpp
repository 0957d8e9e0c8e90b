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
#include <limits>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "capture.hpp"
#include "compare/progress.hpp"
#include "compare/report.hpp"
#include "magicpig/cpu/highway.hpp"
#include "magicpig/planner.hpp"
#include "profile.hpp"
#include "query_rows.hpp"

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
  double index_bytes = std::numeric_limits<double>::infinity();
  int queries = 32;
  TokenId sink = 4;
  TokenId local = 64;

  [[nodiscard]] PlanKinds kinds_to_try() const {
    return {.uniform = wants("uniform"),
            .signatures = wants("signatures") && untrained,
            .trained_signatures = wants("signatures") && !untrained,
            .tables = wants("tables")};
  }
  // `tokens` times KV heads.
  [[nodiscard]] PlanGoal goal(double tokens) const {
    PlanGoal goal{.error = error, .margin = margin, .mean = mean, .one_for_all = global};
    if (std::isfinite(index_bytes)) {
      goal.index_bytes = static_cast<std::size_t>(index_bytes * tokens);
    }
    return goal;
  }
  [[nodiscard]] bool wants(const char* kind) const {
    return std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
  }
};

// The points of the KV heads of a capture, appended to `points`.
Status measure(const Capture& capture, const Options& options,
               std::span<const HeadSetting> settings, ThreadPool& pool, Progress& progress,
               const std::string& name, std::vector<HeadPoint>& points) {
  const Result<TokenRange> middle = middle_of(capture, options.sink, options.local);
  if (!middle.ok()) return middle.status();
  std::vector<float> queries;
  std::vector<TokenId> seen;
  for (const int row : choose_rows(capture, options.queries, RowSet::kEven)) {
    const auto query = capture.query(row);
    queries.insert(queries.end(), query.begin(), query.end());
    seen.push_back(capture.visible(row));
  }
  return capture.with_key_values([&](const auto& key_values) {
    using Source = std::remove_cvref_t<decltype(key_values)>;
    const PlanSample<Source> sample{.shape = capture.shape(),
                                    .key_values = &key_values,
                                    .indexed = *middle,
                                    .queries = queries,
                                    .seen = seen,
                                    .scale = capture.scale()};
    const auto backend = make_backend<HighwayOps>(pool);
    auto measurement = Measurement<std::remove_const_t<decltype(backend)>, Source>::create(
        backend, sample, {.seeds = options.seeds});
    if (!measurement.ok()) return measurement.status();
    const std::size_t own = static_cast<std::size_t>(capture.shape().kv_heads) * settings.size();
    points.resize(points.size() + own);
    return measurement->run(settings, std::span(points).last(own), [&](int done, int) {
      const auto at = static_cast<std::size_t>(done - 1) % settings.size();
      progress.step(name_of(settings[at].kind), name);
    });
  });
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

// What one setting for all would read.
void print_global(const char* what, const HeadPoints& points, PlanGoal goal, bool mean,
                  std::span<const HeadSetting> settings) {
  goal.one_for_all = true;
  goal.mean = mean;
  auto choice = SettingChoice::create(points, goal);
  if (!choice.ok()) return;
  const auto chosen = choice->choose();
  if (!chosen.ok()) return;
  const HeadPoint all = SettingChoice::together(points, *chosen);
  std::printf("%-46s %8.4f %8.2f  %s\n", what, all.error, all.bytes,
              describe(settings[chosen->front()]).c_str());
}

// What was chosen for each head, and what one setting for all would read.
void print(const Profile& profile, const PlanGoal& goal, std::span<const HeadSetting> settings,
           const HeadPoints& points, std::span<const std::size_t> choices) {
  std::printf("%-38s KV head %8s %8s  setting\n", "capture", "error", "bytes");
  std::size_t at = 0;
  for (const LayerProfile& layer : profile.layers) {
    for (std::size_t h = 0; h < layer.heads.size(); ++h, ++at) {
      const HeadPoint& point = points.at(at, choices[at]);
      std::printf("%-38s %7zu %8.4f %8.2f  %s\n", layer.name.c_str(), h, point.error, point.bytes,
                  describe(layer.heads[h]).c_str());
    }
  }
  const HeadPoint mean = SettingChoice::together(points, choices);
  std::printf("%-46s %8.4f %8.2f\n", "mean of all KV heads", mean.error, mean.bytes);
  print_global("one setting for all, mean error", points, goal, true, settings);
  print_global("one setting for all, error of every KV head", points, goal, false, settings);
}

nlohmann::ordered_json made_with(const Options& options) {
  return {{"version", MAGICPIG_VERSION_STRING},
          {"error", options.error},
          {"margin", options.margin},
          {"of", options.mean ? "mean" : "each KV head"},
          {"seeds", options.seeds},
          {"queries", options.queries},
          {"sink", options.sink},
          {"local", options.local}};
}

Status run(const Options& options) {
  auto pool = ThreadPool::create(options.threads);
  if (!pool.ok()) return pool.status();
  const auto settings = PlanSettings::create(options.kinds_to_try());
  if (!settings.ok()) return settings.status();
  const std::span<const HeadSetting> all = settings->all();
  std::optional<Progress> progress(
      std::in_place, static_cast<int>(all.size() * options.captures.size()) * options.seeds);
  std::vector<HeadPoint> measured;
  double tokens = 0.0;  // times KV heads
  Profile profile;
  for (const std::string& path : options.captures) {
    const Result<Capture> capture = Capture::read(path);
    if (!capture.ok()) return capture.status();
    const std::string name = std::filesystem::path(path).stem().string();
    const Status status = measure(*capture, options, all, **pool, *progress, name, measured);
    if (!status.ok())
      return Status::error(status.code(), "%.120s: %s", path.c_str(), status.message());
    const auto heads = static_cast<std::size_t>(capture->shape().kv_heads);
    tokens += static_cast<double>(middle_of(*capture, options.sink, options.local)->size()) *
              static_cast<double>(heads);
    profile.layers.push_back({.name = name, .heads = std::vector<HeadSetting>(heads)});
  }
  progress.reset();
  const HeadPoints points{.points = measured, .settings = all.size()};
  const PlanGoal goal = options.goal(tokens);
  auto choice = SettingChoice::create(points, goal);
  if (!choice.ok()) return choice.status();
  const auto chosen = choice->choose();
  if (!chosen.ok()) return chosen.status();
  std::size_t at = 0;
  for (LayerProfile& layer : profile.layers) {
    for (HeadSetting& setting : layer.heads) setting = all[(*chosen)[at++]];
  }
  print(profile, goal, all, points, *chosen);
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
  app.add_option("--index-bytes", options.index_bytes,
                 "most that indexes hold per token and KV head, in the mean")
      ->check(CLI::NonNegativeNumber);
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
  app.add_option("--queries", options.queries, "query rows per capture, of the even ones")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--sink", options.sink, "first tokens that stay exact")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--local", options.local, "tokens before the query rows that stay exact")
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

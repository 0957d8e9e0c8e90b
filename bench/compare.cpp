// SPDX-License-Identifier: Apache-2.0
// magicpig_compare: the error and cost of every method on captured attention of a real model.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "capture.hpp"
#include "compare/methods.hpp"
#include "compare/progress.hpp"
#include "compare/report.hpp"
#include "compare/trial.hpp"

namespace magicpig::bench {
namespace {

struct Options {
  std::vector<std::string> captures;
  std::vector<std::string> methods;
  std::vector<double> rows{0.01, 0.02, 0.04, 0.08};
  int seeds = 5;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  std::string json;
  TokenId context = 0;
  std::string learned;
  std::string profile;
  TrialConfig trial;
};

struct Chosen {
  const Method* method;
  Setting setting;
};

std::string list_of_methods() {
  std::string list;
  for (const Method& method : all_methods()) {
    list += list.empty() ? "" : ", ";
    list += method.name;
  }
  return list;
}

std::string describe_methods() {
  std::string text = "Methods:\n";
  for (const Method& method : all_methods()) {
    text += "  " + std::string(method.name) + ": " + method.summary + "\n";
  }
  return text +
         "Rows are fractions of the tokens between sink and local window, read per KV head.\n"
         "Bytes are those a step reads of index and rows, keys and values at 2 per scalar, over\n"
         "those tokens. Errors are relative L2 against attention in double precision. Time is that "
         "of\n"
         "one thread for one query and KV head.\n";
}

const std::map<std::string, RowSet> kRowSets{
    {"all", RowSet::kAll}, {"even", RowSet::kEven}, {"odd", RowSet::kOdd}};

void declare(CLI::App& app, Options& options) {
  const auto list = [](CLI::Option* option) { option->delimiter(',')->allow_extra_args(false); };
  app.add_option("FILE", options.captures, "captures (safetensors)")->required();
  list(app.add_option("--methods", options.methods, "any of " + list_of_methods() + "; default all")
           ->check([](const std::string& name) -> std::string {
             for (const Method& method : all_methods()) {
               if (name == method.name) return {};
             }
             return "no method is called '" + name + "'; there are " + list_of_methods();
           }));
  list(app.add_option("--rows", options.rows, "budgets of the methods that have one")
           ->check(CLI::Range(1e-6, 1.0))
           ->capture_default_str());
  app.add_option("--seeds", options.seeds, "seeds of planes and draws")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--queries", options.trial.queries, "query rows per capture, evenly spread")
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
  app.add_option("--context", options.context,
                 "tokens of context to keep: the first of --sink and the newest; 0 for all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--learned", options.learned,
                 "weights of the method learned (safetensors): a file, or a folder with one of "
                 "each capture's name; without it that method is left out");
  app.add_option("--row-set", options.trial.row_set, "query rows to choose from: all, even or odd")
      ->transform(CLI::CheckedTransformer(kRowSets))
      ->option_text("NAME [all]");
  app.add_option("--profile", options.profile,
                 "JSON of magicpig_tune: the method \"profile\" beside --methods, or alone");
  app.add_option("--json", options.json, "file to write the results to");
}

// The methods asked for, all if none is; with a profile that one, and others only if asked for.
Result<std::vector<Chosen>> choose(const Options& options) {
  const std::set<std::string> wanted(options.methods.begin(), options.methods.end());
  std::vector<Chosen> chosen;
  const bool all = wanted.empty() && options.profile.empty();
  for (const Method& method : all_methods()) {
    if (!all && wanted.count(method.name) == 0) continue;
    if (method.needs_weights && options.learned.empty()) {
      (void)std::fprintf(stderr, "magicpig_compare: without --learned, %s is NOT measured\n",
                         method.name);
      continue;
    }
    for (Setting& setting : method.settings(options.rows)) {
      chosen.push_back({&method, std::move(setting)});
    }
  }
  if (options.profile.empty()) return chosen;
  Result<Profile> profile = read_profile(options.profile);
  if (!profile.ok()) return profile.status();
  chosen.push_back({&kProfileMethod, profile_setting(std::move(*profile))});
  return chosen;
}

int fail(const std::string& message) {
  (void)std::fprintf(stderr, "magicpig_compare: %s\n", message.c_str());
  return 2;
}

// Every setting with every seed on one capture. Seeds are outermost, for settings of the same
// (K, L) share an index.
Status run_capture(const std::string& name, Workbench& workbench, const Options& options,
                   std::span<const Chosen> chosen, Progress& progress,
                   std::vector<ResultRow>& results) {
  std::vector<Outcome> outcomes(chosen.size());
  for (int seed = 0; seed < options.seeds; ++seed) {
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      progress.step(chosen[i].method->name + (" " + chosen[i].setting.label), name);
      if (seed > 0 && !chosen[i].setting.random) continue;
      Trial trial(
          workbench,
          {.seed = static_cast<std::uint64_t>(seed) + 1, .timed = seed == 0, .capture = name},
          outcomes[i]);
      const Status status = chosen[i].setting.run(trial);
      if (!status.ok()) return status;
    }
  }
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    results.push_back(
        {.capture = name, .method = chosen[i].method->name, .setting = chosen[i].setting.label});
    const int seeds = chosen[i].setting.random ? options.seeds : 1;
    summarise(outcomes[i], static_cast<std::size_t>(seeds), results.back());
  }
  return Status();
}

nlohmann::ordered_json parameters_of(const Options& options) {
  return {{"version", MAGICPIG_VERSION_STRING},
          {"instructions", highway_target()},
          {"seeds", options.seeds},
          {"queries", options.trial.queries},
          {"threads", options.threads},
          {"context", options.context},
          {"sink", options.trial.sink},
          {"local", options.trial.local},
          {"row_set", options.trial.row_set == RowSet::kAll    ? "all"
                      : options.trial.row_set == RowSet::kEven ? "even"
                                                               : "odd"}};
}

// Keeps the newest --context tokens, and at least the rows that are asked.
void shorten(const Options& options, Capture& capture) {
  const TokenId least = options.trial.sink + capture.query_rows();
  const TokenId kept = options.context > least ? options.context : least;
  if (options.context == 0 || kept >= capture.tokens()) return;
  capture.forget(
      {.begin = options.trial.sink, .end = options.trial.sink + capture.tokens() - kept});
}

// --learned, or the file of the capture's name in the folder that it is.
std::string weights_for(const Options& options, const std::string& capture) {
  const std::filesystem::path path(options.learned);
  if (!std::filesystem::is_directory(path)) return options.learned;
  return (path / std::filesystem::path(capture).filename()).string();
}

// The tables of all captures, then their mean, then the JSON.
Status run(const Options& options) {
  const Result<std::vector<Chosen>> chosen = choose(options);
  if (!chosen.ok()) return chosen.status();
  auto pool = ThreadPool::create(options.threads);
  if (!pool.ok()) return pool.status();
  Progress progress(static_cast<int>(chosen->size() * options.captures.size()) * options.seeds);
  std::vector<ResultRow> results;
  for (const std::string& path : options.captures) {
    const std::string name = std::filesystem::path(path).stem().string();
    Result<Capture> capture = Capture::read(path);
    if (!capture.ok()) return capture.status();
    shorten(options, *capture);
    TrialConfig trial = options.trial;
    trial.learned = weights_for(options, path);
    auto workbench = Workbench::create(*capture, trial, **pool);
    if (!workbench.ok()) return workbench.status();
    const std::size_t before = results.size();
    const Status status = run_capture(name, **workbench, options, *chosen, progress, results);
    if (!status.ok()) return status;
    const TokenRange middle = (*workbench)->middle();
    print_block(name + ": " + std::to_string(middle.size()) + " tokens between sink and window",
                std::span(results).subspan(before));
  }
  if (options.captures.size() > 1) {
    print_block("mean of " + std::to_string(options.captures.size()) + " captures",
                mean_over_captures(results));
  }
  if (options.json.empty()) return Status();
  return write_file(options.json, to_json(results, parameters_of(options)));
}

// Error: a method asked for by name whose weights are not given.
Status check_weights(const Options& options) {
  for (const Method& method : all_methods()) {
    if (!method.needs_weights || !options.learned.empty()) continue;
    if (std::count(options.methods.begin(), options.methods.end(), method.name) == 0) continue;
    return Status::error(ErrorCode::kInvalidArgument, "the method %s needs --learned", method.name);
  }
  return Status();
}

// Error: two files of one stem, which could not be told apart in the results.
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
  CLI::App app("Compares ways of sampling attention on captures of a real model.",
               "magicpig_compare");
  app.footer(bench::describe_methods());
  bench::declare(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  Status status = bench::check_names(options);
  if (status.ok()) status = bench::check_weights(options);
  if (status.ok()) status = bench::run(options);
  return status.ok() ? 0 : bench::fail(status.message());
}

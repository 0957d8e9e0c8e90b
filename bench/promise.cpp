// SPDX-License-Identifier: Apache-2.0
// magicpig_promise: how often promised errors are exceeded on captured attention, and at what rows.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "capture.hpp"
#include "compare/measure.hpp"
#include "compare/progress.hpp"
#include "compare/report.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/code_scores.hpp"
#include "magicpig/sample/top_p.hpp"
#include "magicpig/sample/uniform_tail.hpp"
#include "magicpig/sample/vattention.hpp"

namespace magicpig::bench {
namespace {

struct Options {
  std::vector<std::string> captures;
  double epsilon = 0.1;
  double delta = 0.05;
  int seeds = 20;
  int bits = 2;
  double base = 0.01;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  std::string json;
  std::vector<std::string> ways;
  TrialConfig trial;
};

/// A way to answer within epsilon; run() makes a sampler and calls Trial::decode with it.
struct Way {
  std::string name;
  Promise promise;
  std::function<Status(Trial&)> run;
};

template <class Sampler>
Status run_signatures(int bits, const Budget& budget, Trial& trial) {
  const auto codes = trial.workbench().codes<HadamardQuantiser>(bits, trial.seed());
  if (!codes.ok()) return codes.status();
  const auto sampler = Sampler::create(*(*codes)->quantiser, {.budget = budget});
  if (!sampler.ok()) return sampler.status();
  return trial.decode(*sampler, *(*codes)->index);
}

// At least two collisions, and beside them rho of the rows uniformly.
Status run_collisions(int radius, double rho, Trial& trial, const Tables& tables) {
  auto sampler = Collisions::create(*tables.family, {.min_collisions = 2, .probe_radius = radius});
  if (!sampler.ok()) return sampler.status();
  if (rho == 0.0) return trial.decode(*sampler, *tables.index);
  const auto both = Defensive<Collisions>::create(std::move(*sampler), {.fraction = rho});
  if (!both.ok()) return both.status();
  return trial.decode(*both, *tables.index);
}

template <class Scores>
Status run_vattention(const VAttentionConfig& config, const Scores& scores, Trial& trial,
                      const Signatures<HadamardQuantiser>& index) {
  const auto sampler = VAttention<Scores>::create(config, scores);
  if (!sampler.ok()) return sampler.status();
  return trial.decode(*sampler, index);
}

// Draws of our own that keep the promise, and vAttention at the same one.
std::vector<Way> all_ways(const Options& options) {
  const Promise normal{.epsilon = options.epsilon, .delta = options.delta};
  Promise bernstein = normal;
  bernstein.bound = ErrorBound::kBernstein;
  const int bits = options.bits;
  const Budget base{.fraction = options.base};

  const auto signatures = [=](Trial& trial) { return run_signatures<Poisson>(bits, base, trial); };
  const auto systematic = [=](Trial& trial) {
    return run_signatures<Systematic>(bits, base, trial);
  };
  const auto collisions = [](int k, int l, int radius, double rho) {
    return [=](Trial& trial) {
      const auto made = trial.workbench().tables(k, l, trial.seed());
      if (!made.ok()) return made.status();
      return run_collisions(radius, rho, trial, **made);
    };
  };
  const auto tables = [=](Trial& trial) {
    const auto made = trial.workbench().tables(10, 150, trial.seed());
    if (!made.ok()) return made.status();
    auto found = Collisions::create(*(*made)->family, {.min_collisions = 2});
    if (!found.ok()) return found.status();
    const auto sampler = UniformTail<Collisions>::create(std::move(*found), base);
    if (!sampler.ok()) return sampler.status();
    return trial.decode(*sampler, *(*made)->index);
  };
  const auto uniform = [=](Trial& trial) {
    const auto sampler = Uniform::create(base);
    if (!sampler.ok()) return sampler.status();
    return trial.decode(*sampler, trial.workbench().range_index());
  };
  const auto vattention = [=](SampledSum sum, double epsilon, double delta) {
    return [=](Trial& trial) {
      const auto codes = trial.workbench().codes<HadamardQuantiser>(bits, trial.seed());
      if (!codes.ok()) return codes.status();
      return run_vattention({.heavy = {.fraction = 0.02},
                             .base = {.fraction = 0.01},
                             .epsilon = epsilon,
                             .delta = delta,
                             .sum = sum},
                            CodeScores(*(*codes)->quantiser), trial, *(*codes)->index);
    };
  };
  return {{"signatures", normal, signatures},
          {"signatures, Bernstein", bernstein, signatures},
          {"tables, uniform tail", normal, tables},
          {"uniform", normal, uniform},
          {"uniform, Bernstein", bernstein, uniform},
          {"poisson, once", {}, signatures},
          {"systematic, once", {}, systematic},
          {"tables (10, 150), once", {}, collisions(10, 150, 0, 0.0)},
          {"tables (8, 75), once", {}, collisions(8, 75, 0, 0.0)},
          {"tables (10, 150) rho, once", {}, collisions(10, 150, 0, 0.005)},
          {"tables (14, 110) r rho, once", {}, collisions(14, 110, 1, 0.005)},
          {"uniform, once", {}, uniform},
          {"vattention, denominator",
           {},
           vattention(SampledSum::kDenominator, options.epsilon, options.delta)},
          {"vattention, both", {}, vattention(SampledSum::kBoth, options.epsilon, options.delta)},
          // Lemma 4.2: numerator and denominator within epsilon / 4 each, with delta / 2 each.
          {"vattention, output",
           {},
           vattention(SampledSum::kBoth, options.epsilon / 4, options.delta / 2)}};
}

/// What one way did on all captures, by seed.
struct Account {
  std::vector<double> failures;  ///< share of outputs beyond epsilon, [seeds]
  std::vector<double> covered;   ///< share of outputs within their reported 95 %, [seeds]
  std::vector<std::vector<double>> covered_on;  ///< the same of each capture, [captures, seeds]
  std::vector<double> rows;
  std::vector<double> looks;
  std::vector<double> dense;
  std::vector<double> errors;
};

double deviation(std::span<const double> x) {
  double sum = 0.0;
  for (const double value : x) sum += (value - mean(x)) * (value - mean(x));
  return x.size() > 1 ? std::sqrt(sum / static_cast<double>(x.size() - 1)) : 0.0;
}

// Upper 95 % bound of a mean over seeds.
double upper_95(std::span<const double> x) {
  return mean(x) + 1.645 * deviation(x) / std::sqrt(static_cast<double>(x.size()));
}

void note(const std::vector<Outcome>& of_captures, double epsilon, Account& account) {
  std::vector<double> failed;
  std::vector<double> covered;
  std::vector<double> rows;
  std::vector<double> looks;
  std::vector<double> dense;
  std::vector<double> errors;
  account.covered_on.resize(of_captures.size());
  for (std::size_t c = 0; c < of_captures.size(); ++c) {
    const Outcome& outcome = of_captures[c];
    const std::size_t before = covered.size();
    for (std::size_t i = 0; i < outcome.errors.size(); ++i) {
      failed.push_back(outcome.errors[i] <= epsilon ? 0.0 : 1.0);
      // A bound of 0 is that of exact attention, which rounds.
      covered.push_back(outcome.errors[i] <= outcome.bounds_95[i] + 1e-4 ? 1.0 : 0.0);
    }
    account.covered_on[c].push_back(mean(std::span(covered).subspan(before)));
    errors.push_back(mean(outcome.errors));
    rows.push_back(mean(outcome.rows));
    looks.push_back(mean(outcome.looks));
    dense.push_back(mean(outcome.dense));
  }
  account.failures.push_back(mean(failed));
  account.covered.push_back(mean(covered));
  account.rows.push_back(mean(rows));
  account.looks.push_back(mean(looks));
  account.dense.push_back(mean(dense));
  account.errors.push_back(mean(errors));
}

Status run(const Options& options) {
  auto pool = ThreadPool::create(options.threads);
  if (!pool.ok()) return pool.status();
  std::vector<std::unique_ptr<Capture>> captures;
  std::vector<std::unique_ptr<Workbench>> benches;
  for (const std::string& path : options.captures) {
    Result<Capture> capture = Capture::read(path);
    if (!capture.ok()) return capture.status();
    captures.push_back(std::make_unique<Capture>(std::move(*capture)));
    auto bench = Workbench::create(*captures.back(), options.trial, **pool);
    if (!bench.ok()) return bench.status();
    benches.push_back(std::move(*bench));
  }
  std::vector<Way> ways;
  for (Way& way : all_ways(options)) {
    const bool wanted = std::count(options.ways.begin(), options.ways.end(), way.name) > 0;
    if (options.ways.empty() || wanted) ways.push_back(std::move(way));
  }
  std::vector<Account> accounts(ways.size());
  Progress progress(options.seeds * static_cast<int>(ways.size()));
  for (int seed = 0; seed < options.seeds; ++seed) {
    for (std::size_t w = 0; w < ways.size(); ++w) {
      progress.step(ways[w].name, "seed " + std::to_string(seed + 1));
      std::vector<Outcome> outcomes(benches.size());
      for (std::size_t c = 0; c < benches.size(); ++c) {
        Trial trial(*benches[c],
                    {.seed = static_cast<std::uint64_t>(seed) + 1, .promise = ways[w].promise},
                    outcomes[c]);
        const Status status = ways[w].run(trial);
        if (!status.ok()) return status;
      }
      note(outcomes, options.epsilon, accounts[w]);
    }
  }
  std::printf("epsilon %g, delta %g, %d seeds, %zu captures\n", options.epsilon, options.delta,
              options.seeds, captures.size());
  std::printf("  %-28s %9s %9s %9s %8s %7s %7s %9s  %s\n", "", "failures", "below", "error",
              "rows %", "dense %", "looks", "95 % hold", "on captures");
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (std::size_t w = 0; w < ways.size(); ++w) {
    const Account& a = accounts[w];
    std::vector<double> covered_on;
    for (const auto& of_seeds : a.covered_on) covered_on.push_back(mean(of_seeds));
    const auto [least, most] = std::minmax_element(covered_on.begin(), covered_on.end());
    std::printf("  %-28s %9.4f %9.4f %9.4f %8.2f %7.2f %7.2f %9.4f  %.3f to %.3f\n",
                ways[w].name.c_str(), mean(a.failures), upper_95(a.failures), mean(a.errors),
                100.0 * mean(a.rows), 100.0 * mean(a.dense), mean(a.looks), mean(a.covered), *least,
                *most);
    results.push_back({{"method", ways[w].name},
                       {"failures", mean(a.failures)},
                       {"failures_upper_95", upper_95(a.failures)},
                       {"error_mean", mean(a.errors)},
                       {"rows", mean(a.rows)},
                       {"dense", mean(a.dense)},
                       {"looks", mean(a.looks)},
                       {"within_95", mean(a.covered)},
                       {"within_95_by_capture", covered_on},
                       {"failures_by_seed", a.failures}});
  }
  if (options.json.empty()) return Status();
  const nlohmann::ordered_json all{{"epsilon", options.epsilon},
                                   {"delta", options.delta},
                                   {"seeds", options.seeds},
                                   {"results", results}};
  return write_file(options.json, all.dump(1) + "\n");
}

}  // namespace
}  // namespace magicpig::bench

int main(int argc, char** argv) {
  using namespace magicpig;
  bench::Options options;
  if (options.threads < 1) options.threads = 1;  // where the machine does not say
  CLI::App app("Counts how often promised errors are exceeded on captures of a real model.",
               "magicpig_promise");
  app.add_option("FILE", options.captures, "captures (safetensors)")->required();
  app.add_option("--epsilon", options.epsilon, "relative L2 error of an output")
      ->check(CLI::Range(1e-6, 10.0))
      ->capture_default_str();
  app.add_option("--delta", options.delta, "probability of a larger one")
      ->check(CLI::Range(1e-6, 0.999))
      ->capture_default_str();
  app.add_option("--seeds", options.seeds, "seeds of codes, tables and draws")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--queries", options.trial.queries, "query rows per capture, evenly spread")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--bits", options.bits, "bits of signatures")
      ->check(CLI::Range(1, 4))
      ->capture_default_str();
  app.add_option("--base", options.base, "rows of the first look, as a fraction")
      ->check(CLI::Range(1e-6, 1.0))
      ->capture_default_str();
  std::vector<std::string> names;
  for (const bench::Way& way : bench::all_ways(options)) names.push_back(way.name);
  app.add_option("--ways", options.ways, "which of them, by name; default all")
      ->delimiter(';')
      ->allow_extra_args(false)
      ->check(CLI::IsMember(names));
  app.add_option("--threads", options.threads, "threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--json", options.json, "file to write the results to");
  CLI11_PARSE(app, argc, argv);
  const Status status = bench::run(options);
  if (status.ok()) return 0;
  (void)std::fprintf(stderr, "magicpig_promise: %s\n", status.message());
  return 2;
}

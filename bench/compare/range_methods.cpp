// SPDX-License-Identifier: Apache-2.0
// Methods that need no index but a range of tokens: exact, TopK, uniform and the oracles.
#include <array>
#include <cstdio>

#include "compare/methods.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/oracle.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/top_p.hpp"

namespace magicpig::bench {
namespace {

// A setting for each budget, of a sampler that needs no more than a range of tokens.
template <class Sampler>
std::vector<Setting> by_budget(std::span<const double> rows) {
  std::vector<Setting> settings;
  for (const double fraction : rows) {
    std::array<char, 32> label;
    (void)std::snprintf(label.data(), label.size(), "rows=%g", fraction);
    settings.push_back(
        {.label = label.data(), .random = Sampler::kUnbiased, .run = [fraction](Trial& trial) {
           const auto sampler = Sampler::create({.fraction = fraction});
           if (!sampler.ok()) return sampler.status();
           return trial.decode(*sampler, trial.workbench().range_index());
         }});
  }
  return settings;
}

}  // namespace

std::vector<Setting> exact_settings(std::span<const double>) {
  const auto run = [](Trial& trial) {
    return trial.decode(Exact(), trial.workbench().range_index());
  };
  return {{.label = "all", .random = false, .run = run}};
}

std::vector<Setting> top_k_settings(std::span<const double> rows) {
  return by_budget<TopK<>>(rows);
}

// At shares of the softmax, whatever rows those take.
std::vector<Setting> top_p_settings(std::span<const double>) {
  std::vector<Setting> settings;
  for (const double p : kTopP) {
    std::array<char, 32> label;
    (void)std::snprintf(label.data(), label.size(), "p=%g", p);
    settings.push_back({.label = label.data(), .random = false, .run = [p](Trial& trial) {
                          const auto sampler = TopP<>::create(p);
                          if (!sampler.ok()) return sampler.status();
                          return trial.decode(*sampler, trial.workbench().range_index());
                        }});
  }
  return settings;
}

std::vector<Setting> uniform_settings(std::span<const double> rows) {
  return by_budget<Uniform>(rows);
}

std::vector<Setting> multinomial_settings(std::span<const double> rows) {
  return by_budget<OracleMultinomial>(rows);
}

std::vector<Setting> poisson_settings(std::span<const double> rows) {
  return by_budget<OraclePoisson>(rows);
}

}  // namespace magicpig::bench

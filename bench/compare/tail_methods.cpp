// SPDX-License-Identifier: Apache-2.0
// Heavy tokens for certain and a uniform sample of the others: vAttention, and half and half.
#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "compare/methods.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/code_scores.hpp"
#include "magicpig/sample/uniform_tail.hpp"
#include "magicpig/sample/vattention.hpp"

namespace magicpig::bench {
namespace {

using Heavy = TopK<CodeScores>;

// run(index, scores) with signatures of 2 bits and the scores that they give.
template <class Run>
Status with_scores(Trial& trial, const Run& run) {
  const auto codes = trial.workbench().codes<HadamardQuantiser>(2, trial.seed());
  if (!codes.ok()) return codes.status();
  trial.note_index_bytes((*codes)->index->bytes());
  return run(*(*codes)->index, CodeScores(*(*codes)->quantiser));
}

Status run_vattention(const VAttentionConfig& config, Trial& trial) {
  return with_scores(trial, [&](const auto& index, const CodeScores& scores) {
    const auto sampler = VAttention<CodeScores>::create(config, scores);
    if (!sampler.ok()) return sampler.status();
    return trial.decode(*sampler, index);
  });
}

Status run_half_and_half(double rows, Trial& trial) {
  return with_scores(trial, [&](const auto& index, const CodeScores& scores) {
    const auto heavy = Heavy::create({.fraction = rows / 2}, scores);
    if (!heavy.ok()) return heavy.status();
    const auto sampler = UniformTail<Heavy>::create(*heavy, {.fraction = rows / 2});
    if (!sampler.ok()) return sampler.status();
    return trial.decode(*sampler, index);
  });
}

}  // namespace

// At promises about the denominator, as published, and about both sums.
std::vector<Setting> vattention_settings(std::span<const double>) {
  std::vector<Setting> settings;
  for (const SampledSum sum : {SampledSum::kDenominator, SampledSum::kBoth}) {
    for (const double epsilon : {0.2, 0.1, 0.05}) {
      std::array<char, 64> label;
      (void)std::snprintf(label.data(), label.size(), "%s epsilon=%g delta=0.05",
                          sum == SampledSum::kBoth ? "both" : "denominator", epsilon);
      const VAttentionConfig config{.epsilon = epsilon, .delta = 0.05, .sum = sum};
      settings.push_back({.label = label.data(),
                          .run = [config](Trial& trial) { return run_vattention(config, trial); }});
    }
  }
  return settings;
}

// Half of every budget for tokens of the largest estimated logits, half for a sample of the others.
std::vector<Setting> uniform_tail_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  for (const double fraction : rows) {
    std::array<char, 32> label;
    (void)std::snprintf(label.data(), label.size(), "bits=2 rows=%g", fraction);
    settings.push_back({.label = label.data(), .run = [fraction](Trial& trial) {
                          return run_half_and_half(fraction, trial);
                        }});
  }
  return settings;
}

}  // namespace magicpig::bench

// SPDX-License-Identifier: Apache-2.0
// Methods on signatures: draws with probabilities from packed codes.
#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "compare/methods.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/hash/haar.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "magicpig/sample/code_scores.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/sample/top_p.hpp"

namespace magicpig::bench {
namespace {

template <class Sampler, class Quantiser>
Status run_signatures(int bits, const SignatureSamplerConfig& config, Trial& trial) {
  const auto codes = trial.workbench().codes<Quantiser>(bits, trial.seed());
  if (!codes.ok()) return codes.status();
  trial.note_index_bytes((*codes)->index->bytes());
  const auto sampler = Sampler::create(*(*codes)->quantiser, config);
  if (!sampler.ok()) return sampler.status();
  return trial.decode(*sampler, *(*codes)->index);
}

// `name` in front of bits and rows, for some numbers of bits at every budget.
template <class Sampler, class Quantiser = HadamardQuantiser>
void add_settings(const char* name, std::span<const int> all_bits, std::span<const double> rows,
                  SignatureSamplerConfig config, std::vector<Setting>& settings) {
  for (const int bits : all_bits) {
    for (const double fraction : rows) {
      std::array<char, 64> label;
      std::snprintf(label.data(), label.size(), "%sbits=%d rows=%g", name, bits, fraction);
      config.budget = {.fraction = fraction};
      settings.push_back({.label = label.data(), .run = [=](Trial& trial) {
                            return run_signatures<Sampler, Quantiser>(bits, config, trial);
                          }});
    }
  }
}

}  // namespace

// Codes of 1 to 4 bits per dimension at every budget.
std::vector<Setting> signature_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  add_settings<Systematic>("", std::array{1, 2, 3, 4}, rows, {}, settings);
  return settings;
}

// Codes that are trained on the keys.
std::vector<Setting> trained_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  add_settings<Systematic, ProductQuantiser>("", std::array{1, 2, 3, 4}, rows, {}, settings);
  return settings;
}

// Codes of 2 bits drawn from in other ways, and of another rotation.
std::vector<Setting> signature_draw_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  const std::array bits{2};
  add_settings<Poisson>("poisson ", bits, rows, {}, settings);
  add_settings<TopScores>("topk ", bits, rows, {}, settings);
  add_settings<Systematic>("certain=0.25 ", bits, rows, {.budget = {}, .certain = 0.25}, settings);
  add_settings<Systematic>("certain=0.5 ", bits, rows, {.budget = {}, .certain = 0.5}, settings);
  add_settings<Systematic, ScalarQuantiser<HaarRotation>>("haar ", bits, rows, {}, settings);
  return settings;
}

// Trained codes ranked for each head by itself, at every budget.
std::vector<Setting> pq_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  for (const int bits : {1, 2, 4}) {
    for (const double fraction : rows) {
      std::array<char, 32> label;
      std::snprintf(label.data(), label.size(), "bits=%d rows=%g", bits, fraction);
      settings.push_back({.label = label.data(), .run = [=](Trial& trial) {
                            const auto codes =
                                trial.workbench().codes<ProductQuantiser>(bits, trial.seed());
                            if (!codes.ok()) return codes.status();
                            trial.note_index_bytes((*codes)->index->bytes());
                            const auto sampler = TopK<CodeScores>::create(
                                {.fraction = fraction}, CodeScores(*(*codes)->quantiser));
                            if (!sampler.ok()) return sampler.status();
                            return trial.decode(*sampler, *(*codes)->index);
                          }});
    }
  }
  return settings;
}

// Shares of the softmax that codes of 4 bits estimate.
std::vector<Setting> estimated_top_p_settings(std::span<const double>) {
  std::vector<Setting> settings;
  for (const double p : kTopP) {
    std::array<char, 32> label;
    std::snprintf(label.data(), label.size(), "bits=4 p=%g", p);
    settings.push_back({.label = label.data(), .run = [p](Trial& trial) {
                          const auto codes =
                              trial.workbench().codes<HadamardQuantiser>(4, trial.seed());
                          if (!codes.ok()) return codes.status();
                          trial.note_index_bytes((*codes)->index->bytes());
                          const auto sampler =
                              TopP<CodeScores>::create(p, CodeScores(*(*codes)->quantiser));
                          if (!sampler.ok()) return sampler.status();
                          return trial.decode(*sampler, *(*codes)->index);
                        }});
  }
  return settings;
}

}  // namespace magicpig::bench

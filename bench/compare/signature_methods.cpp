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

}  // namespace magicpig::bench

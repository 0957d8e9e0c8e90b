// SPDX-License-Identifier: Apache-2.0
// Methods on signatures: Poisson draws with probabilities from packed codes.
#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "compare/methods.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/hash/rotation.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/sample/poisson.hpp"

namespace magicpig::bench {
namespace {

Status run_signatures(int bits, double rows, Trial& trial) {
  const Capture& capture = trial.workbench().capture();
  const auto rotation = HadamardRotation::create(capture.shape().head_dim, trial.seed());
  if (!rotation.ok()) return rotation.status();
  auto index = Signatures<HadamardRotation>::create(
      *rotation,
      {.kv_heads = capture.shape().kv_heads, .bits = bits, .value_dim = capture.shape().value_dim});
  if (!index.ok()) return index.status();
  const Status built = capture.with_key_values([&](const auto& key_values) {
    return index->build(make_backend<Ops>(trial.workbench().pool()), key_values,
                        trial.workbench().middle());
  });
  if (!built.ok()) return built;
  trial.note_index_bytes(index->bytes());
  const auto sampler = Poisson::create(*rotation, bits, {.budget = {.fraction = rows}});
  if (!sampler.ok()) return sampler.status();
  return trial.decode(*sampler, *index);
}

}  // namespace

// Codes of 1 to 4 bits per dimension at every budget.
std::vector<Setting> signature_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  for (int bits = 1; bits <= Levels::kMaxBits; ++bits) {
    for (const double fraction : rows) {
      std::array<char, 64> label;
      std::snprintf(label.data(), label.size(), "bits=%d rows=%g", bits, fraction);
      settings.push_back({.label = label.data(), .run = [=](Trial& trial) {
                            return run_signatures(bits, fraction, trial);
                          }});
    }
  }
  return settings;
}

}  // namespace magicpig::bench

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "engine.hpp"
#include "settings.hpp"

namespace magicpig::llama {

struct CompareConfig {
  std::vector<std::string> prompt_files;
  int prompt_tokens = 2000;
  int tokens = 200;
};

/// Continues each prompt by the engine's own attention, taking the most likely token, and gives the
/// same tokens to exact attention by this library: how far their logits are apart, and at each step
/// where the most likely token is another one, by how much either prefers its own. Rounding
/// explains a difference where both margins are within the distance of the logits. The exit status
/// is 1 where some are not.
int run_compare(const Model& model, SessionConfig session, const CompareConfig& config);

}  // namespace magicpig::llama

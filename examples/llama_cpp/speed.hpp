// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "engine.hpp"
#include "settings.hpp"

namespace magicpig::llama {

struct SpeedConfig {
  std::string prompt_file;
  std::vector<int> contexts = {8192, 32768};
  int tokens = 8;
  int rounds = 5;
  std::vector<std::string> methods;
};

/// Times generation over caches of each of `contexts` tokens: the engine and each method take
/// turns, `rounds` times `tokens` tokens each, and the median of their steps counts. Prompts of
/// such lengths take hours, and the model is not made for them: the cache is filled with what the
/// engine makes of the first tokens of a text, again and again, each copy at its own positions.
/// What is generated from it says nothing, the time it takes does. The exit status.
int run_speed(const Model& model, SessionConfig session, const Settings& settings,
              const SpeedConfig& config);

}  // namespace magicpig::llama

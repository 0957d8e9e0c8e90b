// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "engine.hpp"
#include "settings.hpp"

namespace magicpig::llama {

struct GenerateConfig {
  std::string prompt_file;
  int prompt_tokens = 0;  ///< at most; 0 for all
  int tokens = 200;
  std::string attention = "magicpig";
  bool ignore_end = false;
  bool verify = false;
};

/// Prints the most likely continuation of a prompt, times and memory. The exit status.
int run_generate(const Model& model, SessionConfig session, Settings settings,
                 const GenerateConfig& config);

}  // namespace magicpig::llama

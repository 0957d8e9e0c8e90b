// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "engine.hpp"
#include "settings.hpp"

namespace magicpig::llama {

struct EvaluateConfig {
  std::string prompts;
  std::string output;
  std::vector<std::string> methods;
};

/// For each line of `prompts`, a JSON object with a "context": reads it once, by the engine, and
/// then by each method, from that same state,
///
///   - for each of its "items": appends its "question" token by token, so that it, too, is read
///     by the method (by the engine at once), and generates up to "max_tokens" of the most likely
///     tokens;
///   - for its "continuation": appends it token by token; the log-likelihood, and the
///   Kullback-Leibler
///     divergence of the next token's distribution from those by the engine's own attention and by
///     exact attention, where these stand before the method.
///
/// Writes a JSON line for each, with what else the item has. Returns the exit status; throws
/// std::runtime_error where a file is not right.
int run_evaluate(const Model& model, SessionConfig session, const Settings& settings,
                 const EvaluateConfig& config);

}  // namespace magicpig::llama

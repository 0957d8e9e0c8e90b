// SPDX-License-Identifier: Apache-2.0
#include "compare.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "device.hpp"
#include "progress.hpp"

namespace magicpig::llama {
namespace {

// How far logits are apart: the largest and the root mean square distance, a shift of all of them
// left out.
struct Distance {
  double largest = 0.0;
  double typical = 0.0;
};

Distance distance(std::span<const float> a, std::span<const float> b) {
  double shift = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) shift += double{a[i]} - double{b[i]};
  shift /= static_cast<double>(a.size());
  Distance off;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = std::fabs(double{a[i]} - double{b[i]} - shift);
    off.largest = std::max(off.largest, x);
    off.typical += x * x;
  }
  off.typical = std::sqrt(off.typical / static_cast<double>(a.size()));
  return off;
}

}  // namespace

int run_compare(const Model& model, SessionConfig session, const CompareConfig& config) {
  session.context = config.prompt_tokens + config.tokens;
  Session engine(model, session);
  register_device();
  use({.method = Method::kExact});
  Session exact(model, session);
  int unexplained = 0;
  for (const std::string& file : config.prompt_files) {
    Tokens prompt = model.tokenize(file_text(file), true);
    prompt.resize(std::min(prompt.size(), static_cast<std::size_t>(config.prompt_tokens)));
    for (Session* one : {&engine, &exact}) {
      one->clear();
      one->prompt(prompt, 0, ProgressBar("prompt", prompt.size()));
    }
    int same_until = config.tokens;
    int differing = 0;
    Distance mean;
    for (int i = 0; i < config.tokens; ++i) {
      const std::span<const float> a = engine.logits();
      const std::span<const float> b = exact.logits();
      const Distance off = distance(a, b);
      mean.largest += off.largest / config.tokens;
      mean.typical += off.typical / config.tokens;
      const llama_token own = engine.most_likely();
      const llama_token other = exact.most_likely();
      if (own != other) {
        same_until = std::min(same_until, i);
        ++differing;
        const auto at = [](std::span<const float> logits, llama_token token) {
          return double{logits[static_cast<std::size_t>(token)]};
        };
        const double engine_margin = at(a, own) - at(a, other);
        const double exact_margin = at(b, other) - at(b, own);
        // Two logits that move by up to this much each.
        const bool is_explained = engine_margin + exact_margin <= 2.0 * off.largest;
        unexplained += is_explained ? 0 : 1;
        std::printf(
            "%s: token %d: engine %d \"%s\" by %.4f, exact %d \"%s\" by %.4f; logits are up to "
            "%.4f apart%s\n",
            file.c_str(), i, own, model.text(own).c_str(), engine_margin, other,
            model.text(other).c_str(), exact_margin, off.largest,
            is_explained ? "" : ": NOT explained by that");
      }
      engine.step(own);
      exact.step(own);
    }
    std::printf(
        "%s: %zu tokens, then %d: the same for the first %d, %d of all differ; logits %.4f (rms), "
        "%.4f (largest) apart in the mean\n",
        file.c_str(), prompt.size(), config.tokens, same_until, differing, mean.typical,
        mean.largest);
  }
  const Totals done = totals();
  if (done.fallbacks > 0) throw std::runtime_error(done.error);
  return unexplained == 0 ? 0 : 1;
}

}  // namespace magicpig::llama

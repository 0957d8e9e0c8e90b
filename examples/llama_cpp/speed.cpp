// SPDX-License-Identifier: Apache-2.0
#include "speed.hpp"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "device.hpp"
#include "progress.hpp"
#include "spec.hpp"

namespace magicpig::llama {
namespace {

constexpr int kCopied = 2048;

// Fills sequence 0 with `tokens` tokens: copies of a state of kCopied, moved to where they belong.
void fill(Session& session, std::span<const std::uint8_t> state, int tokens) {
  session.clear();
  for (int at = 0; at < tokens; at += kCopied) {
    session.load(state, 1);
    llama_memory_seq_add(session.memory(), 1, 0, -1, at);
    llama_memory_seq_cp(session.memory(), 1, 0, -1, -1);
    (void)llama_memory_seq_rm(session.memory(), 1, -1, -1);
  }
  session.truncate(tokens);
  invalidate();
}

double median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Milliseconds of each of `count` steps from the same cache.
void time_steps(Session& session, int tokens, int count, std::vector<double>& times) {
  session.truncate(tokens);
  for (int i = 0; i <= count; ++i) {
    const Stopwatch watch;
    session.step(static_cast<llama_token>(1000 + i));
    if (i > 0) times.push_back(1e3 * watch.seconds());  // the first makes indexes
  }
}

}  // namespace

int run_speed(const Model& model, SessionConfig session, const Settings& settings,
              const SpeedConfig& config) {
  Tokens text = model.tokenize(file_text(config.prompt_file), true);
  if (text.size() < kCopied) {
    throw std::runtime_error(config.prompt_file + ": fewer than " + std::to_string(kCopied) +
                             " tokens");
  }
  text.resize(kCopied);
  const int longest = *std::max_element(config.contexts.begin(), config.contexts.end());
  session.context = longest + kCopied + 256;
  session.sequences = 2;
  // Before the device is there: the engine's own.
  Session engine(model, session);
  register_device();
  Session sampled(model, session);
  engine.prompt(text);
  const auto state = engine.save();

  std::printf("%8s  %-32s %10s %10s %8s %10s\n", "tokens", "attention", "ms/token", "tokens/s",
              "ratio", "index MiB");
  for (const int tokens : config.contexts) {
    fill(engine, state, tokens);
    fill(sampled, state, tokens);
    std::vector<double> own;
    std::vector<std::vector<double>> theirs(config.methods.size());
    std::vector<double> mib(config.methods.size());
    for (int round = 0; round < config.rounds; ++round) {
      time_steps(engine, tokens, config.tokens, own);
      for (std::size_t m = 0; m < config.methods.size(); ++m) {
        use(settings_of(config.methods[m], settings));
        time_steps(sampled, tokens, config.tokens, theirs[m]);
        mib[m] = static_cast<double>(index_bytes()) / 1048576.0;
      }
    }
    const auto line = [&](const char* name, const std::vector<double>& times, double index) {
      std::printf("%8d  %-32s %10.2f %10.2f %8.2f %10.1f\n", tokens, name, median(times),
                  1e3 / median(times), median(own) / median(times), index);
    };
    line("engine", own, 0.0);
    for (std::size_t m = 0; m < config.methods.size(); ++m) {
      line(config.methods[m].c_str(), theirs[m], mib[m]);
    }
    (void)std::fflush(stdout);
    const Totals done = totals();
    if (done.fallbacks > 0) throw std::runtime_error(done.error);
  }
  return 0;
}

}  // namespace magicpig::llama

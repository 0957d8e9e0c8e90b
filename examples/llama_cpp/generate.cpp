// SPDX-License-Identifier: Apache-2.0
#include "generate.hpp"

#include <cstdio>
#include <stdexcept>

#include "device.hpp"
#include "progress.hpp"

namespace magicpig::llama {
namespace {

// The cache's bytes per token: keys and values of all layers.
double cache_bytes(const Model& model, ggml_type type) {
  const int heads = llama_model_n_head_kv(model.get());
  const int dim = llama_model_n_embd(model.get()) / llama_model_n_head(model.get());
  return 2.0 * model.layers() * static_cast<double>(ggml_row_size(type, heads * dim));
}

}  // namespace

int run_generate(const Model& model, SessionConfig session, Settings settings,
                 const GenerateConfig& config) {
  const bool is_engine = config.attention == "engine";
  Tokens prompt = model.tokenize(file_text(config.prompt_file), true);
  if (config.prompt_tokens > 0 && prompt.size() > static_cast<std::size_t>(config.prompt_tokens)) {
    prompt.resize(static_cast<std::size_t>(config.prompt_tokens));
  }
  if (prompt.empty()) throw std::runtime_error(config.prompt_file + ": no tokens");
  session.context = static_cast<int>(prompt.size()) + config.tokens;
  if (!is_engine) {
    register_device();
    settings.report_every = 16;
    use(settings);
  }
  Session context(model, session);

  const Stopwatch prompt_time;
  context.prompt(prompt, 0, ProgressBar("prompt", prompt.size()));
  const double prompt_seconds = prompt_time.seconds();

  // The first step makes the indexes; it is timed by itself.
  double first_seconds = 0.0;
  double mib_before = 0.0;
  const Stopwatch all;
  int generated = 0;
  for (; generated < config.tokens; ++generated) {
    const llama_token token = context.most_likely();
    if (!config.ignore_end && model.ends(token)) break;
    (void)std::fputs(model.text(token).c_str(), stdout);
    (void)std::fflush(stdout);
    context.step(token);
    if (generated == 0) {
      first_seconds = all.seconds();
      mib_before = resident_mib();
    }
  }
  const double rest_seconds = all.seconds() - first_seconds;

  std::printf("\n\nprompt       %8.1f tokens/s  (%zu tokens in %.1f s)\n",
              static_cast<double>(prompt.size()) / prompt_seconds, prompt.size(), prompt_seconds);
  if (generated > 1) {
    std::printf("generation   %8.1f tokens/s  (%d tokens; the first took %.2f s)\n",
                (generated - 1) / rest_seconds, generated, first_seconds);
  }
  std::printf("resident     %8.1f MiB after the first token, %.1f after the last\n", mib_before,
              resident_mib());
  if (is_engine) return 0;

  const double cached = cache_bytes(model, session.cache_type) * context.tokens();
  std::printf("index        %8.1f MiB, %.1f %% of the cache's %.1f MiB in use\n",
              static_cast<double>(index_bytes()) / 1048576.0,
              100.0 * static_cast<double>(index_bytes()) / cached, cached / 1048576.0);
  const Totals done = totals();
  if (done.fallbacks > 0) {
    std::printf("left to the engine: %lld of %lld attentions: %s\n",
                static_cast<long long>(done.fallbacks),
                static_cast<long long>(done.attentions + done.fallbacks), done.error.c_str());
  }
  if (done.counted > 0) {
    std::printf(
        "rows read    %8.2f %% of the middle per KV head, %.0f bytes per token of it, index and "
        "rows\n",
        100.0 * done.mean_rows(),
        static_cast<double>(done.bytes) / static_cast<double>(done.counted) / context.tokens());
  }
  if (config.verify) {
    const Status status = verify_indexes();
    std::printf("indexes      %s\n", status.ok() ? "equal ones made at once" : status.message());
    return status.ok() ? 0 : 1;
  }
  return 0;
}

}  // namespace magicpig::llama

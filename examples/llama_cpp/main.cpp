// SPDX-License-Identifier: Apache-2.0
// llama.cpp with sampled attention: generates from a prompt, evaluates prompts, times.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "compare.hpp"
#include "device.hpp"
#include "engine.hpp"
#include "evaluate.hpp"
#include "generate.hpp"
#include "spec.hpp"
#include "speed.hpp"

namespace {

using namespace magicpig::llama;

const std::vector<std::pair<std::string, ggml_type>> kCacheTypes{{"f16", GGML_TYPE_F16},
                                                                 {"q8_0", GGML_TYPE_Q8_0}};

// What all commands take.
void add_model(CLI::App& app, SessionConfig& session, std::string& model) {
  app.add_option("--model", model, "GGUF file")->required()->check(CLI::ExistingFile);
  app.add_option("--threads", session.threads, "threads of prompts and generation")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
}

// What those that attend take.
void add_cache(CLI::App& app, SessionConfig& session) {
  app.add_option("--cache", session.cache_type, "type of the cache: f16 or q8_0")
      ->transform(CLI::CheckedTransformer(kCacheTypes));
}

// What those that draw take.
void add_drawing(CLI::App& app, Settings& settings) {
  app.add_option("--dense-layers", settings.dense_layers, "layers that read every token")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--seed", settings.seed, "of planes, rotations and draws")->capture_default_str();
}

int run(int argc, char** argv) {
  CLI::App app("llama.cpp with sampled attention");
  app.require_subcommand(1);
  Settings settings;
  SessionConfig session;
  std::string model;

  GenerateConfig generation;
  std::string method = "signatures";
  CLI::App* generate = app.add_subcommand("generate", "continues a prompt and says how fast");
  add_model(*generate, session, model);
  add_cache(*generate, session);
  add_drawing(*generate, settings);
  generate->add_option("--prompt", generation.prompt_file, "file with the prompt")
      ->required()
      ->check(CLI::ExistingFile);
  generate->add_option("--prompt-tokens", generation.prompt_tokens, "of it at most, 0 for all");
  generate->add_option("--tokens", generation.tokens, "to generate")->capture_default_str();
  generate
      ->add_option("--attention", generation.attention,
                   "engine: llama.cpp's own; exact: every token by this library; magicpig: sampled")
      ->capture_default_str()
      ->check(CLI::IsMember({"engine", "exact", "magicpig"}));
  generate->add_option("--method", method, "of --attention magicpig")->capture_default_str();
  generate->add_option("--rows", settings.rows, "share of the rows read per KV head")
      ->capture_default_str();
  generate->add_option("--bits", settings.bits, "of signatures, per dimension")
      ->capture_default_str();
  generate->add_flag("--ignore-end", generation.ignore_end, "goes on after an end of text");
  generate->add_flag("--verify", generation.verify,
                     "checks the indexes against ones made at once, at the end");

  EvaluateConfig evaluation;
  CLI::App* evaluate =
      app.add_subcommand("evaluate", "answers questions by several methods, one prompt for all");
  add_model(*evaluate, session, model);
  add_cache(*evaluate, session);
  add_drawing(*evaluate, settings);
  evaluate->add_option("--prompts", evaluation.prompts, "JSON lines, as tasks.py writes them")
      ->required()
      ->check(CLI::ExistingFile);
  evaluate
      ->add_option("--methods", evaluation.methods,
                   "engine, or a method with its settings, as \"signatures bits=2 rows=0.04\"")
      ->required();
  evaluate
      ->add_option("--output", evaluation.output,
                   "JSON lines; appended to, lines of prompts "
                   "that it has already are left out")
      ->required();

  CompareConfig comparison;
  CLI::App* compare =
      app.add_subcommand("compare", "exact attention beside the engine's own, token for token");
  add_model(*compare, session, model);
  add_cache(*compare, session);
  compare->add_option("--prompts", comparison.prompt_files, "files with a prompt each")
      ->required()
      ->check(CLI::ExistingFile);
  compare->add_option("--prompt-tokens", comparison.prompt_tokens, "of each at most")
      ->capture_default_str();
  compare->add_option("--tokens", comparison.tokens, "to generate")->capture_default_str();

  std::string wide_model;
  CLI::App* widen = app.add_subcommand("widen", "writes the model with weights in float32");
  add_model(*widen, session, model);
  widen->add_option("--output", wide_model, "GGUF file")->required();

  SpeedConfig speed;
  CLI::App* timing = app.add_subcommand("speed", "times generation beside the engine's own");
  add_model(*timing, session, model);
  add_cache(*timing, session);
  add_drawing(*timing, settings);
  timing->add_option("--prompt", speed.prompt_file, "file with text that fills the cache")
      ->required()
      ->check(CLI::ExistingFile);
  timing->add_option("--contexts", speed.contexts, "tokens in the cache")->delimiter(',');
  timing->add_option("--tokens", speed.tokens, "of each, in each round")->capture_default_str();
  timing->add_option("--rounds", speed.rounds, "alternately")->capture_default_str();
  timing->add_option("--methods", speed.methods, "as for evaluate")->required();

  CLI11_PARSE(app, argc, argv);
  log_less();
  if (widen->parsed()) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = LLAMA_FTYPE_ALL_F32;
    params.allow_requantize = true;
    params.nthread = session.threads;
    return llama_model_quantize(model.c_str(), wide_model.c_str(), &params) == 0 ? 0 : 1;
  }
  const Model loaded(model);
  if (generate->parsed()) {
    settings.method = generation.attention == "exact" ? Method::kExact : method_of(method);
    return run_generate(loaded, session, settings, generation);
  }
  if (evaluate->parsed()) return run_evaluate(loaded, session, settings, evaluation);
  if (compare->parsed()) return run_compare(loaded, session, comparison);
  return run_speed(loaded, session, settings, speed);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    (void)std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

// SPDX-License-Identifier: Apache-2.0
#include "evaluate.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>

#include "device.hpp"
#include "progress.hpp"
#include "spec.hpp"

namespace magicpig::llama {
namespace {

using Json = nlohmann::json;

// log softmax, summed in double.
std::vector<float> log_probabilities(std::span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float x : logits) sum += std::exp(x - largest);
  const double shift = largest + std::log(sum);
  std::vector<float> log_p;
  log_p.reserve(logits.size());
  for (const float x : logits) log_p.push_back(static_cast<float>(x - shift));
  return log_p;
}

double divergence(std::span<const float> log_p, std::span<const float> log_q) {
  double sum = 0.0;
  for (std::size_t i = 0; i < log_p.size(); ++i) {
    sum += std::exp(double{log_p[i]}) * (double{log_p[i]} - double{log_q[i]});
  }
  return sum;
}

std::ptrdiff_t most_likely(std::span<const float> log_p) {
  return std::max_element(log_p.begin(), log_p.end()) - log_p.begin();
}

class Evaluation {
 public:
  // The engine's context is made before the device is there, and keeps its own attention.
  Evaluation(const Model& model, const SessionConfig& session, const Settings& settings)
      : model_(model), settings_(settings), engine_(model, session) {
    register_device();
    sampled_.emplace(model, session);
  }

  template <class Write>
  void run(const Json& prompt, const std::vector<std::string>& methods, const Write& write) {
    const Tokens context = model_.tokenize(prompt.at("context").get<std::string>(), true);
    engine_.clear();
    const Stopwatch watch;
    engine_.prompt(context);
    const double seconds = watch.seconds();
    const auto state = engine_.save();
    references_.clear();
    for (const std::string& method : methods) {
      const bool is_engine = method == kEngine;
      Session& session = is_engine ? engine_ : *sampled_;
      if (!is_engine) {
        session.clear();
        session.load(state);
        Settings settings = settings_of(method, settings_);
        settings.report_every = 4;
        use(settings);
        reset_totals();
      }
      for (const Json& item : prompt.value("items", Json::array())) {
        Json line = item;
        answer(session, static_cast<int>(context.size()), item, is_engine, line);
        finish(prompt, method, seconds, line);
        write(line);
      }
      if (prompt.contains("continuation")) {
        Json line;
        follow(session, static_cast<int>(context.size()), context.back(),
               model_.tokenize(prompt["continuation"].get<std::string>(), false), method, line);
        finish(prompt, method, seconds, line);
        write(line);
      }
      const Totals done = totals();
      if (done.fallbacks > 0) throw std::runtime_error(method + ": " + done.error);
    }
  }

 private:
  void answer(Session& session, int context, const Json& item, bool is_engine, Json& line) {
    const Tokens question = model_.tokenize(item.at("question").get<std::string>(), false);
    if (is_engine) {
      session.prompt(question);
    } else {
      for (const llama_token token : question) session.step(token);
    }
    std::string text;
    const int most = item.at("max_tokens").get<int>();
    for (int i = 0; i < most; ++i) {
      const llama_token token = session.most_likely();
      if (model_.ends(token)) break;
      text += model_.text(token);
      if (i + 1 < most) session.step(token);
    }
    // Tokens may end within a character.
    line["output"] = Json::parse(Json(text).dump(-1, ' ', false, Json::error_handler_t::replace));
    session.truncate(context);
  }

  // The last token of the context is given again, to have the first distribution by the method,
  // too.
  void follow(Session& session, int context, llama_token last, const Tokens& tokens,
              const std::string& method, Json& line) {
    session.truncate(context - 1);
    std::vector<std::vector<float>> log_p;
    double likelihood = 0.0;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      log_p.push_back(log_probabilities(session.step(i == 0 ? last : tokens[i - 1])));
      likelihood += double{log_p.back()[static_cast<std::size_t>(tokens[i])]};
    }
    const auto count = static_cast<double>(tokens.size());
    line["tokens"] = tokens.size();
    line["nll"] = -likelihood / count;
    for (const auto& [reference, wanted] : references_) {
      double divergences = 0.0;
      std::size_t same = 0;
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        divergences += divergence(wanted[i], log_p[i]);
        same += most_likely(wanted[i]) == most_likely(log_p[i]) ? 1U : 0U;
      }
      line["kl_from_" + reference] = divergences / count;
      line["same_top_as_" + reference] = static_cast<double>(same) / count;
    }
    if (is_reference(method)) references_[method] = std::move(log_p);
    session.truncate(context);
  }

  void finish(const Json& prompt, const std::string& method, double seconds, Json& line) const {
    line["task"] = prompt.at("task");
    line["prompt"] = prompt.at("id");
    line["method"] = method;
    line["prompt_seconds"] = seconds;
    const Totals done = totals();
    if (method != kEngine && done.counted > 0) line["rows"] = done.mean_rows();
  }

  const Model& model_;
  Settings settings_;
  Session engine_;
  std::optional<Session> sampled_;
  // Log probabilities of the continuation by engine and exact attention, once they were measured.
  std::map<std::string, std::vector<std::vector<float>>> references_;
};

// What a line answers.
std::string key_of(const Json& line) { return line.at("prompt").dump() + line.at("method").dump(); }

}  // namespace

int run_evaluate(const Model& model, SessionConfig session, const Settings& settings,
                 const EvaluateConfig& config) {
  std::vector<Json> prompts;
  std::ifstream file(config.prompts);
  std::size_t longest = 0;
  for (std::string line; std::getline(file, line);) {
    prompts.push_back(Json::parse(line));
    std::size_t size = model.tokenize(prompts.back().at("context").get<std::string>(), true).size();
    std::size_t more = 0;
    for (const Json& item : prompts.back().value("items", Json::array())) {
      const auto question = model.tokenize(item.at("question").get<std::string>(), false).size();
      more = std::max(more, question + item.at("max_tokens").get<std::size_t>());
    }
    const auto continuation = prompts.back().value("continuation", std::string());
    more = std::max(more, model.tokenize(continuation, false).size());
    longest = std::max(longest, size + more);
  }
  session.context = static_cast<int>(longest + 255) / 256 * 256;

  std::set<std::string> done;
  std::ifstream before(config.output);
  for (std::string line; std::getline(before, line);) done.insert(key_of(Json::parse(line)));
  std::ofstream output(config.output, std::ios::app);
  if (!output) throw std::runtime_error(config.output + ": cannot be written");

  Evaluation evaluation(model, session, settings);
  const ProgressBar progress("prompts", prompts.size());
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto is_done = [&](const std::string& method) {
      return done.contains(prompts[i].at("id").dump() + Json(method).dump());
    };
    std::vector<std::string> methods;
    for (const std::string& method : config.methods) {
      // A continuation is compared with these, which are not kept.
      if (!is_done(method) || (prompts[i].contains("continuation") && is_reference(method))) {
        methods.push_back(method);
      }
    }
    if (std::all_of(methods.begin(), methods.end(), is_done)) continue;
    // Whole prompts, so that one which was cut short is begun again.
    std::string lines;
    evaluation.run(prompts[i], methods, [&](const Json& line) {
      if (!done.contains(key_of(line))) lines += line.dump() + "\n";
    });
    output << lines << std::flush;
    if (!output) throw std::runtime_error(config.output + ": cannot be written");
    progress(i + 1);
  }
  return 0;
}

}  // namespace magicpig::llama

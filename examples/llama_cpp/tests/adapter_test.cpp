// SPDX-License-Identifier: Apache-2.0
// Contexts of llama.cpp that attend through the adapter, beside some that do not.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device.hpp"
#include "difference.hpp"
#include "engine.hpp"
#include "tiny_model.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::llama;
using test::difference;
using test::kLayers;
using test::random_tokens;

const Model& model() {
  static const Model tiny = [] {
    log_less();
    return test::tiny_model();
  }();
  return tiny;
}

SessionConfig config(ggml_type type, int sequences = 1, bool unified = true) {
  return {.context = 2048,
          .batch = 128,
          .cache_type = type,
          .sequences = sequences,
          .unified = unified};
}

// The engine's own attention: in contexts that are made before the device is there.
struct Engine {
  std::map<std::string, std::unique_ptr<Session>> sessions;

  Engine() {
    const auto add = [&](const char* name, const SessionConfig& of) {
      sessions[name] = std::make_unique<Session>(model(), of);
    };
    add("f16", config(GGML_TYPE_F16));
    add("q8_0", config(GGML_TYPE_Q8_0));
    add("two sequences", config(GGML_TYPE_F16, 2));
    add("two caches", config(GGML_TYPE_F16, 2, false));
    register_device();
  }
};

Session& engine(const std::string& name) {
  static Engine all;
  Session& session = *all.sessions.at(name);
  session.clear();
  return session;
}

std::vector<float> copy(std::span<const float> logits) { return {logits.begin(), logits.end()}; }

// ggml rounds queries, and sums of f16 values, to half floats; beside q8_0, queries to 8 bits.
constexpr double kRounding = 0.02;
constexpr double kQueryRounding = 0.06;

struct CacheType {
  std::string name;
  ggml_type type;
  double rounding;
};
const CacheType kCacheTypes[] = {{"f16", GGML_TYPE_F16, kRounding},
                                 {"q8_0", GGML_TYPE_Q8_0, kQueryRounding}};

// Small windows and no exact short ranges, so that most of a short cache is drawn from.
Settings drawn(Method method, double rows = 0.2) {
  return {.method = method,
          .rows = rows,
          .table_bits = 6,
          .tables = 30,
          .window = {.sink = 4, .local = 16},
          .exact_below = 0,
          .dense_layers = {1}};
}
Settings exact() { return {.method = Method::kExact}; }

void steps(Session& session, const Tokens& tokens, llama_seq_id sequence = 0) {
  for (const llama_token token : tokens) session.step(token, sequence);
}

void check_indexes() {
  const Status status = verify_indexes();
  CHECK_MESSAGE(status.ok(), std::string(status.message()));
}

void check_no_fallbacks() {
  const Totals all = totals();
  CHECK_MESSAGE(all.fallbacks == 0, all.error);
}

}  // namespace

TEST_CASE("exact attention of single tokens is the engine's, but for rounding") {
  for (const CacheType& of : kCacheTypes) {
    CAPTURE(of.name);
    Session& theirs = engine(of.name);
    Session ours(model(), config(of.type));
    use(exact());
    reset_totals();
    const Tokens prompt = random_tokens(700, 1);
    theirs.prompt(prompt);
    ours.prompt(prompt);
    CHECK(totals().attentions == 0);  // prompts are the engine's
    CHECK(difference(ours.logits(), theirs.logits()) == 0.0);
    const Tokens forced = random_tokens(40, 2);
    double worst = 0.0;
    for (const llama_token token : forced) {
      const auto wanted = copy(theirs.step(token));
      worst = std::max(worst, difference(ours.step(token), wanted));
    }
    CHECK(worst < of.rounding);
    CHECK(totals().attentions == 40 * kLayers);
    check_no_fallbacks();

    // A control: these tokens do not say so of any attention.
    use(drawn(Method::kUniform, 0.02));
    const auto wanted = copy(theirs.step(3));
    CHECK(difference(ours.step(3), wanted) > 2 * of.rounding);
  }
}

TEST_CASE("draws of every row are exact attention") {
  for (const Method method :
       {Method::kSignatures, Method::kTopK, Method::kQuest, Method::kUniform}) {
    CAPTURE(static_cast<int>(method));
    Session& theirs = engine("f16");
    Session ours(model(), config(GGML_TYPE_F16));
    use(drawn(method, 1.0));
    const Tokens prompt = random_tokens(300, 3);
    theirs.prompt(prompt);
    ours.prompt(prompt);
    for (const llama_token token : random_tokens(30, 4)) {
      const auto wanted = copy(theirs.step(token));
      CHECK(difference(ours.step(token), wanted) < kRounding);
    }
    check_no_fallbacks();
  }
}

TEST_CASE("reports count what was read") {
  Session ours(model(), config(GGML_TYPE_F16));
  Settings settings = drawn(Method::kSignatures, 0.25);
  settings.report_every = 1;
  use(settings);
  ours.prompt(random_tokens(1000, 5));
  reset_totals();
  steps(ours, random_tokens(20, 6));
  const Totals all = totals();
  CHECK(all.counted == 20 * (kLayers - 1) * test::kKvHeads);
  CHECK(all.mean_rows() == doctest::Approx(0.25).epsilon(0.05));
  // f16 keys and values of 64 dimensions, 2-bit codes, a factor and a norm.
  CHECK(all.bytes > all.counted * 20 * 900);
  CHECK(index_bytes() > std::size_t{2} * 2 * 4096 * 20);
}

TEST_CASE("indexes follow a sequence that grows, is cut, loses a range and is shifted") {
  for (const CacheType& of : kCacheTypes) {
    for (const Method method : {Method::kSignatures, Method::kTables, Method::kExact}) {
      CAPTURE(of.name);
      CAPTURE(static_cast<int>(method));
      const bool is_exact = method == Method::kExact;
      Session& theirs = engine(of.name);
      Session ours(model(), config(of.type));
      use(is_exact ? exact() : drawn(method));
      reset_totals();
      const auto both = [&](const auto& change) {
        change(ours);
        if (is_exact) change(theirs);
      };
      const auto check = [&] {
        check_indexes();
        if (is_exact) CHECK(difference(ours.logits(), theirs.logits()) < of.rounding);
      };
      both([](Session& s) { s.prompt(random_tokens(600, 7)); });
      both([](Session& s) { steps(s, random_tokens(3, 8)); });
      check();
      both([](Session& s) { steps(s, random_tokens(150, 9)); });
      check();
      // A rollback, over which other tokens are written.
      both([](Session& s) { s.truncate(500); });
      both([](Session& s) { steps(s, random_tokens(60, 10)); });
      check();
      // A short one, within what was indexed last.
      both([](Session& s) { s.truncate(530); });
      both([](Session& s) { steps(s, random_tokens(30, 11)); });
      check();
      // Positions 100 to 200 go, and those behind move up: keys are rotated where they are.
      both([](Session& s) {
        (void)llama_memory_seq_rm(s.memory(), 0, 100, 200);
        llama_memory_seq_add(s.memory(), 0, 200, -1, -100);
        steps(s, random_tokens(5, 12));
      });
      check();
      // A prompt in between fills the freed cells.
      both([](Session& s) { s.prompt(random_tokens(200, 13)); });
      both([](Session& s) { steps(s, random_tokens(20, 14)); });
      check();
      both([](Session& s) { s.clear(); });
      both([](Session& s) { s.prompt(random_tokens(80, 15)); });
      both([](Session& s) { steps(s, random_tokens(5, 16)); });
      check();
      check_no_fallbacks();
    }
  }
}

TEST_CASE("a cache that was written past the graph is told from its index") {
  Session ours(model(), config(GGML_TYPE_F16));
  use(drawn(Method::kSignatures));
  ours.prompt(random_tokens(400, 17));
  const auto state = ours.save();
  ours.clear();
  ours.prompt(random_tokens(400, 18));
  steps(ours, random_tokens(3, 19));
  check_indexes();
  ours.load(state);
  steps(ours, random_tokens(3, 19));
  CHECK_FALSE(verify_indexes().ok());
  invalidate();
  steps(ours, random_tokens(1, 19));
  check_indexes();
}

TEST_CASE("two sequences in one cache") {
  for (const Method method : {Method::kExact, Method::kSignatures}) {
    const bool is_exact = method == Method::kExact;
    Session& theirs = engine("two sequences");
    Session ours(model(), config(GGML_TYPE_F16, 2));
    use(is_exact ? exact() : drawn(method));
    reset_totals();
    for (Session* session : {&theirs, &ours}) {
      session->prompt(random_tokens(300, 20), 0);
      session->prompt(random_tokens(260, 21), 1);
    }
    const Tokens tokens = random_tokens(80, 22);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const auto sequence = static_cast<llama_seq_id>(i / 3 % 2);
      const auto wanted = copy(theirs.step(tokens[i], sequence));
      const auto got = ours.step(tokens[i], sequence);
      if (is_exact) CHECK(difference(got, wanted) < kRounding);
      if (i % 20 == 0) check_indexes();
    }
    // The first one goes, and its cells are taken by the second.
    for (Session* session : {&theirs, &ours}) {
      (void)llama_memory_seq_rm(session->memory(), 0, -1, -1);
      steps(*session, random_tokens(100, 23), 1);
    }
    check_indexes();
    if (is_exact) CHECK(difference(ours.logits(), theirs.logits()) < kRounding);
    check_no_fallbacks();
  }
}

TEST_CASE("two sequences in one cache, a token of each in one step") {
  for (const Method method : {Method::kExact, Method::kSignatures}) {
    const bool is_exact = method == Method::kExact;
    Session& theirs = engine("two sequences");
    Settings settings = is_exact ? exact() : drawn(method);
    settings.max_rows = 2;
    use(settings);
    Session ours(model(), config(GGML_TYPE_F16, 2));
    reset_totals();
    for (Session* session : {&theirs, &ours}) {
      session->prompt(random_tokens(300, 30), 0);
      session->prompt(random_tokens(200, 31), 1);
    }
    for (int i = 0; i < 90; ++i) {
      const Tokens pair = random_tokens(2, 200 + static_cast<std::uint64_t>(i));
      theirs.step(pair);
      ours.step(pair);
      for (int s = 0; is_exact && s < 2; ++s) {
        CHECK(difference(ours.logits(s), theirs.logits(s)) < kRounding);
      }
    }
    check_indexes();
    CHECK(totals().attentions == 90 * kLayers);
    check_no_fallbacks();
  }
}

TEST_CASE("two sequences with caches of their own, a token of each in one step") {
  for (const Method method : {Method::kExact, Method::kSignatures}) {
    const bool is_exact = method == Method::kExact;
    Session& theirs = engine("two caches");
    Session ours(model(), config(GGML_TYPE_F16, 2, false));
    use(is_exact ? exact() : drawn(method));
    reset_totals();
    for (Session* session : {&theirs, &ours}) {
      session->prompt(random_tokens(300, 24), 0);
      session->prompt(random_tokens(200, 25), 1);
    }
    for (int i = 0; i < 30; ++i) {
      const Tokens pair = random_tokens(2, 100 + static_cast<std::uint64_t>(i));
      theirs.step(pair);
      ours.step(pair);
      for (int s = 0; is_exact && s < 2; ++s) {
        CHECK(difference(ours.logits(s), theirs.logits(s)) < kRounding);
      }
    }
    // The second one alone: its stream is the first of the step then.
    const auto wanted = copy(theirs.step(5, 1));
    const auto got = ours.step(5, 1);
    if (is_exact) CHECK(difference(got, wanted) < kRounding);
    check_indexes();
    CHECK(totals().attentions == 31 * kLayers);
    check_no_fallbacks();
  }
}

TEST_CASE("what fails is left to the engine, and said") {
  Session& theirs = engine("f16");
  Session ours(model(), config(GGML_TYPE_F16));
  Settings settings = drawn(Method::kSignatures, 0.0);
  settings.dense_layers = {};
  use(settings);
  reset_totals();
  const Tokens prompt = random_tokens(100, 26);
  theirs.prompt(prompt);
  ours.prompt(prompt);
  const auto wanted = copy(theirs.step(1));
  CHECK(difference(ours.step(1), wanted) == 0.0);
  CHECK(totals().fallbacks == kLayers);
  CHECK(totals().error.find("budget") != std::string::npos);
  CHECK(index_bytes() == 0);
  check_indexes();
}

// SPDX-License-Identifier: Apache-2.0
// The little of llama.cpp that the programs and tests use.
#pragma once

#include <llama.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace magicpig::llama {

using Tokens = std::vector<llama_token>;

/// A model on the CPU. Throws std::runtime_error where it cannot be read.
class Model {
 public:
  explicit Model(const std::string& path) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    model_.reset(llama_model_load_from_file(path.c_str(), params));
    if (model_ == nullptr) throw std::runtime_error(path + ": llama.cpp cannot load it");
  }

  [[nodiscard]] llama_model* get() const { return model_.get(); }
  [[nodiscard]] const llama_vocab* vocab() const { return llama_model_get_vocab(get()); }
  [[nodiscard]] int vocab_size() const { return llama_vocab_n_tokens(vocab()); }
  [[nodiscard]] int layers() const { return llama_model_n_layer(get()); }

  /// Special tokens in the text count as such; `begin` puts the model's first token before it.
  [[nodiscard]] Tokens tokenize(std::string_view text, bool begin) const {
    Tokens tokens(text.size() + 2);
    const int count =
        llama_tokenize(vocab(), text.data(), static_cast<std::int32_t>(text.size()), tokens.data(),
                       static_cast<std::int32_t>(tokens.size()), begin, true);
    if (count < 0) throw std::runtime_error("llama_tokenize: more tokens than bytes");
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
  }

  [[nodiscard]] std::string text(llama_token token) const {
    char piece[256];
    const int size = llama_token_to_piece(vocab(), token, piece, sizeof(piece), 0, false);
    return {piece, static_cast<std::size_t>(std::max(size, 0))};
  }
  [[nodiscard]] bool ends(llama_token token) const { return llama_vocab_is_eog(vocab(), token); }

 private:
  struct Free {
    void operator()(llama_model* model) const { llama_model_free(model); }
  };
  std::unique_ptr<llama_model, Free> model_;
};

struct SessionConfig {
  int context = 8192;  ///< cells
  int batch = 512;     ///< tokens of a prompt computed at once
  int threads = 2;
  ggml_type cache_type = GGML_TYPE_F16;
  int sequences = 1;
  bool unified = true;  ///< one cache for all sequences
};

/// A context of llama.cpp with flash attention. Throws std::runtime_error where it cannot be made
/// or a step fails.
class Session {
 public:
  Session(const Model& model, const SessionConfig& config) : model_(model), config_(config) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(config.context);
    params.n_batch = static_cast<std::uint32_t>(config.batch);
    params.n_ubatch = params.n_batch;
    params.n_seq_max = static_cast<std::uint32_t>(config.sequences);
    params.n_threads = config.threads;
    params.n_threads_batch = config.threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = config.cache_type;
    params.type_v = config.cache_type;
    params.kv_unified = config.unified;
    context_.reset(llama_init_from_model(model.get(), params));
    if (context_ == nullptr) throw std::runtime_error("llama.cpp cannot make a context");
    batch_ = llama_batch_init(config.batch, 0, config.sequences);
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session() { llama_batch_free(batch_); }

  [[nodiscard]] llama_context* get() const { return context_.get(); }
  [[nodiscard]] llama_memory_t memory() const { return llama_get_memory(get()); }
  /// Behind the last token of the sequence.
  [[nodiscard]] int tokens(llama_seq_id sequence = 0) const {
    return llama_memory_seq_pos_max(memory(), sequence) + 1;
  }

  /// Appends them in batches; `progress` is told how many are through. The logits are those of the
  /// last one.
  template <class Progress>
  void prompt(std::span<const llama_token> tokens, llama_seq_id sequence,
              const Progress& progress) {
    for (std::size_t at = 0; at < tokens.size();) {
      const std::size_t count =
          std::min(static_cast<std::size_t>(config_.batch), tokens.size() - at);
      batch_.n_tokens = 0;
      const int position = this->tokens(sequence);
      for (std::size_t i = 0; i < count; ++i) {
        add(tokens[at + i], position + static_cast<int>(i), sequence, at + i + 1 == tokens.size());
      }
      decode();
      at += count;
      progress(at);
    }
  }
  void prompt(std::span<const llama_token> tokens, llama_seq_id sequence = 0) {
    prompt(tokens, sequence, [](std::size_t) {});
  }

  /// Appends one; its logits, [vocab], until the next step.
  std::span<const float> step(llama_token token, llama_seq_id sequence = 0) {
    batch_.n_tokens = 0;
    add(token, tokens(sequence), sequence, true);
    decode();
    return logits();
  }
  /// Appends a token to each of several sequences at once.
  void step(std::span<const llama_token> one_each) {
    batch_.n_tokens = 0;
    for (std::size_t s = 0; s < one_each.size(); ++s) {
      const auto sequence = static_cast<llama_seq_id>(s);
      add(one_each[s], tokens(sequence), sequence, true);
    }
    decode();
  }

  /// Of the last token, or of the i-th that asked for them.
  [[nodiscard]] std::span<const float> logits(int i = -1) const {
    return {llama_get_logits_ith(get(), i), static_cast<std::size_t>(model_.vocab_size())};
  }
  [[nodiscard]] llama_token most_likely() const {
    const auto all = logits();
    return static_cast<llama_token>(std::max_element(all.begin(), all.end()) - all.begin());
  }

  /// Keeps the first `count` tokens.
  void truncate(int count, llama_seq_id sequence = 0) {
    (void)llama_memory_seq_rm(memory(), sequence, count, -1);
  }
  void clear() { llama_memory_clear(memory(), true); }

  [[nodiscard]] std::vector<std::uint8_t> save(llama_seq_id sequence = 0) const {
    std::vector<std::uint8_t> state(llama_state_seq_get_size(get(), sequence));
    state.resize(llama_state_seq_get_data(get(), state.data(), state.size(), sequence));
    return state;
  }
  /// Writes the cache past the graph: the adapter is to be told, see invalidate().
  void load(std::span<const std::uint8_t> state, llama_seq_id sequence = 0) {
    if (llama_state_seq_set_data(get(), state.data(), state.size(), sequence) == 0) {
      throw std::runtime_error("llama.cpp cannot restore the state");
    }
  }

 private:
  void add(llama_token token, int position, llama_seq_id sequence, bool logits) {
    const int i = batch_.n_tokens++;
    batch_.token[i] = token;
    batch_.pos[i] = position;
    batch_.n_seq_id[i] = 1;
    batch_.seq_id[i][0] = sequence;
    batch_.logits[i] = logits ? 1 : 0;
  }
  void decode() {
    const int status = llama_decode(get(), batch_);
    if (status != 0) throw std::runtime_error("llama_decode: error " + std::to_string(status));
  }

  struct Free {
    void operator()(llama_context* context) const { llama_free(context); }
  };
  const Model& model_;
  SessionConfig config_;
  std::unique_ptr<llama_context, Free> context_;
  llama_batch batch_ = {};
};

/// Prints warnings and errors of llama.cpp alone.
inline void log_less() {
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_WARN) (void)fputs(text, stderr);
      },
      nullptr);
}

}  // namespace magicpig::llama

// SPDX-License-Identifier: Apache-2.0
// A model of random weights and no vocabulary, small enough for tests.
#pragma once

#include <ggml.h>
#include <gguf.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <magicpig/core/random.hpp>
#include <stdexcept>
#include <string>

#include "engine.hpp"

namespace magicpig::llama::test {

inline constexpr int kLayers = 3;
inline constexpr int kHeads = 6;
inline constexpr int kKvHeads = 2;
inline constexpr int kHeadDim = 64;
inline constexpr int kVocabulary = 128;

/// Writes it as GGUF. Queries and keys are scaled so that attention is as uneven as a model's.
inline void write_tiny_model(const std::string& path) {
  constexpr int kWidth = kHeads * kHeadDim;
  constexpr int kHidden = 128;
  gguf_context* file = gguf_init_empty();
  gguf_set_val_str(file, "general.architecture", "llama");
  gguf_set_val_str(file, "tokenizer.ggml.model", "no_vocab");
  const auto set = [&](const char* key, int value) {
    gguf_set_val_u32(file, (std::string("llama.") + key).c_str(),
                     static_cast<std::uint32_t>(value));
  };
  set("block_count", kLayers);
  set("context_length", 8192);
  set("embedding_length", kWidth);
  set("feed_forward_length", kHidden);
  set("attention.head_count", kHeads);
  set("attention.head_count_kv", kKvHeads);
  set("rope.dimension_count", kHeadDim);
  set("vocab_size", kVocabulary);
  gguf_set_val_f32(file, "llama.attention.layer_norm_rms_epsilon", 1e-5F);

  ggml_context* memory =
      ggml_init({.mem_size = 64 << 20, .mem_buffer = nullptr, .no_alloc = false});
  std::uint64_t seed = 0;
  const auto add = [&](const std::string& name, int in, int out, double scale) {
    ggml_tensor* tensor = out > 0 ? ggml_new_tensor_2d(memory, GGML_TYPE_F32, in, out)
                                  : ggml_new_tensor_1d(memory, GGML_TYPE_F32, in);
    ggml_set_name(tensor, name.c_str());
    const RandomStream stream({.seed = ++seed});
    auto* weights = static_cast<float*>(tensor->data);
    for (std::int64_t i = 0; i < ggml_nelements(tensor); ++i) {
      weights[i] = out > 0 ? static_cast<float>(scale / std::sqrt(in) *
                                                stream.normals(static_cast<std::uint32_t>(i))[0])
                           : 1.0F;
    }
    gguf_add_tensor(file, tensor);
  };
  add("token_embd.weight", kWidth, kVocabulary, 1.0);
  add("output_norm.weight", kWidth, 0, 1.0);
  add("output.weight", kWidth, kVocabulary, 1.0);
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::string block = "blk." + std::to_string(layer) + ".";
    add(block + "attn_norm.weight", kWidth, 0, 1.0);
    add(block + "attn_q.weight", kWidth, kHeads * kHeadDim, 1.5);
    add(block + "attn_k.weight", kWidth, kKvHeads * kHeadDim, 1.5);
    add(block + "attn_v.weight", kWidth, kKvHeads * kHeadDim, 1.0);
    add(block + "attn_output.weight", kHeads * kHeadDim, kWidth, 1.0);
    add(block + "ffn_norm.weight", kWidth, 0, 1.0);
    add(block + "ffn_gate.weight", kWidth, kHidden, 1.0);
    add(block + "ffn_up.weight", kWidth, kHidden, 1.0);
    add(block + "ffn_down.weight", kHidden, kWidth, 1.0);
  }
  const bool written = gguf_write_to_file(file, path.c_str(), false);
  ggml_free(memory);
  gguf_free(file);
  if (!written) throw std::runtime_error(path + ": cannot be written");
}

/// The model, of a file that is gone when this returns.
inline Model tiny_model() {
  const std::string path =
      (std::filesystem::temp_directory_path() / "magicpig_tiny_model.gguf").string();
  write_tiny_model(path);
  Model model(path);
  std::filesystem::remove(path);
  return model;
}

/// Tokens that a seed names.
inline Tokens random_tokens(int count, std::uint64_t seed) {
  Tokens tokens;
  const RandomStream stream({.seed = seed});
  for (int i = 0; i < count; ++i) {
    tokens.push_back(
        static_cast<llama_token>(stream.below(static_cast<std::uint32_t>(i), kVocabulary)));
  }
  return tokens;
}

}  // namespace magicpig::llama::test

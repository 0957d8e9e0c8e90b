// SPDX-License-Identifier: Apache-2.0
// Scores of learned codes: in how many bits a token's code agrees with the query's.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/learned_hash.hpp"
#include "magicpig/index/sign_codes.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// bits - Hamming distance of the codes of query and key, 0 to bits: a rank, no logit. Each head of
/// a group ranks by its own (HashAttention), or all of them by the sum over the group, so that they
/// want the same tokens (Spotlight).
/// Source: Spotlight Attention, Li et al. 2025; HashAttention, Desai et al. 2025.
class AgreementScores {
 public:
  static constexpr bool kLogits = false;

  /// For indexes of `hash`, which must outlive them.
  explicit AgreementScores(const LearnedHash& hash, bool group_sum = false)
      : hash_(&hash), group_sum_(group_sum) {}
  explicit AgreementScores(const LearnedHash&& hash, bool = false) = delete;

  /// Error: an index of another hash.
  [[nodiscard]] Status supports(const SignCodes& index) const noexcept {
    if (&index.hash() == hash_) return Status();
    return Status::error(ErrorCode::kShapeMismatch,
                         "the scores are made for another hash than the index, which has %d bits",
                         index.hash().bits());
  }

  struct Scratch {
    float* outputs = nullptr;        // of the networks
    std::uint32_t* codes = nullptr;  // [group, words]
    float* scores = nullptr;         // [group, n]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    return {.outputs = arena.take<float>(hash_->scratch_floats(1)),
            .codes = arena.take<std::uint32_t>(group * static_cast<std::size_t>(hash_->words())),
            .scores = arena.take<float>(group * static_cast<std::size_t>(limits.tokens))};
  }

  template <class Ops, class Source>
  const float* compute(const DrawInput<Source, SignCodes>& input, const Scratch& scratch) const {
    const int group = input.queries.count;
    const int words = hash_->words();
    const std::int64_t n = input.index.indexed().size();
    for (int g = 0; g < group; ++g) {
      const float* outputs =
          hash_->template query_outputs<Ops>(input.kv_head, g, input.queries[g], scratch.outputs);
      hash_->pack(outputs, 1, scratch.codes + std::int64_t{g} * words);
    }
    for (int g = 0; g < group; ++g) {
      const std::uint32_t* query = scratch.codes + std::int64_t{g} * words;
      for (int b = 0; b < input.index.blocks(); ++b) {
        const std::uint32_t* codes = input.index.codes(b, input.kv_head);
        float* scores = scratch.scores + g * n + std::int64_t{b} * SignCodes::kBlock;
        for (int i = 0; i < input.index.block_tokens(b); ++i) {
          int differ = 0;
          for (int w = 0; w < words; ++w) {
            differ += std::popcount(codes[std::int64_t{i} * words + w] ^ query[w]);
          }
          scores[i] = static_cast<float>(hash_->bits() - differ);
        }
      }
    }
    if (group_sum_) add_up(scratch.scores, group, n);
    return scratch.scores;
  }

 private:
  // Small whole numbers: the sums are exact.
  static void add_up(float* scores, int group, std::int64_t n) {
    for (int g = 1; g < group; ++g) {
      for (std::int64_t i = 0; i < n; ++i) scores[i] += scores[g * n + i];
    }
    for (int g = 1; g < group; ++g) {
      for (std::int64_t i = 0; i < n; ++i) scores[g * n + i] = scores[i];
    }
  }

  const LearnedHash* hash_;
  bool group_sum_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

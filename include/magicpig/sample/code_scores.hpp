// SPDX-License-Identifier: Apache-2.0
// Logits as signatures estimate them, for methods that select by estimates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/sample/signature_scores.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// q.(k - c) as the codes of an index estimate it, in the steps of SignatureQueries, at temperature
/// 1 and without the norms of values; c is the same for all tokens. What the samplers of signatures
/// draw by, block by block and never all at once.
class CodeScores {
 public:
  static constexpr bool kLogits = true;

  /// For indexes whose codes `quantiser` makes.
  template <Quantiser Q>
  explicit CodeScores(const Q& quantiser) : shape_(quantiser.shape()) {}

  /// Error: an index of other signatures than this was made for.
  template <class Q>
  [[nodiscard]] Status supports(const Signatures<Q>& index) const noexcept {
    return check_signatures(shape_, index.quantiser().shape());
  }

  struct Scratch {
    SignatureQueries::Scratch queries;
    std::int16_t* steps = nullptr;  // [group, kBlocks * kSignatureBlock]
    float* scores = nullptr;        // [group, n]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    return {.queries = SignatureQueries::carve(arena, limits.group, shape_),
            .steps = arena.take<std::int16_t>(group * kBlocks * kSignatureBlock),
            .scores = arena.take<float>(group * static_cast<std::size_t>(limits.tokens))};
  }

  template <class Ops, class Source, class Q>
  const float* compute(const DrawInput<Source, Signatures<Q>>& input,
                       const Scratch& scratch) const {
    SignatureQueries queries(input, 1.0, scratch.queries);
    // A scale of 0 leaves nothing of a logit, and so nothing to be estimated.
    constexpr double kLog2 = 0.6931471805599453;
    const double step = kLog2 / ScoreRule::kSteps;
    const auto unit =
        static_cast<float>(input.scale != 0.0F ? step / static_cast<double>(input.scale) : 0.0);
    const TokenId n = input.index.indexed().size();
    constexpr std::int64_t kStride = kBlocks * kSignatureBlock;
    for (int first = 0; first < input.index.block_count(); first += kBlocks) {
      const int left = input.index.block_count() - first;
      CodeBlocks blocks = input.index.blocks(first, left < kBlocks ? left : kBlocks, input.kv_head);
      blocks.norms = nullptr;
      queries.score<Ops>(blocks, {.data = scratch.steps, .stride = kStride});
      const std::int64_t begin = std::int64_t{first} * kSignatureBlock;
      const std::int64_t end = begin + kStride < n ? begin + kStride : n;
      for (int g = 0; g < input.queries.count; ++g) {
        for (std::int64_t t = begin; t < end; ++t) {
          scratch.scores[std::int64_t{g} * n + t] =
              unit * static_cast<float>(scratch.steps[g * kStride + t - begin]);
        }
      }
    }
    return scratch.scores;
  }

  /// Bytes that compute() reads.
  template <class Source, class Q>
  [[nodiscard]] static std::int64_t bytes(const DrawInput<Source, Signatures<Q>>& input) {
    return input.index.scan_bytes(false);
  }

 private:
  // A divisor of a segment's blocks.
  static constexpr int kBlocks = 8;
  static_assert(kSignatureSegment / kSignatureBlock % kBlocks == 0);

  QuantiserShape shape_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

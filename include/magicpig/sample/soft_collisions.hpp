// SPDX-License-Identifier: Apache-2.0
// SOCKET: tokens by how likely a softened query shares their buckets.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/index/hash_codes.hpp"
#include "magicpig/sample/top_k.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Keys are hashed to a bucket r_l of each of L tables, c_r in {-1, 1}^K its bits; the query
/// prefers all buckets by its margins a = tanh(w.q) / sqrt(d):
///   P_l(r) = softmax_r(<a_l, c_r> / temperature) = prod_b sigmoid(2 a_lb c_rb / temperature),
/// the product on the right because the 2^K buckets are all sign patterns. A token's score is
/// |v| sum_l P_l(r_l). It ranks and estimates no logit.
/// Cost: L table lookups per query head and token, and L 2^K multiplications.
/// Source: SOCKET, Joshi et al. 2026.
template <class Family>
class SoftCollisions {
 public:
  static constexpr bool kLogits = false;

  /// Scores for indexes of `family`, which must outlive them. Error: a temperature that is not
  /// above 0 or not finite.
  [[nodiscard]] static Result<SoftCollisions> create(const Family& family,
                                                     double temperature = 0.3) noexcept {
    if (!(temperature > 0.0 && temperature <= 1e30)) {
      return Status::error(ErrorCode::kInvalidArgument, "temperature %g must lie in (0, 1e30]",
                           temperature);
    }
    return SoftCollisions(family, temperature);
  }
  static Result<SoftCollisions> create(const Family&& family, double = 0.0) = delete;

  /// Error: an index of another family.
  [[nodiscard]] Status supports(const HashCodes<Family>& index) const noexcept {
    const Family& other = index.family();
    if (&other == family_) return Status();
    return Status::error(ErrorCode::kShapeMismatch,
                         "the scores are made for another family than the index, which has "
                         "(K, L) = (%d, %d)",
                         other.bits(), other.tables());
  }

  struct Scratch {
    float* projections = nullptr;  // [group, K L]
    float* table = nullptr;        // [2^K] of one table
    float* scores = nullptr;       // [group, n]
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto group = static_cast<std::size_t>(limits.group);
    return {.projections = arena.take<float>(family_->scratch_floats(limits.group)),
            .table = arena.take<float>(static_cast<std::size_t>(bucket_count(family_->bits()))),
            .scores = arena.take<float>(group * static_cast<std::size_t>(limits.tokens))};
  }

  template <class Ops, class Source>
  const float* compute(const DrawInput<Source, HashCodes<Family>>& input,
                       const Scratch& scratch) const {
    const HashCodes<Family>& index = input.index;
    const std::int64_t n = index.indexed().size();
    family_->template project<Ops>(input.queries.data, input.queries.count, scratch.projections);
    const std::int64_t planes = std::int64_t{family_->bits()} * family_->tables();
    for (int g = 0; g < input.queries.count; ++g) {
      float* scores = scratch.scores + g * n;
      for (std::int64_t i = 0; i < n; ++i) scores[i] = 0.0F;
      for (int l = 0; l < family_->tables(); ++l) {
        tabulate(scratch.projections + g * planes + l, scratch.table);
        for (int s = 0; s < index.segment_count(); ++s) {
          const Code* codes = index.codes(s, input.kv_head, l);
          float* own = scores + std::int64_t{s} * HashCodesSegment::kTokens;
          for (int i = 0; i < index.segment_tokens(s); ++i) own[i] += scratch.table[codes[i]];
        }
      }
      for (int s = 0; s < index.segment_count(); ++s) {
        const float* norms = index.value_norms(s, input.kv_head);
        float* own = scores + std::int64_t{s} * HashCodesSegment::kTokens;
        for (int i = 0; i < index.segment_tokens(s); ++i) own[i] *= norms[i];
      }
    }
    return scratch.scores;
  }

 private:
  SoftCollisions(const Family& family, double temperature)
      : family_(&family), temperature_(temperature) {}

  // P_l of every bucket; the projection on the plane of bit b is at projections[b * L].
  void tabulate(const float* projections, float* table) const {
    table[0] = 1.0F;
    for (int b = 0; b < family_->bits(); ++b) {
      const auto projection = static_cast<double>(projections[std::int64_t{b} * family_->tables()]);
      const double margin = ::tanh(projection) / ::sqrt(static_cast<double>(family_->dim()));
      const double one = 1.0 / (1.0 + ::exp(-2.0 * margin / temperature_));
      const auto set = static_cast<float>(one);
      const auto clear = static_cast<float>(1.0 - one);
      for (int r = 0; r < bucket_count(b); ++r) {
        table[r + bucket_count(b)] = table[r] * set;
        table[r] *= clear;
      }
    }
  }

  const Family* family_;
  double temperature_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

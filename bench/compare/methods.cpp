// SPDX-License-Identifier: Apache-2.0
// The list of methods.
#include "compare/methods.hpp"

namespace magicpig::bench {

std::span<const Method> all_methods() {
  static constexpr Method kMethods[] = {
      {"exact", "attention over every token", exact_settings},
      {"topk", "each head its own tokens of largest logit, their union the budget", top_k_settings},
      {"top_p", "each head the fewest tokens that hold p of its softmax, exact logits",
       top_p_settings},
      {"uniform", "uniform sampling without replacement", uniform_settings},
      {"oracle_multinomial", "draws with replacement from each head's true softmax",
       multinomial_settings},
      {"oracle_ht", "one Poisson draw per KV head from the sum of its true softmaxes",
       poisson_settings},
      {"magicpig", "the published rule: at least 2 collisions in (K, L) tables",
       published_settings},
      {"tables", "(K, L) tables with other thresholds t, probing radius r, uniform share rho",
       table_settings},
      {"cross_polytope", "the same rule with cross-polytope hashes", cross_polytope_settings},
      {"signatures", "one draw per KV head by packed codes of 1 to 4 bits per dimension",
       signature_settings},
      {"trained_signatures", "the same with codes trained on the keys: product quantisation",
       trained_settings},
      {"signature_draws",
       "codes of 2 bits drawn from otherwise: independent draws, TopK of the score, a certain "
       "share; Haar rotation",
       signature_draw_settings},
      {"top_p_estimated", "top_p by logits that codes of 4 bits estimate, as Twilight does it",
       estimated_top_p_settings},
      {"pq", "each head its own tokens of largest logit by product quantisation of the keys",
       pq_settings},
      {"quest", "each head its own pages of 16, 32 or 64 tokens of largest bound", quest_settings},
      {"socket", "each head its own tokens of most likely collisions with a softened query",
       socket_settings},
      {"vattention",
       "2 % by logits that codes of 2 bits estimate, a pilot of 1 %, as many uniform draws as the "
       "promise about a sum asks for",
       vattention_settings},
      {"uniform_tail",
       "half the budget by logits that codes of 2 bits estimate, half drawn from the others alike",
       uniform_tail_settings},
      {"learned", "each head its own tokens of most bits in common, of codes trained on captures",
       learned_settings, true},
      {"double_sparsity",
       "each head its own tokens by the inner product over 8, 16 or 32 channels of 4 bits",
       double_sparsity_settings},
      {"ivf", "each head its own clusters of keys, by the inner product with their centroids",
       ivf_settings},
  };
  return kMethods;
}

}  // namespace magicpig::bench

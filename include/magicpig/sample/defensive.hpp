// SPDX-License-Identifier: Apache-2.0
// The defensive union: whatever a sampler draws, and a fresh uniform sample beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/sample/budget.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/sample/uniform.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Probability of the union of two independent draws: u + rho - u rho.
template <class Inner>
struct UnionInclusion {
  static_assert(Inner::kAnyToken, "the inner probability of uniformly drawn tokens is needed too");
  static constexpr bool kAnyToken = true;
  static constexpr std::int64_t kIndexBytes = inclusion_bytes<Inner>();
  Inner inner;
  float rho = 0.0F;

  template <class Ops>
  void log_probability(const CandidateTile& tile, float* out) const {
    inner.template log_probability<Ops>(tile, out);
    Ops::log_affine_exp(out, tile.reads, rho, 1.0F - rho);
  }
  void prefetch(const TokenId* tokens, int count) const {
    prefetch_inclusion(inner, tokens, count);
  }
};

/// Draws what `Sampler` draws, and independently of it a uniform sample of the indexed range; pi =
/// u + rho - u rho with rho = m / n exactly. No weight exceeds 1 / rho, so tokens that the hash all
/// but never finds cannot ruin an estimate, and no floor is needed inside a logarithm. Stacks on
/// any sampler whose inclusion probability is known for tokens that it did not draw.
///
/// The error of draws from tables is that of two independent sources. Given the tables, the mean
/// variance of the uniform sample is the sum over the tokens that it alone drew of
/// (1 - rho) omega^2 |v - out|^2; that of the tables comes from the tokens that it did not draw.
/// Source: defensive mixtures, Hesterberg 1995; Owen and Zhou 2000.
template <class Sampler>
class Defensive {
 public:
  static constexpr bool kUnbiased = true;
  static constexpr bool kClustered = !error_is_told<Sampler>();

  /// Error: as Uniform.
  [[nodiscard]] static Result<Defensive> create(Sampler sampler, const Budget& budget) noexcept {
    Result<Uniform> uniform = Uniform::create(budget);
    if (!uniform.ok()) return uniform.status();
    return Defensive(std::move(sampler), *uniform);
  }

  /// As the inner sampler's.
  template <class Index>
  [[nodiscard]] Status supports(const Index& index) const noexcept {
    return supported_by(sampler_, index);
  }

  struct Scratch {
    typename Sampler::Scratch sampler;
    typename Uniform::Scratch uniform;
    TokenId* tokens = nullptr;           // [limits.tokens]
    std::uint32_t* members = nullptr;    // [limits.tokens]
    std::uint16_t* essential = nullptr;  // [limits.tokens, group], see TableGroups
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    const auto tokens = static_cast<std::size_t>(limits.tokens);
    return {
        .sampler = sampler_.carve(arena, limits),
        .uniform = uniform_.carve(arena, limits),
        .tokens = arena.take<TokenId>(tokens),
        .members = arena.take<std::uint32_t>(tokens),
        .essential = arena.take<std::uint16_t>(tokens * static_cast<std::size_t>(limits.group))};
  }

  template <class Ops, class Source, class Index>
  [[nodiscard]] auto draw(const DrawInput<Source, Index>& input, Scratch& scratch) const {
    const auto found = sampler_.template draw<Ops>(input, scratch.sampler);
    const auto extra = uniform_.template draw<Ops>(input, scratch.uniform);
    const std::uint32_t everyone = input.queries.everyone();
    std::size_t count = 0;
    std::size_t f = 0;
    std::size_t e = 0;
    while (f < found.tokens.size() || e < extra.tokens.size()) {
      const bool in_found = f < found.tokens.size() &&
                            (e == extra.tokens.size() || found.tokens[f] <= extra.tokens[e]);
      const bool in_extra = e < extra.tokens.size() &&
                            (f == found.tokens.size() || extra.tokens[e] <= found.tokens[f]);
      scratch.tokens[count] = in_found ? found.tokens[f] : extra.tokens[e];
      scratch.members[count] = in_extra || found.members.empty() ? everyone : found.members[f];
      if (found.groups.known()) {
        const std::uint32_t by_tables = !in_found               ? 0U
                                        : found.members.empty() ? everyone
                                                                : found.members[f];
        combine(found.groups, f, by_tables, in_extra, scratch.essential, count);
      }
      ++count;
      f += in_found ? 1U : 0U;
      e += in_extra ? 1U : 0U;
    }
    using Inner = typename std::remove_cvref_t<decltype(found)>::Inclusion;
    const auto rho = static_cast<float>(uniform_.probability(input.present()));
    TableGroups groups = found.groups;
    groups.essential = scratch.essential;
    groups.alone *= 1.0F - rho;
    return Candidates<UnionInclusion<Inner>>{.tokens = {scratch.tokens, count},
                                             .members = {scratch.members, count},
                                             .inclusion = {.inner = found.inclusion, .rho = rho},
                                             .groups = groups,
                                             .index_bytes = found.index_bytes};
  }

 private:
  // The groups of candidate `count`: those that it was found by, number f there, for the heads that
  // found it; none for a token that the uniform sample has, too.
  static void combine(const TableGroups& found, std::size_t f, std::uint32_t by_tables,
                      bool in_extra, std::uint16_t* essential, std::size_t count) {
    const auto heads = static_cast<std::size_t>(found.heads);
    for (std::size_t g = 0; g < heads; ++g) {
      const bool own = ((by_tables >> g) & 1U) != 0;
      const std::uint16_t found_by = own ? found.essential[f * heads + g] : TableGroups::kAlone;
      const bool keeps = !in_extra || found_by == TableGroups::kAlone;
      essential[count * heads + g] = keeps ? found_by : std::uint16_t{0};
    }
  }

  Defensive(Sampler sampler, Uniform uniform)
      : sampler_(std::move(sampler)), uniform_(std::move(uniform)) {}

  Sampler sampler_;
  Uniform uniform_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

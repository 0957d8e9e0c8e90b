// SPDX-License-Identifier: Apache-2.0
// A way of its own for each KV head: exact, uniform, or by signatures of so many bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <variant>

#include "magicpig/core/candidates.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/head_setting.hpp"
#include "magicpig/core/one_head.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/head_quantisers.hpp"
#include "magicpig/index/per_head_index.hpp"
#include "magicpig/sample/systematic.hpp"
#include "magicpig/sample/uniform.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Draws for each KV head as its setting says, with the very tokens and probabilities that Uniform,
/// or Systematic on signatures of this head, draw for the same noise key; an exact head has all
/// tokens, each with probability 1. So it is unbiased because each of those is.
class PerHead {
 public:
  static constexpr bool kUnbiased = true;

  /// For indexes of `quantisers`, or of others with the same settings. Errors: as
  /// Uniform::create() and Systematic::create(), memory.
  [[nodiscard]] static Result<PerHead> create(const HeadQuantisers& quantisers) noexcept {
    PerHead sampler(quantisers.kv_heads());
    if (sampler.heads_ == nullptr) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads",
                           quantisers.kv_heads());
    }
    for (int h = 0; h < sampler.kv_heads_; ++h) {
      const HeadSetting& setting = quantisers.setting(h);
      Head& head = sampler.heads_[static_cast<std::size_t>(h)];
      Status status;
      if (setting.kind == HeadKind::kUniform) {
        status = keep(Uniform::create({.fraction = setting.budget}), head);
      }
      const HeadQuantisers::One& quantiser = quantisers.quantiser(h);
      if (const auto* random = std::get_if<HadamardQuantiser>(&quantiser)) {
        status = keep(systematic(*random, setting), head);
      }
      if (const auto* trained = std::get_if<ProductQuantiser>(&quantiser)) {
        status = keep(systematic(*trained, setting), head);
      }
      if (!status.ok()) return status;
    }
    return sampler;
  }

  /// Error: an index of other KV heads, or one of whose heads has other codes.
  [[nodiscard]] Status supports(const PerHeadIndex& index) const noexcept {
    if (index.kv_heads() != kv_heads_) {
      return Status::error(ErrorCode::kShapeMismatch,
                           "the sampler is made for %d KV heads, the index has %d", kv_heads_,
                           index.kv_heads());
    }
    for (int h = 0; h < kv_heads_; ++h) {
      const Systematic* own = std::get_if<Systematic>(&at(h));
      const auto* random = index.signatures<HadamardQuantiser>(h);
      const auto* trained = index.signatures<ProductQuantiser>(h);
      if ((own != nullptr) != (random != nullptr || trained != nullptr)) {
        return Status::error(ErrorCode::kShapeMismatch,
                             "KV head %d: the sampler and the index do not both have signatures",
                             h);
      }
      Status status;
      if (random != nullptr) status = own->supports(*random);
      if (trained != nullptr) status = own->supports(*trained);
      if (!status.ok()) {
        return Status::error(status.code(), "KV head %d: %s", h, status.message());
      }
    }
    return Status();
  }

  /// Memory in which the head that is drawn for carves its own.
  struct Scratch {
    std::byte* memory = nullptr;
    std::size_t bytes = 0;
  };

  [[nodiscard]] Scratch carve(Arena& arena, const DrawLimits& limits) const {
    std::size_t most = 0;
    for (int h = 0; h < kv_heads_; ++h) {
      Arena own;
      if (const auto* uniform = std::get_if<Uniform>(&at(h))) (void)uniform->carve(own, limits);
      if (const auto* codes = std::get_if<Systematic>(&at(h))) (void)codes->carve(own, limits);
      if (std::get_if<Systematic>(&at(h)) == nullptr) (void)All::carve(own, limits);
      most = own.bytes_needed() > most ? own.bytes_needed() : most;
    }
    return {.memory = arena.take<std::byte>(most), .bytes = most};
  }

  template <class Ops, class Source>
  [[nodiscard]] Candidates<KnownInclusion> draw(const DrawInput<Source, PerHeadIndex>& input,
                                                Scratch& scratch) const {
    const DrawLimits limits{.group = input.queries.count, .tokens = input.index.indexed().size()};
    Arena arena({scratch.memory, scratch.bytes});
    const int h = input.kv_head;
    if (const auto* codes = std::get_if<Systematic>(&at(h))) {
      typename Systematic::Scratch own = codes->carve(arena, limits);
      if (const auto* random = input.index.template signatures<HadamardQuantiser>(h)) {
        return codes->template draw<Ops>(alone(input, *random, OneHead(input.key_values, h)), own);
      }
      const auto* trained = input.index.template signatures<ProductQuantiser>(h);
      return codes->template draw<Ops>(alone(input, *trained, OneHead(input.key_values, h)), own);
    }
    if (const auto* uniform = std::get_if<Uniform>(&at(h))) {
      typename Uniform::Scratch own = uniform->carve(arena, limits);
      const auto drawn = uniform->template draw<Ops>(input, own);
      return All::carve(arena, limits).with(drawn.tokens, drawn.inclusion.log_pi);
    }
    const All all = All::carve(arena, limits);
    std::size_t count = 0;
    for (TokenId i = 0; i < limits.tokens; ++i) {
      all.tokens[count] = input.index.indexed().begin + i;
      count += input.gone.has(all.tokens[count]) ? 0U : 1U;
    }
    return all.with({all.tokens, count}, 0.0F);
  }

 private:
  using Head = std::variant<std::monostate, Uniform, Systematic>;  // the first for exact

  // Room for every token, and for probabilities that all are the same.
  struct All {
    TokenId* tokens = nullptr;
    float* log_pi = nullptr;

    static All carve(Arena& arena, const DrawLimits& limits) {
      const auto tokens = static_cast<std::size_t>(limits.tokens);
      return {.tokens = arena.take<TokenId>(tokens), .log_pi = arena.take<float>(tokens)};
    }
    [[nodiscard]] Candidates<KnownInclusion> with(std::span<const TokenId> drawn,
                                                  float same) const {
      for (std::size_t i = 0; i < drawn.size(); ++i) log_pi[i] = same;
      return {.tokens = drawn, .members = {}, .inclusion = {.log_pi = log_pi}};
    }
  };

  explicit PerHead(int kv_heads)
      : heads_(new (std::nothrow) Head[static_cast<std::size_t>(kv_heads)]), kv_heads_(kv_heads) {}

  template <class Q>
  static Result<Systematic> systematic(const Q& quantiser, const HeadSetting& setting) {
    return Systematic::create(quantiser, {.budget = {.fraction = setting.budget},
                                          .temperature = setting.temperature,
                                          .certain = setting.certain});
  }

  template <class Sampler>
  static Status keep(Result<Sampler> made, Head& head) {
    if (made.ok()) head.emplace<Sampler>(std::move(*made));
    return made.status();
  }

  // The input for one KV head whose index knows it as 0.
  template <class Source, class Q>
  static DrawInput<OneHead<Source>, Signatures<Q>> alone(
      const DrawInput<Source, PerHeadIndex>& input, const Signatures<Q>& index,
      const OneHead<Source>& source) {
    NoiseKey noise = input.noise;
    noise.first_head += static_cast<std::uint32_t>(input.kv_head);
    return {.key_values = source,
            .index = index,
            .kv_head = 0,
            .queries = input.queries,
            .scale = input.scale,
            .noise = noise,
            .gone = input.gone};
  }

  [[nodiscard]] const Head& at(int kv_head) const {
    return heads_[static_cast<std::size_t>(kv_head)];
  }

  std::unique_ptr<Head[]> heads_;  // [kv_heads]
  int kv_heads_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

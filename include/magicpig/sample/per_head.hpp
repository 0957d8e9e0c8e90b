// SPDX-License-Identifier: Apache-2.0
// A way of its own for each KV head: exact, uniform, by signatures of so many bits, or by tables.
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
#include "magicpig/hash/head_hashes.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/per_head_index.hpp"
#include "magicpig/sample/collision.hpp"
#include "magicpig/sample/defensive.hpp"
#include "magicpig/sample/sampler.hpp"
#include "magicpig/sample/systematic.hpp"
#include "magicpig/sample/uniform.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Probabilities of one KV head, in the form of its own sampler.
struct HeadInclusion {
  static constexpr bool kAnyToken = false;
  using Union = UnionInclusion<CosineInclusion>;
  std::variant<ConstantInclusion, KnownInclusion, CosineInclusion, Union> own;

  template <class Ops>
  void log_probability(const CandidateTile& tile, float* out) const {
    if (const auto* same = std::get_if<ConstantInclusion>(&own)) {
      same->template log_probability<Ops>(tile, out);
    } else if (const auto* known = std::get_if<KnownInclusion>(&own)) {
      known->template log_probability<Ops>(tile, out);
    } else if (const auto* cosine = std::get_if<CosineInclusion>(&own)) {
      cosine->template log_probability<Ops>(tile, out);
    } else if (const auto* either = std::get_if<Union>(&own)) {
      either->template log_probability<Ops>(tile, out);
    }
  }
  void prefetch(const TokenId* tokens, int count) const {
    if (const auto* cosine = std::get_if<CosineInclusion>(&own)) cosine->prefetch(tokens, count);
    if (const auto* either = std::get_if<Union>(&own)) either->prefetch(tokens, count);
  }
};

/// Draws for each KV head as its setting says, with the very tokens and probabilities that Uniform,
/// Systematic on signatures of this head, or Collisions and Defensive<Collisions> on tables of it,
/// draw for the same noise key; an exact head has all tokens, each with probability 1. So it is
/// unbiased because each of those is.
class PerHead {
 public:
  static constexpr bool kUnbiased = true;

  /// For indexes of `hashes`, or of others with the same settings. Errors: as Uniform::create(),
  /// Systematic::create(), Collisions::create() and Defensive::create(), memory.
  [[nodiscard]] static Result<PerHead> create(const HeadHashes& hashes) noexcept {
    return make_all(hashes, [&](int h) -> const HeadSetting& { return hashes.setting(h); });
  }

  /// The same with settings of their own, `profile` [kv_heads], that share the indexes of `hashes`:
  /// other rows, temperatures, collisions. Errors: also check_profile(), and a KV head whose
  /// setting asks for other codes or tables.
  [[nodiscard]] static Result<PerHead> create(const HeadHashes& hashes,
                                              std::span<const HeadSetting> profile) noexcept {
    const Status status = check_profile(profile, hashes.kv_heads());
    if (!status.ok()) return status;
    for (int h = 0; h < hashes.kv_heads(); ++h) {
      if (profile[static_cast<std::size_t>(h)].shares_index(hashes.setting(h))) continue;
      return Status::error(ErrorCode::kShapeMismatch,
                           "KV head %d: the setting asks for other codes or tables than the hashes "
                           "make",
                           h);
    }
    return make_all(hashes, [&](int h) { return profile[static_cast<std::size_t>(h)]; });
  }

  /// Error: an index of other KV heads, or one of whose heads has other codes or tables.
  [[nodiscard]] Status supports(const PerHeadIndex& index) const noexcept {
    if (index.kv_heads() != kv_heads_) {
      return Status::error(ErrorCode::kShapeMismatch,
                           "the sampler is made for %d KV heads, the index has %d", kv_heads_,
                           index.kv_heads());
    }
    for (int h = 0; h < kv_heads_; ++h) {
      const Status status = supports(index, h);
      if (!status.ok()) {
        return Status::error(status.code(), "KV head %d: %s", h, status.message());
      }
    }
    return Status();
  }

  /// Whether the probabilities of this KV head alone tell how far its draws may be off.
  [[nodiscard]] bool error_is_told(int kv_head) const {
    if (std::get_if<Collisions>(&at(kv_head)) != nullptr) {
      return magicpig::error_is_told<Collisions>();
    }
    if (std::get_if<Defensive<Collisions>>(&at(kv_head)) != nullptr) {
      return magicpig::error_is_told<Defensive<Collisions>>();
    }
    return true;
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
      if (const auto* uniform = std::get_if<Uniform>(&at(h))) {
        (void)uniform->carve(own, limits);
      } else if (const auto* codes = std::get_if<Systematic>(&at(h))) {
        (void)codes->carve(own, limits);
      } else if (const auto* collisions = std::get_if<Collisions>(&at(h))) {
        (void)collisions->carve(own, limits);
      } else if (const auto* both = std::get_if<Defensive<Collisions>>(&at(h))) {
        (void)both->carve(own, limits);
      } else {
        (void)own.take<TokenId>(static_cast<std::size_t>(limits.tokens));
      }
      most = own.bytes_needed() > most ? own.bytes_needed() : most;
    }
    return {.memory = arena.take<std::byte>(most), .bytes = most};
  }

  template <class Ops, class Source>
  [[nodiscard]] Candidates<HeadInclusion> draw(const DrawInput<Source, PerHeadIndex>& input,
                                               Scratch& scratch) const {
    const int h = input.kv_head;
    if (const auto* codes = std::get_if<Systematic>(&at(h))) {
      if (const auto* random = input.index.template signatures<HadamardQuantiser>(h)) {
        return draw_alone<Ops>(*codes, input, *random, scratch);
      }
      return draw_alone<Ops>(*codes, input, *input.index.template signatures<ProductQuantiser>(h),
                             scratch);
    }
    if (const auto* collisions = std::get_if<Collisions>(&at(h))) {
      return draw_alone<Ops>(*collisions, input, *input.index.tables(h), scratch);
    }
    if (const auto* both = std::get_if<Defensive<Collisions>>(&at(h))) {
      return draw_alone<Ops>(*both, input, *input.index.tables(h), scratch);
    }
    const TokenRange range = input.index.indexed();
    Arena arena({scratch.memory, scratch.bytes});
    if (const auto* uniform = std::get_if<Uniform>(&at(h))) {
      Uniform::Scratch own = uniform->carve(arena, limits(input));
      return in_common(uniform->template draw<Ops>(input, own));
    }
    auto* tokens = arena.take<TokenId>(static_cast<std::size_t>(range.size()));
    std::size_t count = 0;
    for (TokenId t = range.begin; t < range.end; ++t) {
      if (!input.gone.has(t)) tokens[count++] = t;
    }
    return {.tokens = {tokens, count}, .members = {}, .inclusion = {.own = ConstantInclusion{}}};
  }

 private:
  using Head = std::variant<std::monostate, Uniform, Systematic, Collisions,
                            Defensive<Collisions>>;  // the first for exact

  explicit PerHead(int kv_heads)
      : heads_(new (std::nothrow) Head[static_cast<std::size_t>(kv_heads)]), kv_heads_(kv_heads) {}

  template <class SettingOf>
  static Result<PerHead> make_all(const HeadHashes& hashes, const SettingOf& setting) noexcept {
    PerHead sampler(hashes.kv_heads());
    if (sampler.heads_ == nullptr) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", hashes.kv_heads());
    }
    for (int h = 0; h < sampler.kv_heads_; ++h) {
      const Status status =
          make(setting(h), hashes.hash(h), sampler.heads_[static_cast<std::size_t>(h)]);
      if (!status.ok()) return status;
    }
    return sampler;
  }

  // The sampler of one KV head.
  static Status make(const HeadSetting& setting, const HeadHashes::One& hash, Head& head) {
    if (const auto* random = std::get_if<HadamardQuantiser>(&hash)) {
      return keep(systematic(*random, setting), head);
    }
    if (const auto* trained = std::get_if<ProductQuantiser>(&hash)) {
      return keep(systematic(*trained, setting), head);
    }
    if (const auto* planes = std::get_if<SimHash>(&hash)) {
      Result<Collisions> made = Collisions::create(
          *planes,
          {.min_collisions = setting.min_collisions, .probe_radius = setting.probe_radius});
      if (!made.ok() || setting.uniform_part == 0.0) return keep(std::move(made), head);
      return keep(
          Defensive<Collisions>::create(std::move(*made), {.fraction = setting.uniform_part}),
          head);
    }
    if (setting.kind != HeadKind::kUniform) return Status();
    return keep(Uniform::create({.fraction = setting.budget}), head);
  }

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

  // supports() for one KV head.
  [[nodiscard]] Status supports(const PerHeadIndex& index, int kv_head) const noexcept {
    const auto* codes = std::get_if<Systematic>(&at(kv_head));
    const auto* random = index.signatures<HadamardQuantiser>(kv_head);
    const auto* trained = index.signatures<ProductQuantiser>(kv_head);
    if ((codes != nullptr) != (random != nullptr || trained != nullptr)) {
      return not_both("signatures");
    }
    if (random != nullptr) return codes->supports(*random);
    if (trained != nullptr) return codes->supports(*trained);
    const auto* collisions = std::get_if<Collisions>(&at(kv_head));
    const auto* both = std::get_if<Defensive<Collisions>>(&at(kv_head));
    const auto* tables = index.tables(kv_head);
    if ((collisions != nullptr || both != nullptr) != (tables != nullptr)) {
      return not_both("tables");
    }
    if (collisions != nullptr) return collisions->supports(*tables);
    if (both != nullptr) return both->supports(*tables);
    return Status();
  }

  static Status not_both(const char* what) {
    return Status::error(ErrorCode::kShapeMismatch, "the sampler and the index do not both have %s",
                         what);
  }

  template <class Source>
  static DrawLimits limits(const DrawInput<Source, PerHeadIndex>& input) {
    return {.group = input.queries.count, .tokens = input.index.indexed().size()};
  }

  template <class Inclusion>
  static Candidates<HeadInclusion> in_common(const Candidates<Inclusion>& drawn) {
    return {.tokens = drawn.tokens,
            .members = drawn.members,
            .inclusion = {.own = drawn.inclusion},
            .groups = drawn.groups,
            .index_bytes = drawn.index_bytes + static_cast<std::int64_t>(drawn.tokens.size()) *
                                                   inclusion_bytes<Inclusion>()};
  }

  // Draws for one KV head from an index that knows it as 0.
  template <class Ops, class Sampler, class Source, class Index>
  static Candidates<HeadInclusion> draw_alone(const Sampler& sampler,
                                              const DrawInput<Source, PerHeadIndex>& input,
                                              const Index& index, const Scratch& scratch) {
    Arena arena({scratch.memory, scratch.bytes});
    typename Sampler::Scratch own = sampler.carve(arena, limits(input));
    NoiseKey noise = input.noise;
    noise.first_head += static_cast<std::uint32_t>(input.kv_head);
    const OneHead<Source> source(input.key_values, input.kv_head);
    const DrawInput<OneHead<Source>, Index> alone{.key_values = source,
                                                  .index = index,
                                                  .kv_head = 0,
                                                  .queries = input.queries,
                                                  .scale = input.scale,
                                                  .noise = noise,
                                                  .report = input.report,
                                                  .gone = input.gone};
    return in_common(sampler.template draw<Ops>(alone, own));
  }

  [[nodiscard]] const Head& at(int kv_head) const {
    return heads_[static_cast<std::size_t>(kv_head)];
  }

  std::unique_ptr<Head[]> heads_;  // [kv_heads]
  int kv_heads_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

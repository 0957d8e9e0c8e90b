// SPDX-License-Identifier: Apache-2.0
// The index of a layer whose KV heads are read in ways of their own.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <variant>

#include "magicpig/core/error.hpp"
#include "magicpig/core/head_setting.hpp"
#include "magicpig/core/one_head.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/hash/head_quantisers.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// For each KV head of a profile what its setting needs: Signatures of the head alone, or nothing.
/// All heads cover the same tokens. Memory, threads: as Signatures, for the heads that have them.
class PerHeadIndex {
 public:
  /// An empty index. `quantisers` must outlive it and may be shared by any number of indexes;
  /// `advice` is as SignaturesConfig::memory_advice. Errors: as Signatures::create().
  [[nodiscard]] static Result<PerHeadIndex> create(const HeadQuantisers& quantisers,
                                                   MemoryAdvice advice = nullptr) noexcept {
    PerHeadIndex index(quantisers, advice);
    if (index.heads_ == nullptr) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads",
                           quantisers.kv_heads());
    }
    Status status;
    for (int h = 0; h < index.kv_heads() && status.ok(); ++h) {
      Head& head = index.heads_[static_cast<std::size_t>(h)];
      const HeadQuantisers::One& quantiser = quantisers.quantiser(h);
      if (const auto* random = std::get_if<HadamardQuantiser>(&quantiser)) {
        status = keep(*random, index.config(h), head);
      }
      if (const auto* trained = std::get_if<ProductQuantiser>(&quantiser)) {
        status = keep(*trained, index.config(h), head);
      }
    }
    if (!status.ok()) return status;
    return index;
  }
  static Result<PerHeadIndex> create(const HeadQuantisers&&, MemoryAdvice = nullptr) = delete;

  /// Replaces the content by the tokens of `range`, as Signatures::build() does for each head.
  /// Errors: as there, with the KV head in front; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Result<PerHeadIndex> fresh = create(*quantisers_, advice_);
    if (!fresh.ok()) return fresh.status();
    Status status = check_range(range);
    if (status.ok()) status = check_source(source, kv_heads(), dim(), range.end);
    if (!status.ok()) return status;
    status = fresh->for_each_signatures(
        [&](int h, auto& own) { return own.build(backend, OneHead(source, h), range); });
    if (!status.ok()) return status;
    fresh->range_ = range;
    *this = std::move(*fresh);
    return Status();
  }

  /// Takes over tokens [indexed().end, end). An `end` at or below indexed().end changes nothing.
  /// Errors: as build(); the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    const Status status = check_source(source, kv_heads(), dim(), end);
    if (!status.ok()) return status;
    const Status done = for_each_signatures(
        [&](int h, auto& own) { return own.append(backend, OneHead(source, h), end); });
    if (done.ok()) {
      range_.end = end;
    } else {  // heads before the one that failed have them
      (void)for_each_signatures([&](int, auto& own) { return own.truncate(range_.end); });
    }
    return done;
  }

  /// Forgets tokens from `end` on, as Signatures::truncate(). Error: a negative `end`, and nothing
  /// is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    return for_each_signatures([&](int, auto& own) { return own.truncate(end); });
  }

  [[nodiscard]] TokenRange indexed() const { return range_; }
  [[nodiscard]] int kv_heads() const { return quantisers_->kv_heads(); }
  [[nodiscard]] int dim() const { return quantisers_->dim(); }
  [[nodiscard]] const HeadSetting& setting(int kv_head) const {
    return quantisers_->setting(kv_head);
  }
  /// The signatures of a KV head, whose number in them is 0; null where it has no codes by Q.
  template <class Q>
  [[nodiscard]] const Signatures<Q>* signatures(int kv_head) const {
    return std::get_if<Signatures<Q>>(&heads_[static_cast<std::size_t>(kv_head)]);
  }

  /// Bytes held by all arrays, the quantisers' not among them.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = 0;
    (void)for_each_signatures([&](int, const auto& own) {
      sum += own.bytes();
      return Status();
    });
    return sum;
  }
  /// Bytes per token of one KV head in full segments, all of which a draw reads; 0 without codes.
  [[nodiscard]] std::size_t bytes_per_token(int kv_head) const {
    const bool norms = setting(kv_head).value_norms;
    const auto of = [norms](const auto* own) {
      return own == nullptr ? std::size_t{0}
                            : own->bytes_per_token(own->quantiser().shape(), norms);
    };
    return of(signatures<HadamardQuantiser>(kv_head)) + of(signatures<ProductQuantiser>(kv_head));
  }

 private:
  using Head =
      std::variant<std::monostate, Signatures<HadamardQuantiser>, Signatures<ProductQuantiser>>;

  PerHeadIndex(const HeadQuantisers& quantisers, MemoryAdvice advice)
      : quantisers_(&quantisers),
        advice_(advice),
        heads_(new (std::nothrow) Head[static_cast<std::size_t>(quantisers.kv_heads())]) {}

  template <class Q>
  static Status keep(const Q& quantiser, const SignaturesConfig& config, Head& head) {
    Result<Signatures<Q>> made = Signatures<Q>::create(quantiser, config);
    if (made.ok()) head.emplace<Signatures<Q>>(std::move(*made));
    return made.status();
  }

  [[nodiscard]] SignaturesConfig config(int kv_head) const {
    return {.kv_heads = 1,
            .value_dim = setting(kv_head).value_norms ? quantisers_->value_dim() : 0,
            .memory_advice = advice_};
  }

  // body(KV head, its signatures) for the heads that have them, up to the first error, which gets
  // the number of its KV head.
  template <class Body>
  Status for_each_signatures(const Body& body) const {
    for (int h = 0; h < kv_heads(); ++h) {
      Head& head = heads_[static_cast<std::size_t>(h)];
      Status status;
      if (auto* random = std::get_if<Signatures<HadamardQuantiser>>(&head)) {
        status = body(h, *random);
      }
      if (auto* trained = std::get_if<Signatures<ProductQuantiser>>(&head)) {
        status = body(h, *trained);
      }
      if (!status.ok()) {
        return Status::error(status.code(), "KV head %d by itself: %s", h, status.message());
      }
    }
    return Status();
  }

  const HeadQuantisers* quantisers_;
  MemoryAdvice advice_;
  TokenRange range_;
  std::unique_ptr<Head[]> heads_;  // [kv_heads]
};

}  // namespace magicpig::inline MAGICPIG_ABI

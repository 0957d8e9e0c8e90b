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
#include "magicpig/hash/head_hashes.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// For each KV head of a profile what its setting needs: Signatures or BucketTables of the head
/// alone, or nothing. All heads cover the same tokens. Memory, threads: as those, for the heads
/// that have them.
class PerHeadIndex {
 public:
  /// An empty index. `hashes` must outlive it and may be shared by any number of indexes;
  /// `advice` is as SignaturesConfig::memory_advice. Errors: as Signatures::create() and
  /// BucketTables::create().
  [[nodiscard]] static Result<PerHeadIndex> create(const HeadHashes& hashes,
                                                   MemoryAdvice advice = nullptr) noexcept {
    PerHeadIndex index(hashes, advice);
    if (index.heads_ == nullptr) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", hashes.kv_heads());
    }
    Status status;
    for (int h = 0; h < index.kv_heads() && status.ok(); ++h) {
      Head& head = index.heads_[static_cast<std::size_t>(h)];
      const HeadHashes::One& hash = hashes.hash(h);
      if (const auto* random = std::get_if<HadamardQuantiser>(&hash)) {
        status = keep(Signatures<HadamardQuantiser>::create(*random, index.config(h)), head);
      }
      if (const auto* trained = std::get_if<ProductQuantiser>(&hash)) {
        status = keep(Signatures<ProductQuantiser>::create(*trained, index.config(h)), head);
      }
      if (const auto* planes = std::get_if<SimHash>(&hash)) {
        status = keep(Tables::create(*planes, {.memory_advice = advice}), head);
        index.seal_tokens_ = BucketTablesConfig{}.seal_tokens;
      }
    }
    if (!status.ok()) return status;
    return index;
  }
  static Result<PerHeadIndex> create(const HeadHashes&&, MemoryAdvice = nullptr) = delete;

  /// Replaces the content by the tokens of `range`, as build() does for each head's own.
  /// Errors: as there, with the KV head in front; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Result<PerHeadIndex> fresh = create(*hashes_, advice_);
    if (!fresh.ok()) return fresh.status();
    Status status = check_range(range);
    if (status.ok()) status = check_source(source, kv_heads(), dim(), range.end);
    if (!status.ok()) return status;
    status = fresh->for_each_own(
        [&](int h, auto& own) { return own.build(backend, OneHead(source, h), range); });
    if (!status.ok()) return status;
    fresh->range_ = range;
    *this = std::move(*fresh);
    return Status();
  }

  /// Takes over tokens [indexed().end, end); where a head has tables in multiples of their
  /// seal_tokens, 1,024, for all heads alike, and the rest stays exact until a later call. An `end`
  /// at or below indexed().end changes nothing. Errors: as build(); the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    const Status status = check_source(source, kv_heads(), dim(), end);
    if (!status.ok()) return status;
    end -= (end - range_.end) % seal_tokens_;
    const Status done = for_each_own(
        [&](int h, auto& own) { return own.append(backend, OneHead(source, h), end); });
    if (done.ok()) {
      range_.end = end;
    } else {  // heads before the one that failed have them
      (void)for_each_own([&](int, auto& own) { return own.truncate(range_.end); });
    }
    return done;
  }

  /// Forgets tokens from `end` on, as Signatures and BucketTables do. Error: a negative `end`, and
  /// nothing is changed.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    range_.end = end > range_.begin ? end : range_.begin;
    return for_each_own([&](int, auto& own) { return own.truncate(end); });
  }

  [[nodiscard]] TokenRange indexed() const { return range_; }
  [[nodiscard]] int kv_heads() const { return hashes_->kv_heads(); }
  [[nodiscard]] int dim() const { return hashes_->dim(); }
  [[nodiscard]] const HeadSetting& setting(int kv_head) const { return hashes_->setting(kv_head); }
  /// The signatures of a KV head, whose number in them is 0; null where it has no codes by Q.
  template <class Q>
  [[nodiscard]] const Signatures<Q>* signatures(int kv_head) const {
    return std::get_if<Signatures<Q>>(&heads_[static_cast<std::size_t>(kv_head)]);
  }

  /// The tables of a KV head, whose number in them is 0; null where it has none.
  [[nodiscard]] const BucketTables<SimHash>* tables(int kv_head) const {
    return std::get_if<Tables>(&heads_[static_cast<std::size_t>(kv_head)]);
  }

  /// Bytes held by all arrays; quantisers and planes belong to the hashes.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = 0;
    (void)for_each_own([&](int, const auto& own) {
      sum += own.bytes();
      return Status();
    });
    return sum;
  }
  /// What bytes() will be of one KV head after a build with `tokens` tokens.
  [[nodiscard]] static std::size_t estimate_bytes(const HeadHashes& hashes, int kv_head,
                                                  TokenId tokens) {
    const SignaturesConfig config = config_of(hashes, kv_head);
    const HeadHashes::One& hash = hashes.hash(kv_head);
    if (const auto* random = std::get_if<HadamardQuantiser>(&hash)) {
      return Signatures<HadamardQuantiser>::estimate_bytes(random->shape(), config, tokens);
    }
    if (const auto* trained = std::get_if<ProductQuantiser>(&hash)) {
      return Signatures<ProductQuantiser>::estimate_bytes(trained->shape(), config, tokens);
    }
    const auto* planes = std::get_if<SimHash>(&hash);
    return planes == nullptr ? 0 : Tables::estimate_bytes(*planes, {}, tokens);
  }

  /// Bytes per token of the codes of one KV head in full segments, all of which a draw reads; 0
  /// without codes: of tables it reads some buckets.
  [[nodiscard]] std::size_t bytes_per_token(int kv_head) const {
    const bool norms = setting(kv_head).value_norms;
    const auto of = [norms](const auto* own) {
      return own == nullptr ? std::size_t{0}
                            : own->bytes_per_token(own->quantiser().shape(), norms);
    };
    return of(signatures<HadamardQuantiser>(kv_head)) + of(signatures<ProductQuantiser>(kv_head));
  }

 private:
  using Tables = BucketTables<SimHash>;
  using Head = std::variant<std::monostate, Signatures<HadamardQuantiser>,
                            Signatures<ProductQuantiser>, Tables>;

  PerHeadIndex(const HeadHashes& hashes, MemoryAdvice advice)
      : hashes_(&hashes),
        advice_(advice),
        heads_(new (std::nothrow) Head[static_cast<std::size_t>(hashes.kv_heads())]) {}

  template <class IndexType>
  static Status keep(Result<IndexType> made, Head& head) {
    if (made.ok()) head.emplace<IndexType>(std::move(*made));
    return made.status();
  }

  [[nodiscard]] static SignaturesConfig config_of(const HeadHashes& hashes, int kv_head) {
    return {.kv_heads = 1,
            .value_dim = hashes.setting(kv_head).value_norms ? hashes.value_dim() : 0};
  }
  [[nodiscard]] SignaturesConfig config(int kv_head) const {
    SignaturesConfig config = config_of(*hashes_, kv_head);
    config.memory_advice = advice_;
    return config;
  }

  // body(KV head, its signatures or tables) for the heads that have them, up to the first error,
  // which gets the number of its KV head.
  template <class Body>
  Status for_each_own(const Body& body) const {
    for (int h = 0; h < kv_heads(); ++h) {
      Head& head = heads_[static_cast<std::size_t>(h)];
      Status status;
      if (auto* random = std::get_if<Signatures<HadamardQuantiser>>(&head)) {
        status = body(h, *random);
      }
      if (auto* trained = std::get_if<Signatures<ProductQuantiser>>(&head)) {
        status = body(h, *trained);
      }
      if (auto* tables = std::get_if<Tables>(&head)) status = body(h, *tables);
      if (!status.ok()) {
        return Status::error(status.code(), "KV head %d by itself: %s", h, status.message());
      }
    }
    return Status();
  }

  const HeadHashes* hashes_;
  MemoryAdvice advice_;
  TokenRange range_;
  TokenId seal_tokens_ = 1;        // append() takes multiples of it
  std::unique_ptr<Head[]> heads_;  // [kv_heads]
};

}  // namespace magicpig::inline MAGICPIG_ABI

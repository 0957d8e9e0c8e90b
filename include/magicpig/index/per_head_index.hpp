// SPDX-License-Identifier: Apache-2.0
// The index of a layer whose KV heads are read in ways of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>

#include "magicpig/core/blob.hpp"
#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/head_setting.hpp"
#include "magicpig/core/one_head.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/hash/head_hashes.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/index/checks.hpp"
#include "magicpig/index/saved.hpp"
#include "magicpig/index/segment.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What the indexes of a profile's heads are made from, besides their settings.
struct PerHeadIndexConfig {
  /// Of heads with tables: BucketTablesConfig::segment_tokens.
  int segment_tokens = kMaxSegmentTokens;
  /// Of heads with tables, BucketTablesConfig::seal_tokens. Where there are any, append() takes
  /// tokens in multiples of this for all heads alike.
  int seal_tokens = BucketTablesConfig{}.seal_tokens;
  /// Shown every array of codes, factors, ids, offsets and norms before it is filled; null for
  /// none.
  MemoryAdvice memory_advice = nullptr;
};

/// For each KV head of a profile what its setting needs: Signatures or BucketTables of the head
/// alone, or nothing. All heads cover the same tokens, and the same ones are erased for all.
///
/// Every change is all or nothing, for all heads together. Those that may fail half-way are made to
/// a fork, which then takes this index's place. Memory, threads: as those of the heads' own
/// indexes, and once any token was erased a bit per token for each of them and for all together.
class PerHeadIndex {
 public:
  /// An empty index. `hashes` must outlive it and may be shared by any number of indexes. Errors:
  /// as Signatures::create() and BucketTables::create() where a head has them.
  [[nodiscard]] static Result<PerHeadIndex> create(const HeadHashes& hashes,
                                                   const PerHeadIndexConfig& config = {}) noexcept {
    PerHeadIndex index(hashes, config);
    if (index.heads_ == nullptr) return index.no_memory("for");
    Status status;
    for (int h = 0; h < index.kv_heads() && status.ok(); ++h) {
      Head& head = index.heads_[static_cast<std::size_t>(h)];
      const HeadHashes::One& hash = hashes.hash(h);
      if (const auto* random = std::get_if<HadamardQuantiser>(&hash)) {
        status =
            keep(Signatures<HadamardQuantiser>::create(*random, of_codes(hashes, config, h)), head);
      }
      if (const auto* trained = std::get_if<ProductQuantiser>(&hash)) {
        status =
            keep(Signatures<ProductQuantiser>::create(*trained, of_codes(hashes, config, h)), head);
      }
      if (const auto* planes = std::get_if<SimHash>(&hash)) {
        status = keep(Tables::create(*planes, of_tables(config)), head);
      }
    }
    if (!status.ok()) return status;
    return index;
  }
  static Result<PerHeadIndex> create(const HeadHashes&&, const PerHeadIndexConfig& = {}) = delete;

  /// Replaces the content by the tokens of `range`, as build() does for each head's own.
  /// Errors: as there, with the KV head in front; the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range) noexcept {
    return build_aside(backend, source, range, [&](int h, auto& own) {
      return own.build(backend, OneHead(source, h), range);
    });
  }

  /// The same with the centres of `like`, an index with the same profile. Errors: also another
  /// profile. An empty range forgets them: the next append makes its own.
  template <class Backend, KeyValueSource Source>
  Status build(const Backend& backend, const Source& source, TokenRange range,
               const PerHeadIndex& like) noexcept {
    const auto has = [&](int h) { return h < like.kv_heads(); };
    return build_aside(backend, source, range, [&](int h, auto& own) {
      using Own = std::remove_cvref_t<decltype(own)>;
      const auto* other = has(h) ? std::get_if<Own>(&like.head(h)) : nullptr;
      if (other != nullptr) return own.build(backend, OneHead(source, h), range, other->centres());
      return Status::error(ErrorCode::kShapeMismatch,
                           "the index whose centres are asked for has no such head");
    });
  }

  /// Takes over tokens [indexed().end, end); where a head has tables in multiples of seal_tokens,
  /// for all heads alike, and the rest stays exact until a later call. An `end` at or below
  /// indexed().end changes nothing. Errors: as build(); the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status append(const Backend& backend, const Source& source, TokenId end) noexcept {
    if (end <= range_.end) return Status();
    Status status = check_source(source, kv_heads(), dim(), end);
    if (!status.ok()) return status;
    end -= (end - range_.end) % seal_tokens_;
    status = check_rows(source, {.begin = range_.end, .end = end});
    if (!status.ok()) return status;
    status = for_each_own(
        [&](int h, auto& own) { return own.append(backend, OneHead(source, h), end); });
    if (status.ok()) {
      range_.end = end;
    } else {  // heads before the one that failed have them, in segments of their own
      (void)for_each_own([&](int, auto& own) { return own.truncate(range_.end); });
    }
    return status;
  }

  /// Forgets tokens from `end` on, and that they were erased, as Signatures and BucketTables do.
  /// Errors: a negative `end`, memory where segments are shared; nothing is changed then.
  Status truncate(TokenId end) noexcept {
    const Status status = check_truncation(end);
    if (!status.ok() || end >= range_.end) return status;
    const auto cut = [&](int, auto& own) { return own.truncate(end); };
    // Only what has to be copied first can fail.
    const Status done = shared_bytes() == 0 ? for_each_own(cut) : change_fork(cut);
    if (!done.ok()) return done;
    range_.end = end > range_.begin ? end : range_.begin;
    erased_.truncate(range_.end);
    return done;
  }

  /// An index of the same tokens that shares all segments. Either may then be read, changed and
  /// destroyed on a thread of its own. Memory of its own: as each head's, and bits of erased
  /// tokens. Error: memory.
  [[nodiscard]] Result<PerHeadIndex> fork() const noexcept {
    PerHeadIndex other(*hashes_, config_);
    if (other.heads_ == nullptr || !other.erased_.assign(erased_)) return no_memory("to fork");
    const Status status =
        for_each_own([&](int h, const auto& own) { return keep(own.fork(), other.head(h)); });
    if (!status.ok()) return status;
    other.range_ = range_;
    return other;
  }

  /// Forgets `tokens`, in any order and of all KV heads: they are neither drawn nor attended to any
  /// more, and indexed() stays as it is. Their rows are not read again. One that was erased before
  /// changes nothing. Errors: a token outside indexed(), memory; nothing is changed then. Cost:
  /// that of a fork, and of these tokens.
  Status erase(std::span<const TokenId> tokens) noexcept {
    Status status = check_erasure(tokens, range_);
    if (!status.ok() || tokens.empty()) return status;
    Result<PerHeadIndex> other = fork();
    if (!other.ok()) return other.status();
    if (!other->erased_.add(tokens, range_.end)) return no_memory("to erase tokens of");
    status = other->for_each_own([&](int, auto& own) { return own.erase(tokens); });
    if (status.ok()) *this = std::move(*other);
    return status;
  }

  /// Encodes or hashes tokens anew whose keys or values have changed in place, as rehash() of each
  /// head's own does. Erased tokens stay so. The segments that they lie in exist twice meanwhile,
  /// of all heads. Errors: as build(), a range outside indexed(); the index is then unchanged.
  template <class Backend, KeyValueSource Source>
  Status rehash(const Backend& backend, const Source& source, TokenRange range) noexcept {
    Status status = check_rehash(range, range_);
    if (status.ok()) status = check(backend, source, range);
    if (!status.ok() || range.empty()) return status;
    return change_fork(
        [&](int h, auto& own) { return own.rehash(backend, OneHead(source, h), range); });
  }

  /// How far the keys have left the centres, the largest of all heads that have codes or tables,
  /// see drift_of_keys(): 0 for none, up to 1. Errors: as build().
  template <class Backend, KeyValueSource Source>
  [[nodiscard]] Result<double> drift(const Backend& backend, const Source& source) const noexcept {
    double largest = 0.0;
    Status status = check(backend, source, range_);
    if (!status.ok()) return status;
    status = for_each_own([&](int h, const auto& own) {
      const Result<double> drifted = own.drift(backend, OneHead(source, h));
      if (drifted.ok() && *drifted > largest) largest = *drifted;
      return drifted.status();
    });
    if (!status.ok()) return status;
    return largest;
  }

  /// Makes the centres of all heads anew, as recentre() of each head's own does. Cost and errors:
  /// as there; the index exists twice meanwhile, and is unchanged after an error.
  template <class Backend, KeyValueSource Source>
  Status recentre(const Backend& backend, const Source& source) noexcept {
    const Status status = check(backend, source, range_);
    if (!status.ok()) return status;
    return change_fork([&](int h, auto& own) { return own.recentre(backend, OneHead(source, h)); });
  }

  /// Forgets everything of a request: an empty index at token 0 with the same hashes and config.
  /// Gives back and keeps what each head's own does.
  void clear() noexcept {
    (void)for_each_own([](int, auto& own) {
      own.clear();
      return Status();
    });
    range_ = {};
    erased_ = TokenBits();
  }

  /// Bytes that save() writes.
  [[nodiscard]] std::size_t saved_bytes() const { return saved_bytes_of(*this); }
  /// Writes the index to `to`, of at least saved_bytes(): the profile and the blob of each head's
  /// own index, but not the hashes, of which it has fingerprints. Error: fewer bytes; nothing is
  /// written then.
  [[nodiscard]] Status save(std::span<std::byte> to) const noexcept {
    return save_blob(BlobKind::kPerHeadIndex, *this, to);
  }
  /// Replaces the content by what save() wrote of an index with the same profile, config and equal
  /// hashes. Errors: bytes that are not that (kBadBlob, see BlobReader), with the KV head in front
  /// where it is one head's; memory. The index is then unchanged. Twice the memory meanwhile.
  Status load(std::span<const std::byte> from) noexcept {
    Result<PerHeadIndex> fresh = create(*hashes_, config_);
    if (!fresh.ok()) return fresh.status();
    const Status status = fresh->take(BlobReader(BlobKind::kPerHeadIndex, from));
    if (status.ok()) *this = std::move(*fresh);
    return status;
  }

  /// The fields that save() writes.
  void put(BlobWriter& writer) const {
    writer.put(kv_heads());
    SavedTokens::put(writer, range_, erased_, {});
    for (int h = 0; h < kv_heads(); ++h) {
      for_each_number(setting(h), [&](const char*, auto number) { writer.put(number); });
      (void)with_own(*this, h, [&](const auto& own) {
        writer.put_blob(own);
        return Status();
      });
    }
  }

  /// bytes() of an index of `tokens` tokens that was just built.
  [[nodiscard]] static std::size_t estimate_bytes(const HeadHashes& hashes,
                                                  const PerHeadIndexConfig& config,
                                                  TokenId tokens) {
    std::size_t sum = 0;
    for (int h = 0; h < hashes.kv_heads(); ++h) sum += estimate_bytes(hashes, config, h, tokens);
    return sum;
  }
  /// What one KV head has of them.
  [[nodiscard]] static std::size_t estimate_bytes(const HeadHashes& hashes,
                                                  const PerHeadIndexConfig& config, int kv_head,
                                                  TokenId tokens) {
    const HeadHashes::One& hash = hashes.hash(kv_head);
    const SignaturesConfig codes = of_codes(hashes, config, kv_head);
    if (const auto* random = std::get_if<HadamardQuantiser>(&hash)) {
      return Signatures<HadamardQuantiser>::estimate_bytes(random->shape(), codes, tokens);
    }
    if (const auto* trained = std::get_if<ProductQuantiser>(&hash)) {
      return Signatures<ProductQuantiser>::estimate_bytes(trained->shape(), codes, tokens);
    }
    const auto* planes = std::get_if<SimHash>(&hash);
    return planes == nullptr ? 0 : Tables::estimate_bytes(*planes, of_tables(config), tokens);
  }

  /// Tokens the index covers, erased ones among them.
  [[nodiscard]] TokenRange indexed() const { return range_; }
  /// Those of them that were erased, for all KV heads; until the next change.
  [[nodiscard]] TokenMask erased() const { return erased_.view(); }
  [[nodiscard]] int kv_heads() const { return hashes_->kv_heads(); }
  [[nodiscard]] int dim() const { return hashes_->dim(); }
  [[nodiscard]] const HeadSetting& setting(int kv_head) const { return hashes_->setting(kv_head); }
  /// The signatures of a KV head, whose number in them is 0; null where it has no codes by Q.
  template <class Q>
  [[nodiscard]] const Signatures<Q>* signatures(int kv_head) const {
    return std::get_if<Signatures<Q>>(&head(kv_head));
  }

  /// The tables of a KV head, whose number in them is 0; null where it has none.
  [[nodiscard]] const BucketTables<SimHash>* tables(int kv_head) const {
    return std::get_if<Tables>(&head(kv_head));
  }

  /// Bytes held by all arrays, whoever shares them; quantisers and planes belong to the hashes.
  [[nodiscard]] std::size_t bytes() const {
    return erased_.bytes() + sum_of_own([](const auto& own) { return own.bytes(); });
  }
  /// How many of them other forks hold, too.
  [[nodiscard]] std::size_t shared_bytes() const {
    return sum_of_own([](const auto& own) { return own.shared_bytes(); });
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

  PerHeadIndex(const HeadHashes& hashes, const PerHeadIndexConfig& config)
      : hashes_(&hashes),
        config_(config),
        heads_(new (std::nothrow) Head[static_cast<std::size_t>(hashes.kv_heads())]) {
    for (int h = 0; h < kv_heads(); ++h) {
      if (setting(h).kind == HeadKind::kTables) seal_tokens_ = config.seal_tokens;
    }
  }

  [[nodiscard]] Head& head(int kv_head) { return heads_[static_cast<std::size_t>(kv_head)]; }
  [[nodiscard]] const Head& head(int kv_head) const {
    return heads_[static_cast<std::size_t>(kv_head)];
  }

  template <class IndexType>
  static Status keep(Result<IndexType> made, Head& head) {
    if (made.ok()) head.emplace<IndexType>(std::move(*made));
    return made.status();
  }

  [[nodiscard]] static SignaturesConfig of_codes(const HeadHashes& hashes,
                                                 const PerHeadIndexConfig& config, int kv_head) {
    return {.kv_heads = 1,
            .value_dim = hashes.setting(kv_head).value_norms ? hashes.value_dim() : 0,
            .memory_advice = config.memory_advice};
  }
  [[nodiscard]] static BucketTablesConfig of_tables(const PerHeadIndexConfig& config) {
    return {.segment_tokens = config.segment_tokens,
            .seal_tokens = config.seal_tokens,
            .memory_advice = config.memory_advice};
  }

  [[nodiscard]] Status no_memory(const char* what) const {
    return Status::error(ErrorCode::kOutOfMemory, "no memory %s %d KV heads", what, kv_heads());
  }

  // What rehash(), drift() and recentre() refuse.
  template <class Backend, KeyValueSource Source>
  [[nodiscard]] Status check(const Backend& backend, const Source& source,
                             TokenRange range) const noexcept {
    Status status = check_source(source, kv_heads(), dim(), range.empty() ? 0 : range.end);
    if (status.ok()) status = check_rows(source, range);
    if (status.ok()) status = check_workers(backend);
    return status;
  }

  // build() by `body`, as for_each_own() has it.
  template <class Backend, KeyValueSource Source, class Body>
  Status build_aside(const Backend& backend, const Source& source, TokenRange range,
                     const Body& body) noexcept {
    Result<PerHeadIndex> fresh = create(*hashes_, config_);
    if (!fresh.ok()) return fresh.status();
    Status status = check_range(range);
    if (status.ok()) status = check_source(source, kv_heads(), dim(), range.end);
    if (status.ok()) status = check_rows(source, range);
    if (status.ok() && !range.empty()) status = check_workers(backend);
    if (status.ok()) status = fresh->for_each_own(body);
    if (!status.ok()) return status;
    fresh->range_ = range;
    *this = std::move(*fresh);
    return status;
  }

  // for_each_own(body) of a fork, which then takes this one's place.
  template <class Body>
  Status change_fork(const Body& body) noexcept {
    Result<PerHeadIndex> other = fork();
    if (!other.ok()) return other.status();
    const Status status = other->for_each_own(body);
    if (status.ok()) *this = std::move(*other);
    return status;
  }

  // body(KV head, its signatures or tables) for the heads that have them, up to the first error.
  template <class Body>
  Status for_each_own(const Body& body) {
    return for_each_own(*this, body);
  }
  template <class Body>
  Status for_each_own(const Body& body) const {
    return for_each_own(*this, body);
  }
  template <class Self, class Body>
  static Status for_each_own(Self& self, const Body& body) {
    for (int h = 0; h < self.kv_heads(); ++h) {
      const Status status = with_own(self, h, [&](auto& own) { return body(h, own); });
      if (!status.ok()) return status;
    }
    return Status();
  }
  // body(the signatures or tables of a KV head), if it has any; errors get its number.
  template <class Self, class Body>
  static Status with_own(Self& self, int kv_head, const Body& body) {
    auto& head = self.head(kv_head);
    Status status;
    if (auto* random = std::get_if<Signatures<HadamardQuantiser>>(&head)) status = body(*random);
    if (auto* trained = std::get_if<Signatures<ProductQuantiser>>(&head)) status = body(*trained);
    if (auto* tables = std::get_if<Tables>(&head)) status = body(*tables);
    if (status.ok()) return status;
    return Status::error(status.code(), "KV head %d by itself: %s", kv_head, status.message());
  }

  template <class Size>
  [[nodiscard]] std::size_t sum_of_own(const Size& size) const {
    std::size_t sum = 0;
    (void)for_each_own([&](int, const auto& own) {
      sum += size(own);
      return Status();
    });
    return sum;
  }

  // What put() wrote, to an empty index.
  Status take(BlobReader reader) noexcept {
    reader.expect("kv_heads", kv_heads());
    SavedTokens tokens;
    Status status = tokens.take(reader, INT32_MAX, 0, 0);
    if (!status.ok()) return status;
    range_ = tokens.range;
    erased_ = std::move(tokens.erased);
    for (int h = 0; h < kv_heads(); ++h) {
      for_each_number(setting(h),
                      [&](const char* name, auto number) { reader.expect(name, number); });
      if (!reader.ok()) {
        return Status::error(reader.status().code(), "the profile of KV head %d: %s", h,
                             reader.status().message());
      }
      status = with_own(*this, h, [&](auto& own) { return take_own(reader, own); });
      if (!status.ok()) return status;
    }
    reader.end();
    return reader.status();
  }

  // One head's own index, which must have the tokens that all have.
  template <class Own>
  Status take_own(BlobReader& reader, Own& own) const noexcept {
    const std::span<const std::byte> bytes = reader.take_blob("index");
    Status status = reader.ok() ? own.load(bytes) : reader.status();
    if (!status.ok()) return status;
    reader.require(own.indexed() == range_, "end", own.indexed().end);
    reader.require(same_in(range_, own.erased(), erased()), "erased tokens",
                   own.erased().count(own.indexed()));
    return reader.status();
  }

  [[nodiscard]] static bool same_in(TokenRange range, const TokenMask& a, const TokenMask& b) {
    for (std::int64_t t = range.begin; t < range.end && (a.any() || b.any()); t += 64) {
      if (a.bits(static_cast<TokenId>(t)) != b.bits(static_cast<TokenId>(t))) return false;
    }
    return true;
  }

  // visit(name, number) for all of a setting, as blobs have them.
  template <class Visit>
  static void for_each_number(const HeadSetting& setting, const Visit& visit) {
    visit("kind", static_cast<int>(setting.kind));
    visit("bits", setting.bits);
    visit("budget", setting.budget);
    visit("temperature", setting.temperature);
    visit("certain", setting.certain);
    visit("value_norms", static_cast<int>(setting.value_norms));
    visit("functions", setting.functions);
    visit("tables", setting.tables);
    visit("min_collisions", setting.min_collisions);
    visit("probe_radius", setting.probe_radius);
    visit("uniform_part", setting.uniform_part);
  }

  const HeadHashes* hashes_;
  PerHeadIndexConfig config_;
  TokenRange range_;
  TokenBits erased_;               // for all heads; each head's own index has them, too
  TokenId seal_tokens_ = 1;        // append() takes multiples of it
  std::unique_ptr<Head[]> heads_;  // [kv_heads]
};

}  // namespace magicpig::inline MAGICPIG_ABI

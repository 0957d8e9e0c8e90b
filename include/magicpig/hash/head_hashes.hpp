// SPDX-License-Identifier: Apache-2.0
// What hashes the keys of a layer whose KV heads each have codes or tables of their own, or none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <variant>

#include "magicpig/core/error.hpp"
#include "magicpig/core/head_setting.hpp"
#include "magicpig/core/one_head.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/hash/hamming_ball.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/hash/scalar_quantiser.hpp"
#include "magicpig/hash/sign_projection.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

static_assert(kMaxHashFunctions == kMaxBits && kMaxHashTables == kMaxTables);

/// A profile, and for each KV head whose setting asks for codes or tables what makes them: a random
/// rotation, one trained on the head's keys, or the planes of SimHash. Heads of the same K and L
/// share their planes, as those of one BucketTables do. Immutable once made; any number of threads
/// and indexes share one.
class HeadHashes {
 public:
  using One = std::variant<std::monostate, HadamardQuantiser, ProductQuantiser, SimHash>;

  /// For the KV heads of `source`, trained on `range` where they are to be; `seed` chooses
  /// rotations, first centroids and planes. Errors: as check_profile(),
  /// HadamardQuantiser::create(), ProductQuantiser::train() and SimHash::create(), of the KV head
  /// named in front; memory.
  template <class Backend, KeyValueSource Source>
  [[nodiscard]] static Result<HeadHashes> create(const Backend& backend, const Source& source,
                                                 TokenRange range,
                                                 std::span<const HeadSetting> profile,
                                                 std::uint64_t seed = 0) noexcept {
    Status status = check_profile(profile, source.kv_heads());
    if (!status.ok()) return status;
    HeadHashes all(source);
    if (all.heads_ == nullptr) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %zu KV heads", profile.size());
    }
    for (int h = 0; h < all.kv_heads_; ++h) {
      Head& head = all.heads_[static_cast<std::size_t>(h)];
      head.setting = profile[static_cast<std::size_t>(h)];
      head.owner = h;
      if (head.setting.kind == HeadKind::kSignatures) {
        status = keep(HadamardQuantiser::create(source.head_dim(), head.setting.bits, seed), head);
      }
      if (head.setting.kind == HeadKind::kTrainedSignatures) {
        status = keep(ProductQuantiser::train(backend, OneHead(source, h), range,
                                              {.bits = head.setting.bits, .seed = seed}),
                      head);
      }
      if (head.setting.kind == HeadKind::kTables) {
        head.owner = all.first_like(h);
        if (head.owner == h)
          status = keep(make_planes(source.head_dim(), head.setting, seed), head);
      }
      if (!status.ok()) {
        return Status::error(status.code(), "KV head %d by itself: %s", h, status.message());
      }
    }
    return all;
  }

  [[nodiscard]] int kv_heads() const { return kv_heads_; }
  [[nodiscard]] int dim() const { return dim_; }
  [[nodiscard]] int value_dim() const { return value_dim_; }
  [[nodiscard]] const HeadSetting& setting(int kv_head) const { return at(kv_head).setting; }
  /// What makes its codes or the codes of its tables, or nothing; quantisers are made for KV head 0
  /// of one.
  [[nodiscard]] const One& hash(int kv_head) const { return at(at(kv_head).owner).hash; }

 private:
  struct Head {
    HeadSetting setting;
    One hash;
    int owner = 0;  // the KV head whose hash this one has
  };

  template <class Source>
  explicit HeadHashes(const Source& source)
      : heads_(new (std::nothrow) Head[static_cast<std::size_t>(source.kv_heads())]),
        kv_heads_(source.kv_heads()),
        dim_(source.head_dim()),
        value_dim_(source.value_dim()) {}

  template <class Q>
  static Status keep(Result<Q> made, Head& head) {
    if (made.ok()) head.hash.emplace<Q>(std::move(*made));
    return made.status();
  }

  static Result<SimHash> make_planes(int dim, const HeadSetting& setting, std::uint64_t seed) {
    return SimHash::create(
        {.dim = dim, .bits = setting.functions, .tables = setting.tables, .seed = seed});
  }

  // The first KV head with tables of this one's K and L: itself if there is none before it.
  [[nodiscard]] int first_like(int kv_head) const {
    const HeadSetting& own = setting(kv_head);
    for (int h = 0; h < kv_head; ++h) {
      const HeadSetting& other = setting(h);
      if (other.kind == HeadKind::kTables && other.functions == own.functions &&
          other.tables == own.tables) {
        return h;
      }
    }
    return kv_head;
  }

  [[nodiscard]] const Head& at(int kv_head) const {
    return heads_[static_cast<std::size_t>(kv_head)];
  }

  std::unique_ptr<Head[]> heads_;
  int kv_heads_;
  int dim_;
  int value_dim_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

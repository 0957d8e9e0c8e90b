// SPDX-License-Identifier: Apache-2.0
// The quantisers of a layer whose KV heads have codes of their own bits, or none.
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
#include "magicpig/hash/product_quantiser.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/hash/scalar_quantiser.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// A profile, and for each KV head whose setting asks for codes what makes them: a random rotation
/// or one trained on the head's keys. Immutable once made; any number of threads and indexes share
/// one.
class HeadQuantisers {
 public:
  using One = std::variant<std::monostate, HadamardQuantiser, ProductQuantiser>;

  /// For the KV heads of `source`, trained on `range` where they are to be; `seed` chooses
  /// rotations and first centroids. Errors: as check_profile(), HadamardQuantiser::create() and
  /// ProductQuantiser::train(), of the KV head named in front; memory.
  template <class Backend, KeyValueSource Source>
  [[nodiscard]] static Result<HeadQuantisers> create(const Backend& backend, const Source& source,
                                                     TokenRange range,
                                                     std::span<const HeadSetting> profile,
                                                     std::uint64_t seed = 0) noexcept {
    Status status = check_profile(profile, source.kv_heads());
    if (!status.ok()) return status;
    HeadQuantisers all(source);
    if (all.heads_ == nullptr) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %zu KV heads", profile.size());
    }
    for (int h = 0; h < all.kv_heads_; ++h) {
      Head& head = all.heads_[static_cast<std::size_t>(h)];
      head.setting = profile[static_cast<std::size_t>(h)];
      if (head.setting.kind == HeadKind::kSignatures) {
        status = keep(HadamardQuantiser::create(source.head_dim(), head.setting.bits, seed), head);
      }
      if (head.setting.kind == HeadKind::kTrainedSignatures) {
        status = keep(ProductQuantiser::train(backend, OneHead(source, h), range,
                                              {.bits = head.setting.bits, .seed = seed}),
                      head);
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
  /// Its codes', or nothing; made for KV head 0 of one.
  [[nodiscard]] const One& quantiser(int kv_head) const { return at(kv_head).quantiser; }

 private:
  struct Head {
    HeadSetting setting;
    One quantiser;
  };

  template <class Source>
  explicit HeadQuantisers(const Source& source)
      : heads_(new (std::nothrow) Head[static_cast<std::size_t>(source.kv_heads())]),
        kv_heads_(source.kv_heads()),
        dim_(source.head_dim()),
        value_dim_(source.value_dim()) {}

  template <class Q>
  static Status keep(Result<Q> made, Head& head) {
    if (made.ok()) head.quantiser.emplace<Q>(std::move(*made));
    return made.status();
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

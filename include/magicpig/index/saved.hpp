// SPDX-License-Identifier: Apache-2.0
// What saved indexes have in common: tokens, erased ones among them, and centres.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/blob.hpp"
#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/token_mask.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Range, erased tokens and centres of an index, as they stand in its blob.
struct SavedTokens {
  TokenRange range;
  TokenBits erased;
  Buffer<float> keys;    ///< centres of keys, of the size that the index has
  Buffer<float> values;  ///< and of values

  static void put(BlobWriter& writer, TokenRange range, const TokenBits& erased,
                  const Centres& centres) {
    writer.put(range.begin);
    writer.put(range.end);
    writer.put(static_cast<std::uint64_t>(erased.words().size()));
    writer.put_array(erased.words());
    writer.put_array(centres.keys);
    writer.put_array(centres.values);
  }

  /// What put() wrote, of an index of at most `most` tokens whose centres have these sizes; the
  /// reader's status says what is wrong with it. Error: memory.
  [[nodiscard]] Status take(BlobReader& reader, TokenId most, std::size_t key_size,
                            std::size_t value_size) noexcept {
    range.begin = reader.take<TokenId>("begin");
    range.end = reader.take<TokenId>("end");
    reader.require(range.begin >= 0, "begin", range.begin);
    if (!reader.ok()) return reader.status();  // a difference of the two might not be a number
    reader.require(range.end >= range.begin && range.end - range.begin <= most, "end", range.end);
    const auto words = reader.take<std::uint64_t>("erased words");
    reader.require(words <= static_cast<std::uint64_t>(range.end) / 64 + 1, "erased words",
                   static_cast<long long>(words));
    reader.need("erased", static_cast<std::size_t>(words), sizeof(std::uint64_t));
    if (!reader.ok()) return reader.status();
    Buffer<std::uint64_t> bits;
    if (!bits.resize(static_cast<std::size_t>(words)) || !keys.resize(key_size) ||
        !values.resize(value_size)) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to load an index of %d tokens",
                           range.size());
    }
    reader.take_array("erased", bits.span());
    reader.take_array("centres", keys.span());
    reader.take_array("value means", values.span());
    if (!erased.assign(bits.span())) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory to load %zu erased words",
                           bits.size());
    }
    const TokenMask gone = erased.view();
    reader.require(gone.count(range) == erased.count() && (words == 0) == (erased.count() == 0),
                   "erased tokens", erased.count());
    for (const std::span<const float> all : {keys.span(), values.span()}) {
      for (std::size_t i = 0; i < all.size(); ++i) {
        reader.require(std::isfinite(all[i]), "centre", static_cast<long long>(i));
      }
    }
    return reader.status();
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI

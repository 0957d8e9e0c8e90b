// SPDX-License-Identifier: Apache-2.0
// Whether two indexes hold the same: ranges, centres, norms, the ids in every bucket or every code.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/index/per_head_index.hpp"
#include "magicpig/index/signatures.hpp"

namespace magicpig::test {

[[nodiscard]] inline bool same_floats(const float* a, const float* b, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::bit_cast<std::uint32_t>(a[i]) != std::bit_cast<std::uint32_t>(b[i])) return false;
  }
  return true;
}

/// Buckets of one segment. `tables` and `buckets` as both were made with.
[[nodiscard]] inline bool same_segment(const Segment& a, const Segment& b, int tables,
                                       int buckets) {
  if (a.tokens() != b.tokens()) return false;
  for (int table = 0; table < tables; ++table) {
    for (int code = 0; code < buckets; ++code) {
      const auto x = a.bucket(table, code);
      const auto y = b.bucket(table, code);
      if (!std::equal(x.begin(), x.end(), y.begin(), y.end())) return false;
    }
  }
  return true;
}

/// Null when the same tokens of two indexes of one range were erased.
template <class A, class B>
[[nodiscard]] const char* erasure_difference(const A& a, const B& b) {
  for (TokenId t = a.indexed().begin; t < a.indexed().end; ++t) {
    if (a.erased().has(t) != b.erased().has(t)) return "erased";
  }
  return nullptr;
}

/// Null when two indexes of one family and config hold the same bits, else what differs first. The
/// centre of an empty index has no meaning and is not compared.
template <class Family>
[[nodiscard]] const char* index_difference(const BucketTables<Family>& a,
                                           const BucketTables<Family>& b) {
  if (a.indexed() != b.indexed()) return "range";
  if (a.indexed().empty()) return a.segment_count() == b.segment_count() ? nullptr : "segments";
  if (a.segment_count() != b.segment_count()) return "segments";
  const int buckets = bucket_count(a.family().bits());
  for (int h = 0; h < a.kv_heads(); ++h) {
    if (!same_floats(a.centre(h), b.centre(h), a.dim())) return "centre";
    if (!same_floats(a.norms(h), b.norms(h), a.indexed().size())) return "norms";
    for (int s = 0; s < a.segment_count(); ++s) {
      if (a.segment_begin(s) != b.segment_begin(s)) return "segment begin";
      if (!same_segment(a.segment(s, h), b.segment(s, h), a.family().tables(), buckets)) {
        return "buckets";
      }
    }
  }
  return nullptr;
}

/// Four bits of a token in one row of a block, token t of it being that of `place`.
[[nodiscard]] inline int code_bits(const std::uint8_t* row, const CodePlace& place) {
  return place.upper == 0 ? row[place.byte] & 15 : row[place.byte] >> 4;
}

/// Codes, factors and norms of the tokens of one segment; what lies behind them is left out.
[[nodiscard]] inline const char* segment_difference(const SignatureSegment& a,
                                                    const SignatureSegment& b, int tokens,
                                                    int rows) {
  if (a.largest_factor != b.largest_factor) return "largest factor";
  for (int t = 0; t < tokens; ++t) {
    if (a.factors.data()[t].bits != b.factors.data()[t].bits) return "factors";
    if (a.value_norms.size() != 0 && a.value_norms.data()[t] != b.value_norms.data()[t]) {
      return "value norms";
    }
    const CodePlace place = CodePlace::of(t % kSignatureBlock);
    for (int r = 0; r < rows; ++r) {
      const std::int64_t at = (std::int64_t{t / kSignatureBlock} * rows + r) * 64;
      if (code_bits(a.codes.data() + at, place) != code_bits(b.codes.data() + at, place)) {
        return "codes";
      }
    }
  }
  return nullptr;
}

/// The same for signatures of one quantiser and config.
template <class Q>
[[nodiscard]] const char* index_difference(const Signatures<Q>& a, const Signatures<Q>& b) {
  if (a.indexed() != b.indexed()) return "range";
  if (a.indexed().empty()) return nullptr;
  for (int h = 0; h < a.kv_heads(); ++h) {
    if (!same_floats(a.centre(h), b.centre(h), a.dim())) return "centre";
    for (int s = 0; s < a.segment_count(); ++s) {
      const char* difference = segment_difference(a.segment(s, h), b.segment(s, h),
                                                  a.segment_tokens(s), a.rows_per_block());
      if (difference != nullptr) return difference;
    }
  }
  return nullptr;
}

/// The same for indexes of one profile and config, erased tokens and all.
[[nodiscard]] inline const char* index_difference(const PerHeadIndex& a, const PerHeadIndex& b) {
  if (a.indexed() != b.indexed()) return "range of all";
  const auto of_head = [](const auto* x, const auto* y) -> const char* {
    if ((x == nullptr) != (y == nullptr)) return "kinds of indexes";
    if (x == nullptr) return nullptr;
    const char* difference = index_difference(*x, *y);
    return difference != nullptr ? difference : erasure_difference(*x, *y);
  };
  const char* difference = erasure_difference(a, b);
  for (int h = 0; h < a.kv_heads() && difference == nullptr; ++h) {
    difference = of_head(a.tables(h), b.tables(h));
    if (difference != nullptr) break;
    difference = of_head(a.signatures<HadamardQuantiser>(h), b.signatures<HadamardQuantiser>(h));
    if (difference != nullptr) break;
    difference = of_head(a.signatures<ProductQuantiser>(h), b.signatures<ProductQuantiser>(h));
  }
  return difference;
}

}  // namespace magicpig::test

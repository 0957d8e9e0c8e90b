// SPDX-License-Identifier: Apache-2.0
// What an index must offer to be sampled from, and the index that knows nothing but a range.
#pragma once

#include <concepts>

#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Which tokens are drawn from instead of being attended to exactly; samplers ask for more than
/// this of the index they belong to.
template <class I>
concept Index = requires(const I& index) {
  { index.indexed() } -> std::same_as<TokenRange>;
  { index.kv_heads() } -> std::convertible_to<int>;
  { index.dim() } -> std::convertible_to<int>;
};

/// An index of hash tables, in which a query is looked up by L codes of K bits.
template <class I>
concept TableIndex = Index<I> && requires(const I& index) {
  { index.family().bits() } -> std::convertible_to<int>;
  { index.family().tables() } -> std::convertible_to<int>;
  index.segment(0, 0).bucket(0, Code{});
};

/// An index of nothing but a range: for samplers that need no hashes, such as Uniform.
class RangeIndex {
 public:
  RangeIndex(TokenRange range, int kv_heads, int dim)
      : range_(range), kv_heads_(kv_heads), dim_(dim) {}

  [[nodiscard]] TokenRange indexed() const { return range_; }
  [[nodiscard]] int kv_heads() const { return kv_heads_; }
  [[nodiscard]] int dim() const { return dim_; }

 private:
  TokenRange range_;
  int kv_heads_;
  int dim_;
};

}  // namespace magicpig::inline MAGICPIG_ABI

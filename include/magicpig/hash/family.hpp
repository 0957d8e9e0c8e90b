// SPDX-License-Identifier: Apache-2.0
// Hash families: what a locality-sensitive hash must offer to an index and to the inclusion
// probability.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "magicpig/core/checksum.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/vector_ops.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Vectors hashed together; families may read their planes once for all of them.
inline constexpr int kHashBatch = kMaxGroup;

/// L independent hash functions onto [0, bucket_count(bits())). Immutable once made, so that any
/// number of threads and indexes share one.
template <class F>
concept HashFamily = requires(const F& family, const float* vectors, Code* codes, float* scratch,
                              double cosine) {
  { family.dim() } -> std::convertible_to<int>;
  { family.bits() } -> std::convertible_to<int>;    // K: a code has K bits
  { family.tables() } -> std::convertible_to<int>;  // L
  // whether codes near in Hamming distance are likelier of near vectors, so that radii beyond 0
  // have a meaning
  { F::kHammingBalls } -> std::convertible_to<bool>;
  // P(codes of two vectors in one table differ in at most `radius` bits), by their cosine
  { family.table_collision(cosine, 0) } -> std::same_as<double>;
  // a number that families have in common only if they make the same codes: indexes that are
  // loaded are of the family at hand
  { family.fingerprint() } -> std::same_as<std::uint64_t>;
  // floats of scratch for hashing `count` vectors
  { family.scratch_floats(1) } -> std::convertible_to<std::size_t>;
};

/// Code of vector v in table l: codes[v * tables + l]. `vectors` [count, dim], count at most
/// kHashBatch.
template <class F, class Ops>
concept HashFamilyOver = HashFamily<F> &&
    requires(const F& family, const float* vectors, Code* codes, float* scratch) {
  family.template hash<Ops>(vectors, 1, codes, scratch);
};

/// Checksum of a family's sizes and of the `numbers` it projects on. `parts` into which it cuts a
/// code, 0 for bits that are signs.
template <class Family>
[[nodiscard]] std::uint64_t family_fingerprint(const Family& family, int parts,
                                               std::span<const float> numbers) {
  Checksum sum;
  sum.add_value(parts);
  sum.add_value(family.dim());
  sum.add_value(family.bits());
  sum.add_value(family.tables());
  sum.add_array(numbers);
  return sum.value();
}

/// Buckets of a table of codes of `bits` bits.
[[nodiscard]] constexpr int bucket_count(int bits) { return 1 << bits; }

}  // namespace magicpig::inline MAGICPIG_ABI

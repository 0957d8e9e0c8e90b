// SPDX-License-Identifier: Apache-2.0
// What makes codes of keys, four bits to a row, and from a query the number that each row adds to a
// token's estimated logit: the concept.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Sizes of a quantiser's codes, and what has to be known of it where it is not at hand.
struct QuantiserShape {
  int dim = 0;            ///< of keys and queries
  int bits = 0;           ///< per dimension, 1 to 4
  int rows = 0;           ///< of four bits per token, even
  int query_scratch = 0;  ///< integers that tabulate() takes

  friend bool operator==(const QuantiserShape&, const QuantiserShape&) = default;
};

/// Codes x(k) of centred keys with a factor f(k) per token, such that f <x, q> estimates <k, q>.
/// <x, q> is a sum over rows of what four bits of the code select from 16 numbers. Immutable once
/// made, so that any number of threads and indexes share one; the same bits on every machine.
///
/// A model also has encode<Ops>(kv_head, keys [dim, kRotationLanes] of finite floats, the bits of
/// each lane's largest magnitude [kRotationLanes], lanes, scratch, factors [kRotationLanes]), which
/// puts the codes of kRotationLanes keys where `lanes` says.
template <class Q>
concept Quantiser = requires(const Q& quantiser, int kv_head, const float* query,
                             std::int32_t* integers, Arena& arena) {
  { quantiser.shape() } -> std::same_as<QuantiserShape>;
  // KV heads that it was made for; 0: it is the same for all
  { quantiser.kv_heads() } -> std::convertible_to<int>;
  // A number that quantisers have in common only if they make the same codes: an index that is
  // loaded is of the quantiser at hand
  { quantiser.fingerprint() } -> std::same_as<std::uint64_t>;
  // How far an estimated logit is to be trusted, as an exponent: see SignatureSamplerConfig
  { quantiser.temperature() } -> std::convertible_to<double>;
  // Of a query [dim], finite: the numbers of each row, [rows, 16] after the scratch
  // [query_scratch]. Each is below 2^30 and stands for itself times what is returned.
  { quantiser.tabulate(kv_head, query, integers, integers) } -> std::same_as<double>;
  // Scratch of encode()
  { quantiser.carve(arena) } -> std::same_as<typename Q::KeyScratch>;
};

/// The temperature for codes of 1 to 4 bits per dimension. The best guess of a logit is its
/// unbiased estimate times the share of a coordinate's square that the code keeps, .64, .88, .97
/// and .99, seen from the mean; on captures a little less is best for 2 bits and more. With 0.9 for
/// all, errors with 1 bit are 12 % larger, with others within 2 % (magicpig_compare).
[[nodiscard]] constexpr double code_temperature(int bits) {
  constexpr std::array<double, 4> kTemperatures = {0.65, 0.8, 0.9, 0.95};
  return kTemperatures[static_cast<std::size_t>(bits - 1)];
}

}  // namespace magicpig::inline MAGICPIG_ABI

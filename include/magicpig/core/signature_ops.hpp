// SPDX-License-Identifier: Apache-2.0
// The seam for a SIMD library where signatures are made and scanned: the same bits from each.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Tokens whose codes lie together. Everything below takes whole blocks.
inline constexpr int kSignatureBlock = 128;
/// Independent systematic draws, token i of an array taking part in draw i modulo this.
inline constexpr int kSystematicTracks = 8;

/// Where a block keeps the four bits of token t: in the half `upper` of byte `byte` of each row. So
/// the even bytes' lower halves hold 32 consecutive tokens, the odd bytes' the next 32, and vectors
/// of any width sum consecutive tokens.
struct CodePlace {
  int byte = 0;   ///< in [0, 64)
  int upper = 0;  ///< 0 or 1

  [[nodiscard]] static constexpr CodePlace of(int t) {
    return {.byte = 2 * (t % 32) + t / 32 % 2, .upper = t / 64};
  }
};

/// Blocks of codes one after the other, with what belongs to their tokens.
struct CodeBlocks {
  const std::uint8_t* codes = nullptr;  ///< [blocks, rows, 64], see CodePlace
  const bf16* factors = nullptr;        ///< [blocks * kSignatureBlock], finite, not negative
  const std::int16_t* norms = nullptr;  ///< [blocks * kSignatureBlock], at most 8192; or null
  int blocks = 0;
  int rows = 0;                      ///< per block, even
  float factor_scale = 0.0F;         ///< what makes 2^15 of the largest factor, or little less
  const CodeBlocks* next = nullptr;  ///< blocks wanted soon, or null: asked for with these
};

/// Asks for what belongs to the tokens of block b of those wanted soon; returns its codes, or null
/// where there is no such block.
MAGICPIG_ALWAYS_INLINE const std::uint8_t* prefetch_next(const CodeBlocks& blocks, int b) {
  const CodeBlocks* next = blocks.next;
  if (next == nullptr || b >= next->blocks) return nullptr;
  const std::int64_t first = std::int64_t{b} * kSignatureBlock;
  prefetch_far(next->factors + first, kSignatureBlock * sizeof(bf16));
  if (next->norms != nullptr) {
    prefetch_far(next->norms + first, kSignatureBlock * sizeof(std::int16_t));
  }
  return next->codes + std::int64_t{b} * next->rows * 64;
}

/// What the queries of a group make of codes: four bits of row r select one of 16 partial sums.
struct PartialSums {
  const std::uint8_t* sums = nullptr;         ///< [rows, group, 16]; of 8 rows from 8 r on: 255
  const std::int16_t* middles = nullptr;      ///< [group] the sum over rows for a score of 0
  const std::int16_t* units = nullptr;        ///< [group] |sum - middle| * unit < 2^15
  const std::int16_t* multipliers = nullptr;  ///< [group] at most 2^13 either way
  int group = 1;
};

/// Which scores are certain to be drawn, and how the probability of others falls below them.
struct ScoreRule {
  static constexpr int kSteps = 16;  ///< of a score per power of 2
  static constexpr std::uint32_t kCertain = 65536;
  static constexpr int kLogCertain = 16 * kSteps;  ///< in steps of a score
  /// Below every score: of tokens that are gone, and of places behind the last token.
  static constexpr std::int16_t kNoScore = -16384;

  std::int16_t tau = 0;                   ///< scores from here on are certain
  std::int16_t longest = 255;             ///< gaps beyond this count as this; -1: all is certain
  std::int16_t certain_from = INT16_MAX;  ///< scores from here on are certain, below tau as well

  /// In units of 2^-16: 1 from tau on, and `gap` sixteenths of a power of 2 and one below it about
  /// 2^-((gap + 1) / 16), with a mantissa of 5 bits; at least 2^-16.
  [[nodiscard]] static constexpr std::uint32_t units(int gap) {
    if (gap < 0) return kCertain;
    return static_cast<std::uint32_t>(((31 - (gap & 15)) << 11) >> (gap >> 4));
  }
  /// The least score that is certain.
  [[nodiscard]] constexpr std::int16_t first_certain() const {
    return longest < 0 ? INT16_MIN : certain_from < tau ? certain_from : tau;
  }
  [[nodiscard]] constexpr int gap(std::int16_t score) const {
    if (score >= first_certain()) return -1;
    return tau - 1 - score < longest ? tau - 1 - score : longest;
  }
};

/// 16 log2 of a number, at least 1, to the nearest.
[[nodiscard]] constexpr int log2_of(std::uint64_t x) {
  // 2^(1/32), 2^(3/32) ... in units of 2^-31.
  constexpr std::uint32_t kBounds[ScoreRule::kSteps] = {
      2194507417U, 2291666561U, 2393127307U, 2499080105U, 2609723834U, 2725266179U,
      2845924021U, 2971923842U, 3103502151U, 3240905930U, 3384393094U, 3534232978U,
      3690706840U, 3854108391U, 4024744348U, 4202935003U};
  const int exponent = static_cast<int>(std::bit_width(x)) - 1;
  const std::uint64_t mantissa = exponent > 31 ? x >> (exponent - 31) : x << (31 - exponent);
  int steps = ScoreRule::kSteps * exponent;
  for (const std::uint32_t bound : kBounds) steps += mantissa >= bound ? 1 : 0;
  return steps;
}

/// Where scores of blocks go: head g's from data + g * stride on.
struct ScoreRows {
  std::int16_t* data = nullptr;
  std::int64_t stride = 0;
};

/// Vectors that are encoded together, each in a lane of its own: coordinate j of vector l at
/// [j * kRotationLanes + l].
inline constexpr int kRotationLanes = 16;

/// Of coordinates [0, count): changes of sign, a Walsh-Hadamard transform, and a shift to the right
/// that rounds halves up. For stride, 2 stride, 4 stride ... below count each two coordinates so
/// far apart, in blocks of twice as many, become their sum and their difference.
struct LaneTransform {
  const std::int32_t* signs =
      nullptr;    ///< [count] -1 for what changes its sign, 0 for what does not
  int count = 1;  ///< stride times 2 or a power of it
  int stride = 1;
  int shift = 0;
};

/// A transform of kLanes vectors, in place; no sum may reach 2^31.
template <int kLanes>
void transform_hadamard(const LaneTransform& transform, std::int32_t* x) {
  const int end = transform.count * kLanes;
  for (int i = 0; i < end; ++i) {
    const std::int32_t sign = transform.signs[i / kLanes];
    x[i] = (x[i] ^ sign) - sign;
  }
  for (int half = transform.stride * kLanes; half < end; half *= 2) {
    for (int i = 0; i < end; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        const std::int32_t a = x[j];
        const std::int32_t b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
  const std::int32_t rounding = (std::int32_t{1} << transform.shift) / 2;
  for (int i = 0; i < end; ++i) x[i] = (x[i] + rounding) >> transform.shift;
}

/// Where the codes of kRotationLanes tokens go. The four bits of a token in each row of a block
/// (see CodePlace) lie in a 16-bit word of its own.
struct CodeLanes {
  std::uint8_t* words = nullptr;  ///< [kRotationLanes] words of the first row; see kRowBytes
  const std::uint16_t* wanted = nullptr;  ///< [kRotationLanes] bits of each word that are written
  int shift = 0;                          ///< of the four bits in their word
  static constexpr int kRowBytes = 64;    ///< from one row to the next
};

/// Sixteen vectors for each row of a code, of which a token's nearest is its four bits.
struct Centroids {
  static constexpr int kDotShift = 2;  ///< of products that are summed over rows

  const std::int16_t* values = nullptr;      ///< [rows, 16, pairs, 2]
  const std::int32_t* half_norms = nullptr;  ///< [rows, 16] half their squared norms
  int rows = 0;
  int pairs = 1;  ///< of coordinates, 1 or 2
};

/// Products of 16-bit integers, for kRotationLanes tokens at a time. Pairs of coordinates of a
/// token lie together: those of lane l at [2 l] and [2 l + 1] of 2 kRotationLanes integers. No sum
/// of products, in any order, may reach 2^31.
template <class O>
concept ProductOps = requires(const std::int32_t* first, int n, std::int16_t* pairs,
                              const std::int16_t* x, std::int32_t* y, const Centroids& centroids,
                              const CodeLanes& lanes) {
  // the pair of lane l at pairs + i stride = first[i, l] and second[i, l], or 0 where second is
  // null; first, second [n, kRotationLanes] of at most 16 bits, i in [0, n)
  O::pair_lanes(first, first, n, n, pairs);
  // y [n, kRotationLanes] = (matrix x + 2^shift / 2) >> shift, n even; x [n / 2, kRotationLanes, 2]
  // in pairs of coordinates i and i + n / 2, matrix [n, n / 2, 2] of columns in the same pairs
  O::project_lanes(x, n, x, n, y);
  // Of each row that centroid whose product with y [rows, pairs, kRotationLanes, 2] less its half
  // norm is the largest, the first of equals: its number goes to the row of the code, and y
  // [kRotationLanes] becomes the sum over rows of the products, each shifted right by kDotShift,
  // modulo 2^32
  O::nearest_lanes(centroids, x, lanes, y);
};

/// Loads of rows of type T for the encoding of kRotationLanes tokens.
template <class O, class T>
concept EncodesRows = requires(const T* const* rows, const T* row, const float* centre, int dim,
                               float* to, std::uint32_t* largest) {
  // to [dim, kRotationLanes] = rows [kRotationLanes] of `dim` scalars each, less centre [dim];
  // largest [kRotationLanes] = of each lane the bits of the largest magnitude, which are at least
  // those of infinity where anything is not finite
  O::centre_lanes(rows, centre, dim, to, largest);
  // |row - centre|^2: the differences in float, their squares added in double to the sum of their
  // coordinate modulo 16, one after the other, and each of 8, 4, 2, 1 sums to the one so far before
  { O::squared_distance(row, centre, dim) } -> std::same_as<double>;
};

/// Operations on codes and scores, and those that make codes, of kRotationLanes tokens at a time.
/// All is integers but for single operations of floats in a given order: every model returns the
/// very bits of ScalarSignatureOps. Counts n of scores are multiples of kSignatureBlock; scores lie
/// in [-2^15 + 2^8, 2^14 + 2^12]; no alignment is needed.
template <class O>
concept SignatureOps = ProductOps<O> && EncodesRows<O, float> && EncodesRows<O, fp16> &&
    EncodesRows<O, bf16> && EncodesRows<O, q8_0> && EncodesRows<O, q4_0> &&
    requires(const CodeBlocks& blocks, const PartialSums& partial, const ScoreRows& rows,
             const std::int16_t* scores, int n, int group, std::int16_t* to, const ScoreRule& rule,
             std::uint16_t* tracks, const std::uint16_t* noise, std::uint64_t* drawn,
             const float* floats, std::int32_t* integers, std::int64_t* squares,
             const LaneTransform& transform, const CodeLanes& lanes) {
  // s = (sum over rows of the partial sums that a token's bits select - middle) * unit,
  // f = min(32767, trunc(factor * factor_scale)), a (*) b = (a b + 2^14) >> 15:
  // score = (s (*) f) (*) multiplier + norm
  O::score_codes(blocks, partial, rows);
  // to = log-sum over the first `group` rows of score - the row's offset, row by row: that of two
  // is the larger + (max(0, 59 - difference) >> 2), within an eighth of an octave of the exact one
  O::combine_scores(rows, n, group, scores, to);
  // the largest score; n > 0
  { O::largest_score(scores, n) } -> std::same_as<std::int16_t>;
  // sum of rule.units(rule.gap(score))
  { O::expected(scores, n, rule) } -> std::same_as<std::uint64_t>;
  // bit i of drawn[i / 64]: score i is certain, or its units, added to track i % 8, carry
  O::draw_systematic(scores, n, rule, tracks, drawn);
  // bit i of drawn[i / 64]: noise[i] is less than the units of score i
  O::draw_poisson(scores, n, rule, noise, drawn);
  // integers [n, kRotationLanes] = floats [n, kRotationLanes] times powers [kRotationLanes],
  // rounded towards zero; each product is below 2^30
  O::scale_lanes(floats, floats, n, integers);
  // in place; no sum reaches 2^31
  O::transform_lanes(transform, integers);
  // squares [kRotationLanes] = of each lane the sum of the squares of n coordinates
  O::square_lanes(integers, n, squares);
  // Codes of 1 to 4 bits of n coordinates, n a multiple of 4. With h = 2^bits / 2, that of x >= 0
  // is the code of level h + i (Levels), i of the ascending bounds [h - 1, kRotationLanes] being
  // less than x; that of other x is the complement of that of -1 - x. Row p n / 4 + j of the block
  // takes bit p of coordinates [4 j, 4 j + 4), the first in its lowest bit. sums [bits,
  // kRotationLanes] = the coordinates whose bit p is set, less all the others, modulo 2^32
  O::template quantise_lanes<1>(integers, n, integers, lanes, integers);
};

}  // namespace magicpig::inline MAGICPIG_ABI

// SPDX-License-Identifier: Apache-2.0
// The operations on signatures through xsimd, for the instruction set that this file is compiled
// for.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <xsimd/xsimd.hpp>

#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/cpu/scalar_signatures.hpp"
#include "magicpig/cpu/xsimd_encoding.hpp"
#include "magicpig/cpu/xsimd_integers.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

#ifdef MAGICPIG_XSIMD_INTEGERS

/// Sums of partial sums of one block of codes, for one, two or four heads at a time. Bytes hold
/// them for eight rows, which come to 255 at most; then the sums of all bytes and of the odd ones
/// alone are kept in 16 bits.
class XsimdCodeSums : XsimdIntegers {
 public:
  struct Block {
    const std::uint8_t* codes = nullptr;  ///< [rows, 64]
    const std::uint8_t* sums = nullptr;   ///< [rows, group, 16], of the first head wanted
    std::size_t rows = 0;
    std::size_t group = 0;
    const std::uint8_t* next = nullptr;  ///< [rows, 64] to be asked for, or null
  };

  /// To `to` [kHeads, kSignatureBlock], modulo 2^16.
  template <std::size_t kHeads>
  static void add(const Block& block, std::uint16_t* to) {
    for (std::size_t column = 0; column < 64; column += Bytes::size) {
      add_column<kHeads>(block, column, to + column / 2);
    }
  }

 private:
  // Of the codes' lower halves and of the upper ones.
  template <class Vector, std::size_t kHeads>
  struct Halves {
    Halves() {
      each<kHeads>([&](auto g) { lower[g] = upper[g] = Vector(0); });
    }
    Vector lower[kHeads];
    Vector upper[kHeads];
  };

  template <std::size_t kHeads>
  static void add_column(const Block& block, std::size_t column, std::uint16_t* to) {
    Halves<Words, kHeads> all;  // the even bytes' sums and 256 times the odd ones'
    Halves<Words, kHeads> odd;
    const auto add_rows = [&](std::size_t row, auto rows) {
      Halves<Bytes, kHeads> few;
      for (std::size_t r = row; r < row + rows(); ++r) add_row(block, r, column, few);
      each<kHeads>([&](auto g) {
        const auto lower = std::bit_cast<Words>(few.lower[g]);
        const auto upper = std::bit_cast<Words>(few.upper[g]);
        all.lower[g] += lower;
        odd.lower[g] += lower >> 8;
        all.upper[g] += upper;
        odd.upper[g] += upper >> 8;
      });
    };
    std::size_t row = 0;
    for (; row + 8 <= block.rows; row += 8) {
      add_rows(row, std::integral_constant<std::size_t, 8>());
    }
    for (; row < block.rows; row += 2) add_rows(row, std::integral_constant<std::size_t, 2>());
    // Quarters of a block: see CodePlace.
    each<kHeads>([&](auto g) {
      std::uint16_t* sums = to + g * kSignatureBlock;
      (all.lower[g] - (odd.lower[g] << 8)).store_unaligned(sums);
      odd.lower[g].store_unaligned(sums + 32);
      (all.upper[g] - (odd.upper[g] << 8)).store_unaligned(sums + 64);
      odd.upper[g].store_unaligned(sums + 96);
    });
  }

  template <std::size_t kHeads>
  MAGICPIG_ALWAYS_INLINE static void add_row(const Block& block, std::size_t row,
                                             std::size_t column, Halves<Bytes, kHeads>& sums) {
    if (block.next != nullptr && column == 0) prefetch_far(block.next + row * 64, 1);
    const auto code = Bytes::load_unaligned(block.codes + row * 64 + column);
    const Bytes half(15);
    const Bytes lower = code & half;
    const Bytes upper = std::bit_cast<Bytes>(std::bit_cast<Words>(code) >> 4) & half;
    each<kHeads>([&](auto g) {
      const Bytes table = table_of(block.sums + (row * block.group + g) * 16);
      sums.lower[g] += look_up(table, lower);
      sums.upper[g] += look_up(table, upper);
    });
  }
};

/// SignatureOps of the instruction set that XsimdOps is for.
class XsimdSignatureOps : public XsimdEncodingOps {
 public:
  static void score_codes(const CodeBlocks& blocks, const PartialSums& partial,
                          const ScoreRows& scores) {
    alignas(kAlignment) std::int16_t shares[kSignatureBlock];
    alignas(kAlignment) std::uint16_t sums[4 * kSignatureBlock];
    for (int b = 0; b < blocks.blocks; ++b) {
      const std::int64_t first = std::int64_t{b} * kSignatureBlock;
      const std::int16_t* norms = blocks.norms != nullptr ? blocks.norms + first : nullptr;
      take_shares(blocks.factors + first, blocks.factor_scale, shares);
      const std::uint8_t* next = prefetch_next(blocks, b);
      for (int g = 0; g < partial.group;) {
        const XsimdCodeSums::Block block{.codes = blocks.codes + std::int64_t{b} * blocks.rows * 64,
                                         .sums = partial.sums + std::int64_t{g} * 16,
                                         .rows = static_cast<std::size_t>(blocks.rows),
                                         .group = static_cast<std::size_t>(partial.group),
                                         .next = g == 0 ? next : nullptr};
        const int heads = add_heads(block, partial.group - g, sums);
        for (int i = 0; i < heads; ++i, ++g) {
          score_head(partial, g, sums + std::int64_t{i} * kSignatureBlock, shares, norms,
                     scores.data + g * scores.stride + first);
        }
      }
    }
  }

  static void combine_scores(const ScoreRows& scores, int n, int group, const std::int16_t* offsets,
                             std::int16_t* to) {
    const auto row = [&](int g) {
      return [from = scores.data + g * scores.stride, offset = Shorts(offsets[g])](int i) {
        return Shorts::load_unaligned(from + i) - offset;
      };
    };
    const auto first = row(0);
    if (group == 1) {
      for (int i = 0; i < n; i += kLanes) first(i).store_unaligned(to + i);
      return;
    }
    const auto second = row(1);
    for (int i = 0; i < n; i += kLanes) log_sum(first(i), second(i)).store_unaligned(to + i);
    for (int g = 2; g < group; ++g) {
      const auto more = row(g);
      for (int i = 0; i < n; i += kLanes) {
        log_sum(Shorts::load_unaligned(to + i), more(i)).store_unaligned(to + i);
      }
    }
  }

  static std::int16_t largest_score(const std::int16_t* scores, int n) {
    auto largest = Shorts::load_unaligned(scores);
    for (int i = kLanes; i < n; i += kLanes) {
      largest = (xsimd::max)(largest, Shorts::load_unaligned(scores + i));
    }
    alignas(kAlignment) std::int16_t lanes[Shorts::size];
    largest.store_aligned(lanes);
    for (const std::int16_t lane : lanes) lanes[0] = lane > lanes[0] ? lane : lanes[0];
    return lanes[0];
  }

  static std::uint64_t expected(const std::int16_t* scores, int n, const ScoreRule& rule) {
    // 8,192 of less than 2^16 stay below 2^29.
    constexpr int kChunk = 8192;
    auto sum = static_cast<std::uint64_t>(n);
    for (int first = 0; first < n; first += kChunk) {
      const int end = n - first < kChunk ? n : first + kChunk;
      Pairs few(0);
      for (int i = first; i < end; i += kLanes) {
        const auto pairs = std::bit_cast<Pairs>(limits_of(scores + i, rule));
        few += (pairs & Pairs(0xffff)) + (pairs >> 16);
      }
      alignas(kAlignment) std::uint32_t lanes[Pairs::size];
      few.store_aligned(lanes);
      for (const std::uint32_t lane : lanes) sum += lane;
    }
    return sum;
  }

  static void draw_systematic(const std::int16_t* scores, int n, const ScoreRule& rule,
                              std::uint16_t* tracks, std::uint64_t* drawn) {
    auto sum = Tracks::load_unaligned(tracks);
    draw(scores, n, rule, drawn, [&](const Tracks& limits, int) {
      // A sum that passed 2^16 is less than the units that it grew by; nothing grows for a certain
      // score, whose limit anything is within.
      sum += limits + Tracks(1);
      return sum;
    });
    sum.store_unaligned(tracks);
  }

  static void draw_poisson(const std::int16_t* scores, int n, const ScoreRule& rule,
                           const std::uint16_t* noise, std::uint64_t* drawn) {
    draw(scores, n, rule, drawn,
         [=](const Tracks&, int i) { return Tracks::load_unaligned(noise + i); });
  }

 private:
  using Pairs = xsimd::batch<std::uint32_t>;
  using Integers = xsimd::batch<std::int32_t>;
  using Floats = xsimd::batch<float>;
  static constexpr int kLanes = static_cast<int>(Shorts::size);

  // Four heads need some 28 registers, two 16.
  static constexpr bool kManyRegisters = XSIMD_WITH_AVX512BW || XSIMD_WITH_NEON64;

  // Returns how many heads were summed.
  static int add_heads(const XsimdCodeSums::Block& block, int heads, std::uint16_t* sums) {
    if (kManyRegisters && heads >= 4) return XsimdCodeSums::add<4>(block, sums), 4;
    if (heads >= 2) return XsimdCodeSums::add<2>(block, sums), 2;
    return XsimdCodeSums::add<1>(block, sums), 1;
  }

  // Widened and narrowed within a pair's 32 bits.
  static void take_shares(const bf16* factors, float scale, std::int16_t* shares) {
    const auto* from = reinterpret_cast<const std::uint16_t*>(factors);
    const auto share = [=](const Pairs& bits) {
      const Floats product = std::bit_cast<Floats>(bits) * Floats(scale);
      return xsimd::to_int((xsimd::min)(product, Floats(32767.0F)));
    };
    for (int i = 0; i < kSignatureBlock; i += kLanes) {
      const auto pairs = std::bit_cast<Pairs>(Words::load_unaligned(from + i));
      const Integers both = share(pairs << 16) | (share(pairs & Pairs(0xffff0000U)) << 16);
      std::bit_cast<Shorts>(both).store_aligned(shares + i);
    }
  }

  static void score_head(const PartialSums& partial, int g, const std::uint16_t* sums,
                         const std::int16_t* shares, const std::int16_t* norms, std::int16_t* to) {
    const Shorts middle(partial.middles[g]);
    const Shorts unit(partial.units[g]);
    const Shorts multiplier(partial.multipliers[g]);
    for (int i = 0; i < kSignatureBlock; i += kLanes) {
      const auto sum = std::bit_cast<Shorts>(Words::load_aligned(sums + i));
      const Shorts share = product((sum - middle) * unit, Shorts::load_aligned(shares + i));
      const Shorts score = product(share, multiplier);
      (norms != nullptr ? score + Shorts::load_unaligned(norms + i) : score)
          .store_unaligned(to + i);
    }
  }

  static Shorts log_sum(const Shorts& a, const Shorts& b) {
    const Shorts larger = (xsimd::max)(a, b);
    // Below 2^16, as a number without a sign.
    const auto difference = std::bit_cast<Words>(larger - (xsimd::min)(a, b));
    const Words near = Words(59) - (xsimd::min)(difference, Words(59));
    return larger + std::bit_cast<Shorts>(near >> 2);
  }

  // ScoreRule::units() of scores less 1, so that those of certain ones fit 16 bits.
  static Words limits_of(const std::int16_t* scores, const ScoreRule& rule) {
    alignas(16) static constexpr std::uint8_t kPowers[16] = {128, 64, 32, 16, 8, 4, 2, 1};
    const int lowest = rule.tau - 1 - rule.longest;
    const Shorts longest(static_cast<std::int16_t>(lowest > -32768 ? lowest : -32768));
    const Shorts score = Shorts::load_unaligned(scores);
    const Shorts tau(rule.tau);
    // From -1 to rule.longest.
    const Shorts gap = tau - Shorts(1) - (xsimd::min)((xsimd::max)(score, longest), tau);
    // With k = gap >> 4 units are 2^(15 - k), of which one byte is 0 and k or k - 8 is the other's
    // place in the table, and of that power 15 - gap % 16 sixteenths.
    const auto steps = std::bit_cast<Words>(gap);
    const Words places = (steps >> 4 | (steps << 4 & Words(0xff00))) ^ Words(8);
    const auto power =
        std::bit_cast<Words>(look_up(table_of(kPowers), std::bit_cast<Bytes>(places)));
    const Words units = power + upper_product(power, (steps << 12) ^ Words(0xf000));
    // Below 2^16, as a number without a sign; 0 where the score is certain.
    const auto missing =
        std::bit_cast<Words>((xsimd::max)(score, Shorts(rule.first_certain())) - score);
    return (units - Words(1)) | ((xsimd::min)(missing, Words(1)) - Words(1));
  }

  // Score i is drawn if number(limits of scores i to i + 7, i) is within its limit.
  template <class Number>
  static void draw(const std::int16_t* scores, int n, const ScoreRule& rule, std::uint64_t* drawn,
                   const Number& number) {
    alignas(kAlignment) std::uint16_t limits[kSignatureBlock];
    auto* to = reinterpret_cast<std::uint8_t*>(drawn);
    for (int first = 0; first < n; first += kSignatureBlock) {
      for (int i = 0; i < kSignatureBlock; i += kLanes) {
        limits_of(scores + first + i, rule).store_aligned(limits + i);
      }
      for (int i = 0; i < kSignatureBlock; i += kSystematicTracks) {
        const auto own = Tracks::load_aligned(limits + i);
        *to++ = within(number(own, first + i), own);
      }
    }
  }
};

static_assert(SignatureOps<XsimdSignatureOps>);

#else

using XsimdSignatureOps = ScalarSignatureOps;

#endif

}  // namespace magicpig::inline MAGICPIG_ABI

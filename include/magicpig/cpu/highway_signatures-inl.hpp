// SPDX-License-Identifier: Apache-2.0
// The operations on signatures in terms of Google Highway, for the target that is being compiled.

// In place of #pragma once, as in highway-inl.hpp.
#if defined(MAGICPIG_CPU_HIGHWAY_SIGNATURES_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef MAGICPIG_CPU_HIGHWAY_SIGNATURES_INL_HPP
#undef MAGICPIG_CPU_HIGHWAY_SIGNATURES_INL_HPP
#else
#define MAGICPIG_CPU_HIGHWAY_SIGNATURES_INL_HPP
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "magicpig/core/prefetch.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/cpu/highway_encoding-inl.hpp"
#include "magicpig/cpu/scalar_signatures.hpp"
#include "magicpig/version.hpp"

HWY_BEFORE_NAMESPACE();
namespace magicpig::inline MAGICPIG_ABI {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_SCALAR

using HighwaySignatureOps = ScalarSignatureOps;  // without vectors there are no shuffles

#else

/// Sums of partial sums of one block of codes, for one, two or four heads at a time. Bytes hold
/// them for eight rows, which come to 255 at most; then the sums of all bytes and of the odd ones
/// alone are kept in 16 bits.
///
/// Bytes are added eight rows at a time since widening takes six instructions per head, and
/// each row four.
class HighwayCodeSums {
  using Bytes = hn::CappedTag<std::uint8_t, 64>;
  using Words = hn::Repartition<std::uint16_t, Bytes>;
  using ByteVector = hn::Vec<Bytes>;
  using WordVector = hn::Vec<Words>;

 public:
  struct Block {
    const std::uint8_t* codes = nullptr;  // [rows, 64]
    const std::uint8_t* sums = nullptr;   // [rows, group, 16], of the first head wanted
    std::size_t rows = 0;
    std::size_t group = 0;
    const std::uint8_t* next = nullptr;  // [rows, 64] to be asked for, or null
  };

  /// To `to` [kHeads, kSignatureBlock], modulo 2^16.
  template <int kHeads>
  HWY_INLINE static void add(const Block& block, std::uint16_t* to) {
    for (std::size_t column = 0; column < 64; column += hn::Lanes(Bytes())) {
      add_column<kHeads>(block, column, to);
    }
  }

 private:
  template <int kHeads>
  HWY_INLINE static void add_column(const Block& block, std::size_t column, std::uint16_t* to) {
    // Of the even bytes' lower halves (and 256 times the odd ones'), the odd bytes' lower halves,
    // and the same of the upper halves, for each head.
    const WordVector zero = hn::Zero(Words());
    WordVector a0 = zero, b0 = zero, c0 = zero, e0 = zero, a1 = zero, b1 = zero, c1 = zero,
               e1 = zero, a2 = zero, b2 = zero, c2 = zero, e2 = zero, a3 = zero, b3 = zero,
               c3 = zero, e3 = zero;
    const auto add_rows = [&](std::size_t row, auto rows) HWY_ATTR {
      const ByteVector none = hn::Zero(Bytes());
      ByteVector l0 = none, u0 = none, l1 = none, u1 = none, l2 = none, u2 = none, l3 = none,
                 u3 = none;
      for (std::size_t r = 0; r < rows(); ++r) {
        add_row<kHeads>(block, row + r, column, l0, u0, l1, u1, l2, u2, l3, u3);
      }
      widen(l0, u0, a0, b0, c0, e0);
      if constexpr (kHeads > 1) widen(l1, u1, a1, b1, c1, e1);
      if constexpr (kHeads > 2) {
        widen(l2, u2, a2, b2, c2, e2);
        widen(l3, u3, a3, b3, c3, e3);
      }
    };
    std::size_t row = 0;
    for (; row + 8 <= block.rows; row += 8) {
      add_rows(row, std::integral_constant<std::size_t, 8>());
    }
    for (; row < block.rows; row += 2) add_rows(row, std::integral_constant<std::size_t, 2>());
    to += column / 2;
    store(a0, b0, c0, e0, to);
    if constexpr (kHeads > 1) store(a1, b1, c1, e1, to + kSignatureBlock);
    if constexpr (kHeads > 2) {
      store(a2, b2, c2, e2, to + 2 * kSignatureBlock);
      store(a3, b3, c3, e3, to + 3 * kSignatureBlock);
    }
  }

  template <int kHeads>
  HWY_INLINE static void add_row(const Block& block, std::size_t row, std::size_t column,
                                 ByteVector& l0, ByteVector& u0, ByteVector& l1, ByteVector& u1,
                                 ByteVector& l2, ByteVector& u2, ByteVector& l3, ByteVector& u3) {
    const Bytes d;
    const std::uint8_t* codes = block.codes + row * 64 + column;
    // 4 to 16 KiB ahead a cold scan takes 1.1 times as long as one from cache, without 1.8 times.
    if (block.next != nullptr && column == 0) prefetch_far(block.next + row * 64, 1);
    const ByteVector code = hn::LoadU(d, codes);
    const ByteVector half = hn::Set(d, 15);
    const ByteVector lower = hn::And(code, half);
    const ByteVector upper =
        hn::And(hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(Words(), code))), half);
    const std::uint8_t* sums = block.sums + row * block.group * 16;
    look_up(sums, lower, upper, l0, u0);
    if constexpr (kHeads > 1) look_up(sums + 16, lower, upper, l1, u1);
    if constexpr (kHeads > 2) {
      look_up(sums + 32, lower, upper, l2, u2);
      look_up(sums + 48, lower, upper, l3, u3);
    }
  }

  HWY_INLINE static void look_up(const std::uint8_t* sums, ByteVector lower, ByteVector upper,
                                 ByteVector& l, ByteVector& u) {
    const ByteVector table = hn::LoadDup128(Bytes(), sums);
    l = hn::Add(l, hn::TableLookupBytes(table, lower));
    u = hn::Add(u, hn::TableLookupBytes(table, upper));
  }

  HWY_INLINE static void widen(ByteVector l, ByteVector u, WordVector& a, WordVector& b,
                               WordVector& c, WordVector& e) {
    const Words d;
    const WordVector lower = hn::BitCast(d, l);
    const WordVector upper = hn::BitCast(d, u);
    a = hn::Add(a, lower);
    b = hn::Add(b, hn::ShiftRight<8>(lower));
    c = hn::Add(c, upper);
    e = hn::Add(e, hn::ShiftRight<8>(upper));
  }

  // Quarters of a block: see CodePlace.
  HWY_INLINE static void store(WordVector a, WordVector b, WordVector c, WordVector e,
                               std::uint16_t* to) {
    const Words d;
    hn::StoreU(hn::Sub(a, hn::ShiftLeft<8>(b)), d, to);
    hn::StoreU(b, d, to + 32);
    hn::StoreU(hn::Sub(c, hn::ShiftLeft<8>(e)), d, to + 64);
    hn::StoreU(e, d, to + 96);
  }
};

/// SignatureOps of one Highway target.
class HighwaySignatureOps : public HighwayEncodingOps {
  using Words = hn::CappedTag<std::uint16_t, 32>;
  using Shorts = hn::RebindToSigned<Words>;
  using WordVector = hn::Vec<Words>;
  using ShortVector = hn::Vec<Shorts>;
  using Mask = hn::Mask<Words>;

 public:
  static HWY_ATTR void score_codes(const CodeBlocks& blocks, const PartialSums& partial,
                                   const ScoreRows& scores) {
    HWY_ALIGN std::int16_t shares[kSignatureBlock];
    HWY_ALIGN std::uint16_t sums[4 * kSignatureBlock];
    const auto rows = static_cast<std::size_t>(blocks.rows);
    for (int b = 0; b < blocks.blocks; ++b) {
      const std::int64_t first = std::int64_t{b} * kSignatureBlock;
      const std::int16_t* norms = blocks.norms != nullptr ? blocks.norms + first : nullptr;
      take_shares(blocks.factors + first, blocks.factor_scale, shares);
      const std::uint8_t* next = prefetch_next(blocks, b);
      for (int g = 0; g < partial.group;) {
        const HighwayCodeSums::Block block{
            .codes = blocks.codes + std::int64_t{b} * blocks.rows * 64,
            .sums = partial.sums + std::int64_t{g} * 16,
            .rows = rows,
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

  static HWY_ATTR void combine_scores(const ScoreRows& scores, int n, int group,
                                      const std::int16_t* offsets, std::int16_t* to) {
    const Shorts d;
    const ShortVector first = hn::Set(d, offsets[0]);
    if (group == 1) {
      return each(n, [=](std::size_t i) HWY_ATTR {
        hn::StoreU(hn::Sub(hn::LoadU(d, scores.data + i), first), d, to + i);
      });
    }
    const ShortVector second = hn::Set(d, offsets[1]);
    each(n, [=](std::size_t i) HWY_ATTR {
      const ShortVector a = hn::Sub(hn::LoadU(d, scores.data + i), first);
      const ShortVector b = hn::Sub(hn::LoadU(d, scores.data + scores.stride + i), second);
      hn::StoreU(log_sum(a, b), d, to + i);
    });
    for (int g = 2; g < group; ++g) {
      const std::int16_t* row = scores.data + g * scores.stride;
      const ShortVector offset = hn::Set(d, offsets[g]);
      each(n, [=](std::size_t i) HWY_ATTR {
        const ShortVector score = hn::Sub(hn::LoadU(d, row + i), offset);
        hn::StoreU(log_sum(hn::LoadU(d, to + i), score), d, to + i);
      });
    }
  }

  static HWY_ATTR std::int16_t largest_score(const std::int16_t* scores, int n) {
    const Shorts d;
    ShortVector largest = hn::LoadU(d, scores);
    each(n, [=, &largest](std::size_t i)
                HWY_ATTR { largest = hn::Max(largest, hn::LoadU(d, scores + i)); });
    HWY_ALIGN std::int16_t lanes[32];
    hn::Store(largest, d, lanes);
    for (std::size_t i = 1; i < hn::Lanes(d); ++i) {
      lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    }
    return lanes[0];
  }

  static HWY_ATTR std::uint64_t expected(const std::int16_t* scores, int n, const ScoreRule& rule) {
    // 8,192 probabilities below 2^16 stay below 2^29.
    constexpr int kChunk = 8192;
    std::uint64_t sum = 0;
    for (int i = 0; i < n; i += kChunk) {
      sum += expected_few(scores + i, n - i < kChunk ? n - i : kChunk, rule);
    }
    return sum;
  }

  static HWY_ATTR void draw_systematic(const std::int16_t* scores, int n, const ScoreRule& rule,
                                       std::uint16_t* tracks, std::uint64_t* drawn) {
    const hn::CappedTag<std::uint16_t, kSystematicTracks> d;
    HWY_ALIGN std::uint16_t units[kSignatureBlock];
    HWY_ALIGN std::uint8_t bits[16];
    auto* to = reinterpret_cast<std::uint8_t*>(drawn);
    auto sum = hn::LoadU(d, tracks);
    const auto zero = hn::Zero(d);
    for (int first = 0; first < n; first += kSignatureBlock) {
      take_units(scores + first, rule, units);
      for (std::size_t i = 0; i < kSignatureBlock; i += kSystematicTracks) {
        const auto own = hn::Load(d, units + i);
        sum = hn::Add(sum, own);
        const auto is_drawn = hn::Or(hn::Lt(sum, own), hn::Eq(own, zero));
        hn::StoreMaskBits(d, is_drawn, bits);
        *to++ = bits[0];
      }
    }
    hn::StoreU(sum, d, tracks);
  }

  static HWY_ATTR void draw_poisson(const std::int16_t* scores, int n, const ScoreRule& rule,
                                    const std::uint16_t* noise, std::uint64_t* drawn) {
    const Words d;
    HWY_ALIGN std::uint8_t bits[16];
    auto* to = reinterpret_cast<std::uint8_t*>(drawn);
    each(n, [=, &bits, &to](std::size_t i) HWY_ATTR {
      const WordVector own = units_of(scores + i, rule);
      const Mask is_drawn = hn::Or(hn::Lt(hn::LoadU(d, noise + i), own), hn::Eq(own, hn::Zero(d)));
      hn::StoreMaskBits(d, is_drawn, bits);
      for (std::size_t j = 0; j < hn::Lanes(d) / 8; ++j) *to++ = bits[j];
    });
  }

 private:
  // Four heads need some 28 registers, two 16.
  static constexpr bool kManyRegisters =
      HWY_TARGET <= HWY_AVX3 || (HWY_ARCH_ARM_A64 && HWY_TARGET != HWY_EMU128);

  template <class Function>
  HWY_INLINE static void each(int n, const Function& function) {
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); i += hn::Lanes(Shorts())) function(i);
  }

  // Returns how many heads were summed.
  HWY_INLINE static int add_heads(const HighwayCodeSums::Block& block, int heads,
                                  std::uint16_t* sums) {
    if (kManyRegisters && heads >= 4) return HighwayCodeSums::add<4>(block, sums), 4;
    if (heads >= 2) return HighwayCodeSums::add<2>(block, sums), 2;
    return HighwayCodeSums::add<1>(block, sums), 1;
  }

  HWY_INLINE static void take_shares(const bf16* factors, float scale, std::int16_t* shares) {
    const hn::CappedTag<float, 16> d;
    const hn::RebindToUnsigned<decltype(d)> du;
    const hn::RebindToSigned<decltype(d)> di;
    const hn::Rebind<std::uint16_t, decltype(d)> du16;
    const hn::Rebind<std::int16_t, decltype(d)> di16;
    const auto by = hn::Set(d, scale);
    const auto most = hn::Set(d, 32767.0F);
    const auto* from = reinterpret_cast<const std::uint16_t*>(factors);
    for (std::size_t i = 0; i < kSignatureBlock; i += hn::Lanes(d)) {
      const auto bits = hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(du16, from + i)));
      const auto share = hn::Min(hn::Mul(hn::BitCast(d, bits), by), most);
      hn::StoreU(hn::DemoteTo(di16, hn::ConvertTo(di, share)), di16, shares + i);
    }
  }

  HWY_INLINE static void score_head(const PartialSums& partial, int g, const std::uint16_t* sums,
                                    const std::int16_t* shares, const std::int16_t* norms,
                                    std::int16_t* to) {
    const Shorts d;
    const ShortVector middle = hn::Set(d, partial.middles[g]);
    const ShortVector unit = hn::Set(d, partial.units[g]);
    const ShortVector multiplier = hn::Set(d, partial.multipliers[g]);
    each(kSignatureBlock, [=](std::size_t i) HWY_ATTR {
      const ShortVector sum = hn::BitCast(d, hn::Load(Words(), sums + i));
      const ShortVector scaled = hn::Mul(hn::Sub(sum, middle), unit);
      const ShortVector share = product(scaled, hn::Load(d, shares + i));
      const ShortVector score = product(share, multiplier);
      hn::StoreU(norms != nullptr ? hn::Add(score, hn::LoadU(d, norms + i)) : score, d, to + i);
    });
  }

  HWY_INLINE static ShortVector log_sum(ShortVector a, ShortVector b) {
    const Words du;
    const ShortVector larger = hn::Max(a, b);
    // Below 2^16, as a number without a sign.
    const WordVector difference = hn::BitCast(du, hn::Sub(larger, hn::Min(a, b)));
    const WordVector near = hn::SaturatedSub(hn::Set(du, 59), difference);
    return hn::Add(larger, hn::BitCast(Shorts(), hn::ShiftRight<2>(near)));
  }

  // (a b + 2^14) >> 15
  HWY_INLINE static ShortVector product(ShortVector a, ShortVector b) {
#if HWY_ARCH_ARM
    return ShortVector(vqrdmulhq_s16(a.raw, b.raw));
#else
    return hn::MulFixedPoint15(a, b);
#endif
  }

  // ScoreRule::units() of scores, 0 for those that are certain.
  HWY_INLINE static WordVector units_of(const std::int16_t* scores, const ScoreRule& rule) {
    const Shorts d;
    const Words du;
    const ShortVector score = hn::LoadU(d, scores);
    const ShortVector below =
        hn::SaturatedSub(hn::Set(d, static_cast<std::int16_t>(rule.tau - 1)), score);
    const ShortVector gap = hn::Min(below, hn::Set(d, rule.longest));
    const WordVector steps = hn::BitCast(du, hn::Max(gap, hn::Zero(d)));
    const WordVector mantissa = hn::Xor(hn::And(steps, hn::Set(du, 15)), hn::Set(du, 31));
    const WordVector units = shift_right(hn::ShiftLeft<11>(mantissa), hn::ShiftRight<4>(steps));
    const auto is_uncertain = hn::Lt(score, hn::Set(d, rule.first_certain()));
    return hn::IfThenElseZero(hn::RebindMask(du, is_uncertain), units);
  }

  // v >> bits, bits below 16.
  HWY_INLINE static WordVector shift_right(WordVector v, WordVector bits) {
#if HWY_TARGET == HWY_SSSE3
    // Highway 1.0.3 takes an instruction of SSE4.1 for this.
    const Words d;
    const auto halve = [=](WordVector x, WordVector shifted, std::uint16_t bit) HWY_ATTR {
      return hn::IfThenElse(hn::TestBit(bits, hn::Set(d, bit)), shifted, x);
    };
    v = halve(v, hn::ShiftRight<8>(v), 8);
    v = halve(v, hn::ShiftRight<4>(v), 4);
    v = halve(v, hn::ShiftRight<2>(v), 2);
    return halve(v, hn::ShiftRight<1>(v), 1);
#else
    return hn::Shr(v, bits);
#endif
  }

  HWY_INLINE static void take_units(const std::int16_t* scores, const ScoreRule& rule,
                                    std::uint16_t* units) {
    each(kSignatureBlock, [=, &rule](std::size_t i) HWY_ATTR {
      hn::Store(units_of(scores + i, rule), Words(), units + i);
    });
  }

  HWY_INLINE static std::uint64_t expected_few(const std::int16_t* scores, int n,
                                               const ScoreRule& rule) {
    const Words d;
    const hn::Repartition<std::uint32_t, Words> d32;
    auto sum = hn::Zero(d32);
    auto certain = hn::Zero(d32);
    const auto low = hn::Set(d32, 0xffff);
    each(n, [=, &rule, &sum, &certain](std::size_t i) HWY_ATTR {
      const WordVector units = units_of(scores + i, rule);
      const auto pairs = hn::BitCast(d32, units);
      sum = hn::Add(sum, hn::Add(hn::And(pairs, low), hn::ShiftRight<16>(pairs)));
      const auto ones =
          hn::BitCast(d32, hn::And(hn::VecFromMask(d, hn::Eq(units, hn::Zero(d))), hn::Set(d, 1)));
      certain = hn::Add(certain, hn::Add(hn::And(ones, low), hn::ShiftRight<16>(ones)));
    });
    return std::uint64_t{hn::GetLane(hn::SumOfLanes(d32, sum))} +
           ScoreRule::kCertain * std::uint64_t{hn::GetLane(hn::SumOfLanes(d32, certain))};
  }
};

static_assert(SignatureOps<HighwaySignatureOps>);

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace magicpig::inline MAGICPIG_ABI
HWY_AFTER_NAMESPACE();

#endif  // MAGICPIG_CPU_HIGHWAY_SIGNATURES_INL_HPP

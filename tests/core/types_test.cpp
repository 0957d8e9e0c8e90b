// SPDX-License-Identifier: Apache-2.0
// 16-bit floats against a reference in double, and the ranges of tokens.
#include "magicpig/core/types.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "random.hpp"

namespace {

using namespace magicpig;

// A binary format: sign, exponent field, `mantissa` bits of fraction.
struct Format {
  int exponent_bits;
  int mantissa_bits;

  [[nodiscard]] int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};
constexpr Format kHalf{.exponent_bits = 5, .mantissa_bits = 10};
constexpr Format kBrain{.exponent_bits = 8, .mantissa_bits = 7};

// The value of a pattern, by the definition of IEEE 754.
double decode_pattern(const Format& format, std::uint32_t bits) {
  const auto fraction = static_cast<int>(bits & ((1U << format.mantissa_bits) - 1));
  const int top = (1 << format.exponent_bits) - 1;
  const int exponent = static_cast<int>(bits >> format.mantissa_bits) & top;
  const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
  if (exponent == top) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  const int implicit = exponent == 0 ? 0 : 1 << format.mantissa_bits;
  const int scale = (exponent == 0 ? 1 : exponent) - format.bias() - format.mantissa_bits;
  return sign * std::ldexp(implicit + fraction, scale);
}

// x rounded to the nearest value of the format, ties to even; beyond the largest, infinity.
double round_to_format(const Format& format, float x) {
  const auto value = static_cast<double>(x);
  if (std::isnan(x) || std::isinf(x) || value == 0.0) return value;
  const int lowest = 1 - format.bias();
  const int exponent = std::ilogb(value) > lowest ? std::ilogb(value) : lowest;
  const int quantum = exponent - format.mantissa_bits;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -quantum)), quantum);
  const bool overflow = std::fabs(rounded) >= std::ldexp(1.0, format.bias() + 1);
  return overflow ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

bool rounds_right(float x) {
  return same(static_cast<double>(to_float(to_fp16(x))), round_to_format(kHalf, x)) &&
         same(static_cast<double>(to_float(to_bf16(x))), round_to_format(kBrain, x));
}

TEST_CASE("every 16-bit pattern has the value that IEEE 754 gives it") {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const fp16 half{static_cast<std::uint16_t>(bits)};
    const bf16 brain{static_cast<std::uint16_t>(bits)};
    wrong += !same(static_cast<double>(to_float(half)), decode_pattern(kHalf, bits));
    wrong += !same(static_cast<double>(to_float(brain)), decode_pattern(kBrain, bits));
  }
  CHECK(wrong == 0);
}

TEST_CASE("every 16-bit pattern survives the way to float and back; NaN stays NaN") {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const fp16 half{static_cast<std::uint16_t>(bits)};
    const bf16 brain{static_cast<std::uint16_t>(bits)};
    const fp16 half_again = to_fp16(to_float(half));
    const bf16 brain_again = to_bf16(to_float(brain));
    wrong += std::isnan(to_float(half)) ? !std::isnan(to_float(half_again)) : half_again != half;
    wrong +=
        std::isnan(to_float(brain)) ? !std::isnan(to_float(brain_again)) : brain_again != brain;
  }
  CHECK(wrong == 0);
}

TEST_CASE("ties between neighbouring 16-bit floats go to even, and their float neighbours do not") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  int wrong = 0;
  for (const Format& format : {kHalf, kBrain}) {
    for (std::uint32_t bits = 0; bits < 0xffffU; ++bits) {
      const double low = decode_pattern(format, bits);
      const double high = decode_pattern(format, bits + 1);
      if (!std::isfinite(low) || !std::isfinite(high)) continue;
      const auto middle = static_cast<float>(0.5 * (low + high));  // 17 bits at most: exact
      for (const float x :
           {std::nextafter(middle, -kInfinity), middle, std::nextafter(middle, kInfinity)}) {
        wrong += !rounds_right(x);
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("any float rounds to the nearest 16-bit float") {
  constexpr std::uint64_t kSeed = 11;
  CAPTURE(kSeed);
  test::Random random(kSeed);
  int wrong = 0;
  for (int i = 0; i < 200000; ++i) {
    wrong += !rounds_right(std::bit_cast<float>(static_cast<std::uint32_t>(random.bits())));
  }
  CHECK(wrong == 0);
}

TEST_CASE("rounding overflows where the next 16-bit float would be") {
  CHECK(to_float(to_fp16(65519.996F)) == 65504.0F);
  CHECK(std::isinf(to_float(to_fp16(65520.0F))));
  CHECK(std::isinf(to_float(to_fp16(-3e38F))));
  CHECK(std::isinf(to_float(to_bf16(std::numeric_limits<float>::max()))));
  CHECK(to_fp16(0x1p-25F).bits == 0);  // a tie between 0 and the smallest subnormal
  CHECK(to_fp16(std::nextafter(0x1p-25F, 1.0F)).bits == 1);
}

TEST_CASE("conversions are usable at compile time") {
  static_assert(to_fp16(1.5F).bits == 0x3e00);
  static_assert(to_bf16(1.5F).bits == 0x3fc0);
  static_assert(to_float(fp16{0x3e00}) == 1.5F);
  static_assert(to_float(bf16{0x3fc0}) == 1.5F);
  CHECK(to_float(2.5F) == 2.5F);
}

TEST_CASE("a range of tokens is half-open, and empty when it ends before it begins") {
  constexpr TokenRange kRange{.begin = 3, .end = 5};
  CHECK(kRange.size() == 2);
  CHECK(!kRange.contains(2));
  CHECK(kRange.contains(3));
  CHECK(kRange.contains(4));
  CHECK(!kRange.contains(5));
  CHECK(TokenRange{.begin = 5, .end = 3}.size() == 0);
  CHECK(TokenRange{.begin = 5, .end = 3}.empty());
  CHECK(!TokenRange{.begin = 5, .end = 3}.contains(4));
}

TEST_CASE("the middle of a window is what lies between sinks and newest tokens") {
  constexpr Window kWindow{.sink = 4, .local = 64};
  CHECK(kWindow.middle(1000) == TokenRange{.begin = 4, .end = 936});
  CHECK(kWindow.middle(69) == TokenRange{.begin = 4, .end = 5});
  for (const TokenId tokens : {0, 1, 4, 63, 64, 65, 68}) {
    CAPTURE(tokens);
    CHECK(kWindow.middle(tokens).empty());
  }
  CHECK(Window{.sink = 0, .local = 0}.middle(10) == TokenRange{.begin = 0, .end = 10});
  CHECK(Window{.sink = 0, .local = 0}.middle(0).empty());
  constexpr TokenId kMost = std::numeric_limits<TokenId>::max();
  CHECK(kWindow.middle(kMost) == TokenRange{.begin = 4, .end = kMost - 64});
}

TEST_CASE("a window covers every token exactly once: sinks, middle, newest") {
  for (const TokenId sink : {0, 1, 4}) {
    for (const TokenId local : {0, 1, 7}) {
      for (TokenId tokens = sink + local; tokens < 30; ++tokens) {
        const TokenRange middle = Window{.sink = sink, .local = local}.middle(tokens);
        CHECK(sink + middle.size() + local == tokens);
      }
    }
  }
}

TEST_CASE("a shape counts the query heads of a KV head") {
  CHECK(Shape{.query_heads = 32, .kv_heads = 8, .head_dim = 128, .value_dim = 64}.group() == 4);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Version numbers, and the name of the inline namespace that everything in the library lives in.
#pragma once

// The one place where the version stands: CMake reads these three lines.
#define MAGICPIG_VERSION_MAJOR 0
#define MAGICPIG_VERSION_MINOR 1
#define MAGICPIG_VERSION_PATCH 0

/// major * 10000 + minor * 100 + patch, for `#if MAGICPIG_VERSION >= 200`.
#define MAGICPIG_VERSION \
  (MAGICPIG_VERSION_MAJOR * 10000 + MAGICPIG_VERSION_MINOR * 100 + MAGICPIG_VERSION_PATCH)

#define MAGICPIG_STRINGIFY_TOKEN(token) #token
#define MAGICPIG_STRINGIFY(token) MAGICPIG_STRINGIFY_TOKEN(token)

/// The version as text, "major.minor.patch".
#define MAGICPIG_VERSION_STRING              \
  MAGICPIG_STRINGIFY(MAGICPIG_VERSION_MAJOR) \
  "." MAGICPIG_STRINGIFY(MAGICPIG_VERSION_MINOR) "." MAGICPIG_STRINGIFY(MAGICPIG_VERSION_PATCH)

// An empty set of candidates has lse = -infinity and probabilities are kept as logarithms, so a
// compiler that may assume away infinities and NaN would break results silently.
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "magicpig needs infinities: add -fno-finite-math-only after -ffast-math"
#endif

/// MAGICPIG_ABI names the inline namespace: `namespace magicpig::inline MAGICPIG_ABI { ... }`.
///
/// Why: a header-only library is compiled once per translation unit, and the linker keeps one copy
/// of each inline function. Were two units compiled with different -march flags or library
/// versions, it could keep the AVX-512 copy for the unit that was meant to run anywhere. So the
/// name holds the version and one digit for each compiler flag that changes the code generated, and
/// such units share nothing of this library; what they share of the standard library's templates
/// over built-in types, when nothing is inlined, no header can prevent. The price is that a type of
/// this library cannot cross between them: pass raw pointers.
///
/// A host that wants one name for all of its units defines MAGICPIG_ABI itself, on the command
/// line, and then answers for compiling all of them with the same flags.

// One digit per instruction set extension that compilers use unasked or that library code tests
// for. Extensions that no processor has without one of these need no digit of their own.
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)

#if defined(__SSSE3__)
#define MAGICPIG_ABI_SSSE3 1
#else
#define MAGICPIG_ABI_SSSE3 0
#endif
#if defined(__SSE4_1__)
#define MAGICPIG_ABI_SSE4_1 1
#else
#define MAGICPIG_ABI_SSE4_1 0
#endif
#if defined(__SSE4_2__)
#define MAGICPIG_ABI_SSE4_2 1
#else
#define MAGICPIG_ABI_SSE4_2 0
#endif
#if defined(__POPCNT__)
#define MAGICPIG_ABI_POPCNT 1
#else
#define MAGICPIG_ABI_POPCNT 0
#endif
#if defined(__LZCNT__)
#define MAGICPIG_ABI_LZCNT 1
#else
#define MAGICPIG_ABI_LZCNT 0
#endif
#if defined(__BMI__)
#define MAGICPIG_ABI_BMI 1
#else
#define MAGICPIG_ABI_BMI 0
#endif
#if defined(__BMI2__)
#define MAGICPIG_ABI_BMI2 1
#else
#define MAGICPIG_ABI_BMI2 0
#endif
#if defined(__AVX__)
#define MAGICPIG_ABI_AVX 1
#else
#define MAGICPIG_ABI_AVX 0
#endif
#if defined(__AVX2__)
#define MAGICPIG_ABI_AVX2 1
#else
#define MAGICPIG_ABI_AVX2 0
#endif
#if defined(__FMA__)
#define MAGICPIG_ABI_FMA 1
#else
#define MAGICPIG_ABI_FMA 0
#endif
#if defined(__FMA4__)
#define MAGICPIG_ABI_FMA4 1
#else
#define MAGICPIG_ABI_FMA4 0
#endif
#if defined(__XOP__)
#define MAGICPIG_ABI_XOP 1
#else
#define MAGICPIG_ABI_XOP 0
#endif
#if defined(__F16C__)
#define MAGICPIG_ABI_F16C 1
#else
#define MAGICPIG_ABI_F16C 0
#endif
#if defined(__AVXVNNI__)
#define MAGICPIG_ABI_AVXVNNI 1
#else
#define MAGICPIG_ABI_AVXVNNI 0
#endif
#if defined(__AES__)
#define MAGICPIG_ABI_AES 1
#else
#define MAGICPIG_ABI_AES 0
#endif
#if defined(__PCLMUL__)
#define MAGICPIG_ABI_PCLMUL 1
#else
#define MAGICPIG_ABI_PCLMUL 0
#endif
#if defined(__VAES__)
#define MAGICPIG_ABI_VAES 1
#else
#define MAGICPIG_ABI_VAES 0
#endif
#if defined(__VPCLMULQDQ__)
#define MAGICPIG_ABI_VPCLMULQDQ 1
#else
#define MAGICPIG_ABI_VPCLMULQDQ 0
#endif
#if defined(__GFNI__)
#define MAGICPIG_ABI_GFNI 1
#else
#define MAGICPIG_ABI_GFNI 0
#endif
#if defined(__AVX512F__)
#define MAGICPIG_ABI_AVX512F 1
#else
#define MAGICPIG_ABI_AVX512F 0
#endif
#if defined(__AVX512CD__)
#define MAGICPIG_ABI_AVX512CD 1
#else
#define MAGICPIG_ABI_AVX512CD 0
#endif
#if defined(__AVX512BW__)
#define MAGICPIG_ABI_AVX512BW 1
#else
#define MAGICPIG_ABI_AVX512BW 0
#endif
#if defined(__AVX512DQ__)
#define MAGICPIG_ABI_AVX512DQ 1
#else
#define MAGICPIG_ABI_AVX512DQ 0
#endif
#if defined(__AVX512VL__)
#define MAGICPIG_ABI_AVX512VL 1
#else
#define MAGICPIG_ABI_AVX512VL 0
#endif
#if defined(__AVX512IFMA__)
#define MAGICPIG_ABI_AVX512IFMA 1
#else
#define MAGICPIG_ABI_AVX512IFMA 0
#endif
#if defined(__AVX512VBMI__)
#define MAGICPIG_ABI_AVX512VBMI 1
#else
#define MAGICPIG_ABI_AVX512VBMI 0
#endif
#if defined(__AVX512VBMI2__)
#define MAGICPIG_ABI_AVX512VBMI2 1
#else
#define MAGICPIG_ABI_AVX512VBMI2 0
#endif
#if defined(__AVX512VNNI__)
#define MAGICPIG_ABI_AVX512VNNI 1
#else
#define MAGICPIG_ABI_AVX512VNNI 0
#endif
#if defined(__AVX512BITALG__)
#define MAGICPIG_ABI_AVX512BITALG 1
#else
#define MAGICPIG_ABI_AVX512BITALG 0
#endif
#if defined(__AVX512VPOPCNTDQ__)
#define MAGICPIG_ABI_AVX512VPOPCNTDQ 1
#else
#define MAGICPIG_ABI_AVX512VPOPCNTDQ 0
#endif
#if defined(__AVX512BF16__)
#define MAGICPIG_ABI_AVX512BF16 1
#else
#define MAGICPIG_ABI_AVX512BF16 0
#endif
#if defined(__AVX512FP16__)
#define MAGICPIG_ABI_AVX512FP16 1
#else
#define MAGICPIG_ABI_AVX512FP16 0
#endif

#elif defined(__aarch64__) || defined(_M_ARM64)

#if defined(__ARM_FEATURE_ATOMICS)
#define MAGICPIG_ABI_ATOMICS 1
#else
#define MAGICPIG_ABI_ATOMICS 0
#endif
#if defined(__ARM_FEATURE_AES)
#define MAGICPIG_ABI_AES 1
#else
#define MAGICPIG_ABI_AES 0
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#define MAGICPIG_ABI_DOTPROD 1
#else
#define MAGICPIG_ABI_DOTPROD 0
#endif
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
#define MAGICPIG_ABI_FP16 1
#else
#define MAGICPIG_ABI_FP16 0
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MAGICPIG_ABI_BF16 1
#else
#define MAGICPIG_ABI_BF16 0
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define MAGICPIG_ABI_I8MM 1
#else
#define MAGICPIG_ABI_I8MM 0
#endif
#if defined(__ARM_FEATURE_SVE)
#define MAGICPIG_ABI_SVE 1
#else
#define MAGICPIG_ABI_SVE 0
#endif
#if defined(__ARM_FEATURE_SVE2)
#define MAGICPIG_ABI_SVE2 1
#else
#define MAGICPIG_ABI_SVE2 0
#endif
#if defined(__ARM_FEATURE_SVE_BITS)
#define MAGICPIG_ABI_SVE_BITS __ARM_FEATURE_SVE_BITS
#else
#define MAGICPIG_ABI_SVE_BITS 0
#endif

#endif

// Relaxed floating-point rules change results, not only instructions.
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#define MAGICPIG_ABI_RELAXED_MATH 1
#else
#define MAGICPIG_ABI_RELAXED_MATH 0
#endif

// With exceptions the throwing wrappers exist, and the standard containers throw.
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define MAGICPIG_ABI_EXCEPTIONS 1
#else
#define MAGICPIG_ABI_EXCEPTIONS 0
#endif

#define MAGICPIG_ABI_JOIN2_TOKENS(a, b) a##b
#define MAGICPIG_ABI_JOIN2(a, b) MAGICPIG_ABI_JOIN2_TOKENS(a, b)
#define MAGICPIG_ABI_JOIN3_TOKENS(a, b, c) a##_##b##_##c
#define MAGICPIG_ABI_JOIN3(a, b, c) MAGICPIG_ABI_JOIN3_TOKENS(a, b, c)
#define MAGICPIG_ABI_JOIN8_TOKENS(a, b, c, d, e, f, g, h) a##b##c##d##e##f##g##h
#define MAGICPIG_ABI_JOIN8(a, b, c, d, e, f, g, h) MAGICPIG_ABI_JOIN8_TOKENS(a, b, c, d, e, f, g, h)

// v<version>: inline functions of any two releases may differ, so all three numbers count.
#define MAGICPIG_ABI_VERSION                                                               \
  MAGICPIG_ABI_JOIN2(v, MAGICPIG_ABI_JOIN3(MAGICPIG_VERSION_MAJOR, MAGICPIG_VERSION_MINOR, \
                                           MAGICPIG_VERSION_PATCH))

#if defined(MAGICPIG_ABI_SSSE3)
#define MAGICPIG_ABI_SCALAR_DIGITS                                                       \
  MAGICPIG_ABI_JOIN8(x86_, MAGICPIG_ABI_SSSE3, MAGICPIG_ABI_SSE4_1, MAGICPIG_ABI_SSE4_2, \
                     MAGICPIG_ABI_POPCNT, MAGICPIG_ABI_LZCNT, MAGICPIG_ABI_BMI, MAGICPIG_ABI_BMI2)
#define MAGICPIG_ABI_AVX_DIGITS                                                                   \
  MAGICPIG_ABI_JOIN8(_, MAGICPIG_ABI_AVX, MAGICPIG_ABI_AVX2, MAGICPIG_ABI_FMA, MAGICPIG_ABI_FMA4, \
                     MAGICPIG_ABI_XOP, MAGICPIG_ABI_F16C, MAGICPIG_ABI_AVXVNNI)
#define MAGICPIG_ABI_CIPHER_DIGITS                                                \
  MAGICPIG_ABI_JOIN8(_, MAGICPIG_ABI_AES, MAGICPIG_ABI_PCLMUL, MAGICPIG_ABI_VAES, \
                     MAGICPIG_ABI_VPCLMULQDQ, MAGICPIG_ABI_GFNI, , )
#define MAGICPIG_ABI_AVX512_DIGITS                                                          \
  MAGICPIG_ABI_JOIN8(_, MAGICPIG_ABI_AVX512F, MAGICPIG_ABI_AVX512CD, MAGICPIG_ABI_AVX512BW, \
                     MAGICPIG_ABI_AVX512DQ, MAGICPIG_ABI_AVX512VL, MAGICPIG_ABI_AVX512IFMA, \
                     MAGICPIG_ABI_AVX512VBMI)
#define MAGICPIG_ABI_AVX512_LATER_DIGITS                                      \
  MAGICPIG_ABI_JOIN8(_, MAGICPIG_ABI_AVX512VBMI2, MAGICPIG_ABI_AVX512VNNI,    \
                     MAGICPIG_ABI_AVX512BITALG, MAGICPIG_ABI_AVX512VPOPCNTDQ, \
                     MAGICPIG_ABI_AVX512BF16, MAGICPIG_ABI_AVX512FP16, )
#define MAGICPIG_ABI_ISA                                                     \
  MAGICPIG_ABI_JOIN8(MAGICPIG_ABI_SCALAR_DIGITS, MAGICPIG_ABI_AVX_DIGITS,    \
                     MAGICPIG_ABI_CIPHER_DIGITS, MAGICPIG_ABI_AVX512_DIGITS, \
                     MAGICPIG_ABI_AVX512_LATER_DIGITS, , , )
#elif defined(MAGICPIG_ABI_DOTPROD)
#define MAGICPIG_ABI_NEON_DIGITS                                                           \
  MAGICPIG_ABI_JOIN8(arm64_, MAGICPIG_ABI_ATOMICS, MAGICPIG_ABI_AES, MAGICPIG_ABI_DOTPROD, \
                     MAGICPIG_ABI_FP16, MAGICPIG_ABI_BF16, MAGICPIG_ABI_I8MM, )
#define MAGICPIG_ABI_SVE_DIGITS \
  MAGICPIG_ABI_JOIN8(_, MAGICPIG_ABI_SVE, MAGICPIG_ABI_SVE2, _, MAGICPIG_ABI_SVE_BITS, , , )
#define MAGICPIG_ABI_ISA MAGICPIG_ABI_JOIN2(MAGICPIG_ABI_NEON_DIGITS, MAGICPIG_ABI_SVE_DIGITS)
#else
#define MAGICPIG_ABI_ISA other
#endif

#if !defined(MAGICPIG_ABI)
#define MAGICPIG_ABI                                         \
  MAGICPIG_ABI_JOIN3(MAGICPIG_ABI_VERSION, MAGICPIG_ABI_ISA, \
                     MAGICPIG_ABI_JOIN2(MAGICPIG_ABI_RELAXED_MATH, MAGICPIG_ABI_EXCEPTIONS))
#endif

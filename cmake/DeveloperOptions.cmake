# SPDX-License-Identifier: Apache-2.0
# Flags for this project's own tests, benches and examples, carried by targets that are never installed.
include(CheckCXXSourceCompiles)

set(MAGICPIG_ARCH "" CACHE STRING "Value of -march for tests, benches and examples; empty for none")
option(MAGICPIG_WARNINGS_AS_ERRORS "Compile tests, benches and examples with warnings as errors" OFF)
set(MAGICPIG_SANITIZE "" CACHE STRING "Value of -fsanitize for tests, benches and examples; empty for none")
option(MAGICPIG_NO_EXCEPTIONS "Compile the library's tests with -fno-exceptions -fno-rtti" OFF)

set(CMAKE_CXX_EXTENSIONS OFF)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()

# magicpig_options: warnings, sanitizers, exceptions.
add_library(magicpig_options INTERFACE)
if(MSVC)
  target_compile_options(magicpig_options INTERFACE /W4)
else()
  target_compile_options(magicpig_options INTERFACE -Wall -Wextra -Wconversion -Wshadow)
endif()
if(MAGICPIG_WARNINGS_AS_ERRORS)
  target_compile_options(magicpig_options INTERFACE $<IF:$<CXX_COMPILER_ID:MSVC>,/WX,-Werror>)
endif()
if(MAGICPIG_SANITIZE)
  target_compile_options(magicpig_options INTERFACE
    -fsanitize=${MAGICPIG_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND MAGICPIG_SANITIZE MATCHES "undefined")
    # With checks of alignment g++ takes 1.7 times as long; clang++, which the presets choose, has them.
    target_compile_options(magicpig_options INTERFACE -fno-sanitize=alignment)
  endif()
  target_compile_definitions(magicpig_options INTERFACE _GLIBCXX_ASSERTIONS)
  target_link_options(magicpig_options INTERFACE -fsanitize=${MAGICPIG_SANITIZE})
endif()

# magicpig_allow_avx512(<target> <PRIVATE|INTERFACE>): without false alarms in the compiler's own headers.
function(magicpig_allow_avx512 target scope)
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # GCC bug 105593.
    target_compile_options(${target} ${scope}
      $<$<COMPILE_LANGUAGE:CXX>:-Wno-uninitialized> $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
  endif()
endfunction()

# magicpig_set_arch(<target> <PRIVATE|INTERFACE> <arch>): -march, and what it needs to compile cleanly.
function(magicpig_set_arch target scope arch)
  if(arch STREQUAL "")
    return()
  endif()
  string(MAKE_C_IDENTIFIER "MAGICPIG_${arch}_HAS_AVX2_WITHOUT_AES" lacks_aes)
  set(CMAKE_REQUIRED_FLAGS "-march=${arch}")
  check_cxx_source_compiles("
    #if !defined(__AVX2__) || (defined(__AES__) && defined(__PCLMUL__))
    #error
    #endif
    int main() {}" ${lacks_aes})
  target_compile_options(${target} ${scope}
    $<$<COMPILE_LANGUAGE:CXX>:-march=${arch}> $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-march=${arch}>)
  # Highway refuses a baseline with all of Ice Lake's extensions unless it is asked for.
  target_compile_definitions(${target} ${scope} HWY_WANT_AVX3_DL)
  if(${lacks_aes})
    # Such as x86-64-v3: without this Highway would silently fall back to SSSE3.
    target_compile_definitions(${target} ${scope} HWY_DISABLE_PCLMUL_AES)
  endif()
  magicpig_allow_avx512(${target} ${scope})
endfunction()

if(MAGICPIG_ARCH STREQUAL "" AND MAGICPIG_SANITIZE AND CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND
   CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  # Without SSSE3 Highway emulates 128 bits in loops, over which clang++ with UBSan takes a quarter of an hour. Without FMA
  # sums are those of the baseline.
  set(MAGICPIG_ARCH x86-64-v2)
endif()
# magicpig_arch: MAGICPIG_ARCH for targets that do not choose an instruction set of their own.
add_library(magicpig_arch INTERFACE)
magicpig_set_arch(magicpig_arch INTERFACE "${MAGICPIG_ARCH}")

# SPDX-License-Identifier: Apache-2.0
# One function per third-party library: a target that exists, else an installed package, else a pinned archive.
include(FetchContent)

# magicpig_find_or_fetch(<package> <version> TARGET <target> URL <url> SHA256 <hash> [INCLUDE <directory>]
#                        [HEADER <header>])
# With INCLUDE the archive is header-only and its own CMakeLists.txt is not run, so none of its options,
# tests or install rules reach this build. Nothing is downloaded when the target or the package is there;
# FETCHCONTENT_SOURCE_DIR_<PACKAGE> names an unpacked archive to use instead of a download.
# With HEADER, a cross compiler that finds that header by itself has it from a package for this machine's
# processor, whose headers suit any other.
function(magicpig_find_or_fetch package version)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "TARGET;URL;SHA256;INCLUDE;HEADER" "")
  if(TARGET ${arg_TARGET})
    return()
  endif()
  set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL TRUE)
  find_package(${package} ${version} QUIET CONFIG)
  if(TARGET ${arg_TARGET})
    message(STATUS "magicpig: ${package} ${${package}_VERSION} found in ${${package}_DIR}")
    return()
  endif()
  if(DEFINED arg_HEADER AND CMAKE_CROSSCOMPILING)
    string(TOUPPER ${package} upper)
    find_path(MAGICPIG_${upper}_INCLUDE_DIR ${arg_HEADER}
      PATHS ${CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES} NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
    if(MAGICPIG_${upper}_INCLUDE_DIR)
      message(STATUS "magicpig: headers of ${package} found in ${MAGICPIG_${upper}_INCLUDE_DIR}")
      add_library(${arg_TARGET} INTERFACE IMPORTED GLOBAL)
      target_include_directories(${arg_TARGET} SYSTEM INTERFACE "${MAGICPIG_${upper}_INCLUDE_DIR}")
      return()
    endif()
  endif()
  message(STATUS "magicpig: ${package} ${version} not found, taking ${arg_URL}")
  set(header_only "")
  if(DEFINED arg_INCLUDE)
    set(header_only SOURCE_SUBDIR directory-without-cmakelists)
  endif()
  FetchContent_Declare(${package} URL ${arg_URL} URL_HASH SHA256=${arg_SHA256} SYSTEM ${header_only})
  FetchContent_MakeAvailable(${package})
  if(DEFINED arg_INCLUDE)
    string(TOLOWER ${package} lower)
    add_library(${arg_TARGET} INTERFACE IMPORTED GLOBAL)
    target_include_directories(${arg_TARGET} SYSTEM INTERFACE "${${lower}_SOURCE_DIR}/${arg_INCLUDE}")
  endif()
endfunction()

function(magicpig_require_highway)
  if(TARGET hwy AND NOT TARGET hwy::hwy)
    add_library(hwy::hwy ALIAS hwy)
  endif()
  magicpig_find_or_fetch(hwy 1.0.3 TARGET hwy::hwy HEADER hwy/highway.h
    URL https://github.com/google/highway/archive/refs/tags/1.0.3.tar.gz
    SHA256 566fc77315878473d9a6bd815f7de78c73734acdcb745c3dde8579560ac5440e
    INCLUDE .)
  include("${CMAKE_CURRENT_FUNCTION_LIST_DIR}/HighwayHeaders.cmake")
endfunction()

# magicpig_has_highway_library(<out>): whether hwy::hwy is a library, which dispatch at run time needs.
function(magicpig_has_highway_library out)
  set(${out} FALSE PARENT_SCOPE)
  if(TARGET hwy::hwy)
    get_target_property(type hwy::hwy TYPE)
    if(type MATCHES "^(STATIC|SHARED)_LIBRARY$")
      set(${out} TRUE PARENT_SCOPE)
    endif()
  endif()
endfunction()

function(magicpig_require_eigen)
  magicpig_find_or_fetch(Eigen3 3.4.0 TARGET Eigen3::Eigen
    URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.bz2
    SHA256 b4c198460eba6f28d34894e3a5710998818515104d6e74e5cc331ce31e46e626
    INCLUDE .)
endfunction()

function(magicpig_require_xsimd)
  magicpig_find_or_fetch(xsimd 8.1.0 TARGET xsimd HEADER xsimd/xsimd.hpp
    URL https://github.com/xtensor-stack/xsimd/archive/refs/tags/8.1.0.tar.gz
    SHA256 d52551360d37709675237d2a0418e28f70995b5b7cdad7c674626bcfbbf48328
    INCLUDE include)
  include("${CMAKE_CURRENT_FUNCTION_LIST_DIR}/XsimdHeaders.cmake")
endfunction()

function(magicpig_require_doctest)
  magicpig_find_or_fetch(doctest 2.4.9 TARGET doctest::doctest
    URL https://github.com/doctest/doctest/archive/refs/tags/v2.4.9.tar.gz
    SHA256 19b2df757f2f3703a5e63cee553d85596875f06d91a3333acd80a969ef210856
    INCLUDE .)
endfunction()

function(magicpig_require_json)
  magicpig_find_or_fetch(nlohmann_json 3.11.2 TARGET nlohmann_json::nlohmann_json
    URL https://github.com/nlohmann/json/archive/refs/tags/v3.11.2.tar.gz
    SHA256 d69f9deb6a75e2580465c6c4c5111b89c4dc2fa94e3a85fcd2ffcd9a143d9273
    INCLUDE include)
endfunction()

function(magicpig_require_cli11)
  magicpig_find_or_fetch(CLI11 2.1.2 TARGET CLI11::CLI11
    URL https://github.com/CLIUtils/CLI11/archive/refs/tags/v2.1.2.tar.gz
    SHA256 26291377e892ba0e5b4972cdfd4a2ab3bf53af8dac1f4ea8fe0d1376b625c8cb
    INCLUDE include)
endfunction()

function(magicpig_require_benchmark)
  set(BENCHMARK_ENABLE_TESTING OFF)
  set(BENCHMARK_ENABLE_INSTALL OFF)
  set(BENCHMARK_ENABLE_WERROR OFF)
  set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
  magicpig_find_or_fetch(benchmark 1.7.1 TARGET benchmark::benchmark
    URL https://github.com/google/benchmark/archive/refs/tags/v1.7.1.tar.gz
    SHA256 6430e4092653380d9dc4ccb45a1e2dc9259d581f4866dc0759713126056bc1d7)
endfunction()

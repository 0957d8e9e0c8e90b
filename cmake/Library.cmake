# SPDX-License-Identifier: Apache-2.0
# Functions that define magicpig::magicpig and, one by one, the components that need a third-party library.
include(GNUInstallDirs)

set(magicpig_include_dir "${PROJECT_SOURCE_DIR}/include")
# Headers of a component begin with one of these paths below include/magicpig; all others are core.
set(magicpig_component_prefixes cpu/highway cpu/eigen cpu/xsimd cpu/openmp cuda/)

# magicpig_headers(<out> [<prefix>]): the headers that begin with prefix, or, without one, the core.
function(magicpig_headers out)
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS LIST_DIRECTORIES false
       "${magicpig_include_dir}/magicpig/*.hpp" "${magicpig_include_dir}/magicpig/*.cuh")
  list(JOIN magicpig_component_prefixes "|" any_prefix)
  if(ARGC GREATER 1)
    list(FILTER headers INCLUDE REGEX "^${magicpig_include_dir}/magicpig/${ARGV1}")
  else()
    list(FILTER headers EXCLUDE REGEX "^${magicpig_include_dir}/magicpig/(${any_prefix})")
  endif()
  set(${out} ${headers} PARENT_SCOPE)
endfunction()

# Gives an interface target its headers. No compiler flags: those are the host's to choose.
function(magicpig_set_headers target)
  target_sources(${target} INTERFACE
    FILE_SET HEADERS BASE_DIRS "${magicpig_include_dir}" FILES ${ARGN})
  set_target_properties(${target} PROPERTIES
    VERIFY_INTERFACE_HEADER_SETS ${PROJECT_IS_TOP_LEVEL})
endfunction()

# magicpig_add_library(): the target magicpig::magicpig, which needs threads and nothing else.
function(magicpig_add_library)
  find_package(Threads REQUIRED)
  magicpig_headers(headers)
  add_library(magicpig INTERFACE)
  add_library(magicpig::magicpig ALIAS magicpig)
  magicpig_set_headers(magicpig ${headers})
  target_compile_features(magicpig INTERFACE cxx_std_20)
  target_link_libraries(magicpig INTERFACE Threads::Threads)
endfunction()

# magicpig_add_component(<name> HEADERS <prefix> DEPENDS <target>...): the target magicpig::<name>.
function(magicpig_add_component name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "HEADERS" "DEPENDS")
  magicpig_headers(headers "${arg_HEADERS}")
  set(target magicpig_${name})
  add_library(${target} INTERFACE)
  add_library(magicpig::${name} ALIAS ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name})
  magicpig_set_headers(${target} ${headers})
  target_link_libraries(${target} INTERFACE magicpig ${arg_DEPENDS})
endfunction()

# magicpig_add_cuda(): the target magicpig::cuda. Its kernels call constexpr functions of the core, for which nvcc wants a
# flag; it is the one that a target of this project brings along.
function(magicpig_add_cuda)
  find_package(CUDAToolkit REQUIRED)
  magicpig_add_component(cuda HEADERS cuda/ DEPENDS CUDA::cudart CUDA::cublas)
  # These headers are CUDA, which this check does not compile: tests/cuda has one of its own.
  set_target_properties(magicpig_cuda PROPERTIES VERIFY_INTERFACE_HEADER_SETS OFF)
  target_compile_options(magicpig_cuda INTERFACE
    $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:--expt-relaxed-constexpr>)
endfunction()

# SPDX-License-Identifier: Apache-2.0
# The conformance tests once per instruction set: always compiled, run where the processor can.

# Itself compiled for the baseline, it starts a program only on a processor that has what the program
# was compiled for. A check inside the program would come too late: code before main uses the flags too.
add_executable(magicpig_run_where_supported support/run_where_supported.cpp)
target_link_libraries(magicpig_run_where_supported PRIVATE magicpig_options)
target_compile_features(magicpig_run_where_supported PRIVATE cxx_std_20)

function(magicpig_add_conformance_variant name)
  magicpig_add_doctest_program(magicpig_conformance_${name} ${conformance_sources})
  if(ARGC GREATER 1)
    magicpig_set_arch(magicpig_conformance_${name} PRIVATE ${ARGV1})
  endif()
  add_test(NAME magicpig_conformance_${name}
    COMMAND magicpig_run_where_supported ${name} $<TARGET_FILE:magicpig_conformance_${name}>)
  set_tests_properties(magicpig_conformance_${name} PROPERTIES SKIP_RETURN_CODE 77)
endfunction()

# Without MAGICPIG_ARCH, magicpig_tests is the baseline already.
if(NOT MAGICPIG_ARCH STREQUAL "")
  magicpig_add_conformance_variant(baseline)
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND NOT MSVC)
  magicpig_add_conformance_variant(haswell haswell)
  magicpig_add_conformance_variant(skylake_avx512 skylake-avx512)
endif()

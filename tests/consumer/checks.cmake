# SPDX-License-Identifier: Apache-2.0
# What a consumer may expect of the targets that it was given.

# check_interface(<target>): neither flags nor definitions reach the consumer.
function(check_interface target)
  foreach(property INTERFACE_COMPILE_OPTIONS INTERFACE_COMPILE_DEFINITIONS INTERFACE_LINK_OPTIONS)
    get_target_property(value ${target} ${property})
    if(value)
      message(FATAL_ERROR "${target} has ${property} ${value}")
    endif()
  endforeach()
endfunction()

# use_components(<target> <component>...): links them, checks them and tells consumer.cpp of them.
function(use_components target)
  foreach(component IN LISTS ARGN)
    target_link_libraries(${target} PRIVATE magicpig::${component})
    string(TOUPPER "CONSUMER_USES_${component}" definition)
    target_compile_definitions(${target} PRIVATE ${definition})
    check_interface(magicpig::${component})
  endforeach()
endfunction()

# check_nothing_leaks(<directory>): no test, program, dependency or cache variable of a vendored magicpig.
function(check_nothing_leaks directory)
  get_property(tests DIRECTORY "${directory}" PROPERTY TESTS)
  get_property(targets DIRECTORY "${directory}" PROPERTY BUILDSYSTEM_TARGETS)
  get_property(subdirectories DIRECTORY "${directory}" PROPERTY SUBDIRECTORIES)
  if(tests OR subdirectories OR NOT targets STREQUAL "magicpig")
    message(FATAL_ERROR "leaked: tests ${tests}, targets ${targets}, folders ${subdirectories}")
  endif()
  foreach(target hwy::hwy xsimd Eigen3::Eigen doctest::doctest benchmark::benchmark nlohmann_json::nlohmann_json)
    if(TARGET ${target})
      message(FATAL_ERROR "${target} has been looked up without need")
    endif()
  endforeach()
  get_cmake_property(variables CACHE_VARIABLES)
  list(FILTER variables INCLUDE REGEX "^(BUILD_TESTING|CMAKE_CXX_STANDARD|MAGICPIG_ARCH|MAGICPIG_SANITIZE)$")
  if(variables)
    message(FATAL_ERROR "cache variables leaked: ${variables}")
  endif()
endfunction()

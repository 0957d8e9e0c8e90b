# SPDX-License-Identifier: Apache-2.0
# Configures, builds, runs and installs one consumer project, and looks for things that should not be there.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

# installed_files(<out> <prefix>): sorted, relative to prefix.
function(installed_files out prefix)
  file(GLOB_RECURSE files RELATIVE "${prefix}" "${prefix}/*")
  list(SORT files)
  set(${out} "${files}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE "${work_dir}")
set(prefix "${work_dir}/prefix")
set(options -G "${generator}" "-DCMAKE_CXX_COMPILER=${compiler}" -DFETCHCONTENT_FULLY_DISCONNECTED=ON)
if(NOT consumer STREQUAL fetch_content)
  string(REPLACE ";" "\\;" components "${components}")
  list(APPEND options "-DCOMPONENTS=${components}")
endif()

if(consumer STREQUAL find_package)
  run(${CMAKE_COMMAND} --install "${magicpig_binary_dir}" --prefix "${prefix}")
  installed_files(files "${prefix}")
  foreach(file IN LISTS files)
    if(NOT file MATCHES "^include/magicpig/.+\\.(hpp|cuh)$" AND
       NOT file MATCHES "^share/(cmake/magicpig/[A-Za-z-]+\\.cmake|pkgconfig/magicpig\\.pc)$" AND
       NOT file MATCHES "^share/doc/magicpig/LICENSE$")
      message(FATAL_ERROR "installed without need: ${file}")
    endif()
  endforeach()
  list(APPEND options "-DCMAKE_PREFIX_PATH=${prefix}")
else()
  list(APPEND options "-DFETCHCONTENT_SOURCE_DIR_MAGICPIG=${magicpig_source_dir}")
endif()

run(${CMAKE_COMMAND} -S "${source_dir}" -B "${work_dir}/build" ${options})
run(${CMAKE_COMMAND} --build "${work_dir}/build")
run("${work_dir}/build/consumer")

# The consumer installs its program and nothing of ours.
run(${CMAKE_COMMAND} --install "${work_dir}/build" --prefix "${work_dir}/consumer-prefix")
installed_files(files "${work_dir}/consumer-prefix")
if(NOT files STREQUAL "bin/consumer")
  message(FATAL_ERROR "the consumer installed more than its program: ${files}")
endif()

# Without CMake: the flags that pkg-config gives are enough.
find_program(PKG_CONFIG NAMES pkg-config pkgconf)
if(consumer STREQUAL find_package AND PKG_CONFIG)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env "PKG_CONFIG_PATH=${prefix}/share/pkgconfig"
      "${PKG_CONFIG}" "--define-variable=prefix=${prefix}" --cflags --libs magicpig
    OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags)
  run("${compiler}" -std=c++20 "${source_dir}/../consumer.cpp" ${flags}
    -o "${work_dir}/pkg_config_consumer")
  run("${work_dir}/pkg_config_consumer")
endif()

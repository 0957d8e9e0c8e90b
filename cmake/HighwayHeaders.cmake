# SPDX-License-Identifier: Apache-2.0
# Defines magicpig::highway_headers from the package hwy; used by the build and by the installed package.

# Only Highway's include directory: with a static target nothing needs linking, and hwy::hwy may be a
# shared library whose definitions (HWY_SHARED_DEFINE) would reach every user.
if(NOT TARGET magicpig::highway_headers)
  get_target_property(directories hwy::hwy INTERFACE_INCLUDE_DIRECTORIES)
  add_library(magicpig::highway_headers INTERFACE IMPORTED GLOBAL)
  target_include_directories(magicpig::highway_headers SYSTEM INTERFACE ${directories})
  unset(directories)
endif()

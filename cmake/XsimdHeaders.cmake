# SPDX-License-Identifier: Apache-2.0
# Defines magicpig::xsimd_headers from the package xsimd; used by the build and by the installed package.

# Only xsimd's include directory: Debian's target asks to link xtl, which is a package of its own and
# which nothing here uses.
if(NOT TARGET magicpig::xsimd_headers)
  get_target_property(directories xsimd INTERFACE_INCLUDE_DIRECTORIES)
  add_library(magicpig::xsimd_headers INTERFACE IMPORTED GLOBAL)
  target_include_directories(magicpig::xsimd_headers SYSTEM INTERFACE ${directories})
  unset(directories)
endif()

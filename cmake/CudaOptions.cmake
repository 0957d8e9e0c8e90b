# SPDX-License-Identifier: Apache-2.0
# The CUDA compiler for this project's own tests and benchmark of the device: architectures, C++20, warnings.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90)
endif()
enable_language(CUDA)

add_library(magicpig_cuda_options INTERFACE)
target_link_libraries(magicpig_cuda_options INTERFACE magicpig::cuda)
# CMake 3.25 does not know that nvcc 13 has C++20.
target_compile_options(magicpig_cuda_options INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>
  "$<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:SHELL:-Xcompiler=-Wall,-Wextra>")
if(MAGICPIG_WARNINGS_AS_ERRORS)
  target_compile_options(magicpig_cuda_options INTERFACE
    "$<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:SHELL:-Werror all-warnings>")
endif()

# SPDX-License-Identifier: Apache-2.0
# The CUDA compiler for this project's own tests, benchmark and example of the device: architectures, C++20, warnings.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
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

# magicpig_cuda_arch: for devices of compute capability 8.0, 8.9, 9.0 and, as PTX, later ones, unless others are chosen by
# CMAKE_CUDA_ARCHITECTURES. All of them from the PTX of 8.0, as no kernel asks for more: one pass of the front end, not three.
add_library(magicpig_cuda_arch INTERFACE)
if(NOT CMAKE_CUDA_ARCHITECTURES)
  target_compile_options(magicpig_cuda_arch INTERFACE
    "$<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:SHELL:-gencode arch=compute_80,code=[compute_80,sm_80,sm_89,sm_90]>")
endif()

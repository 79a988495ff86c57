# CUDA with the compiler of the venv (PyPI nvidia-cuda-nvcc), or one given as -DCMAKE_CUDA_COMPILER.
# PyPI's layout has lib/ instead of lib64/, so nvcc is told where its runtime lies.
if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${VSP_CUDA_ROOT}/bin/nvcc)
endif()
set(CMAKE_CUDA_FLAGS_INIT "-L${VSP_CUDA_ROOT}/lib")
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real)
endif()
enable_language(CUDA)
# One CUDA runtime per process: torch's.
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
# CMake 3.25 does not know that nvcc 13 speaks C++20.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
add_library(vsp_cuda_options INTERFACE)
target_compile_options(vsp_cuda_options INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo -Xcompiler=-Wall>)
target_link_libraries(vsp_cuda_options INTERFACE ${VSP_CUDA_ROOT}/lib/libcudart.so.13)
target_include_directories(vsp_cuda_options SYSTEM INTERFACE ${VSP_CUDA_ROOT}/include)

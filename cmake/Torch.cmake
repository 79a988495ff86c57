# LibTorch from the venv as imported targets. find_package(Torch) is not used: it demands the CUDA
# toolkit, and fails with CMake 3.25 where nvcc is present. torch's include folder ships old protobuf
# headers, so only targets that link vsp_torch get it, and those never see generated protobuf code.
file(GLOB VSP_TORCH_DIR ${VSP_VENV}/lib/python3*/site-packages/torch)
if(NOT VSP_TORCH_DIR)
  message(FATAL_ERROR "no torch in ${VSP_VENV}: run deploy/local/setup.sh first")
endif()
get_filename_component(VSP_SITE_PACKAGES ${VSP_TORCH_DIR} DIRECTORY)
set(VSP_CUDA_ROOT ${VSP_SITE_PACKAGES}/nvidia/cu13)

add_library(vsp_torch INTERFACE)
target_include_directories(vsp_torch SYSTEM INTERFACE
  ${VSP_TORCH_DIR}/include ${VSP_TORCH_DIR}/include/torch/csrc/api/include ${VSP_CUDA_ROOT}/include)
target_link_libraries(vsp_torch INTERFACE
  -Wl,--no-as-needed ${VSP_TORCH_DIR}/lib/libtorch_cpu.so ${VSP_TORCH_DIR}/lib/libc10.so)
if(VSP_CUDA)
  target_link_libraries(vsp_torch INTERFACE
    ${VSP_TORCH_DIR}/lib/libtorch_cuda.so ${VSP_TORCH_DIR}/lib/libc10_cuda.so)
endif()
target_link_libraries(vsp_torch INTERFACE -Wl,--as-needed)
target_link_options(vsp_torch INTERFACE
  -Wl,-rpath,${VSP_TORCH_DIR}/lib -Wl,-rpath,${VSP_CUDA_ROOT}/lib
  -Wl,-rpath-link,${VSP_TORCH_DIR}/lib -Wl,-rpath-link,${VSP_CUDA_ROOT}/lib -Wl,--allow-shlib-undefined)

#include <cuda_runtime_api.h>

#include "kernels/cuda/kernel_choice.h"

namespace vsprefill::kernels::cuda {

bool DeviceIsSm90() {
  int device, major, minor;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;  // sm_90a code runs nowhere else
}

}  // namespace vsprefill::kernels::cuda

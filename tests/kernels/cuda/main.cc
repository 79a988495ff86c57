// Runs the GPU tests, or exits with 77 (CTest: skipped) and the reason where there is no GPU.
#include <cuda_runtime_api.h>

#include <cstdio>

#include "gtest/gtest.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("SKIPPED: no usable CUDA device (%s)\n",
                error != cudaSuccess ? cudaGetErrorString(error) : "none present");
    return 77;
  }
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major < 8) {
    std::printf("SKIPPED: %s has compute capability %d.%d, 8.0 is needed\n", properties.name,
                properties.major, properties.minor);
    return 77;
  }
  std::printf("GPU: %s, compute capability %d.%d\n", properties.name, properties.major,
              properties.minor);
  return RUN_ALL_TESTS();
}

// What every launcher of this folder shares. Include from .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/tensor_view.h"

namespace vsprefill::kernels::cuda {

inline cudaStream_t AsCuda(Stream stream) { return static_cast<cudaStream_t>(stream); }

inline KernelStatus AsStatus(cudaError_t error) {
  return error == cudaSuccess ? KernelStatus::kOk : KernelStatus::kDeviceError;
}

/// Outcome of the launch just made on this thread. Clears a launch error, not a sticky one.
inline KernelStatus LaunchStatus() { return AsStatus(cudaGetLastError()); }

/// Lets `kernel` use `bytes` of dynamic shared memory (more than 48 KiB needs asking).
template <typename Kernel>
KernelStatus AllowSharedMemory(Kernel kernel, int bytes) {
  return AsStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

inline bool Aligned16(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace vsprefill::kernels::cuda

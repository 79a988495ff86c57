// The vocabulary that kernels share with the rest of the project: element types, devices, streams.
// Kernels see raw pointers, sizes and strides; they know no model, no gRPC and no LibTorch.
#pragma once

#include <cstdint>

namespace vsprefill::kernels {

enum class DType : uint8_t { kF32 = 0, kBF16 = 1 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr const char* Name(DType dtype) { return dtype == DType::kF32 ? "float32" : "bfloat16"; }

enum class DeviceKind : uint8_t { kCpu = 0, kCuda = 1 };

/// A CUDA stream (cudaStream_t) without CUDA headers; null for the CPU, where work is done when
/// the call returns.
using Stream = void*;

/// Outcome of a launcher. Kernels neither allocate nor print; the caller turns this into a Status
/// with the name of the operation and its shapes (server/base/kernel_status.h).
enum class KernelStatus : uint8_t {
  kOk = 0,
  kUnsupportedShape,  // e.g. a head_dim that no kernel was compiled for
  kUnsupportedDType,
  kDeviceError,  // a launch failed; the device may be lost
};

}  // namespace vsprefill::kernels

// Which CUDA device this process can use, and why not where it cannot. No CUDA headers here:
// callers need none.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace vsprefill {

struct CudaDeviceInfo {
  int ordinal = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t memory_bytes = 0;
};

/// UNAVAILABLE where there is no such device, its compute capability is below 8.0, or the driver is
/// older than the CUDA runtime (the message then names both versions). Never initialises a device.
absl::StatusOr<CudaDeviceInfo> ProbeCudaDevice(int ordinal);

/// OK for 0 (cudaSuccess); else RESOURCE_EXHAUSTED for out of memory, INTERNAL for the rest, with
/// `what` and CUDA's own words. `code` is a cudaError_t.
absl::Status CudaStatus(int code, const char* what);

}  // namespace vsprefill

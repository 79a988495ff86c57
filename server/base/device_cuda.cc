#include "server/base/device_cuda.h"

#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"

namespace vsprefill {
namespace {

std::string Version(int version) {
  return absl::StrFormat("%d.%d", version / 1000, version % 1000 / 10);
}

}  // namespace

absl::Status CudaStatus(int code, const char* what) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message = absl::StrCat(what, ": ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: later calls shall not report it again
    return absl::ResourceExhaustedError(message);
  }
  return absl::InternalError(message);
}

absl::StatusOr<CudaDeviceInfo> ProbeCudaDevice(int ordinal) {
  int driver = 0, runtime = 0, count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return absl::UnavailableError("no NVIDIA driver on this machine");
  }
  if (error == cudaErrorInsufficientDriver) {
    (void)cudaRuntimeGetVersion(&runtime);
    return absl::UnavailableError(absl::StrCat("the NVIDIA driver supports CUDA ", Version(driver),
                                               ", this build needs ", Version(runtime)));
  }
  if (error != cudaSuccess || count == 0) {
    return absl::UnavailableError(absl::StrCat(
        "no CUDA device (", error != cudaSuccess ? cudaGetErrorString(error) : "none found", ")"));
  }
  if (ordinal < 0 || ordinal >= count) {
    return absl::UnavailableError(
        absl::StrCat("CUDA device ", ordinal, " does not exist (allowed: 0 to ", count - 1, ")"));
  }
  cudaDeviceProp properties;
  VSP_RETURN_IF_ERROR(
      CudaStatus(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties"));
  CudaDeviceInfo info;
  info.ordinal = ordinal;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  if (info.major < 8) {
    return absl::UnavailableError(absl::StrCat(info.name, " has compute capability ", info.major,
                                               ".", info.minor, ", 8.0 is needed"));
  }
  return info;
}

}  // namespace vsprefill

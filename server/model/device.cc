#include "server/model/device.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/model/torch_backend_cuda.h"

namespace vsprefill::model {

absl::StatusOr<ChosenDevice> ChooseDevice(absl::string_view device) {
  if (device == "cpu") return ChosenDevice{kernels::DeviceKind::kCpu, "cpu, as asked for"};
  if (device != "auto" && device != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("device \"", device, "\" is not one of auto, cpu, cuda"));
  }
  const absl::StatusOr<std::string> gpu = DescribeGpu();
  if (gpu.ok()) {
    return ChosenDevice{kernels::DeviceKind::kCuda,
                        absl::StrCat(*gpu, device == "auto" ? ", found" : ", as asked for")};
  }
  if (device == "cuda") {
    return absl::Status(gpu.status().code(),
                        absl::StrCat("device cuda cannot be used: ", gpu.status().message()));
  }
  return ChosenDevice{kernels::DeviceKind::kCpu,
                      absl::StrCat("cpu, because ", gpu.status().message())};
}

}  // namespace vsprefill::model

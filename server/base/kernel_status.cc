#include "server/base/kernel_status.h"

#include "absl/strings/str_cat.h"

namespace vsprefill {

absl::Status FromKernelStatus(kernels::KernelStatus status, absl::string_view operation) {
  switch (status) {
    case kernels::KernelStatus::kOk:
      return absl::OkStatus();
    case kernels::KernelStatus::kUnsupportedShape:
      return absl::UnimplementedError(absl::StrCat("no kernel for this shape: ", operation));
    case kernels::KernelStatus::kUnsupportedDType:
      return absl::UnimplementedError(absl::StrCat("no kernel for this dtype: ", operation));
    case kernels::KernelStatus::kDeviceError:
      return absl::InternalError(absl::StrCat("device error in ", operation));
  }
  return absl::InternalError(absl::StrCat("unknown kernel status in ", operation));
}

}  // namespace vsprefill

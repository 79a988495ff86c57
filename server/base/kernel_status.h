// Turns a launcher's KernelStatus into an absl::Status that names the operation.
#pragma once

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/tensor_view.h"

namespace vsprefill {

/// OK for kOk; UNIMPLEMENTED for an unsupported shape or dtype; INTERNAL for a device error.
/// `operation` names the kernel and, where the caller has them at hand, its shapes.
absl::Status FromKernelStatus(kernels::KernelStatus status, absl::string_view operation);

}  // namespace vsprefill

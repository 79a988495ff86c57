// --device auto|cpu|cuda: which device is taken, and why.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/tensor_view.h"

namespace vsprefill::model {

struct ChosenDevice {
  kernels::DeviceKind kind = kernels::DeviceKind::kCpu;
  std::string reason;  // one line for people: what was taken and why
};

/// "auto" takes a GPU where a usable one is there, else the CPU. INVALID_ARGUMENT for another word;
/// UNAVAILABLE for "cuda" without a usable GPU (the message says why).
absl::StatusOr<ChosenDevice> ChooseDevice(absl::string_view device);

}  // namespace vsprefill::model

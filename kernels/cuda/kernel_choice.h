// Which of two implementations runs: Hopper's own instructions, or what every device runs.
#pragma once

#include <cstdint>

namespace vsprefill::kernels::cuda {

/// For tests and benchmarks; everything else uses the fastest one.
enum class KernelChoice : uint8_t { kFastest, kGeneric };

/// Whether the current device runs the kernels in sm90/ (compute capability 9.0).
bool DeviceIsSm90();

}  // namespace vsprefill::kernels::cuda

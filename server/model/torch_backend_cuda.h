// The CUDA side of TorchBackend; its source file is chosen by CMake (with or without CUDA).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/model/torch_backend.h"

namespace vsprefill::model {

/// One line about the GPU that would be used. UNAVAILABLE where there is none; one line says why.
absl::StatusOr<std::string> DescribeGpu();

/// UNAVAILABLE as DescribeGpu.
absl::StatusOr<std::unique_ptr<TorchBackend>> CreateCudaBackend();

}  // namespace vsprefill::model

// The CUDA side of TorchBackend; its source file is chosen by CMake (with or without CUDA).
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "server/model/torch_backend.h"

namespace vsprefill::model {

/// UNAVAILABLE where there is no usable GPU; one line says why.
absl::StatusOr<std::unique_ptr<TorchBackend>> CreateCudaBackend();

}  // namespace vsprefill::model

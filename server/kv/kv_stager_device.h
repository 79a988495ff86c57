// The stager for a device. kv_stager_cuda.cc or kv_stager_no_cuda.cc defines the part for GPUs.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/tensor_view.h"
#include "server/kv/kv_stager.h"

namespace vsprefill::kv {

/// Copies chunks on a stream of its own into `staging_bytes` of pinned memory, in slots of
/// kMaxMessageBytes. RESOURCE_EXHAUSTED where that cannot be had; UNIMPLEMENTED in a build without
/// CUDA.
absl::StatusOr<std::unique_ptr<KvStager>> CreateCudaKvStager(int64_t staging_bytes);

inline absl::StatusOr<std::unique_ptr<KvStager>> CreateKvStager(kernels::DeviceKind device,
                                                                int64_t staging_bytes) {
  if (device == kernels::DeviceKind::kCuda) return CreateCudaKvStager(staging_bytes);
  return CreateHostKvStager(staging_bytes);
}

}  // namespace vsprefill::kv

// Host to device: the one step of a decoder that needs CUDA. CMake lists upload_cuda.cc or
// upload_no_cuda.cc.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/tensor_view.h"
#include "server/kv/kv_cache.h"

namespace vsprefill::decode {

/// Copies K and V of tokens [0, num_tokens) from a cache in host memory to one in device memory of
/// the same layout and capacity. Enqueues on `stream`; `host` must stay until it is synchronised.
/// UNIMPLEMENTED in a build without CUDA.
absl::Status Upload(const kv::KvCache& host, int64_t num_tokens, const kv::KvCache& device,
                    kernels::Stream stream);

}  // namespace vsprefill::decode

// LibTorch operations on plain pointers, the same for CPU and CUDA: CUDA's run on the calling
// thread's current device and stream. No exception leaves them.
#pragma once

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/tensor_view.h"

namespace vsprefill::model {

absl::Status TorchEmbed(absl::Span<const int32_t> ids, const void* table, int64_t vocab,
                        int64_t width, kernels::DType dtype, void* out, kernels::DeviceKind device);
absl::Status TorchScore(const void* logits, int64_t vocab, kernels::DType dtype,
                        absl::Span<const int32_t> targets, float* log_probs, uint8_t* top1,
                        kernels::DeviceKind device);
absl::Status TorchToHostFloat(const void* data, int64_t elements, kernels::DType dtype, float* out,
                              kernels::DeviceKind device);

}  // namespace vsprefill::model

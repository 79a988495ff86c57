// Dense causal attention of LibTorch's CUDA libraries (cuDNN, FlashAttention 2), for bfloat16.
#pragma once

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/attention.h"

namespace vsprefill::model {

/// Same contract as kernels::AttentionFn without an index: every query sees the keys up to its own
/// position. REQUIRES: bfloat16, head_dim a multiple of 8 up to 256, device memory. Enqueues on the
/// current stream of the calling thread. UNIMPLEMENTED where no library takes the shape.
absl::Status LibraryAttention(const kernels::AttentionShape& shape,
                              absl::Span<const kernels::AttentionSequence> sequences);

}  // namespace vsprefill::model

// Launchers behind AttentionCuda, which picks by dtype, shape and device.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/attention_params.cuh"
#include "kernels/cuda/kernel_choice.h"

namespace vsprefill::kernels::cuda {

/// Tensor cores, head_dim 16, 32, 64, 80, 96 or 128. All pointers 16-byte aligned, all strides
/// multiples of 8 elements.
KernelStatus LaunchAttentionBf16(const AttentionBatch& batch, int num_items, int head_dim,
                                 cudaStream_t stream);
/// The same on Hopper's own instructions (where DeviceIsSm90): head_dim 64 or 128, else, or where
/// the copy engine cannot address K and V, kUnsupportedShape.
KernelStatus LaunchAttentionSm90(const AttentionBatch& batch, int num_items, int head_dim,
                                 cudaStream_t stream);
/// AttentionCuda with the choice of its bf16 kernel, for tests and benchmarks.
KernelStatus AttentionWith(KernelChoice kernel, const AttentionShape& shape,
                           const AttentionSequence* sequences, int num_sequences, Stream stream);
/// SIMT, plain float32 arithmetic, head_dim 16, 32, 64, 80, 96 or 128, strides multiples of 4.
KernelStatus LaunchAttentionF32(const AttentionBatch& batch, int num_items, int head_dim,
                                cudaStream_t stream);

}  // namespace vsprefill::kernels::cuda

// Launchers behind AttentionSumsCuda, which picks by dtype, shape and device.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/kernel_choice.h"
#include "kernels/distill.h"

namespace vsprefill::kernels::cuda {

/// bf16 on Hopper's own instructions (compute capability 9.0, see DeviceIsSm90): head_dim 64 or
/// 128, else, or where the copy engine cannot address Q and K, kUnsupportedShape and nothing done.
/// Pointers and strides as in kernels/distill.h, at least one token.
KernelStatus LaunchAttentionSumsSm90(const AttentionSumsArgs& args, cudaStream_t stream);

/// AttentionSumsCuda with the choice of its bf16 kernels, for tests and benchmarks.
KernelStatus AttentionSumsWith(KernelChoice kernel, const AttentionSumsArgs& args, Stream stream);

}  // namespace vsprefill::kernels::cuda

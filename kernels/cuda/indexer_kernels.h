// Launchers behind IndexerCuda, which picks by dtype, shape and device.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/kernel_choice.h"
#include "kernels/indexer.h"

namespace vsprefill::kernels::cuda {

struct IndexerParams {
  IndexerLayer layer;
  IndexerInput input;
};

/// The Hopper kernel: bf16 features and weights, head_dim 64 or 128; else, or where the copy engine
/// cannot address a tensor, kUnsupportedShape. At least one token.
KernelStatus LaunchIndexerSm90(const IndexerParams& params, cudaStream_t stream);

/// IndexerCuda with the choice of its kernel, for tests and benchmarks.
KernelStatus IndexerWith(KernelChoice choice, const IndexerLayer& layer, const IndexerInput& input,
                         Stream stream);

}  // namespace vsprefill::kernels::cuda

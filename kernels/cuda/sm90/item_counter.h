// Counters from which persistent blocks draw their work items.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vsprefill::kernels::cuda::sm90 {

/// A device counter that reads 0 now and that no launch on another stream uses; the launch must
/// leave it at 0. Null where there is none: `stream` is being captured (the graph may run beside
/// other launches of this stream), or many streams hold one already. Thread safe.
uint32_t* ItemCounter(cudaStream_t stream);

}  // namespace vsprefill::kernels::cuda::sm90

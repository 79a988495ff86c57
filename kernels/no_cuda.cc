// A build without CUDA.
#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

const KernelSet* CudaKernelsOrNull() { return nullptr; }

}  // namespace vsprefill::kernels

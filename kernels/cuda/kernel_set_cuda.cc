#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

const KernelSet* CudaKernelsOrNull() {
  // The other selections have no CUDA version yet.
  static const KernelSet set{AttentionCuda,  CountPairsCuda,    SelectCuda,     IndexerCuda,
                             RmsNormCuda,    QkvRopeAppendCuda, SiluMulCuda,    AttentionSumsCuda,
                             PoolBlocksCuda, SelectWindowCuda,  SelectFlashCuda};
  return &set;
}

}  // namespace vsprefill::kernels

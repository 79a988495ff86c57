#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

const KernelSet* CudaKernelsOrNull() {
  static const KernelSet set{AttentionCuda, CountPairsCuda,    SelectCuda,  IndexerCuda,
                             RmsNormCuda,   QkvRopeAppendCuda, SiluMulCuda, AttentionSumsCuda};
  return &set;
}

}  // namespace vsprefill::kernels

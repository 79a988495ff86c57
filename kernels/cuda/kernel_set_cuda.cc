#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

const KernelSet* CudaKernelsOrNull() {
  static const KernelSet set{
      AttentionCuda,  CountPairsCuda,       SelectCuda,       IndexerCuda,
      RmsNormCuda,    QkvRopeAppendCuda,    SiluMulCuda,      AttentionSumsCuda,
      PoolBlocksCuda, SelectWindowCuda,     SelectFlashCuda,  SelectMInferenceCuda,
      SelectFlexCuda, SelectXAttentionCuda, SelectAnchorCuda, SelectSeerCuda};
  return &set;
}

}  // namespace vsprefill::kernels

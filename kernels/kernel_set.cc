#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

const KernelSet& RefKernels() {
  // Pair counts are exact integers: one implementation serves both tables.
  static const KernelSet set{AttentionRef,    CountPairsCpu,       SelectRef,
                             IndexerRef,      RmsNormRef,          QkvRopeAppendRef,
                             SiluMulRef,      AttentionSumsRef,    PoolBlocksRef,
                             SelectWindowRef, SelectFlashRef,      SelectMInferenceRef,
                             SelectFlexRef,   SelectXAttentionRef, SelectAnchorRef};
  return set;
}

const KernelSet& CpuKernels() {
  static const KernelSet set{AttentionCpu,    CountPairsCpu,       SelectCpu,
                             IndexerCpu,      RmsNormCpu,          QkvRopeAppendCpu,
                             SiluMulCpu,      AttentionSumsCpu,    PoolBlocksCpu,
                             SelectWindowCpu, SelectFlashCpu,      SelectMInferenceCpu,
                             SelectFlexCpu,   SelectXAttentionCpu, SelectAnchorCpu};
  return set;
}

}  // namespace vsprefill::kernels

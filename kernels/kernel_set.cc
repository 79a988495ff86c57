#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

const KernelSet& RefKernels() {
  // Pair counts are exact integers: one implementation serves both tables.
  static const KernelSet set{
      AttentionRef,  CountPairsCpu,       SelectRef,       IndexerRef,
      RmsNormRef,    QkvRopeAppendRef,    SiluMulRef,      AttentionSumsRef,
      PoolBlocksRef, SelectWindowRef,     SelectFlashRef,  SelectMInferenceRef,
      SelectFlexRef, SelectXAttentionRef, SelectAnchorRef, SelectSeerRef};
  return set;
}

const KernelSet& CpuKernels() {
  static const KernelSet set{
      AttentionCpu,  CountPairsCpu,       SelectCpu,       IndexerCpu,
      RmsNormCpu,    QkvRopeAppendCpu,    SiluMulCpu,      AttentionSumsCpu,
      PoolBlocksCpu, SelectWindowCpu,     SelectFlashCpu,  SelectMInferenceCpu,
      SelectFlexCpu, SelectXAttentionCpu, SelectAnchorCpu, SelectSeerCpu};
  return set;
}

}  // namespace vsprefill::kernels

#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

const KernelSet& RefKernels() {
  // Pair counts are exact integers: one implementation serves both tables.
  static const KernelSet set{AttentionRef, CountPairsCpu,    SelectRef,  IndexerRef,
                             RmsNormRef,   QkvRopeAppendRef, SiluMulRef, AttentionSumsRef};
  return set;
}

const KernelSet& CpuKernels() {
  static const KernelSet set{AttentionCpu, CountPairsCpu,    SelectCpu,  IndexerCpu,
                             RmsNormCpu,   QkvRopeAppendCpu, SiluMulCpu, AttentionSumsCpu};
  return set;
}

}  // namespace vsprefill::kernels

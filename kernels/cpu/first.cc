// First versions: the references, until the vectorised kernels replace them one by one.
#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

KernelStatus RmsNormCpu(const RmsNormArgs& args, Stream stream) { return RmsNormRef(args, stream); }
KernelStatus QkvRopeAppendCpu(const QkvRopeAppendArgs& args, Stream stream) {
  return QkvRopeAppendRef(args, stream);
}
KernelStatus SiluMulCpu(const SiluMulArgs& args, Stream stream) { return SiluMulRef(args, stream); }
KernelStatus IndexerCpu(const IndexerLayer& layer, const IndexerInput& input, Stream stream) {
  return IndexerRef(layer, input, stream);
}
KernelStatus AttentionSumsCpu(const AttentionSumsArgs& args, Stream stream) {
  return AttentionSumsRef(args, stream);
}

}  // namespace vsprefill::kernels

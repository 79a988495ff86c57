// First version of the sums: the reference, until the vectorised kernel replaces it.
#include "kernels/kernel_set.h"

namespace vsprefill::kernels {

KernelStatus AttentionSumsCpu(const AttentionSumsArgs& args, Stream stream) {
  return AttentionSumsRef(args, stream);
}

}  // namespace vsprefill::kernels

// The CPU kernels for one instruction set; compiled with its flags (kernels/CMakeLists.txt).
#include "kernels/cpu/vec_avx2_inl.h"
// The vector type comes first: the rest is written in terms of it.
#include "kernels/cpu/attention_inl.h"
#include "kernels/cpu/attention_sums_inl.h"
#include "kernels/cpu/dot_products_inl.h"
#include "kernels/cpu/indexer_inl.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/layer_ops_inl.h"
#include "kernels/cpu/unrotate_inl.h"

namespace vsprefill::kernels::cpu {

const IsaKernels& Avx2Kernels() {
  static constexpr IsaKernels kKernels{AttentionBegin,  AttentionColumns, AttentionMerge,
                                       AttentionFinish, AttentionSums,    IndexerTokens,
                                       RmsNorm,         QkvRopeAppend,    SiluMul,
                                       DotProducts,     UnrotatePool};
  return kKernels;
}

}  // namespace vsprefill::kernels::cpu

// What the kernels behind IndexerCuda share.
#pragma once

#include "kernels/cuda/indexer_kernels.h"

namespace vsprefill::kernels::cuda {

inline constexpr float kFeatureEps = 1e-6f;

/// Writes both logits of token t; one thread. The sums are w2's rows times the hidden layer.
__device__ __forceinline__ void StoreLogits(const IndexerParams& p, int group, int64_t t,
                                            float vertical, float slash) {
  const IndexerLayer& layer = p.layer;
  const int64_t at = group * p.input.logit_stride + t;
  p.input.vertical_logits[at] = vertical + layer.b2[group * 2];
  p.input.slash_logits[at] =
      slash + layer.b2[group * 2 + 1] + layer.slash_prior[group * kSlashBuckets + SlashBucket(t)];
}

}  // namespace vsprefill::kernels::cuda

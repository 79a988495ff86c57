// The target of SeerAttention's gate: the true attention, the largest value of each block of 64 x
// 64, every row of blocks normalised. In slabs of rows, so that no n x n matrix is stored.
#pragma once

#include <torch/types.h>

#include <cstdint>

namespace vsprefill::training {

/// Causal softmax of queries [tokens, num_q_heads, head_dim] with keys [groups, tokens, head_dim],
/// both after RoPE: float32 [num_q_heads, blocks, blocks], rows sum to 1, 0 right of the diagonal.
/// At most about `slab_bytes` of scores live at once.
/// Ref: SeerAttention (arXiv 2410.13276): a row's largest logit per block before the softmax gives
/// its largest probability, so the exponentials are per block.
torch::Tensor BlockMaxAttention(const torch::Tensor& queries, const torch::Tensor& keys,
                                double scale, int64_t slab_bytes);

}  // namespace vsprefill::training

#include "training/block_attention.h"

#include <algorithm>
#include <limits>

#include "kernels/select_seer.h"

namespace vsprefill::training {

torch::Tensor BlockMaxAttention(const torch::Tensor& queries, const torch::Tensor& keys,
                                double scale, int64_t slab_bytes) {
  constexpr int64_t kBlock = kernels::kSeerBlock;
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  torch::NoGradGuard no_grad;
  const int64_t tokens = keys.size(1), groups = keys.size(0), heads = queries.size(1);
  const int64_t blocks = kernels::SeerBlocks(tokens);
  const torch::Tensor wide_keys = keys.to(torch::kFloat32);
  const torch::TensorOptions options = wide_keys.options();
  torch::Tensor target = torch::zeros({heads, blocks, blocks}, options);
  // Two such tensors live at once: the scores and what a reduction makes of them.
  const int64_t slab_blocks =
      std::clamp<int64_t>(slab_bytes / (heads * tokens * kBlock * 8), 1, blocks);
  for (int64_t first = 0; first < blocks; first += slab_blocks) {
    const int64_t end_block = std::min(first + slab_blocks, blocks);
    const int64_t begin = first * kBlock, end = std::min(end_block * kBlock, tokens);
    const int64_t rows = end - begin;
    const torch::Tensor slab_queries = queries.narrow(0, begin, rows).to(torch::kFloat32) * scale;
    torch::Tensor scores =
        torch::matmul(slab_queries.transpose(0, 1).reshape({groups, -1, queries.size(2)}),
                      wide_keys.narrow(1, 0, end).transpose(1, 2))
            .view({heads, rows, end});
    scores.narrow(2, begin, rows)
        .masked_fill_(torch::ones({rows, rows}, options.dtype(torch::kBool)).triu(1), kHidden);
    const torch::Tensor log_sum = torch::logsumexp(scores, -1, /*keepdim=*/true);
    if (end % kBlock != 0) {
      scores = torch::constant_pad_nd(scores, {0, end_block * kBlock - end}, kHidden);
    }
    torch::Tensor largest = scores.unflatten(-1, {end_block, kBlock}).amax(-1) - log_sum;
    if (rows % kBlock != 0) {
      largest = torch::constant_pad_nd(largest, {0, 0, 0, kBlock - rows % kBlock}, kHidden);
    }
    largest = largest.unflatten(1, {end_block - first, kBlock}).amax(2).exp();
    target.narrow(1, first, end_block - first)
        .narrow(2, 0, end_block)
        .copy_(largest / largest.sum(-1, /*keepdim=*/true));
  }
  return target;
}

}  // namespace vsprefill::training

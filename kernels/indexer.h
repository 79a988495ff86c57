// VSIndexer inference: two logits per token and KV group from the RoPE'd key and the value.
//
// hidden = silu(w1 [k * k_scale ; v * v_scale] + b1); (vertical, slash) = w2 hidden + b2, and the
// slash logit of token t adds slash_prior[bucket(t)], because token t scores offset o = t
// (mapping B). k and v are RMS-normalised over head_dim first (eps 1e-6).
// Ref: VSPrefill (arXiv 2603.04460) names input, two linear layers and the two outputs; activation,
// scaling and prior are ours (docs/vsprefill.md).
#pragma once

#include <cstdint>

#include "kernels/tensor_view.h"

namespace vsprefill::kernels {

inline constexpr int kSlashBuckets = 128;

/// Log-spaced bucket of an offset: 0..31 one each, then 8 per octave up to 128 buckets (covers
/// offsets up to 2^17 and beyond; larger ones share the last).
constexpr int SlashBucket(int64_t offset) {
  if (offset < 32) return static_cast<int>(offset);
  int octave = 0;  // offset / 2^octave in [32, 64)
  for (int step = 32; step > 0; step /= 2) {
    if (octave + step <= 58 && offset >> (5 + octave + step) != 0) octave += step;
  }
  const int64_t x = offset >> octave;
  // 8 sub-buckets of 4.
  const int bucket = 32 + octave * 8 + static_cast<int>((x - 32) / 4);
  return bucket < kSlashBuckets ? bucket : kSlashBuckets - 1;
}

/// Weights of one layer; all groups. `weight_dtype` of w1 only; the rest float32.
struct IndexerLayer {
  int num_groups = 0, head_dim = 0, hidden = 0;
  DType weight_dtype = DType::kBF16;
  const void* w1 = nullptr;   // [num_groups, hidden, 2 * head_dim]; columns: key half, value half
                              // (feature scales folded in)
  const float* b1 = nullptr;  // [num_groups, hidden]
  const float* w2 = nullptr;  // [num_groups, 2, hidden]; row 0 vertical, row 1 slash
  const float* b2 = nullptr;  // [num_groups, 2]
  const float* slash_prior = nullptr;  // [num_groups, kSlashBuckets]
};

struct IndexerInput {
  const void* k = nullptr;  // [num_groups, tokens, head_dim], strides in elements
  const void* v = nullptr;
  int64_t head_stride = 0, token_stride = 0;
  DType dtype = DType::kBF16;
  int64_t token_begin = 0, token_end = 0;  // tokens to score; k and v point at token 0
  float* vertical_logits =
      nullptr;  // float32 [num_groups, logit_stride]; [.., token_begin:token_end] written
  float* slash_logits = nullptr;
  int64_t logit_stride = 0;
};

using IndexerFn = KernelStatus (*)(const IndexerLayer& layer, const IndexerInput& input,
                                   Stream stream);
KernelStatus IndexerRef(const IndexerLayer& layer, const IndexerInput& input, Stream stream);
KernelStatus IndexerCpu(const IndexerLayer& layer, const IndexerInput& input, Stream stream);
KernelStatus IndexerCuda(const IndexerLayer& layer, const IndexerInput& input, Stream stream);

}  // namespace vsprefill::kernels

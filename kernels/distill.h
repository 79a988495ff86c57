// Distillation targets: column and diagonal sums of the true attention, without an n x n matrix.
//
// For KV group h with g query heads and n tokens:
//   columns[j]   = 1 / (n g) * sum over heads, rows i >= j of P[i, j]
//   diagonals[o] = 1 / (n g) * sum over heads, rows i >= o of P[i, i - o]
// P is the causal softmax; both sum to 1. Ref: VSPrefill (arXiv 2603.04460), online aggregation.
//
// CUDA: enqueued on `stream` (bf16: head_dim 16, 32, 64, 80, 96 or 128 on tensor cores, 64 and 128
// on compute capability 9.0 by kernels of their own; float32 any, slow); pointers 16-byte aligned,
// strides multiples of 16 bytes. Every run gives the same bits.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/tensor_view.h"

namespace vsprefill::kernels {

struct AttentionSumsArgs {
  AttentionShape shape;
  AttentionSequence sequence;  // q_tokens == kv_tokens; out and index unused
  /// Scratch, float32, AttentionSumsScratch() elements, 16-byte aligned. Its first [num_q_heads,
  /// kv_tokens], all that the reference and the CPU touch, are the rows' log-sum-exp (natural)
  /// afterwards.
  float* lse = nullptr;
  float* columns = nullptr;    // float32 [num_kv_heads, kv_tokens]
  float* diagonals = nullptr;  // float32 [num_kv_heads, kv_tokens]
};

/// Where the scratch's part behind the log-sum-exp begins: sums in fixed point, 8 bytes each.
constexpr int64_t AttentionSumsFixedOffset(const AttentionShape& shape, int64_t tokens) {
  return (shape.num_q_heads * tokens + 3) / 4 * 4;
}
/// Elements of AttentionSumsArgs::lse.
constexpr int64_t AttentionSumsScratch(const AttentionShape& shape, int64_t tokens) {
  return AttentionSumsFixedOffset(shape, tokens) + 4 * shape.num_kv_heads * tokens;
}

KernelStatus AttentionSumsRef(const AttentionSumsArgs& args, Stream stream);
KernelStatus AttentionSumsCpu(const AttentionSumsArgs& args, Stream stream);
KernelStatus AttentionSumsCuda(const AttentionSumsArgs& args, Stream stream);

}  // namespace vsprefill::kernels

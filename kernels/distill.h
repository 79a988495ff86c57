// Distillation targets: column and diagonal sums of the true attention, without an n x n matrix.
//
// For KV group h with g query heads and n tokens:
//   columns[j]   = 1 / (n g) * sum over heads, rows i >= j of P[i, j]
//   diagonals[o] = 1 / (n g) * sum over heads, rows i >= o of P[i, i - o]
// P is the causal softmax; both sum to 1. Ref: VSPrefill (arXiv 2603.04460), online aggregation.
//
// CUDA: enqueued on `stream` (bf16: head_dim 16, 32, 64, 80, 96 or 128 on tensor cores, float32
// any, slow); pointers 16-byte aligned, strides multiples of 16 bytes. Every run gives the same
// bits.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/tensor_view.h"

namespace vsprefill::kernels {

struct AttentionSumsArgs {
  AttentionShape shape;
  AttentionSequence sequence;  // q_tokens == kv_tokens; out and index unused
  float* lse = nullptr;        // scratch, float32 [num_q_heads, kv_tokens] (natural log)
  float* columns = nullptr;    // float32 [num_kv_heads, kv_tokens]
  float* diagonals = nullptr;  // float32 [num_kv_heads, kv_tokens]
};

KernelStatus AttentionSumsRef(const AttentionSumsArgs& args, Stream stream);
KernelStatus AttentionSumsCpu(const AttentionSumsArgs& args, Stream stream);
KernelStatus AttentionSumsCuda(const AttentionSumsArgs& args, Stream stream);

}  // namespace vsprefill::kernels

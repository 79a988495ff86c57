// What the Hopper attention kernel gets as its launch parameter, and what it hands to the kernel
// that joins the parts of dense row tiles.
#pragma once

#include <cuda.h>

#include "kernels/cuda/attention_params.cuh"
#include "kernels/sparse_index.h"

namespace vsprefill::kernels::cuda::sm90 {

struct AttentionBatchSm90 {
  /// K and V of each sequence as (element, token, KV head), boxes of 64 x 64 x 1.
  CUtensorMap k_maps[kSequencesPerLaunch];
  CUtensorMap v_maps[kSequencesPerLaunch];
  /// Q and output of each sequence as (element, head, token), boxes of one row tile: 64 x
  /// group_size x row_tile, that is, packed rows.
  CUtensorMap q_maps[kSequencesPerLaunch];
  CUtensorMap out_maps[kSequencesPerLaunch];
  AttentionBatch base;
  uint32_t* counter;  // draws of this launch so far (0), or null: static schedule
  int32_t num_items;
  uint32_t group_reciprocal;  // ceil(2^16 / group_size)
};

/// What one part of a dense row tile leaves for each packed row: the unnormalised sum of values
/// o [kPackedRows, head_dim], the maximum of the scores times scale * log2(e) that o is relative to
/// (-inf: no column seen), and the sum of the probabilities.
struct Partial {
  float *o, *max, *sum;
};
/// Of part `part` of a sequence's `unit`-th dense row tile, as FindWorkItem counts them.
__device__ __forceinline__ Partial FindPartial(const SequenceParams& s, int unit, int part,
                                               int head_dim) {
  float* const o = s.partials + int64_t{unit * s.dense_parts + part} * kPackedRows * (head_dim + 2);
  float* const max = o + kPackedRows * head_dim;
  return {o, max, max + kPackedRows};
}

/// Joins the parts of all divided row tiles of the batch into their rows of the output, in order of
/// the parts; enqueues on `stream`, nothing where none is divided.
KernelStatus JoinParts(const AttentionBatch& batch, int head_dim, cudaStream_t stream);

}  // namespace vsprefill::kernels::cuda::sm90

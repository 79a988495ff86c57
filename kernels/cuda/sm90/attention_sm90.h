// What the Hopper attention kernel gets as its launch parameter.
#pragma once

#include <cuda.h>

#include "kernels/cuda/attention_params.cuh"

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

}  // namespace vsprefill::kernels::cuda::sm90

// Memory of an AttentionTile, and which shapes the CPU kernels take.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/scratch.h"

namespace vsprefill::kernels::cpu {

inline bool SupportedShape(const AttentionShape& shape) {
  return shape.num_kv_heads > 0 && shape.num_q_heads % shape.num_kv_heads == 0 &&
         shape.group_size() <= kPackedRows && shape.head_dim > 0 && shape.head_dim % 16 == 0 &&
         shape.head_dim <= kMaxHeadDim && shape.scale > 0;
}

inline void CarveSums(Carver& carver, int head_dim, int lanes, AttentionTile* tile) {
  tile->sum_out = carver.Take<float>(int64_t{head_dim} * lanes);
  tile->max = carver.Take<float>(lanes);
  tile->sum = carver.Take<float>(lanes);
}

/// All buffers of a tile whose head_dim and lanes are set. A word is at most one element.
inline void CarveTile(Carver& carver, AttentionTile* tile) {
  tile->query = carver.Take<float>((tile->head_dim + 15) / 16 * 16 * int64_t{tile->lanes});
  tile->positions = carver.Take<int32_t>(tile->lanes);
  tile->key_tile = carver.Take<float>(int64_t{kColumnTile} * tile->head_dim);
  tile->value_tile = carver.Take<float>(int64_t{kColumnTile} * tile->head_dim);
  tile->scores = carver.Take<float>(kColumnTile * kMaxBlockLanes);
  tile->probabilities = carver.Take<float>(kColumnTile * kMaxBlockLanes);
  CarveSums(carver, tile->head_dim, tile->lanes, tile);
}

}  // namespace vsprefill::kernels::cpu

// What the warps of the Hopper attention kernel share (attention_sm90.cu says how it works): a
// column tile's plan, the shared memory, and where packed rows lie.
#pragma once

#include <cstdint>

#include "kernels/cuda/sm90/attention_sm90.h"
#include "kernels/cuda/sm90/ring.cuh"
#include "kernels/sparse_index.h"
#include "kernels/tile_index.h"

namespace vsprefill::kernels::cuda::sm90::attention {

inline constexpr int kColumns = 128;      // of a column tile
inline constexpr int kHalf = kBandBlock;  // columns of half a tile
inline constexpr int kWarpgroup = 128;
inline constexpr int kThreads = 3 * kWarpgroup;
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;
inline constexpr int kPlans = 8;
inline constexpr float kLog2E = 1.4426950408889634f;
// Named barriers: 1 and 2: it is consumer 0's (1's) turn to issue products; 3 and 4: both have
// written their output of an even (odd) item.
inline constexpr int kTurnBarrier = 1;
inline constexpr int kOutputBarrier = 3;
static_assert(kColumns == 2 * kHalf && kColumns == kKeyBlock);

// Plan::flags. Masked: some (row, column) pair of the half may be invisible, see `columns`.
inline constexpr int kMasked0 = 1;
inline constexpr int kMasked1 = 32;
inline constexpr int kMasked = kMasked0 | kMasked1;
inline constexpr int kFirst = 2;     // of its item
inline constexpr int kLast = 4;      // of its item
inline constexpr int kGather0 = 8;   // half 0 is gathered, else a band or nothing
inline constexpr int kGather1 = 16;  // the same for half 1

/// What a tile is made of.
struct alignas(16) Plan {
  WorkItem work;  // sequence -1: no more work
  int32_t flags;
  int32_t first_column[2];  // of halves that are not gathered; may be negative, -64: nothing
};

template <int kHeadDim>
struct Config {
  static constexpr int kStages = kHeadDim == 128 ? 2 : 3;
  static constexpr int kSlices = kHeadDim / 64;  // of 64 elements = 128 bytes
  static constexpr int kSliceBytes = kColumns * 128;
  static constexpr int kTileBytes = kSlices * kSliceBytes;
  // The planner must be able to run ahead of the loader, which retires a plan kStages tiles late.
  static_assert(kPlans > kStages + 2);
};

template <int kHeadDim>
struct alignas(1024) Shared {
  using C = Config<kHeadDim>;
  uint8_t q[2][C::kTileBytes];
  uint8_t k[C::kStages][C::kTileBytes];
  uint8_t v[C::kStages][C::kTileBytes];
  uint64_t k_full[C::kStages], k_empty[C::kStages];
  uint64_t v_full[C::kStages], v_empty[C::kStages];
  uint64_t q_full[2], q_empty[2];
  uint64_t plan_full[kPlans], plan_empty[kPlans];
  WorkItem q_work[2];  // whose queries, then whose output
  Plan plans[kPlans];
  alignas(16) int32_t columns[kPlans][kColumns];
};

template <int kHeadDim>
using Stage = Slot<Config<kHeadDim>::kStages>;

/// Packed row -> position in the row tile: row / group_size without a division, for rows below 128.
__device__ __forceinline__ int DivideRow(int row, uint32_t reciprocal) {
  return static_cast<int>(row * reciprocal >> 16);
}

/// Position of a packed row, or -1 for an idle one (padding, or outside the queries).
__device__ __forceinline__ int RowPosition(const AttentionBatchSm90& batch,
                                           const SequenceParams& sequence, int tile, int row) {
  const int position = tile * batch.base.row_tile + DivideRow(row, batch.group_reciprocal);
  const bool used = row < batch.base.row_tile * batch.base.group_size &&
                    position >= sequence.q_start && position < sequence.kv_tokens;
  return used ? position : -1;
}

/// First position of an item's row tile, counted from the sequence's first query; may be negative.
__device__ __forceinline__ int FirstQuery(const AttentionBatchSm90& batch, const WorkItem& work) {
  return work.tile * batch.base.row_tile - batch.base.sequences[work.sequence].q_start;
}

/// Whether an indexed sequence's row tile is one of its dense last ones.
__device__ __forceinline__ bool IsDense(const SequenceParams& s, int tile) {
  return tile >= s.first_tile + s.num_tiles - s.dense_tiles;
}

}  // namespace vsprefill::kernels::cuda::sm90::attention

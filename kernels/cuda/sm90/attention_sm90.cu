// Causal attention, dense, vertical-slash or block-sparse, bf16 on Hopper (sm_90a): wgmma fed by
// TMA and cp.async.
//
//   S[r, n] = scale * q[r] . k[column(n)]     [128 packed rows] x [128 columns of this tile]
//   O[r]    = sum over tiles of exp(S - rowmax) v[column(n)], online softmax, float32
//
// One persistent block per multiprocessor: a producer warpgroup and two consumer warpgroups. A work
// item is an (index group, row tile) as in attention_params.cuh; consumer w owns packed rows 64 w
// to 64 w + 63 (packed row r: position first + r / g, head r % g).
//
// Column tiles. A tile has two halves of 64 columns; half h of an item's tile t is number 2 t + h
// of its walk: first the selected distance blocks, nearest first (contiguous columns: TMA, rows
// outside the sequence arrive as zeros), then the verticals that no band covers, compacted on the
// fly, 64 at a time (gathered: cp.async). A tile may hold one half of each kind. Block-sparse: the
// selected key blocks of 128, then likewise the single columns outside of them. What is missing in
// the last tile is masked, and zeros, so that nothing stale meets a zero probability.
//
// Shared memory, tiles as [head_dim / 64][128 rows][64 elements] with 128-byte swizzle (16-byte
// chunk c of row r lies at c ^ (r % 8)), the layout of TMA and wgmma:
//   q            packed rows of two items; an item's output takes the place of its queries
//   k, v         kStages tiles each, with a full and an empty barrier each
//   plans        ring of kPlans tiles: what each is made of
//   columns      ring of column numbers, 128 for each plan. Written for gathered halves and for
//                masked tiles, read by the gather and by the mask.
//
// Producer warps: 0 loads queries and bands (TMA); 1 plans: draws work items and walks their index,
// some tiles ahead; 2 and 3 gather, each half of the rows. Consumers overlap the softmax of one
// tile with the products S = Q K of the next, of the next item's first one too, and O += P V of the
// one before.
//
// Dense last rows: where the caller gives a workspace, a dense row tile is several items, each over
// a part of its columns, that leave unnormalised sums there; join_parts.cu makes the output of
// them.
//
// Scheduling: items are drawn from a counter (item_counter.h), heaviest first; while a stream is
// captured each block takes every gridDim-th item. An item's result does not depend on who
// computes it.
#include <algorithm>
#include <climits>
#include <utility>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sm90/attention_sm90.h"
#include "kernels/cuda/sm90/item_counter.h"
#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/sm90/ring.cuh"
#include "kernels/cuda/sm90/scores.cuh"
#include "kernels/cuda/sm90/tensor_map.h"
#include "kernels/sparse_index.h"
#include "kernels/tile_index.h"

namespace vsprefill::kernels::cuda {
namespace sm90 {
namespace {

constexpr int kColumns = 128;      // of a column tile
constexpr int kHalf = kBandBlock;  // columns of half a tile
constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
constexpr int kPlans = 8;
constexpr float kLog2E = 1.4426950408889634f;
// Named barriers: 1 and 2: it is consumer 0's (1's) turn to issue products; 3 and 4: both have
// written their output of an even (odd) item.
constexpr int kTurnBarrier = 1;
constexpr int kOutputBarrier = 3;
static_assert(kColumns == 2 * kHalf && kColumns == kKeyBlock);

// Plan::flags
constexpr int kMasked0 = 1;   // some (row, column) pair of half 0 may be invisible: see `columns`
constexpr int kMasked1 = 32;  // the same for half 1
constexpr int kMasked = kMasked0 | kMasked1;
constexpr int kFirst = 2;     // of its item
constexpr int kLast = 4;      // of its item
constexpr int kGather0 = 8;   // half 0 is gathered, else a band or nothing
constexpr int kGather1 = 16;  // the same for half 1

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

// ---------------------------------------------------------------------------- planner

/// Number of selected distance blocks 0 .. last_block. Called by a whole warp.
__device__ __forceinline__ int CountBlocks(const uint32_t* bits, int last_block) {
  const int words = last_block / 32 + 1;
  int count = 0;
  for (int i = threadIdx.x & 31; i < words; i += 32) {
    uint32_t word = bits[i];
    if (i == words - 1) word &= 0xffffffffu >> (31 - (last_block & 31));
    count += __popc(word);
  }
  return __reduce_add_sync(0xffffffffu, count);
}

/// The item after `item` for this block; one thread. Every block draws once for each item that it
/// computes, so the draw number num_items - 1 is the launch's last one: the counter is left at 0.
__device__ __forceinline__ int NextItem(const AttentionBatchSm90& batch, int item) {
  const int blocks = static_cast<int>(gridDim.x);
  if (batch.counter == nullptr) return item + blocks;
  const int draw = static_cast<int>(atomicAdd(batch.counter, 1u));
  if (draw == batch.num_items - 1) atomicExch(batch.counter, 0u);
  return blocks + draw;
}

/// Walks the index of one item after the other and publishes plans. One warp.
template <int kHeadDim>
class Planner {
 public:
  __device__ __forceinline__ Planner(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared)
      : batch_(batch), shared_(shared), lane_(threadIdx.x & 31) {}

  __device__ __forceinline__ void Run() {
    for (int item = blockIdx.x; item < batch_.num_items;) {
      int next = 0;
      if (lane_ == 0) next = NextItem(batch_, item);
      work_ = FindWorkItem(batch_.base, item);
      PlanItem();
      item = __shfl_sync(0xffffffffu, next, 0);
    }
    work_.sequence = -1;
    Publish(0, kNothing, kNothing);
  }

 private:
  __device__ __forceinline__ void PlanItem() {
    const SequenceParams& s = batch_.base.sequences[work_.sequence];
    first_row_ = work_.tile * batch_.base.row_tile;
    last_row_ = first_row_ + batch_.base.row_tile - 1;
    if (s.blocks != nullptr) {
      PlanBlocks(s);
    } else {
      PlanBands(s);
    }
  }

  /// Block-sparse: each selected block is a tile of its own, but the last visible one where the
  /// rows see only its first half.
  __device__ __forceinline__ void PlanBlocks(const SequenceParams& s) {
    const int last_column = min(last_row_, s.kv_tokens - 1);
    const int last_block = last_column / kKeyBlock;
    block_bits_ =
        s.blocks + int64_t{work_.group} * s.blocks_stride + int64_t{work_.tile} * s.block_words;
    column_bits_ = nullptr;
    num_verticals_ = next_vertical_ = 0;
    if (s.columns != nullptr) {
      column_bits_ = s.columns + int64_t{work_.group} * s.columns_stride +
                     int64_t{work_.tile / s.tiles_per_set} * s.column_words;
      num_verticals_ = last_column + 1;
    }
    LoadCandidates();

    int first = kFirst;
    int block = -1;  // found, not published yet
    for (int begin = 0; begin <= last_block / 32; begin += 32) {
      const int index = begin + lane_;
      uint32_t word = index <= last_block / 32 ? block_bits_[index] : 0;
      if (index == last_block / 32) word &= 0xffffffffu >> (31 - last_block % 32);
      for (uint32_t filled = __ballot_sync(0xffffffffu, word != 0); filled != 0;
           filled &= filled - 1) {
        const int from = __ffs(static_cast<int>(filled)) - 1;
        for (uint32_t bits = __shfl_sync(0xffffffffu, word, from); bits != 0; bits &= bits - 1) {
          if (block >= 0) {
            PublishBlock(first, block);
            first = 0;
          }
          block = (begin + from) * 32 + __ffs(static_cast<int>(bits)) - 1;
        }
      }
    }
    const bool half = block == last_block && last_column % kKeyBlock < kHalf;
    if (block >= 0 && !half) {
      PublishBlock(first | (num_verticals_ == 0 ? kLast : 0), block);
      first = 0;
      if (num_verticals_ == 0) return;
    }
    PlanVerticals(first, half ? block * kKeyBlock + kHalf - 1 : kNothing);
  }

  __device__ __forceinline__ void PublishBlock(int flags, int block) {
    const int near = block * kKeyBlock + kHalf - 1;
    Publish(flags | MaskBand(0, near) | MaskBand(1, near + kHalf), near, near + kHalf);
  }

  /// Vertical-slash, or dense.
  __device__ __forceinline__ void PlanBands(const SequenceParams& s) {
    block_bits_ = column_bits_ = nullptr;
    const int last_block = last_row_ / kBandBlock;
    const bool dense = s.bands == nullptr || IsDense(s, work_.tile);
    int num_bands = last_block + 1;  // at least partly right of column 0
    first_band_ = 0;
    bands_ = verticals_ = nullptr;
    num_verticals_ = next_vertical_ = 0;
    if (!dense) {
      bands_ = s.bands + work_.group * s.band_list_stride;
      verticals_ = s.verticals + work_.group * s.vertical_stride;
      band_bits_ = s.band_bits + work_.group * s.band_stride;
      num_verticals_ = s.num_verticals[work_.group];
      num_bands = CountBlocks(band_bits_, last_block);
    } else if (s.bands != nullptr && s.dense_parts > 1) {
      // Whole tiles, as equally many as can be.
      const int tiles = (num_bands + 1) / 2;
      first_band_ = work_.part * tiles / s.dense_parts * 2;
      num_bands = min(num_bands, (work_.part + 1) * tiles / s.dense_parts * 2) - first_band_;
    }
    LoadCandidates();

    int first = kFirst;
    int nearest = 0;  // columns of the bands of tiles 16 i to 16 i + 15, one per lane
    for (int t = 0; t < num_bands / 2; ++t) {
      if (t % 16 == 0) nearest = Nearest(2 * t + lane_, num_bands);
      const int near = __shfl_sync(0xffffffffu, nearest, 2 * t % 32);
      const int far = __shfl_sync(0xffffffffu, nearest, 2 * t % 32 + 1);
      const int masked = MaskBand(0, near) | MaskBand(1, far);
      const bool last = t == num_bands / 2 - 1 && num_bands % 2 == 0 && num_verticals_ == 0;
      Publish(first | masked | (last ? kLast : 0), near, far);
      first = 0;
    }
    if (num_bands % 2 != 0 || num_verticals_ > 0 || num_bands == 0) {
      PlanVerticals(first, num_bands % 2 != 0 ? Nearest(num_bands - 1, num_bands) : kNothing);
    }
  }

  /// The tiles behind the whole tiles of bands or blocks: single columns. `near`: nearest column of
  /// the half left over, if any.
  __device__ __forceinline__ void PlanVerticals(int first, int near) {
    int flags = first;
    int filled = 0;  // columns in the slots of this tile and the next
    if (near != kNothing) {
      flags |= MaskBand(0, near);
      filled = kHalf;
    }
    for (;;) {
      // One column past the tile tells that there is another tile.
      while (filled <= kColumns && next_vertical_ < num_verticals_) filled = Compact(filled);
      int32_t* columns = shared_.columns[tile_ % kPlans];
      for (int n = filled + lane_; n < kColumns; n += 32) columns[n] = INT_MAX;
      __syncwarp();
      if (near == kNothing && columns[kHalf - 1] > first_row_) flags |= kMasked0;
      if (columns[kColumns - 1] > first_row_) flags |= kMasked1;
      if (near == kNothing && filled > 0) flags |= kGather0;
      if (filled > kHalf) flags |= kGather1;
      if (filled <= kColumns) break;
      Publish(flags, near, kNothing);
      flags = 0;
      near = kNothing;
      filled -= kColumns;
    }
    Publish(flags | kLast, near, kNothing);
  }

  /// Looks at the next 128 verticals and appends those that no band covers to the `filled` columns
  /// of this tile and the next; returns how many there are then.
  __device__ __forceinline__ int Compact(int filled) {
    bool keep[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      // What is no candidate is -1 or INT_MAX.
      keep[u] = static_cast<uint32_t>(candidate_[u]) <= static_cast<uint32_t>(last_row_);
      if (keep[u]) {
        const bool blocks = block_bits_ != nullptr;
        const int block =
            blocks ? candidate_[u] / kKeyBlock : (last_row_ - candidate_[u]) / kBandBlock;
        keep[u] = !TestBit(blocks ? block_bits_ : band_bits_, block);
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint32_t kept = __ballot_sync(0xffffffffu, keep[u]);
      if (keep[u]) {
        const int n = filled + __popc(kept & ((1u << lane_) - 1));
        shared_.columns[(tile_ + n / kColumns) % kPlans][n % kColumns] = candidate_[u];
      }
      filled += __popc(kept);
    }
    next_vertical_ += 128;
    // Candidates ascend: behind a column right of the row tile nothing is visible.
    if (__any_sync(0xffffffffu, candidate_[3] > last_row_)) next_vertical_ = num_verticals_;
    LoadCandidates();
    return filled;
  }

  __device__ __forceinline__ void LoadCandidates() {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int i = next_vertical_ + u * 32 + lane_;
      candidate_[u] = INT_MAX;
      if (i < num_verticals_) {
        candidate_[u] = column_bits_ == nullptr ? verticals_[i] : TestBit(column_bits_, i) ? i : -1;
      }
    }
  }

  /// Column of band number `i` that is nearest to the row tile.
  __device__ __forceinline__ int Nearest(int i, int num_bands) const {
    if (i >= num_bands) return 0;
    return last_row_ - (bands_ == nullptr ? first_band_ + i : bands_[i]) * kBandBlock;
  }

  /// If some pair of a row and a column of the band may be invisible: writes the band's columns,
  /// and returns the half's flag.
  __device__ __forceinline__ int MaskBand(int half, int near) {
    if (near <= first_row_ && near >= kHalf - 1) return 0;
    int32_t* columns = shared_.columns[tile_ % kPlans] + half * kHalf;
    for (int n = lane_; n < kHalf; n += 32) columns[n] = near - (kHalf - 1) + n;
    __syncwarp();
    return half == 0 ? kMasked0 : kMasked1;
  }

  /// Publishes the plan of this tile, and waits until the places of the next two are free: columns
  /// that a tile cannot hold are written to the one behind it.
  __device__ __forceinline__ void Publish(int flags, int near, int far) {
    const Slot<kPlans> slot(tile_);
    if (lane_ == 0) {
      shared_.plans[slot.index] = {work_, flags, {near - (kHalf - 1), far - (kHalf - 1)}};
    }
    BarrierArrive(SharedAddress(&shared_.plan_full[slot.index]));  // each lane, for its columns
    ++tile_;
    const Slot<kPlans> ahead(tile_ + 1);
    WaitEmpty(shared_.plan_empty, ahead.index, ahead.parity);
    __syncwarp();
  }

  static constexpr int kNothing = -1;  // the 64 columns up to it: all left of the sequence

  const AttentionBatchSm90& batch_;
  Shared<kHeadDim>& shared_;
  const int lane_;
  uint32_t tile_ = 0;  // counted over all items of the block
  WorkItem work_;
  int first_row_, last_row_;
  int first_band_;        // of the item's part of a dense row tile
  const int32_t* bands_;  // null: every block from first_band_ on
  const int32_t* verticals_;
  const uint32_t* band_bits_;
  const uint32_t* block_bits_;   // null: vertical-slash or dense
  const uint32_t* column_bits_;  // null: `verticals_` lists the single columns
  int num_verticals_, next_vertical_;
  int candidate_[4];  // verticals (or columns) next_vertical_ + 32 u + lane
};

// ---------------------------------------------------------------------------- loader

/// Starts the TMA copies of the halves of a K or V tile that are not gathered. One thread.
template <int kHeadDim>
__device__ __forceinline__ void LoadBands(uint32_t tile_shared, const CUtensorMap* map,
                                          uint64_t& full, const Plan& plan, int kv_head) {
  using C = Config<kHeadDim>;
  const uint32_t barrier = SharedAddress(&full);
  const bool load[2] = {(plan.flags & kGather0) == 0, (plan.flags & kGather1) == 0};
  BarrierArriveExpect(barrier, (load[0] + load[1]) * (C::kTileBytes / 2));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!load[half]) continue;
#pragma unroll
    for (int slice = 0; slice < C::kSlices; ++slice) {
      TmaLoad3D(tile_shared + slice * C::kSliceBytes + half * kHalf * 128, map, barrier, slice * 64,
                plan.first_column[half], kv_head);
    }
  }
}

/// Loads queries and bands. One thread.
template <int kHeadDim>
__device__ __forceinline__ void Load(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared) {
  using C = Config<kHeadDim>;
  uint32_t items = 0;
  for (uint32_t tile = 0;; ++tile) {
    const Slot<kPlans> slot(tile);
    const Stage<kHeadDim> stage(tile);
    WaitFull(shared.plan_full, slot.index, slot.parity);
    const Plan plan = shared.plans[slot.index];
    const int sequence = plan.work.sequence;
    const int group = plan.work.group;
    const int kv_head = group / batch.base.groups_per_kv_head;
    if (plan.flags & kFirst) {
      const int rows = batch.base.row_tile * batch.base.group_size;
      const Slot<2> q(items++);
      WaitEmpty(shared.q_empty, q.index, q.parity);
      const uint32_t full = SharedAddress(&shared.q_full[q.index]);
      shared.q_work[q.index] = plan.work;
      BarrierArriveExpect(full, rows * kHeadDim * 2);
#pragma unroll
      for (int slice = 0; slice < C::kSlices; ++slice) {
        TmaLoad3D(SharedAddress(shared.q[q.index]) + slice * C::kSliceBytes,
                  &batch.q_maps[sequence], full, slice * 64, group * batch.base.group_size,
                  FirstQuery(batch, plan.work));
      }
    }
    WaitEmpty(shared.k_empty, stage.index, stage.parity);
    // Consumers have left the keys of tile - kStages and with them its plan.
    if (tile >= C::kStages) {
      BarrierArrive(SharedAddress(&shared.plan_empty[(tile - C::kStages) % kPlans]));
    }
    if (sequence < 0) {
      BarrierArrive(SharedAddress(&shared.k_full[stage.index]), 3);
      return;
    }
    LoadBands<kHeadDim>(SharedAddress(shared.k[stage.index]), &batch.k_maps[sequence],
                        shared.k_full[stage.index], plan, kv_head);
    WaitEmpty(shared.v_empty, stage.index, stage.parity);
    LoadBands<kHeadDim>(SharedAddress(shared.v[stage.index]), &batch.v_maps[sequence],
                        shared.v_full[stage.index], plan, kv_head);
  }
}

// ---------------------------------------------------------------------------- gatherers

/// Starts the copies of one half of a K or V tile from `rows`. `kCheck`: a column may lie outside
/// the sequence; its row becomes zeros. One warp.
template <int kHeadDim, bool kCheck>
__device__ __forceinline__ void GatherHalf(uint32_t half_shared, const char* rows,
                                           uint32_t token_bytes, int kv_tokens,
                                           const int32_t* columns) {
  constexpr int kChunks = kHeadDim / 8;    // 16-byte pieces of a row
  constexpr int kStep = 4 * 32 / kChunks;  // rows per step: each lane copies a piece of four
  static_assert(kStep % 8 == 0);           // so that the swizzle is the same in each step
  const int lane = threadIdx.x & 31;
  const int chunk = lane % kChunks;
  const int row = lane / kChunks * 4;
  uint32_t target[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    target[i] = half_shared + chunk / 8 * Config<kHeadDim>::kSliceBytes + (row + i) * 128 +
                ((chunk ^ (row + i)) & 7) * 16;
  }
  rows += chunk * 16;
  asm volatile("" : "+l"(rows));  // one addition for each address, not two
  // Column numbers of several steps before their copies: the latencies overlap.
  constexpr int kSteps = 4;
  static_assert(kHalf % (kSteps * kStep) == 0);
  for (int n = 0; n < kHalf; n += kSteps * kStep) {
    int4 quads[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      quads[i] = *reinterpret_cast<const int4*>(columns + n + i * kStep + row);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int column[4] = {quads[i].x, quads[i].y, quads[i].z, quads[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool valid =
            !kCheck || static_cast<uint32_t>(column[j]) < static_cast<uint32_t>(kv_tokens);
        const uint64_t offset =
            uint64_t{valid ? static_cast<uint32_t>(column[j]) : 0} * token_bytes;
        CopyAsync16(target[j] + (n + i * kStep) * 128, rows + offset, valid);
      }
    }
  }
}

/// Gathers half `kTileHalf` of the tiles' keys and values, the keys one tile ahead of the values:
/// the order in which consumers give them back. One warp.
template <int kHeadDim, int kTileHalf>
__device__ __forceinline__ void Gather(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared) {
  constexpr int kGathered = kTileHalf == 0 ? kGather0 : kGather1;
  constexpr int kMayMask = kTileHalf == 0 ? kMasked0 : kMasked1;
  struct Source {
    const char *k, *v;
    uint32_t token_bytes;
    int kv_tokens;
    int flags;
  };
  const bool leader = threadIdx.x % 32 == 0;
  uint32_t copying = 0;  // full barrier of the tile whose copies are in flight
  // cp.async writes in the generic proxy, wgmma reads in the async proxy: the writer fences.
  const auto finish = [&] {
    FenceProxyAsync();
    __syncwarp();
    if (leader) BarrierArrive(copying);
  };
  const auto finish_all = [&] {
    if (copying == 0) return;
    WaitCopies<0>();
    finish();
    copying = 0;
  };
  const auto wait = [&](uint64_t& barrier, uint32_t parity) {
    if (__all_sync(0xffffffffu, BarrierTest(SharedAddress(&barrier), parity))) return;
    finish_all();  // consumers may wait for these before they free anything
    BarrierWait(SharedAddress(&barrier), parity);
    __syncwarp();
  };
  const auto gather = [&](uint8_t* tile, uint64_t& full, const char* rows, const Source& source,
                          const int32_t* columns) {
    const uint32_t target = SharedAddress(tile) + kTileHalf * kHalf * 128;
    if (source.flags & kMayMask) {
      GatherHalf<kHeadDim, true>(target, rows, source.token_bytes, source.kv_tokens, columns);
    } else {
      GatherHalf<kHeadDim, false>(target, rows, source.token_bytes, source.kv_tokens, columns);
    }
    CommitCopies();
    if (copying != 0) {
      WaitCopies<1>();
      finish();
    }
    copying = SharedAddress(&full);
  };
  Source source = {}, last = {};  // of the keys' tile and of the values' tile
  for (uint32_t tile = 0;; ++tile) {
    const Slot<kPlans> slot(tile);
    const Stage<kHeadDim> stage(tile);
    wait(shared.plan_full[slot.index], slot.parity);
    const WorkItem item = shared.plans[slot.index].work;
    source.flags = shared.plans[slot.index].flags;
    if (item.sequence >= 0) {
      if (source.flags & kFirst) {
        const SequenceParams& s = batch.base.sequences[item.sequence];
        const int64_t head = item.group / batch.base.groups_per_kv_head * s.kv_head_stride * 2;
        source.k = static_cast<const char*>(s.k) + head;
        source.v = static_cast<const char*>(s.v) + head;
        source.token_bytes = static_cast<uint32_t>(s.kv_token_stride * 2);
        source.kv_tokens = s.kv_tokens;
      }
      // A wait tells only neighbouring phases apart, so gatherers take part in every tile.
      wait(shared.k_empty[stage.index], stage.parity ^ 1);
      if (source.flags & kGathered) {
        gather(shared.k[stage.index], shared.k_full[stage.index], source.k, source,
               shared.columns[slot.index] + kTileHalf * kHalf);
      } else if (leader) {
        BarrierArrive(SharedAddress(&shared.k_full[stage.index]));
      }
    }
    if (tile > 0) {
      const Slot<kPlans> last_slot(tile - 1);
      const Stage<kHeadDim> last_stage(tile - 1);
      wait(shared.v_empty[last_stage.index], last_stage.parity ^ 1);
      if (last.flags & kGathered) {
        gather(shared.v[last_stage.index], shared.v_full[last_stage.index], last.v, last,
               shared.columns[last_slot.index] + kTileHalf * kHalf);
      } else if (leader) {
        BarrierArrive(SharedAddress(&shared.v_full[last_stage.index]));
      }
      // Each lane has read columns.
      BarrierArrive(SharedAddress(&shared.plan_empty[last_slot.index]));
    }
    if (item.sequence < 0) break;
    last = source;
  }
  finish_all();
}

// ---------------------------------------------------------------------------- consumers

/// o += p v, or o = p v where `add` is false; committed, not waited for.
template <int kHeadDim>
__device__ __forceinline__ void StartValues(float (&o)[kHeadDim / 2],
                                            const uint32_t (&p)[kColumns / 16][4],
                                            uint32_t v_shared, bool add) {
  v_shared = Uniform(v_shared);
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    const uint64_t b = MatrixDescriptor(v_shared, Config<kHeadDim>::kSliceBytes, step * 16 * 128);
    if constexpr (kHeadDim == 128) {
      WgmmaRegistersN128<Contiguous::kN>(o, p[step], b, step != 0 || add);
    } else {
      WgmmaRegistersN64(o, p[step], b, step != 0 || add);
    }
  }
  WgmmaCommit();
}

/// Scores of invisible pairs of half `kTileHalf` become -inf. `limit`: position of the thread's two
/// rows; idle rows have the largest one. A negative column is, unsigned, right of every row.
template <int kTileHalf>
__device__ __forceinline__ void Mask(float (&s)[kColumns / 2], const int32_t* columns,
                                     const uint32_t (&limit)[2]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = kTileHalf * kHalf / 8; n < (kTileHalf + 1) * kHalf / 8; ++n) {
    const int2 pair = *reinterpret_cast<const int2*>(columns + n * 8 + (lane & 3) * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (static_cast<uint32_t>(pair.x) > limit[half]) s[n * 4 + half * 2] = -INFINITY;
      if (static_cast<uint32_t>(pair.y) > limit[half]) s[n * 4 + half * 2 + 1] = -INFINITY;
    }
  }
  __syncwarp();  // before the warp's leader gives the columns back
}

/// Running maximum and sum of the thread's two rows. The sum covers this thread's columns only.
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

/// Sum over the four threads of a row. Called by a whole warp.
__device__ __forceinline__ float RowSum(float sum) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

/// 1 / the whole row's sum, from its threads' parts; 0 for a row that saw no column. Called by a
/// whole warp.
__device__ __forceinline__ float Inverse(float sum) {
  sum = RowSum(sum);
  return sum > 0.0f ? Reciprocal(sum) : 0.0f;
}

/// Online softmax: s becomes the probabilities relative to the new maximum. What was accumulated
/// before has to be multiplied by `correction`; returns whether that matters to some row of the
/// warp.
__device__ __forceinline__ bool Softmax(float (&s)[kColumns / 2], RowState& rows, float scale_log2,
                                        float (&correction)[2]) {
  bool changed = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float m = rows.max[half];
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      m = fmaxf(m, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
    }
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
    // A row that has seen no column yet: any finite reference keeps exp2 at zero, not NaN.
    const float reference = m == -INFINITY ? 0.0f : m * scale_log2;
    // Exactly 1 where nothing changed (the rounding of `reference` would show): whether the warp
    // corrects must not show in a row, for idle rows take part in the vote.
    correction[half] = m == rows.max[half] ? 1.0f : Exp2(rows.max[half] * scale_log2 - reference);
    changed |= m != rows.max[half];
    rows.max[half] = m;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& p = s[n * 4 + half * 2 + e];
        p = Exp2(p * scale_log2 - reference);
        sum += p;
      }
    }
    rows.sum[half] = rows.sum[half] * correction[half] + sum;
  }
  return __any_sync(0xffffffffu, changed);
}

/// Probabilities rounded to bf16, as the A operand of StartValues.
__device__ __forceinline__ void PackProbabilities(uint32_t (&p)[kColumns / 16][4],
                                                  const float (&s)[kColumns / 2]) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[step][i] = PackBf16(s[step * 8 + i * 2], s[step * 8 + i * 2 + 1]);
    }
  }
}

/// o / sum of this warp's 16 rows, rounded to bf16, into the queries' place: `rows_shared` is the
/// address of the warp's first row.
template <int kHeadDim>
__device__ __forceinline__ void WriteRows(uint32_t rows_shared, const float (&o)[kHeadDim / 2],
                                          const float (&sums)[2]) {
  const float inverse[2] = {Inverse(sums[0]), Inverse(sums[1])};
  // Matrix lane / 8 of each store: rows 8 * (matrix % 2), 16-byte chunk matrix / 2 of two.
  const int lane = threadIdx.x & 31;
  const int row = lane % 16;
  const int chunk = lane / 16;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; n += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (n + i / 2) * 4 + i % 2 * 2;
      words[i] = PackBf16(o[at] * inverse[i % 2], o[at + 1] * inverse[i % 2]);
    }
    StoreMatrix4(rows_shared + n / 8 * Config<kHeadDim>::kSliceBytes + row * 128 +
                     (((n + chunk) ^ row) & 7) * 16,
                 words);
  }
}

/// Starts the copy of a row tile's output to where it belongs. One thread.
template <int kHeadDim>
__device__ __forceinline__ void SendRows(const AttentionBatchSm90& batch, const WorkItem& work,
                                         uint32_t out_shared) {
#pragma unroll
  for (int slice = 0; slice < Config<kHeadDim>::kSlices; ++slice) {
    TmaStore3D(&batch.out_maps[work.sequence], out_shared + slice * Config<kHeadDim>::kSliceBytes,
               slice * 64, work.group * batch.base.group_size, FirstQuery(batch, work));
  }
  CommitBulk();
}

/// The same without the copy engine, which refuses to store at negative coordinates: the row tile
/// in which the queries begin. `row`: this thread's first row.
template <int kHeadDim>
__device__ __forceinline__ void StoreRows(const AttentionBatchSm90& batch, const WorkItem& work,
                                          int row, const float (&o)[kHeadDim / 2],
                                          const float (&sums)[2]) {
  const SequenceParams& sequence = batch.base.sequences[work.sequence];
  const int group_size = batch.base.group_size;
  const float inverse[2] = {Inverse(sums[0]), Inverse(sums[1])};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int packed = row + half * 8;
    const int position = RowPosition(batch, sequence, work.tile, packed);
    if (position < 0) continue;
    const int head =
        work.group * group_size + packed - DivideRow(packed, batch.group_reciprocal) * group_size;
    auto* out = static_cast<__nv_bfloat16*>(sequence.out) +
                (position - sequence.q_start) * sequence.out_token_stride +
                head * sequence.out_head_stride + (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(out + n * 8) =
          PackBf16(o[n * 4 + half * 2] * inverse[half], o[n * 4 + half * 2 + 1] * inverse[half]);
    }
  }
}

/// What a part of a dense row tile leaves. `row`: this thread's first row.
template <int kHeadDim>
__device__ __forceinline__ void StorePartial(const AttentionBatchSm90& batch, const WorkItem& work,
                                             int row, const float (&o)[kHeadDim / 2],
                                             const float (&maxima)[2], const float (&sums)[2]) {
  const SequenceParams& s = batch.base.sequences[work.sequence];
  const int last_tile = s.first_tile + s.num_tiles - 1;
  const Partial to = FindPartial(s, (last_tile - work.tile) * batch.base.num_groups + work.group,
                                 work.part, kHeadDim);
  const int lane = threadIdx.x & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int packed = row + half * 8;
    const float sum = RowSum(sums[half]);
    if (lane == 0) {
      to.max[packed] = maxima[half] * (batch.base.scale * kLog2E);
      to.sum[packed] = sum;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(to.o + packed * kHeadDim + n * 8 + lane * 2) =
          make_float2(o[n * 4 + half * 2], o[n * 4 + half * 2 + 1]);
    }
  }
}

/// The products and the softmax of packed rows 64 `consumer` to 64 `consumer` + 63.
template <int kHeadDim>
__device__ __forceinline__ void Consume(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared,
                                        int consumer) {
  using C = Config<kHeadDim>;
  const int thread = threadIdx.x % kWarpgroup;
  const bool warp_leader = thread % 32 == 0;
  const int first_row = consumer * 64 + thread / 32 * 16 + thread % 32 / 4;
  const uint32_t q_shared = SharedAddress(shared.q[0]) + consumer * 64 * 128;
  // Sends the output of both consumers, the last one to write, and gives the queries' place back.
  const bool sender = consumer == 1 && thread == 0;
  const float scale_log2 = batch.base.scale * kLog2E;
  const auto release = [&](uint64_t& barrier) {
    if (warp_leader) BarrierArrive(SharedAddress(&barrier));
  };

  float s[kColumns / 2], o[kHeadDim / 2];
  uint32_t p[kColumns / 16][4];
  float correction[2];
  RowState rows;
  uint32_t limit[2];

  uint32_t items = 0;  // finished ones
  const auto start_item = [&](const WorkItem& item) {
    const SequenceParams& sequence = batch.base.sequences[item.sequence];
    limit[0] = static_cast<uint32_t>(RowPosition(batch, sequence, item.tile, first_row));
    limit[1] = static_cast<uint32_t>(RowPosition(batch, sequence, item.tile, first_row + 8));
    rows = RowState();
  };
  // After the scores of a tile: gives its keys back.
  // In blocks of their own, for the compiler would move them down past the softmax.
  const auto mask_and_release = [&](uint32_t tile, int flags) {
    if (flags & kMasked0) Mask<0>(s, shared.columns[tile % kPlans], limit);
    if (flags & kMasked1) Mask<1>(s, shared.columns[tile % kPlans], limit);
    release(shared.k_empty[Stage<kHeadDim>(tile).index]);
  };

  // The block has at least one item.
  WaitFull(shared.k_full, 0, 0);
  int flags = shared.plans[0].flags;
  start_item(shared.plans[0].work);
  WaitFull(shared.q_full, 0, 0);
  WgmmaFence();
  StartScores<kHeadDim, C::kSliceBytes, 1024, C::kSliceBytes>(s, q_shared,
                                                              SharedAddress(shared.k[0]));
  WgmmaWait<0>();
  PinRegisters(s);
  mask_and_release(0, flags);
  Softmax(s, rows, scale_log2, correction);
  PackProbabilities(p, s);
  if (consumer == 1) NamedBarrierArrive(kTurnBarrier, 2 * kWarpgroup);  // consumer 0 starts

  for (uint32_t tile = 0;; ++tile) {
    // p holds the probabilities of `tile`, o the sum over the item's tiles before it.
    const Stage<kHeadDim> stage(tile), next(tile + 1);
    if ((flags & kFirst) && sender && items > 0) {
      // The last item's output has left by now. The queries waited for below may need its place.
      WaitBulkReads();
      BarrierArrive(SharedAddress(&shared.q_empty[(items - 1) % 2]));
    }
    WaitFull(shared.k_full, next.index, next.parity);
    const int next_flags = shared.plans[(tile + 1) % kPlans].flags;
    const Slot<2> q(items + (next_flags & kFirst ? 1 : 0));
    // An item's end waits like any other tile: under the next item's first softmax.
    const bool ends = (flags & kLast) != 0;
    const float sums[2] = {rows.sum[0], rows.sum[1]};
    const float maxima[2] = {rows.max[0], rows.max[1]};
    if (next_flags & kFirst) {
      WaitFull(shared.q_full, q.index, q.parity);
      start_item(shared.q_work[q.index]);
    }
    NamedBarrierSync(kTurnBarrier + consumer, 2 * kWarpgroup);
    WgmmaFence();
    // After the last item of all these scores mean nothing.
    StartScores<kHeadDim, C::kSliceBytes, 1024, C::kSliceBytes>(
        s, q_shared + q.index * Config<kHeadDim>::kTileBytes, SharedAddress(shared.k[next.index]));
    WaitFull(shared.v_full, stage.index, stage.parity);
    WgmmaFence();
    StartValues<kHeadDim>(o, p, SharedAddress(shared.v[stage.index]), (flags & kFirst) == 0);
    NamedBarrierArrive(kTurnBarrier + (consumer ^ 1), 2 * kWarpgroup);
    WgmmaWait<1>();
    PinRegisters(s);
    if ((next_flags & kMasked) == 0) release(shared.k_empty[next.index]);
    if (next_flags & kMasked) mask_and_release(tile + 1, next_flags);
    const bool changed = Softmax(s, rows, scale_log2, correction);
    // Never true. The assembler would wait for the product o += p v before the softmax instead of
    // computing the one under the other; it does not move the wait across a way out.
    if (rows.sum[0] + rows.sum[1] < 0.0f) return;
    WgmmaWait<0>();
    PinRegisters(o);
    release(shared.v_empty[stage.index]);
    if (changed && !ends) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
    }
    PackProbabilities(p, s);
    if (ends) {
      const uint32_t out_shared = SharedAddress(shared.q[items % 2]);
      const WorkItem ended = shared.q_work[items % 2];
      const bool divided = batch.base.sequences[ended.sequence].dense_parts > 1 &&
                           IsDense(batch.base.sequences[ended.sequence], ended.tile);
      const bool send = !divided && FirstQuery(batch, ended) >= 0;
      if (divided) {
        StorePartial<kHeadDim>(batch, ended, first_row, o, maxima, sums);
      } else if (send) {
        WriteRows<kHeadDim>(out_shared + (consumer * 64 + thread / 32 * 16) * 128, o, sums);
        FenceProxyAsync();
      } else {
        StoreRows<kHeadDim>(batch, ended, first_row, o, sums);
      }
      if (consumer == 0) {
        NamedBarrierArrive(kOutputBarrier + items % 2, 2 * kWarpgroup);
      } else {
        NamedBarrierSync(kOutputBarrier + items % 2, 2 * kWarpgroup);
        if (send && sender) SendRows<kHeadDim>(batch, ended, out_shared);
      }
      if ((next_flags & kFirst) == 0) break;  // that was the last item
      ++items;
    }
    flags = next_flags;
  }
  if (sender) WaitBulk();
  if (consumer == 0) NamedBarrierSync(kTurnBarrier, 2 * kWarpgroup);  // the turn left over
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    AttentionSm90Kernel(const __grid_constant__ AttentionBatchSm90 batch) {
  using C = Config<kHeadDim>;
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    // The swizzle counts from 1024-byte boundaries.
    if (SharedAddress(&shared) % 1024 != 0) __trap();
    for (int i = 0; i < C::kStages; ++i) {
      // Full: the loader and both gatherers. Empty: each consumer warp.
      BarrierInit(SharedAddress(&shared.k_full[i]), 3);
      BarrierInit(SharedAddress(&shared.v_full[i]), 3);
      BarrierInit(SharedAddress(&shared.k_empty[i]), 8);
      BarrierInit(SharedAddress(&shared.v_empty[i]), 8);
    }
    for (int i = 0; i < 2; ++i) {
      BarrierInit(SharedAddress(&shared.q_full[i]), 1);
      BarrierInit(SharedAddress(&shared.q_empty[i]), 1);
    }
    for (int i = 0; i < kPlans; ++i) {
      // Full: the planner's threads. Empty: the loader (for the consumers, too) and the gatherers'.
      BarrierInit(SharedAddress(&shared.plan_full[i]), 32);
      BarrierInit(SharedAddress(&shared.plan_empty[i]), 1 + 2 * 32);
    }
    FenceBarrierInit();
  }
  // Padding rows are never loaded: any finite number does.
  for (int i = threadIdx.x; i < 2 * C::kTileBytes / 16; i += kThreads) {
    reinterpret_cast<uint4*>(shared.q)[i] = make_uint4(0, 0, 0, 0);
  }
  FenceProxyAsync();
  __syncthreads();
  const int warpgroup = Uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    LowerRegisters<kProducerRegisters>();
    const int warp = Uniform(threadIdx.x / 32);
    if (warp == 0) {
      if (threadIdx.x == 0) Load(batch, shared);
    } else if (warp == 1) {
      Planner<kHeadDim>(batch, shared).Run();
    } else if (warp == 2) {
      Gather<kHeadDim, 0>(batch, shared);
    } else {
      Gather<kHeadDim, 1>(batch, shared);
    }
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consume(batch, shared, warpgroup - 1);
  }
}

template <int kHeadDim>
KernelStatus Launch(const AttentionBatchSm90& batch, cudaStream_t stream) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return AsStatus(error);
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return AsStatus(error);
  constexpr int kBytes = sizeof(Shared<kHeadDim>);
  KernelStatus status = AllowSharedMemory(AttentionSm90Kernel<kHeadDim>, kBytes);
  if (status != KernelStatus::kOk) return status;
  const int blocks = std::min(batch.num_items, multiprocessors);
  AttentionSm90Kernel<kHeadDim><<<blocks, kThreads, kBytes, stream>>>(batch);
  status = LaunchStatus();
  return status == KernelStatus::kOk ? JoinParts(batch.base, kHeadDim, stream) : status;
}

}  // namespace
}  // namespace sm90

KernelStatus LaunchAttentionSm90(const AttentionBatch& base, int num_items, int head_dim,
                                 cudaStream_t stream) {
  if (head_dim != 64 && head_dim != 128) return KernelStatus::kUnsupportedShape;
  sm90::AttentionBatchSm90 batch;
  batch.base = base;
  for (int i = 0; i < base.num_sequences; ++i) {
    const SequenceParams& s = base.sequences[i];
    // Gathering multiplies 32-bit numbers.
    if (s.kv_token_stride >= int64_t{1} << 31) return KernelStatus::kUnsupportedShape;
    const int q_heads = base.num_groups * base.group_size;
    const int q_tokens = s.kv_tokens - s.q_start;
    const auto columns = [&](CUtensorMap* map, const void* rows) {
      return sm90::DescribeTensor(
          map, rows, {head_dim, s.kv_tokens, base.num_groups / base.groups_per_kv_head},
          {s.kv_token_stride, s.kv_head_stride}, {64, kBandBlock, 1});
    };
    const auto rows = [&](CUtensorMap* map, const void* data, int64_t head_stride,
                          int64_t token_stride) {
      return sm90::DescribeTensor(map, data, {head_dim, q_heads, q_tokens},
                                  {head_stride, token_stride},
                                  {64, base.group_size, base.row_tile});
    };
    const bool described = columns(&batch.k_maps[i], s.k) && columns(&batch.v_maps[i], s.v) &&
                           rows(&batch.q_maps[i], s.q, s.q_head_stride, s.q_token_stride) &&
                           rows(&batch.out_maps[i], s.out, s.out_head_stride, s.out_token_stride);
    if (!described) return KernelStatus::kUnsupportedShape;
  }
  batch.counter = sm90::ItemCounter(stream);
  batch.num_items = num_items;
  batch.group_reciprocal = (65536 + base.group_size - 1) / base.group_size;
  return head_dim == 128 ? sm90::Launch<128>(batch, stream) : sm90::Launch<64>(batch, stream);
}

}  // namespace vsprefill::kernels::cuda

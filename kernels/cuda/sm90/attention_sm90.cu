// Causal attention, dense or vertical-slash, bf16 on Hopper (sm_90a): wgmma fed by TMA and
// cp.async.
//
//   S[r, n] = scale * q[r] . k[column(n)]     [128 packed rows] x [128 columns of this tile]
//   O[r]    = sum over tiles of exp(S - rowmax) v[column(n)], online softmax, float32
//
// One persistent block per multiprocessor: a producer warpgroup and two consumer warpgroups. A work
// item is a (KV group, row tile) as in attention_params.cuh; consumer w owns packed rows 64 w to
// 64 w + 63 (packed row r: position first + r / g, head r % g).
//
// Column tiles. A tile has two halves of 64 columns; half h of tile t is block number 2 t + h of
// the walk: first the selected distance blocks, nearest first (contiguous columns: TMA, rows
// outside the sequence arrive as zeros), then the verticals that no band covers, compacted on the
// fly, 64 at a time (gathered: cp.async, all four producer warps). A tile may hold one half of each
// kind; what is missing in the last tile is masked.
//
// Shared memory, all tiles as [head_dim / 64][128 rows][64 elements], 128-byte swizzle (16-byte
// chunk c of row r lies at c ^ (r % 8)), the layout of TMA and wgmma:
//   q            the item's 128 packed rows
//   k, v         kStages tiles each, with a full and an empty barrier each
//   columns      ring of column numbers: 128 for each of kRingTiles tiles. Written for gathered
//                halves and for masked tiles, read by the gather and by the mask.
//   notes        per K stage: work item and flags of the tile
//
// Producer warp 0 issues TMA and notes, warp 1 compacts verticals one tile ahead, warps 2 and 3
// fetch queries; all gather. Consumers overlap the softmax of one tile with the products S = Q K of
// the next and O += P V of the one before, and take turns at issuing products (named barriers), so
// that one's softmax runs under the other's products.
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
#include "kernels/cuda/sm90/tensor_map.h"
#include "kernels/sparse_index.h"

namespace vsprefill::kernels::cuda {
namespace sm90 {
namespace {

constexpr int kRows = kPackedRows;  // of a row tile
constexpr int kColumns = 128;       // of a column tile
constexpr int kHalf = kBandBlock;   // columns of half a tile
constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
constexpr int kQueryThreads = 64;  // producer warps 2 and 3
static_assert(kColumns == 2 * kHalf);

// Named barriers.
constexpr int kProducerBarrier = 1;
constexpr int kTurnBarrier = 2;  // and 3: it is consumer 0's (1's) turn to issue products

// TileNote::flags
constexpr int kMasked = 1;    // some (row, column) pair may be invisible: look at `columns`
constexpr int kLast = 2;      // of its item
constexpr int kGathered = 4;  // cp.async wrote part of it

struct TileNote {
  int32_t item;  // -1: no more work
  int32_t flags;
};

template <int kHeadDim>
struct Config {
  static constexpr int kStages = kHeadDim == 128 ? 2 : 3;
  static constexpr int kRingTiles = kStages + 2;  // in flight, being gathered, being compacted
  static constexpr int kSlices = kHeadDim / 64;   // of 64 elements = 128 bytes
  static constexpr int kSliceBytes = kColumns * 128;
  static constexpr int kTileBytes = kSlices * kSliceBytes;
};

template <int kHeadDim>
struct alignas(1024) Shared {
  using C = Config<kHeadDim>;
  uint8_t q[C::kTileBytes];
  uint8_t k[C::kStages][C::kTileBytes];
  uint8_t v[C::kStages][C::kTileBytes];
  uint64_t k_full[C::kStages], k_empty[C::kStages];
  uint64_t v_full[C::kStages], v_empty[C::kStages];
  uint64_t q_full, q_empty;
  TileNote notes[C::kStages];
  int32_t gathered_flags[2];  // by parity of the tile
  int32_t next_item[2];       // by parity of the item
  int32_t columns[C::kRingTiles * kColumns];
};

/// Where tile number `tile` (counted over all items of the block) lives.
template <int kHeadDim>
struct Slot {
  int stage;
  uint32_t parity;  // of the stage's full barriers
  int columns;      // start in the ring
  __device__ __forceinline__ explicit Slot(uint32_t tile)
      : stage(tile % Config<kHeadDim>::kStages),
        parity(tile / Config<kHeadDim>::kStages & 1),
        columns(tile % Config<kHeadDim>::kRingTiles * kColumns) {}
};

/// Packed row -> (position, head) without a division: row / group_size for rows below 128.
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

// ---------------------------------------------------------------------------- producer

/// `x`, but computed anew at each call: what depends on it is not kept in registers across the
/// tiles of an item. The producer has few.
__device__ __forceinline__ int Fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

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

/// The row tile's part of the index. Uniform over the producer.
struct Walk {
  bool dense;
  int num_bands;      // at least partly right of column 0
  int num_verticals;  // of the group, covered and invisible ones included
  int first_row, last_row;

  __device__ __forceinline__ Walk(const SequenceParams& s, const WorkItem& item, int row_tile) {
    first_row = item.tile * row_tile;
    last_row = first_row + row_tile - 1;
    dense = s.bands == nullptr || item.tile >= s.first_tile + s.num_tiles - s.dense_tiles;
    const int last_block = last_row / kBandBlock;
    num_verticals = dense ? 0 : s.num_verticals[item.group];
    num_bands =
        dense ? last_block + 1 : CountBlocks(s.band_bits + item.group * s.band_stride, last_block);
  }
  /// Column nearest to the row tile of the walk's band number `i`.
  __device__ __forceinline__ int Nearest(const SequenceParams& s, int group, int i) const {
    const int block = dense ? i : s.bands[group * s.band_list_stride + i];
    return last_row - block * kBandBlock;
  }
};

/// Where the compaction of a row tile's verticals stands.
struct Compaction {
  int next = 0;     // first vertical not looked at yet
  int carried = 0;  // columns already in the next tile's slots
};

/// Compacts uncovered verticals into the ring's slots of `tile`, whose first `taken` ones (0 or 64)
/// belong to a band, and tells in gathered_flags whether the tile is the last one. Called by one
/// warp for consecutive tiles.
template <int kHeadDim>
__device__ __forceinline__ void FillColumns(Shared<kHeadDim>& shared, const SequenceParams& s,
                                            int group, const Walk& walk, Compaction& compaction,
                                            uint32_t tile, int taken) {
  constexpr int kRing = Config<kHeadDim>::kRingTiles * kColumns;
  const int lane = threadIdx.x & 31;
  const int base = Slot<kHeadDim>(tile).columns;
  const int32_t* verticals = s.verticals + group * s.vertical_stride;
  const uint32_t* band_bits = s.band_bits + group * s.band_stride;
  int filled = taken + compaction.carried;
  // One column past the tile tells that there is another tile.
  while (filled <= kColumns && compaction.next < walk.num_verticals) {
    int column[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int i = compaction.next + u * 32 + lane;
      column[u] = i < walk.num_verticals ? verticals[i] : INT_MAX;
    }
    bool keep[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      keep[u] = column[u] <= walk.last_row;
      if (keep[u]) {
        const int block = (walk.last_row - column[u]) / kBandBlock;
        keep[u] = (band_bits[block >> 5] >> (block & 31) & 1) == 0;
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint32_t kept = __ballot_sync(0xffffffffu, keep[u]);
      if (keep[u]) {
        int slot = base + filled + __popc(kept & ((1u << lane) - 1));
        if (slot >= kRing) slot -= kRing;
        shared.columns[slot] = column[u];
      }
      filled += __popc(kept);
    }
    compaction.next += 128;
    // Verticals ascend: behind a column right of the row tile nothing is visible.
    if (__any_sync(0xffffffffu, column[3] > walk.last_row)) compaction.next = walk.num_verticals;
  }
  const int count = filled < kColumns ? filled : kColumns;
  for (int n = count + lane; n < kColumns; n += 32) shared.columns[base + n] = INT_MAX;
  __syncwarp();
  if (lane == 0) {
    const bool masked = shared.columns[base + kColumns - 1] > walk.first_row;
    shared.gathered_flags[tile & 1] =
        kGathered | (masked ? kMasked : 0) | (filled <= kColumns ? kLast : 0);
  }
  compaction.carried = filled - count;
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

/// Starts the copies of the item's queries; idle rows become zeros. Called by kQueryThreads
/// threads.
template <int kHeadDim>
__device__ __forceinline__ void LoadQueries(const AttentionBatchSm90& batch,
                                            const SequenceParams& sequence, const WorkItem& item,
                                            uint32_t q_shared, int thread) {
  constexpr int kChunks = kHeadDim / 8;
  const int chunk = thread % kChunks;
  const int group_size = batch.base.group_size;
  const auto* q = static_cast<const __nv_bfloat16*>(sequence.q) + chunk * 8 +
                  static_cast<int64_t>(item.group) * group_size * sequence.q_head_stride;
#pragma unroll 4
  for (int row = thread / kChunks; row < kRows; row += kQueryThreads / kChunks) {
    const int position = RowPosition(batch, sequence, item.tile, row);
    const int head = row - DivideRow(row, batch.group_reciprocal) * group_size;
    const int64_t offset = position < 0 ? 0
                                        : (position - sequence.q_start) * sequence.q_token_stride +
                                              head * sequence.q_head_stride;
    CopyAsync16(
        q_shared + chunk / 8 * Config<kHeadDim>::kSliceBytes + row * 128 + ((chunk ^ row) & 7) * 16,
        q + offset, position >= 0);
  }
}

/// Starts the copies of rows `first_row` (0 or 64) to 127 of a K or V tile; a column outside the
/// sequence becomes zeros: its probability is zero, but zero times garbage may be NaN. Called by
/// the whole producer.
template <int kHeadDim>
__device__ __forceinline__ void Gather(uint32_t tile_shared, const SequenceParams& sequence,
                                       const void* k_or_v, int group, const int32_t* columns,
                                       int first_row) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kStep = kWarpgroup / kChunks;  // a multiple of 8: the swizzle stays
  const int thread = Fresh(threadIdx.x);
  const int chunk = thread % kChunks;
  const int row = thread / kChunks;
  const auto* rows =
      static_cast<const __nv_bfloat16*>(k_or_v) + group * sequence.kv_head_stride + chunk * 8;
  columns += row;
  tile_shared += chunk / 8 * Config<kHeadDim>::kSliceBytes + row * 128 + ((chunk ^ row) & 7) * 16;
#pragma unroll 8
  for (int i = first_row; i < kColumns; i += kStep) {
    const int column = columns[i];
    const bool valid = static_cast<uint32_t>(column) < static_cast<uint32_t>(sequence.kv_tokens);
    CopyAsync16(tile_shared + i * 128, rows + (valid ? column * sequence.kv_token_stride : 0),
                valid);
  }
}

/// Starts the TMA copy of 64 contiguous columns into half `half` of a K or V tile.
template <int kHeadDim>
__device__ __forceinline__ void LoadHalf(uint32_t tile_shared, const CUtensorMap* map,
                                         uint32_t barrier, int first_column, int group, int half) {
#pragma unroll
  for (int slice = 0; slice < Config<kHeadDim>::kSlices; ++slice) {
    TmaLoad3D(tile_shared + slice * Config<kHeadDim>::kSliceBytes + half * kHalf * 128, map,
              barrier, slice * 64, first_column, group);
  }
}

/// Everything that fills shared memory. Threads 0 to 127.
template <int kHeadDim>
__device__ __forceinline__ void Produce(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared) {
  using C = Config<kHeadDim>;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const bool leader = threadIdx.x == 0;
  uint32_t tile = 0;
  int item_index = blockIdx.x;
  for (uint32_t items = 0;; ++items) {
    if (item_index >= batch.num_items) break;
    int following = 0;
    if (leader) following = NextItem(batch, item_index);
    const WorkItem item = FindWorkItem(batch.base, item_index);
    const SequenceParams& sequence = batch.base.sequences[item.sequence];
    const CUtensorMap* k_map = &batch.k_maps[item.sequence];
    const CUtensorMap* v_map = &batch.v_maps[item.sequence];
    const Walk walk(sequence, item, batch.base.row_tile);
    const int band_tiles = walk.num_bands / 2;
    const bool mixed = walk.num_bands % 2 != 0;
    const bool gathers = mixed || walk.num_verticals > 0 || walk.num_bands == 0;

    if (warp == 0) {
      int nearest = 0;  // of the bands of tiles 16 i to 16 i + 15, one per lane
      for (int t = 0; t < band_tiles; ++t, ++tile) {
        if (t % 16 == 0 && 2 * t + lane < walk.num_bands) {
          nearest = walk.Nearest(sequence, item.group, 2 * t + lane);
        }
        const int near = __shfl_sync(0xffffffffu, nearest, 2 * t % 32);
        const int far = __shfl_sync(0xffffffffu, nearest, 2 * t % 32 + 1);
        const Slot<kHeadDim> slot(tile);
        const bool masked = near > walk.first_row || far < kHalf - 1;
        BarrierWait(SharedAddress(&shared.k_empty[slot.stage]), slot.parity ^ 1);
        if (masked) {
          for (int n = lane; n < kColumns; n += 32) {
            shared.columns[slot.columns + n] = (n < kHalf ? near : far - kHalf) - (kHalf - 1) + n;
          }
          __syncwarp();
        }
        if (leader) {
          const bool last = t == band_tiles - 1 && !gathers;
          shared.notes[slot.stage] = {item_index, (masked ? kMasked : 0) | (last ? kLast : 0)};
          const uint32_t k_full = SharedAddress(&shared.k_full[slot.stage]);
          BarrierArrive(k_full, kWarpgroup);
          BarrierArriveExpect(k_full, C::kTileBytes);
          const uint32_t k_shared = SharedAddress(shared.k[slot.stage]);
          LoadHalf<kHeadDim>(k_shared, k_map, k_full, near - (kHalf - 1), item.group, 0);
          LoadHalf<kHeadDim>(k_shared, k_map, k_full, far - (kHalf - 1), item.group, 1);
          BarrierWait(SharedAddress(&shared.v_empty[slot.stage]), slot.parity ^ 1);
          const uint32_t v_full = SharedAddress(&shared.v_full[slot.stage]);
          BarrierArrive(v_full, kWarpgroup);
          BarrierArriveExpect(v_full, C::kTileBytes);
          const uint32_t v_shared = SharedAddress(shared.v[slot.stage]);
          LoadHalf<kHeadDim>(v_shared, v_map, v_full, near - (kHalf - 1), item.group, 0);
          LoadHalf<kHeadDim>(v_shared, v_map, v_full, far - (kHalf - 1), item.group, 1);
        }
        __syncwarp();
      }
    } else {
      if (warp >= 2) {
        BarrierWait(SharedAddress(&shared.q_empty), (items & 1) ^ 1);
        LoadQueries<kHeadDim>(batch, sequence, item, SharedAddress(shared.q),
                              Fresh(threadIdx.x) - (kWarpgroup - kQueryThreads));
        BarrierArriveAfterCopies(SharedAddress(&shared.q_full));
      }
      tile += band_tiles;
    }

    if (gathers) {
      Compaction compaction;
      // Warp 0 is behind the last band tile: the ring's slots of this and the next tile are free.
      NamedBarrierSync(kProducerBarrier, kWarpgroup);
      int taken = mixed ? kHalf : 0;
      if (warp == 1)
        FillColumns(shared, sequence, Fresh(item.group), walk, compaction, tile, taken);
      for (bool last = false; !last; ++tile, taken = 0) {
        NamedBarrierSync(kProducerBarrier, kWarpgroup);
        const Slot<kHeadDim> slot(tile);
        int flags = shared.gathered_flags[tile & 1];
        last = (flags & kLast) != 0;
        const uint32_t k_full = SharedAddress(&shared.k_full[slot.stage]);
        const uint32_t k_shared = SharedAddress(shared.k[slot.stage]);
        BarrierWait(SharedAddress(&shared.k_empty[slot.stage]), slot.parity ^ 1);
        int first_column = 0;  // of the band half
        if (warp == 0) {
          if (taken != 0) {
            const int near = walk.Nearest(sequence, item.group, walk.num_bands - 1);
            first_column = near - (kHalf - 1);
            if (near > walk.first_row || near < kHalf - 1) flags |= kMasked;
            for (int n = lane; n < kHalf; n += 32) {
              shared.columns[slot.columns + n] = first_column + n;
            }
            __syncwarp();
          }
          if (leader) {
            shared.notes[slot.stage] = {item_index, flags};
            BarrierArriveExpect(k_full, taken != 0 ? C::kTileBytes / 2 : 0);
            if (taken != 0)
              LoadHalf<kHeadDim>(k_shared, k_map, k_full, first_column, item.group, 0);
          }
          __syncwarp();
        }
        const int32_t* columns = shared.columns + slot.columns;
        Gather<kHeadDim>(k_shared, sequence, sequence.k, Fresh(item.group), columns, taken);
        BarrierArriveAfterCopies(k_full);
        // The K slot of `tile` is taken, so the ring's slots of the next two tiles are free.
        if (warp == 1 && !last) {
          FillColumns(shared, sequence, Fresh(item.group), walk, compaction, tile + 1, 0);
        }
        const uint32_t v_full = SharedAddress(&shared.v_full[slot.stage]);
        const uint32_t v_shared = SharedAddress(shared.v[slot.stage]);
        BarrierWait(SharedAddress(&shared.v_empty[slot.stage]), slot.parity ^ 1);
        if (leader) {
          BarrierArriveExpect(v_full, taken != 0 ? C::kTileBytes / 2 : 0);
          if (taken != 0) LoadHalf<kHeadDim>(v_shared, v_map, v_full, first_column, item.group, 0);
        }
        __syncwarp();
        Gather<kHeadDim>(v_shared, sequence, sequence.v, Fresh(item.group), columns, taken);
        BarrierArriveAfterCopies(v_full);
      }
    }

    if (leader) shared.next_item[items & 1] = following;
    NamedBarrierSync(kProducerBarrier, kWarpgroup);
    item_index = shared.next_item[items & 1];
  }
  if (leader) {
    const Slot<kHeadDim> slot(tile);
    BarrierWait(SharedAddress(&shared.k_empty[slot.stage]), slot.parity ^ 1);
    shared.notes[slot.stage] = {-1, 0};
    BarrierArrive(SharedAddress(&shared.k_full[slot.stage]), kWarpgroup + 1);
  }
}

// ---------------------------------------------------------------------------- consumers

/// s = q k^T of this warpgroup's 64 rows and a tile's 128 columns, unscaled; committed, not waited
/// for.
template <int kHeadDim>
__device__ __forceinline__ void StartScores(float (&s)[kColumns / 2], uint32_t q_shared,
                                            uint32_t k_shared) {
  constexpr int kSliceBytes = Config<kHeadDim>::kSliceBytes;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int offset = step / 4 * kSliceBytes + step % 4 * 32;
    WgmmaSharedN128(s, MatrixDescriptor(q_shared + offset, 1024, 0),
                    MatrixDescriptor(k_shared + offset, 1024, 0), step != 0);
  }
  WgmmaCommit();
}

/// o += p v; committed, not waited for.
template <int kHeadDim>
__device__ __forceinline__ void StartValues(float (&o)[kHeadDim / 2],
                                            const uint32_t (&p)[kColumns / 16][4],
                                            uint32_t v_shared) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    const uint64_t b =
        MatrixDescriptor(v_shared + step * 16 * 128, 1024, Config<kHeadDim>::kSliceBytes);
    if constexpr (kHeadDim == 128) {
      WgmmaRegistersN128(o, p[step], b, 1);
    } else {
      WgmmaRegistersN64(o, p[step], b, 1);
    }
  }
  WgmmaCommit();
}

/// Scores of invisible pairs become -inf. `limit`: position of the thread's two rows; idle rows
/// have the largest one. A negative column is, unsigned, right of every row.
__device__ __forceinline__ void Mask(float (&s)[kColumns / 2], const int32_t* columns,
                                     const uint32_t (&limit)[2]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
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
    correction[half] = Exp2(rows.max[half] * scale_log2 - reference);
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

/// Among four neighbouring lanes: lane j gets word j of each, in the order of the lanes.
__device__ __forceinline__ void TransposeQuad(uint32_t (&w)[4]) {
  const int lane = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, lane & 1 ? w[i] : w[i + 1], 1);
    (lane & 1 ? w[i] : w[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, lane & 2 ? w[i] : w[i + 2], 2);
    (lane & 2 ? w[i] : w[i + 2]) = other;
  }
}

/// out = o / sum for the thread's two rows, `row` and `row + 8` of the row tile.
template <int kHeadDim>
__device__ __forceinline__ void StoreRows(const AttentionBatchSm90& batch,
                                          const SequenceParams& sequence, const WorkItem& item,
                                          int first_row, const float (&o)[kHeadDim / 2],
                                          const RowState& rows) {
  const int lane = threadIdx.x & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    const int row = first_row + half * 8;
    const int position = RowPosition(batch, sequence, item.tile, row);
    const int head = row - DivideRow(row, batch.group_reciprocal) * batch.base.group_size;
    auto* out = static_cast<__nv_bfloat16*>(sequence.out) +
                (position - sequence.q_start) * sequence.out_token_stride +
                (static_cast<int64_t>(item.group) * batch.base.group_size + head) *
                    sequence.out_head_stride;
#pragma unroll
    for (int chunk = 0; chunk < kHeadDim / 8; chunk += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = PackBf16(o[(chunk + i) * 4 + half * 2] * inverse,
                            o[(chunk + i) * 4 + half * 2 + 1] * inverse);
      }
      TransposeQuad(words);
      if (position >= 0) {
        *reinterpret_cast<uint4*>(out + (chunk + lane) * 8) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

/// The products and the softmax of packed rows 64 `consumer` to 64 `consumer` + 63.
template <int kHeadDim>
__device__ __forceinline__ void Consume(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared,
                                        int consumer) {
  const int thread = threadIdx.x % kWarpgroup;
  const bool warp_leader = thread % 32 == 0;
  const int first_row = consumer * 64 + thread / 32 * 16 + thread % 32 / 4;
  const uint32_t q_shared = SharedAddress(shared.q) + consumer * 64 * 128;
  const float scale_log2 = batch.base.scale * 1.4426950408889634f;
  const auto release = [&](uint64_t& barrier) {
    if (warp_leader) BarrierArrive(SharedAddress(&barrier));
  };

  if (consumer == 1) NamedBarrierArrive(kTurnBarrier, 2 * kWarpgroup);  // consumer 0 starts
  uint32_t tile = 0;
  for (uint32_t items = 0;; ++items, ++tile) {
    Slot<kHeadDim> slot(tile);
    BarrierWait(SharedAddress(&shared.k_full[slot.stage]), slot.parity);
    TileNote note = shared.notes[slot.stage];
    if (note.item < 0) break;
    const WorkItem item = FindWorkItem(batch.base, note.item);
    const SequenceParams& sequence = batch.base.sequences[item.sequence];
    const uint32_t limit[2] = {
        static_cast<uint32_t>(RowPosition(batch, sequence, item.tile, first_row)),
        static_cast<uint32_t>(RowPosition(batch, sequence, item.tile, first_row + 8))};
    float o[kHeadDim / 2];
#pragma unroll
    for (float& x : o) x = 0.0f;
    RowState rows;
    float s[kColumns / 2], correction[2];
    uint32_t p[kColumns / 16][4];

    BarrierWait(SharedAddress(&shared.q_full), items & 1);
    FenceProxyAsync();  // queries came by cp.async
    WgmmaFence();
    StartScores<kHeadDim>(s, q_shared, SharedAddress(shared.k[slot.stage]));
    WgmmaWait<0>();
    PinRegisters(s);
    if (note.flags & kMasked) Mask(s, shared.columns + slot.columns, limit);
    release(shared.k_empty[slot.stage]);
    if (note.flags & kLast) release(shared.q_empty);
    Softmax(s, rows, scale_log2, correction);
    PackProbabilities(p, s);

    while ((note.flags & kLast) == 0) {
      const Slot<kHeadDim> next(tile + 1);
      BarrierWait(SharedAddress(&shared.k_full[next.stage]), next.parity);
      const TileNote next_note = shared.notes[next.stage];
      if ((note.flags | next_note.flags) & kGathered) FenceProxyAsync();
      NamedBarrierSync(kTurnBarrier + consumer, 2 * kWarpgroup);
      WgmmaFence();
      StartScores<kHeadDim>(s, q_shared, SharedAddress(shared.k[next.stage]));
      BarrierWait(SharedAddress(&shared.v_full[slot.stage]), slot.parity);
      if (note.flags & kGathered) FenceProxyAsync();
      WgmmaFence();
      StartValues<kHeadDim>(o, p, SharedAddress(shared.v[slot.stage]));
      NamedBarrierArrive(kTurnBarrier + (consumer ^ 1), 2 * kWarpgroup);
      WgmmaWait<1>();
      PinRegisters(s);
      if (next_note.flags & kMasked) Mask(s, shared.columns + next.columns, limit);
      release(shared.k_empty[next.stage]);
      if (next_note.flags & kLast) release(shared.q_empty);
      const bool changed = Softmax(s, rows, scale_log2, correction);
      WgmmaWait<0>();
      PinRegisters(o);
      release(shared.v_empty[slot.stage]);
      if (changed) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
      }
      PackProbabilities(p, s);
      slot = next;
      note = next_note;
      ++tile;
    }
    BarrierWait(SharedAddress(&shared.v_full[slot.stage]), slot.parity);
    if (note.flags & kGathered) FenceProxyAsync();
    WgmmaFence();
    StartValues<kHeadDim>(o, p, SharedAddress(shared.v[slot.stage]));
    WgmmaWait<0>();
    PinRegisters(o);
    release(shared.v_empty[slot.stage]);
    StoreRows<kHeadDim>(batch, sequence, item, first_row, o, rows);
  }
  if (consumer == 0) NamedBarrierSync(kTurnBarrier, 2 * kWarpgroup);  // the turn left over
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    AttentionSm90Kernel(const __grid_constant__ AttentionBatchSm90 batch) {
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    // The swizzle counts from 1024-byte boundaries.
    if (SharedAddress(&shared) % 1024 != 0) __trap();
    for (int i = 0; i < Config<kHeadDim>::kStages; ++i) {
      // Full: the leader, and each producer thread for what it gathered. Empty: each consumer warp.
      BarrierInit(SharedAddress(&shared.k_full[i]), 1 + kWarpgroup);
      BarrierInit(SharedAddress(&shared.v_full[i]), 1 + kWarpgroup);
      BarrierInit(SharedAddress(&shared.k_empty[i]), 8);
      BarrierInit(SharedAddress(&shared.v_empty[i]), 8);
    }
    BarrierInit(SharedAddress(&shared.q_full), kQueryThreads);
    BarrierInit(SharedAddress(&shared.q_empty), 8);
    FenceBarrierInit();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    LowerRegisters<kProducerRegisters>();
    Produce<kHeadDim>(batch, shared);
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consume<kHeadDim>(batch, shared, warpgroup - 1);
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
  const KernelStatus status = AllowSharedMemory(AttentionSm90Kernel<kHeadDim>, kBytes);
  if (status != KernelStatus::kOk) return status;
  const int blocks = std::min(batch.num_items, multiprocessors);
  AttentionSm90Kernel<kHeadDim><<<blocks, kThreads, kBytes, stream>>>(batch);
  return LaunchStatus();
}

}  // namespace
}  // namespace sm90

bool DeviceIsSm90() {
  int device, major;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
}

KernelStatus LaunchAttentionSm90(const AttentionBatch& base, int num_items, int head_dim,
                                 cudaStream_t stream) {
  if (head_dim != 64 && head_dim != 128) return KernelStatus::kUnsupportedShape;
  sm90::AttentionBatchSm90 batch;
  batch.base = base;
  for (int i = 0; i < base.num_sequences; ++i) {
    const SequenceParams& s = base.sequences[i];
    for (const auto& [map, rows] :
         {std::pair{&batch.k_maps[i], s.k}, std::pair{&batch.v_maps[i], s.v}}) {
      if (!sm90::DescribeRows(map, rows, head_dim, s.kv_tokens, base.num_groups, s.kv_token_stride,
                              s.kv_head_stride)) {
        return KernelStatus::kUnsupportedShape;
      }
    }
  }
  batch.counter = sm90::ItemCounter(stream);
  batch.num_items = num_items;
  batch.group_reciprocal = (65536 + base.group_size - 1) / base.group_size;
  return head_dim == 128 ? sm90::Launch<128>(batch, stream) : sm90::Launch<64>(batch, stream);
}

}  // namespace vsprefill::kernels::cuda

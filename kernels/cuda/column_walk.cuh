// Which key columns a row tile reads, 64 at a time.
//
// Vertical-slash: first the selected distance blocks (nearest first, contiguous columns), then the
// verticals that no band covers, compacted on the fly. Block-sparse: first the selected key blocks
// in halves, then the single columns outside of them, then the means of the blocks left out.
//
// A dense row tile is the case "every distance block selected, no verticals". One warp advances the
// walk; the state lies in shared memory, so the tile just produced is seen by the other warps after
// the next barrier. Two tiles are alive at once (the one computed on and the one being loaded).
#pragma once

#include <climits>

#include "kernels/cuda/attention_params.cuh"
#include "kernels/sparse_index.h"
#include "kernels/tile_index.h"

namespace vsprefill::kernels::cuda {

struct ColumnTile {
  int32_t count;   // 0: the walk is over; 64 for contiguous tiles
  int32_t first;   // first column of a contiguous tile (may be negative); else kGathered
  int32_t ring;    // gathered: where the tile's columns start in ColumnWalk::ring
  int32_t masked;  // some (row, column) pair of the tile may be invisible
  int32_t means;   // columns are blocks, whose means are read
};

/// Where a walk takes gathered columns from.
enum WalkSource : int32_t { kVerticals, kSingleColumns, kMeans };

inline constexpr int32_t kGathered = INT_MIN;

struct ColumnWalk {
  // Columns of gathered tiles. Invariant: tile being read (64) + left over (< 64) + one refill step
  // (128) never exceed the capacity.
  static constexpr int kRing = 256;
  int32_t ring[kRing];
  ColumnTile tiles[2];
  const int32_t* bands;  // null: every block
  const int32_t* verticals;
  const uint32_t* band_bits;
  int32_t next_band, num_bands;
  int32_t next_vertical, num_verticals;
  int32_t ring_head, ring_count;
  int32_t first_row, last_row;  // positions of the row tile's ends (last: even past the sequence)
  // Block-sparse; blocks null: not.
  const uint32_t* blocks;
  const uint32_t* columns;
  int32_t next_half, num_halves;  // of key blocks
  int32_t source;                 // WalkSource of next_vertical and num_verticals
  int32_t num_means;              // blocks that may be read through their means
};

/// One thread sets the walk up.
__device__ __forceinline__ void StartWalk(ColumnWalk& walk, const SequenceParams& s, int group,
                                          int tile, int row_tile) {
  const int first = tile * row_tile;
  const int last = first + row_tile - 1;
  walk.blocks = nullptr;
  walk.source = kVerticals;
  walk.next_half = walk.num_halves = walk.num_means = 0;
  if (s.blocks != nullptr) {
    walk.blocks = s.blocks + int64_t{group} * s.blocks_stride + int64_t{tile} * s.block_words;
    const int end = last < s.kv_tokens ? last + 1 : s.kv_tokens;  // of visible columns
    walk.num_halves = (end + kBandBlock - 1) / kBandBlock;
    walk.source = kSingleColumns;
    walk.num_bands = walk.num_verticals = 0;
    if (s.columns != nullptr) {
      walk.columns = s.columns + int64_t{group} * s.columns_stride +
                     int64_t{tile / s.tiles_per_set} * s.column_words;
      walk.num_verticals = end;
    }
    if (s.k_means != nullptr) walk.num_means = first / kKeyBlock;
    walk.next_band = walk.next_vertical = walk.ring_head = walk.ring_count = 0;
    walk.first_row = first;
    walk.last_row = last;
    return;
  }
  const bool dense = s.bands == nullptr || tile >= s.first_tile + s.num_tiles - s.dense_tiles;
  walk.bands = dense ? nullptr : s.bands + group * s.band_list_stride;
  walk.verticals = dense ? nullptr : s.verticals + group * s.vertical_stride;
  walk.band_bits = dense ? nullptr : s.band_bits + group * s.band_stride;
  walk.num_bands = dense ? last / kBandBlock + 1 : s.num_bands[group];
  walk.num_verticals = dense ? 0 : s.num_verticals[group];
  walk.next_band = walk.next_vertical = walk.ring_head = walk.ring_count = 0;
  walk.first_row = first;
  walk.last_row = last;
}

/// Candidate i of the walk's source: its column (INT_MAX past the end), and whether it is read.
__device__ __forceinline__ int Candidate(const ColumnWalk& walk, int i, bool* keep) {
  if (i >= walk.num_verticals) {
    *keep = false;
    return INT_MAX;
  }
  if (walk.source == kVerticals) {
    const int column = walk.verticals[i];
    *keep =
        column <= walk.last_row && !TestBit(walk.band_bits, (walk.last_row - column) / kBandBlock);
    return column;
  }
  *keep = walk.source == kMeans ? !TestBit(walk.blocks, i)
                                : TestBit(walk.columns, i) && !TestBit(walk.blocks, i / kKeyBlock);
  return i;
}

/// The first half of a selected block at or after next_half; at least num_halves: there is none.
__device__ __forceinline__ int NextHalf(const ColumnWalk& walk) {
  const int half = walk.next_half;
  if (half >= walk.num_halves) return half;
  int block = half / 2;
  uint32_t word = walk.blocks[block / 32] >> (block % 32);
  if (word & 1) return half;
  while (word == 0) {
    block = (block / 32 + 1) * 32;
    if (block * 2 >= walk.num_halves) return walk.num_halves;
    word = walk.blocks[block / 32];
  }
  return (block + __ffs(word) - 1) * 2;
}

/// Produces the next tile into *out. Called by all 32 lanes of one warp.
__device__ __forceinline__ void NextTile(ColumnWalk& walk, ColumnTile* out) {
  const int lane = threadIdx.x & 31;
  const int last = walk.last_row;
  const int band = walk.next_band;
  if (band < walk.num_bands) {
    const int block = walk.bands != nullptr ? walk.bands[band] : band;
    const int nearest = last - block * kBandBlock;
    __syncwarp();
    if (nearest >= 0) {
      if (lane == 0) {
        walk.next_band = band + 1;
        const int masked = nearest > walk.first_row || nearest < kBandBlock - 1;
        *out = {kBandBlock, nearest - (kBandBlock - 1), 0, masked, 0};
      }
      __syncwarp();
      return;
    }
    // Blocks ascend: the others lie left of column 0, too.
    if (lane == 0) walk.next_band = walk.num_bands;
  }
  const int half = NextHalf(walk);
  if (half < walk.num_halves) {
    __syncwarp();
    if (lane == 0) {
      walk.next_half = half + 1;
      const int masked = half * kBandBlock + kBandBlock - 1 > walk.first_row;
      *out = {kBandBlock, half * kBandBlock, 0, masked, 0};
    }
    __syncwarp();
    return;
  }
  int head = walk.ring_head, queued = walk.ring_count;
  int next = walk.next_vertical;
  for (;;) {
    while (queued < 64 && next < walk.num_verticals) {
      int column[4];
      bool keep[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) column[u] = Candidate(walk, next + u * 32 + lane, &keep[u]);
      next += 128;
      // Candidates ascend: behind a column right of the row tile nothing is visible.
      if (__any_sync(0xffffffffu, column[3] > last)) next = max(next, walk.num_verticals);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const uint32_t kept = __ballot_sync(0xffffffffu, keep[u]);
        if (keep[u]) {
          const int before = __popc(kept & ((1u << lane) - 1));
          walk.ring[(head + queued + before) & (ColumnWalk::kRing - 1)] = column[u];
        }
        queued += __popc(kept);
      }
    }
    // Means have a tile of their own: not before the last columns have gone.
    if (queued > 0 || walk.source != kSingleColumns) break;
    __syncwarp();
    if (lane == 0) {
      walk.next_half = walk.num_halves;
      walk.source = kMeans;
      walk.num_verticals = walk.num_means;
    }
    __syncwarp();
    next = 0;
  }
  __syncwarp();
  if (lane == 0) {
    const int count = queued < 64 ? queued : 64;
    const int last_column =
        count == 0 ? 0 : walk.ring[(head + count - 1) & (ColumnWalk::kRing - 1)];
    *out = {count, kGathered, head, count < 64 || last_column > walk.first_row,
            walk.source == kMeans};
    walk.ring_head = (head + count) & (ColumnWalk::kRing - 1);
    walk.ring_count = queued - count;
    walk.next_vertical = next;
  }
  __syncwarp();
}

/// What ln(kKeyBlock) is in log2 units.
inline constexpr float kMeansBiasLog2 = 7.0f;
static_assert(kKeyBlock == 1 << 7);

/// Rows that a tile's column numbers count, of K or V or their means.
struct TileSource {
  const void* rows;
  int64_t stride;  // elements
  int32_t end;     // valid numbers are below it
};
template <typename Element>
__device__ __forceinline__ TileSource SourceOf(const ColumnTile& tile, const SequenceParams& s,
                                               const void* rows, const void* means, int kv_head,
                                               int head_dim) {
  if (tile.means) {
    const int64_t head = int64_t{kv_head} * s.means_stride * head_dim;
    return {static_cast<const Element*>(means) + head, head_dim, s.means_stride};
  }
  return {static_cast<const Element*>(rows) + kv_head * s.kv_head_stride, s.kv_token_stride,
          s.kv_tokens};
}

/// Column n of a tile; INT_MAX (visible to no row) past a gathered tile's end. Contiguous tiles may
/// yield negative columns, and columns past the end of the sequence.
__device__ __forceinline__ int TileColumn(const ColumnWalk& walk, const ColumnTile& tile, int n) {
  if (tile.first != kGathered) return tile.first + n;
  return n < tile.count ? walk.ring[(tile.ring + n) & (ColumnWalk::kRing - 1)] : INT_MAX;
}

}  // namespace vsprefill::kernels::cuda

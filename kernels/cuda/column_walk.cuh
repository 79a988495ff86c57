// Which key columns a row tile reads, 64 at a time: first the selected distance blocks (nearest
// first, contiguous columns), then the verticals that no band covers, compacted on the fly.
//
// A dense row tile is the case "every distance block selected, no verticals". One warp advances the
// walk; the state lies in shared memory, so the tile just produced is seen by the other warps after
// the next barrier. Two tiles are alive at once (the one computed on and the one being loaded).
#pragma once

#include <climits>

#include "kernels/cuda/attention_params.cuh"
#include "kernels/sparse_index.h"

namespace vsprefill::kernels::cuda {

struct ColumnTile {
  int32_t count;   // 0: the walk is over; 64 for contiguous tiles
  int32_t first;   // first column of a contiguous tile (may be negative); else kGathered
  int32_t ring;    // gathered: where the tile's columns start in ColumnWalk::ring
  int32_t masked;  // some (row, column) pair of the tile may be invisible
};

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
};

/// One thread sets the walk up.
__device__ __forceinline__ void StartWalk(ColumnWalk& walk, const SequenceParams& s, int group,
                                          int tile, int row_tile) {
  const int first = tile * row_tile;
  const int last = first + row_tile - 1;
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
        *out = {kBandBlock, nearest - (kBandBlock - 1), 0, masked};
      }
      __syncwarp();
      return;
    }
    // Blocks ascend: the others lie left of column 0, too.
    if (lane == 0) walk.next_band = walk.num_bands;
  }
  int head = walk.ring_head, queued = walk.ring_count;
  int next = walk.next_vertical;
  const int total = walk.num_verticals;
  while (queued < 64 && next < total) {
    int column[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int i = next + u * 32 + lane;
      column[u] = i < total ? walk.verticals[i] : INT_MAX;
    }
    bool keep[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      keep[u] = column[u] <= last;
      if (keep[u]) {
        const int block = (last - column[u]) / kBandBlock;
        keep[u] = ((walk.band_bits[block >> 5] >> (block & 31)) & 1) == 0;
      }
    }
    next += 128;
    // Verticals ascend: behind a column right of the row tile nothing is visible.
    if (__any_sync(0xffffffffu, column[3] > last)) next = total;
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
  __syncwarp();
  if (lane == 0) {
    const int count = queued < 64 ? queued : 64;
    const int last_column =
        count == 0 ? 0 : walk.ring[(head + count - 1) & (ColumnWalk::kRing - 1)];
    *out = {count, kGathered, head, count < 64 || last_column > walk.first_row};
    walk.ring_head = (head + count) & (ColumnWalk::kRing - 1);
    walk.ring_count = queued - count;
    walk.next_vertical = next;
  }
  __syncwarp();
}

/// Column n of a tile; INT_MAX (visible to no row) past a gathered tile's end. Contiguous tiles may
/// yield negative columns, and columns past the end of the sequence.
__device__ __forceinline__ int TileColumn(const ColumnWalk& walk, const ColumnTile& tile, int n) {
  if (tile.first != kGathered) return tile.first + n;
  return n < tile.count ? walk.ring[(tile.ring + n) & (ColumnWalk::kRing - 1)] : INT_MAX;
}

}  // namespace vsprefill::kernels::cuda

// The sparse index of vertical-slash attention: which keys a row tile reads (docs/vsprefill.md).
//
// Row tiles. Rows are packed over an index group of g query heads (all heads of a KV group, or a
// single head for methods that select per head): a row tile holds RowTilePositions(g) =
// floor(128 / g) consecutive query positions times the g heads. Tiles are aligned to absolute
// position 0, so the same selection gives the same result for every chunking of a prompt.
//
// Distance space. For the row tile of positions [m0, m0 + M) the distance of key column c is
// delta = (m0 + M - 1) - c, counted from the tile's LAST position even where the sequence ends
// inside the tile. Bands are whole blocks of kBandBlock distances: block b holds distances
// [b * kBandBlock, (b + 1) * kBandBlock). A row tile reads column c (for all its rows, causal mask
// applied) iff the bit of block delta / kBandBlock is set or c is a selected vertical; a vertical
// whose distance is covered by a band is skipped, so no column is read twice. The local band is at
// least 128 >= M distances wide, so surviving verticals lie left of the row tile.
//
// Ref: VSPrefill (arXiv 2603.04460); the distance-space form and the block rounding are ours.
#pragma once

#include <cstdint>

#include "kernels/tensor_view.h"

namespace vsprefill::kernels {

inline constexpr int kPackedRows = 128;
inline constexpr int kBandBlock = 64;

/// Query positions in one row tile for a group of `group_size` query heads per KV head (1..128).
constexpr int RowTilePositions(int group_size) { return kPackedRows / group_size; }
constexpr int64_t BandBlocks(int64_t kv_tokens, int row_tile) {
  // The first row tile's last position can lie past the end of the sequence.
  return (kv_tokens + row_tile - 1 + kBandBlock - 1) / kBandBlock;
}
constexpr int64_t BandWords(int64_t kv_tokens, int row_tile) {
  return (BandBlocks(kv_tokens, row_tile) + 31) / 32;
}

/// One sequence's index for all index groups of one layer. All pointers are in the memory of the
/// device that executes it; counts stay there too.
struct SparseIndexView {
  int num_groups = 0;
  /// Selected columns, ascending: int32 [num_groups, vertical_stride], the first num_verticals[g]
  /// of each row are valid.
  int32_t* verticals = nullptr;
  int64_t vertical_stride = 0;
  int32_t* num_verticals = nullptr;  // int32 [num_groups]
  /// Bit b % 32 of word b / 32 is set iff block b of distances is selected:
  /// uint32 [num_groups, band_stride].
  uint32_t* band_bits = nullptr;
  int64_t band_stride = 0;
  /// The selected blocks as a list, ascending: int32 [num_groups, band_list_stride]; the first
  /// num_bands[g] are valid. Holds the same set as band_bits.
  int32_t* bands = nullptr;
  int64_t band_list_stride = 0;
  int32_t* num_bands = nullptr;  // int32 [num_groups]
  /// A row tile that contains a position >= dense_from attends to every visible key.
  int64_t dense_from = INT64_MAX;
};

}  // namespace vsprefill::kernels

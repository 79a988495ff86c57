// Which columns a row tile reads, in which order: the one walk that AttentionCpu and CountPairsCpu
// share. Column order within a tile: surviving verticals ascending, then band columns ascending, so
// that columns under the causal mask come last.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"

namespace vsprefill::kernels {

/// Rows of one sequence that one row tile holds. Positions are absolute.
struct RowTile {
  int64_t first = 0;                   // position of the tile's first row, a multiple of its size
  int64_t last = 0;                    // the tile's last position: distances count from here
  int64_t row_begin = 0, row_end = 0;  // positions that this call computes, within [first, last]
  bool dense = false;
};

inline int64_t NumRowTiles(int group_size, const AttentionSequence& s) {
  const int64_t m = RowTilePositions(group_size);
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  return s.q_tokens == 0 ? 0 : (s.kv_tokens - 1) / m - q_start / m + 1;
}

/// The i-th row tile that the sequence's queries touch.
inline RowTile GetRowTile(int group_size, const AttentionSequence& s, int64_t i) {
  const int64_t m = RowTilePositions(group_size);
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  RowTile tile;
  tile.first = (q_start / m + i) * m;
  tile.last = tile.first + m - 1;
  tile.row_begin = std::max(tile.first, q_start);
  tile.row_end = std::min(tile.first + m, s.kv_tokens);
  tile.dense = s.index == nullptr || tile.last >= s.index->dense_from;
  return tile;
}

/// Lanes that the kernels compute for a tile: packed rows padded to whole vectors of 16.
inline int64_t TileLanes(int group_size, const RowTile& tile) {
  return ((tile.row_end - tile.row_begin) * group_size + 15) / 16 * 16;
}

inline bool BandSelected(const SparseIndexView& index, int group, int64_t block) {
  return (index.band_bits[group * index.band_stride + block / 32] >> (block % 32)) & 1u;
}

/// Columns of one selected band block for a tile, clipped to [0, row_end); may be empty.
struct ColumnRange {
  int64_t begin = 0, end = 0;
};
inline ColumnRange BandColumns(const RowTile& tile, int64_t block) {
  return {std::max<int64_t>(0, tile.last - (block + 1) * kBandBlock + 1),
          std::min(tile.row_end, tile.last - block * kBandBlock + 1)};
}

/// Yields the columns of (tile, group), `capacity` at a time.
class ColumnStream {
 public:
  ColumnStream(const SparseIndexView* index, int group, const RowTile& tile)
      : index_(index), tile_(tile), group_(group) {
    if (tile.dense) {
      vertical_end_ = 0;
      next_band_ = -1;
      range_ = {0, tile.row_end};
    } else {
      vertical_end_ = index->num_verticals[group];
      next_band_ = index->num_bands[group] - 1;
    }
  }

  /// Writes up to `capacity` columns and returns how many; 0 at the end.
  int Next(int32_t* columns, int capacity) {
    int count = 0;
    while (count < capacity && vertical_ < vertical_end_) {
      const int32_t c = index_->verticals[group_ * index_->vertical_stride + vertical_++];
      if (c >= tile_.row_end) {
        vertical_ = vertical_end_;
        break;
      }
      columns[count] = c;
      count += !BandSelected(*index_, group_, (tile_.last - c) / kBandBlock);
    }
    while (count < capacity) {
      if (range_.begin >= range_.end) {
        if (next_band_ < 0) break;
        range_ =
            BandColumns(tile_, index_->bands[group_ * index_->band_list_stride + next_band_--]);
        continue;
      }
      const int take =
          static_cast<int>(std::min<int64_t>(capacity - count, range_.end - range_.begin));
      for (int i = 0; i < take; ++i) columns[count + i] = static_cast<int32_t>(range_.begin + i);
      range_.begin += take;
      count += take;
    }
    return count;
  }

 private:
  const SparseIndexView* index_;
  RowTile tile_;
  int group_;
  int32_t vertical_ = 0, vertical_end_ = 0, next_band_ = -1;
  ColumnRange range_;
};

}  // namespace vsprefill::kernels

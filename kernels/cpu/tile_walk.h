// Which columns a row tile reads, in which order: the one walk that AttentionCpu and CountPairsCpu
// share. Column order within a tile: single columns that no band or block holds ascending, then
// band or block columns ascending, so that columns under the causal mask come last.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"

namespace vsprefill::kernels {

/// Rows of one sequence that one row tile holds. Positions are absolute.
struct RowTile {
  int64_t number = 0;                  // counted from position 0
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
  tile.number = q_start / m + i;
  tile.first = tile.number * m;
  tile.last = tile.first + m - 1;
  tile.row_begin = std::max(tile.first, q_start);
  tile.row_end = std::min(tile.first + m, s.kv_tokens);
  tile.dense = s.dense() || (s.index != nullptr && tile.last >= s.index->dense_from);
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

inline ColumnRange BlockColumns(const RowTile& tile, int64_t block) {
  return {block * kKeyBlock, std::min(tile.row_end, (block + 1) * kKeyBlock)};
}

/// Blocks whose mean stands in for them, where the index has means: [0, this) without the set ones.
inline int64_t NumMeanBlocks(const RowTile& tile) { return tile.first / kKeyBlock; }

/// Yields the columns of (tile, group), `capacity` at a time.
class ColumnStream {
 public:
  ColumnStream(const AttentionSequence& s, int group, const RowTile& tile) : tile_(tile) {
    if (tile.dense) {
      range_ = {0, tile.row_end};
    } else if (s.index != nullptr) {
      index_ = s.index;
      verticals_ = index_->verticals + group * index_->vertical_stride;
      vertical_end_ = index_->num_verticals[group];
      bands_ = index_->bands + group * index_->band_list_stride;
      next_band_ = index_->num_bands[group] - 1;
      group_ = group;
    } else {
      blocks_ = s.tiles->BlocksOf(group, tile.number);
      block_end_ = KeyBlocks(tile.row_end);
      if (s.tiles->columns != nullptr) {
        columns_ = s.tiles->ColumnsOf(group, tile.number);
        column_end_ = tile.row_end;
      }
    }
  }

  /// Writes up to `capacity` columns and returns how many; 0 at the end.
  int Next(int32_t* columns, int capacity) {
    int count = 0;
    while (count < capacity && vertical_ < vertical_end_) {
      const int32_t c = verticals_[vertical_++];
      if (c >= tile_.row_end) {
        vertical_ = vertical_end_;
        break;
      }
      columns[count] = c;
      count += !BandSelected(*index_, group_, (tile_.last - c) / kBandBlock);
    }
    for (; count < capacity && column_ < column_end_; ++column_) {
      if (column_ % 32 == 0 && columns_[column_ / 32] == 0) {
        column_ += 31;
        continue;
      }
      columns[count] = static_cast<int32_t>(column_);
      count += TestBit(columns_, column_) && !TestBit(blocks_, column_ / kKeyBlock);
    }
    while (count < capacity) {
      if (range_.begin >= range_.end && !NextRange()) break;
      const int take =
          static_cast<int>(std::min<int64_t>(capacity - count, range_.end - range_.begin));
      for (int i = 0; i < take; ++i) columns[count + i] = static_cast<int32_t>(range_.begin + i);
      range_.begin += take;
      count += take;
    }
    return count;
  }

 private:
  /// Sets range_ to the next band or block, which may be empty; false at the end.
  bool NextRange() {
    if (next_band_ >= 0) {
      range_ = BandColumns(tile_, bands_[next_band_--]);
      range_.end = std::max(range_.begin, range_.end);
      return true;
    }
    while (block_ < block_end_ && !TestBit(blocks_, block_)) ++block_;
    if (block_ >= block_end_) return false;
    range_ = BlockColumns(tile_, block_++);
    return true;
  }

  RowTile tile_;
  // Vertical-slash.
  const SparseIndexView* index_ = nullptr;
  const int32_t* verticals_ = nullptr;
  const int32_t* bands_ = nullptr;
  int group_ = 0;
  int32_t vertical_ = 0, vertical_end_ = 0, next_band_ = -1;
  // Block-sparse.
  const uint32_t* blocks_ = nullptr;
  const uint32_t* columns_ = nullptr;
  int64_t block_ = 0, block_end_ = 0, column_ = 0, column_end_ = 0;

  ColumnRange range_;
};

/// Yields the blocks of (tile, group) that are read through their means, `capacity` at a time.
class MeanStream {
 public:
  MeanStream(const AttentionSequence& s, int group, const RowTile& tile) {
    if (tile.dense || s.tiles == nullptr || s.tiles->k_means == nullptr) return;
    blocks_ = s.tiles->BlocksOf(group, tile.number);
    end_ = NumMeanBlocks(tile);
  }
  int Next(int32_t* blocks, int capacity) {
    int count = 0;
    for (; count < capacity && block_ < end_; ++block_) {
      blocks[count] = static_cast<int32_t>(block_);
      count += !TestBit(blocks_, block_);
    }
    return count;
  }

 private:
  const uint32_t* blocks_ = nullptr;
  int64_t block_ = 0, end_ = 0;
};

}  // namespace vsprefill::kernels

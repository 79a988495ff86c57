// Exact pair counts of AttentionCpu's tile walk without walking the columns: verticals are counted
// by prefix sums, bands and blocks as ranges.
#include <algorithm>
#include <vector>

#include "kernels/cpu/tile_walk.h"

namespace vsprefill::kernels {
namespace {

// Sum over rows [row_begin, row_end) of the number of columns of [begin, end) that each may see.
int64_t CausalPairs(int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
  if (begin >= end) return 0;
  int64_t pairs = 0;
  // Rows at or past `end` - 1 see all columns; the others those up to their own position.
  const int64_t full_from = std::clamp(end - 1, row_begin, row_end);
  pairs += (row_end - full_from) * (end - begin);
  const int64_t partial_from = std::max(row_begin, begin);
  if (partial_from < full_from) {
    const int64_t rows = full_from - partial_from;
    pairs += rows * (partial_from - begin + 1) + rows * (rows - 1) / 2;
  }
  return pairs;
}

// What one row tile of one index group reads.
struct TileCounts {
  int64_t columns = 0;   // that are multiplied, before padding
  int64_t unmasked = 0;  // pairs, of one query head
  int64_t means = 0;     // pseudo-keys
};

TileCounts CountBands(const SparseIndexView& index, int group, const RowTile& tile,
                      const std::vector<int32_t>& verticals_before) {
  TileCounts counts;
  // Verticals lie left of the rows, so every row sees each of them (sparse_index.h).
  int64_t verticals = verticals_before[tile.row_end];
  for (int32_t i = 0; i < index.num_bands[group]; ++i) {
    const ColumnRange range = BandColumns(tile, index.bands[group * index.band_list_stride + i]);
    if (range.begin >= range.end) continue;
    counts.columns += range.end - range.begin;
    counts.unmasked += CausalPairs(tile.row_begin, tile.row_end, range.begin, range.end);
    verticals -= verticals_before[range.end] - verticals_before[range.begin];
  }
  counts.columns += verticals;
  counts.unmasked += verticals * (tile.row_end - tile.row_begin);
  return counts;
}

TileCounts CountBlocks(const AttentionSequence& s, int group, const RowTile& tile) {
  TileCounts counts;
  const uint32_t* blocks = s.tiles->BlocksOf(group, tile.number);
  for (int64_t b = 0; b < KeyBlocks(tile.row_end); ++b) {
    if (!TestBit(blocks, b)) continue;
    const ColumnRange range = BlockColumns(tile, b);
    counts.columns += range.end - range.begin;
    counts.unmasked += CausalPairs(tile.row_begin, tile.row_end, range.begin, range.end);
  }
  if (s.tiles->columns != nullptr) {
    const uint32_t* columns = s.tiles->ColumnsOf(group, tile.number);
    int64_t single = 0;  // they lie left of the rows, too
    for (int64_t b = 0; b < KeyBlocks(tile.row_end); ++b) {
      if (TestBit(blocks, b)) continue;
      const ColumnRange range = BlockColumns(tile, b);
      single += CountBits(columns + range.begin / 32, range.end - range.begin);
    }
    counts.columns += single;
    counts.unmasked += single * (tile.row_end - tile.row_begin);
  }
  if (s.tiles->k_means != nullptr) {
    counts.means = NumMeanBlocks(tile) - CountBits(blocks, NumMeanBlocks(tile));
  }
  return counts;
}

int64_t Even(int64_t columns) { return (columns + 1) / 2 * 2; }

}  // namespace

KernelStatus CountPairsCpu(const AttentionShape& shape, const AttentionSequence& s,
                           PairCounts* counts, Stream /*stream*/) {
  if (!SupportedIndex(shape, s)) return KernelStatus::kUnsupportedShape;
  const int groups = IndexGroups(shape, s);
  const int g = shape.num_q_heads / groups;
  const SparseIndexView* index = s.index;
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  const int64_t tiles = NumRowTiles(g, s);
  counts->dense += CausalPairs(q_start, s.kv_tokens, 0, s.kv_tokens) * shape.num_q_heads;
  std::vector<int32_t> verticals_before;  // [c]: selected verticals < c
  for (int group = 0; group < groups; ++group) {
    if (index != nullptr) {
      ++counts->indexes;
      counts->vertical_columns += index->num_verticals[group];
      counts->slash_diagonals += int64_t{index->num_bands[group]} * kBandBlock;
      verticals_before.assign(s.kv_tokens + 1, 0);
      const int32_t* verticals = index->verticals + group * index->vertical_stride;
      for (int32_t i = 0; i < index->num_verticals[group] && verticals[i] < s.kv_tokens; ++i) {
        verticals_before[verticals[i] + 1] = 1;
      }
      for (int64_t c = 0; c < s.kv_tokens; ++c) verticals_before[c + 1] += verticals_before[c];
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const RowTile tile = GetRowTile(g, s, t);
      TileCounts read;
      if (tile.dense) {
        read.columns = tile.row_end;
        read.unmasked = CausalPairs(tile.row_begin, tile.row_end, 0, read.columns);
      } else {
        read = index != nullptr ? CountBands(*index, group, tile, verticals_before)
                                : CountBlocks(s, group, tile);
      }
      counts->unmasked += read.unmasked * g;
      counts->multiplied += TileLanes(g, tile) * (Even(read.columns) + Even(read.means));
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

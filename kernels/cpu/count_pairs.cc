// Exact pair counts of AttentionCpu's tile walk without walking the columns: verticals are counted
// by prefix sums, bands as ranges.
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

}  // namespace

KernelStatus CountPairsCpu(const AttentionShape& shape, const AttentionSequence& s,
                           PairCounts* counts, Stream /*stream*/) {
  const int g = shape.group_size();
  const SparseIndexView* index = s.index;
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  const int64_t tiles = NumRowTiles(g, s);
  counts->dense += CausalPairs(q_start, s.kv_tokens, 0, s.kv_tokens) * shape.num_q_heads;
  std::vector<int32_t> verticals_before;  // [c]: selected verticals < c
  for (int group = 0; group < shape.num_kv_heads; ++group) {
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
      const int64_t rows = tile.row_end - tile.row_begin;
      int64_t columns = 0, unmasked = 0;
      if (tile.dense) {
        columns = tile.row_end;
        unmasked = CausalPairs(tile.row_begin, tile.row_end, 0, columns);
      } else {
        // Verticals lie left of the rows, so every row sees each of them (sparse_index.h).
        int64_t verticals = verticals_before[tile.row_end];
        for (int32_t i = 0; i < index->num_bands[group]; ++i) {
          const ColumnRange range =
              BandColumns(tile, index->bands[group * index->band_list_stride + i]);
          if (range.begin >= range.end) continue;
          columns += range.end - range.begin;
          unmasked += CausalPairs(tile.row_begin, tile.row_end, range.begin, range.end);
          verticals -= verticals_before[range.end] - verticals_before[range.begin];
        }
        columns += verticals;
        unmasked += verticals * rows;
      }
      counts->unmasked += unmasked * g;
      counts->multiplied += TileLanes(g, tile) * ((columns + 1) / 2 * 2);
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

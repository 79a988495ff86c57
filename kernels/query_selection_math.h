// The arithmetic of query_selection.h that all implementations share, so that they agree bit for
// bit: integers, and chains of single IEEE operations with no multiply followed by an add.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/query_selection.h"
#include "kernels/selection_math.h"

namespace vsprefill::kernels::selection {

inline constexpr uint64_t kShareOne = uint64_t{1} << 40;

/// What a row's weights are multiplied with; `sum` is theirs, at least Weight(max, max).
constexpr double ShareUnit(uint64_t sum) {
  return static_cast<double>(kShareOne) / static_cast<double>(sum);
}
constexpr uint64_t Share(uint64_t weight, double unit) {
  return static_cast<uint64_t>(static_cast<double>(weight) * unit);
}

constexpr bool Supported(const QuerySelectionInput& input) {
  const AttentionSequence& s = input.sequence;
  return s.q_tokens >= 1 && s.q_tokens <= s.kv_tokens && s.kv_tokens <= kMaxSelectionTokens &&
         input.prompt_tokens >= s.kv_tokens;
}

/// Row tiles of an index group of g query heads that hold a query of the chunk.
struct ChunkTiles {
  int64_t positions = 0;  // per tile
  int64_t first = 0, count = 0;
};
constexpr ChunkTiles TilesOf(const AttentionSequence& s, int group_size) {
  ChunkTiles tiles;
  tiles.positions = RowTilePositions(group_size);
  tiles.first = (s.kv_tokens - s.q_tokens) / tiles.positions;
  tiles.count = (s.kv_tokens - 1) / tiles.positions + 1 - tiles.first;
  return tiles;
}

/// Queries of the chunk in row tile t: positions [begin, end).
struct TileRows {
  int64_t begin = 0, end = 0;
};
constexpr TileRows RowsOf(const AttentionSequence& s, const ChunkTiles& tiles, int64_t tile) {
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  const int64_t first = tile * tiles.positions, end = first + tiles.positions;
  return {first > q_start ? first : q_start, end < s.kv_tokens ? end : s.kv_tokens};
}

// StreamingLLM.

/// Blocks of distances that hold every row's window of `window` tokens, of `all` there are.
constexpr int64_t WindowBands(int64_t window, int64_t row_tile, int64_t all) {
  const int64_t bands = (window + row_tile - 1 + kBandBlock - 1) / kBandBlock;
  return bands < 2 ? std::min<int64_t>(2, all) : std::min(bands, all);
}

// FlashPrefill.

/// Blocks [0, this) that are scored in a row tile.
constexpr int64_t ScoredBlocks(const FlashParams& params, int64_t tile_first, int64_t row_end) {
  return params.whole_blocks ? tile_first / kKeyBlock : row_end / kKeyBlock;
}
/// First row whose logit with `block` counts.
constexpr int64_t FirstScoringRow(const FlashParams& params, int64_t block) {
  return params.whole_blocks ? 0 : block * kKeyBlock;
}
/// Whether the tile is one of the prompt's last ones.
constexpr bool IsLastTile(const FlashParams& params, int64_t tile, int64_t positions,
                          int64_t prompt_tokens) {
  return tile >= (prompt_tokens - 1) / positions + 1 - params.last_tiles;
}
/// Blocks that are read whatever their score; `row_begin` and `row_end`: the tile's rows.
constexpr bool FlashForced(const FlashParams& params, int64_t block, int64_t tile_first,
                           int64_t row_end) {
  return block < params.sink_blocks || (block > tile_first / kKeyBlock - params.window_blocks &&
                                        block <= (row_end - 1) / kKeyBlock);
}
constexpr bool ReachesAlpha(uint64_t score, double alpha, uint64_t best) {
  return static_cast<double>(score) >= alpha * static_cast<double>(best);
}

// FlexPrefill.

/// Blocks that a cover of `entries` entries becomes, between the two budgets, of `all` blocks.
constexpr int64_t FlexBlocks(int64_t entries, const FlexParams& params, int64_t all) {
  const int64_t low = (params.min_budget + kKeyBlock - 1) / kKeyBlock;
  const int64_t high = (params.max_budget + kKeyBlock - 1) / kKeyBlock;
  return std::min(all, std::min(std::max(entries / kKeyBlock + 1, low), std::max(high, low)));
}
/// Whether a running sum is still within gamma of `rows` rows.
constexpr bool WithinGamma(uint64_t sum, double gamma, int64_t rows) {
  return static_cast<double>(sum) <= gamma * (static_cast<double>(rows) * 1099511627776.0);
}

/// Square root of the Jensen-Shannon divergence (natural logarithm) between two distributions given
/// as shares; `a_total` and `b_total` are what they count as 1.
inline double SqrtJsDivergence(const uint64_t* a, double a_total, const uint64_t* b, double b_total,
                               int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double p = static_cast<double>(a[i]) / a_total, q = static_cast<double>(b[i]) / b_total;
    const double middle = (p + q) / 2;
    if (p > 0) sum += p * std::log(p / middle);
    if (q > 0) sum += q * std::log(q / middle);
  }
  return std::sqrt(std::max(sum / 2, 0.0));
}

// XAttention.

constexpr bool ReachesThreshold(uint64_t sum, double threshold, uint64_t total) {
  return static_cast<double>(sum) >= threshold * static_cast<double>(total);
}

// AnchorAttention.

/// First block of the window of a set whose first row tile is given.
constexpr int64_t AnchorWindow(const AnchorParams& params, int64_t set_first) {
  return set_first > params.window_blocks ? set_first - params.window_blocks : 0;
}

}  // namespace vsprefill::kernels::selection

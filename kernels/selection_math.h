// The arithmetic of selection (kernels/selection.h), the same source for host and device, so that
// all implementations agree bit for bit. Sums are integers (any order gives the same result);
// floating-point expressions are chains of single IEEE operations with no multiply followed by an
// add, so contraction to FMA cannot change them. nvcc: usable in device code through
// --expt-relaxed-constexpr; do not compile with -use_fast_math.
//
// Legend: n = kv_tokens, M = positions per row tile, w = weight, j = column, o = offset (diagonal),
// b = block of 64 distances. Qx = fixed point with x fractional bits.
#pragma once

#include <cstdint>

#include "kernels/selection.h"

namespace vsprefill::kernels::selection {

/// Logits that are no finite number count as the lowest one.
constexpr float Sanitize(float logit) {
  constexpr float kMax = 3.402823466e+38f;
  return (logit >= -kMax && logit <= kMax) ? logit : -kMax;
}

/// exp(logit - max) as Q36, truncated; relative error below 1e-7 (+ 2^-36 absolute), monotone in
/// logit. Both arguments sanitized, logit <= max. Weight(max, max) = 2^36.
constexpr uint64_t Weight(float logit, float max) {
  const float octaves = (max - logit) * 1.44269504f;
  if (!(octaves < 36.0f)) return 0;
  const uint32_t fixed = static_cast<uint32_t>(octaves * 16777216.0f);  // Q24, exact
  const uint32_t fraction = (fixed & 0xffffffu) << 8;                   // Q32
  // 2^-fraction as Q31: alternating polynomial of degree 6, max error 2.6e-9.
  const auto times = [fraction](uint32_t x) -> uint32_t { return uint64_t{x} * fraction >> 32; };
  uint32_t p = 0x395c0;
  p = 0x29cfcc - times(p);
  p = 0x139f092 - times(p);
  p = 0x71a5911 - times(p);
  p = 0x1ebfadad - times(p);
  p = 0x58b90b22 - times(p);
  p = 0x80000000 - times(p);
  return (uint64_t{p} << 5) >> (fixed >> 24);
}

/// What follows from the sizes and parameters alone; the same for all groups.
struct Geometry {
  int64_t n = 0, q_start = 0;
  int64_t row_tile = 0;      // M
  int64_t num_blocks = 0;    // BandBlocks(n, M)
  int64_t local_blocks = 0;  // LB, at most num_blocks
  int64_t local_width = 0;   // Lw
  int64_t sinks = 0;         // forced columns are [0, sinks)
  int64_t columns_end = 0;   // E, >= sinks; candidates are [sinks, E)
  int64_t sparse_end = 0;    // rows [q_start, sparse_end) are sparse, [sparse_end, n) dense
  int64_t dense_from = 0;
};

constexpr bool Supported(const SelectionInput& input) {
  return input.num_groups >= 1 && input.group_size >= 1 && input.group_size <= kPackedRows &&
         input.kv_tokens >= 1 && input.kv_tokens <= kMaxSelectionTokens && input.q_start >= 0 &&
         input.q_start < input.kv_tokens && input.prompt_tokens >= input.kv_tokens;
}

constexpr Geometry MakeGeometry(const SelectionInput& input, const SelectionParams& params) {
  Geometry g;
  g.n = input.kv_tokens;
  g.q_start = input.q_start;
  g.row_tile = RowTilePositions(input.group_size);
  g.num_blocks = BandBlocks(g.n, static_cast<int>(g.row_tile));
  int64_t local = (int64_t{params.local_tokens} + kBandBlock - 1) / kBandBlock;
  local = local < 2 ? 2 : local;
  g.local_width = local * kBandBlock - g.row_tile / 2;
  g.local_blocks = local < g.num_blocks ? local : g.num_blocks;
  const int64_t tiles_end = (g.n + g.row_tile - 1) / g.row_tile * g.row_tile;
  g.columns_end = tiles_end - local * kBandBlock;
  if (g.columns_end < 0) g.columns_end = 0;
  g.sinks = params.sink_tokens < g.columns_end ? params.sink_tokens : g.columns_end;
  g.dense_from = INT64_MAX;
  g.sparse_end = g.n;
  if (params.last_dense_tokens > 0) {
    g.dense_from = input.prompt_tokens - params.last_dense_tokens;
    if (g.dense_from < 0) g.dense_from = 0;
    const int64_t dense_tile = g.dense_from / g.row_tile * g.row_tile;
    if (dense_tile < g.sparse_end) g.sparse_end = dense_tile;
  }
  if (g.sparse_end < g.q_start) g.sparse_end = g.q_start;
  return g;
}

/// Mean mass per pair on diagonal o as Q40, at most 1.
/// `unit` = OffsetUnit(n, sum of slash weights).
constexpr double OffsetUnit(int64_t n, uint64_t slash_sum) {
  return (static_cast<double>(n) * 1099511627776.0) / static_cast<double>(slash_sum);
}
constexpr uint64_t OffsetMass(uint64_t weight, int64_t n, int64_t offset, double unit) {
  const uint64_t mass =
      static_cast<uint64_t>((static_cast<double>(weight) * unit) / static_cast<double>(n - offset));
  return mass < (uint64_t{1} << 40) ? mass : (uint64_t{1} << 40);
}

/// Score of column j. `unit` = OffsetUnit(n, sum of vertical weights); `local_mass` = H(j) =
/// sum of OffsetMass over offsets o < min(local_width, n - j).
constexpr float ColumnScore(uint64_t weight, const Geometry& g, int64_t column, double unit,
                            uint64_t local_mass) {
  const uint64_t mass = static_cast<uint64_t>(static_cast<double>(weight) * unit);
  const uint64_t rest = mass > local_mass ? mass - local_mass : 0;
  int64_t rows = g.n - column - g.local_width;
  if (rows < 64) rows = 64;
  const double scale = static_cast<double>(g.n) * (1.0 / 1099511627776.0);  // exact
  return static_cast<float>((static_cast<double>(rest) * scale) / static_cast<double>(rows));
}

/// Number of (distance in block b, row of the tile) pairs that meet on diagonal o: the weight of
/// p_s[o] in M * mass_b. Nonzero for o in [64 b - M + 1, 64 b + 63].
constexpr int64_t BlockOverlap(int64_t block, int64_t offset, int64_t row_tile) {
  const int64_t first = block * kBandBlock > offset ? block * kBandBlock : offset;
  const int64_t block_last = block * kBandBlock + kBandBlock - 1;
  const int64_t last = block_last < offset + row_tile - 1 ? block_last : offset + row_tile - 1;
  return last >= first ? last - first + 1 : 0;
}

/// Score of block b, whose weight is sum_o w_s[o] * BlockOverlap(b, o, M) (< 2^50).
/// `unit` = BlockUnit(g, sum of slash weights).
constexpr double BlockUnit(const Geometry& g, uint64_t slash_sum) {
  return static_cast<double>(g.n * g.n) /
         (static_cast<double>(slash_sum) * static_cast<double>(kBandBlock * g.row_tile));
}
constexpr float BlockScore(uint64_t block_weight, const Geometry& g, int64_t block, double unit) {
  int64_t rows = g.n - block * kBandBlock;
  if (rows < 64) rows = 64;
  return static_cast<float>((static_cast<double>(block_weight) * unit) / static_cast<double>(rows));
}

/// Ranking by weight alone (kCumulative).
constexpr float WeightScore(uint64_t weight) {
  return static_cast<float>(static_cast<double>(weight));
}

/// Order-preserving integer of a score (>= 0): the bits of the float, below 2^31.
constexpr uint32_t Key(float score) { return __builtin_bit_cast(uint32_t, score); }
inline constexpr uint32_t kNothing = 0xffffffffu;  // a cut above every key

/// Cut of kMassPerCost: candidates with Key(score) >= cut are kept.
constexpr uint32_t ThresholdCut(float threshold, float scale) {
  const float cut = threshold * scale;
  return cut > 0.0f ? Key(cut) : 0;
}

/// Weight that the candidates of one kind must reach (kCumulative): 0 if the forced part does.
constexpr uint64_t CumulativeTarget(float tau, uint64_t total, uint64_t forced) {
  uint64_t target = static_cast<uint64_t>(static_cast<double>(tau) * static_cast<double>(total));
  if (target > total) target = total;
  return target > forced ? target - forced : 0;
}

/// Candidates of one kind that a minimum demands beyond the `forced` ones.
constexpr int64_t MinimumCount(float ratio, int64_t total, int64_t forced) {
  const double exact = static_cast<double>(ratio) * static_cast<double>(total);
  int64_t count = static_cast<int64_t>(exact);
  if (static_cast<double>(count) < exact) ++count;
  return count > forced ? count - forced : 0;
}

/// Estimated pairs (per query head) that a column or block costs in the sparse rows of the chunk.
constexpr int64_t ColumnPairs(const Geometry& g, int64_t column) {
  const int64_t first = column > g.q_start ? column : g.q_start;
  return g.sparse_end > first ? g.sparse_end - first : 0;
}
constexpr int64_t BlockPairs(const Geometry& g, int64_t block) {
  const int64_t reach = block * kBandBlock - g.row_tile + 1;
  const int64_t first = reach > g.q_start ? reach : g.q_start;
  return g.sparse_end > first ? (g.sparse_end - first) * kBandBlock : 0;
}
/// Pairs of dense causal attention of rows [begin, end).
constexpr int64_t DensePairs(int64_t begin, int64_t end) {
  return (end * (end + 1) - begin * (begin + 1)) / 2;
}

/// Pairs left for candidates under max_density (negative: the forced part alone is above the cap).
/// `forced` = ColumnPairs of the sinks + BlockPairs of the local blocks.
constexpr int64_t PairBudget(const Geometry& g, float max_density, int64_t forced) {
  const int64_t all = DensePairs(g.q_start, g.n);
  const int64_t cap =
      static_cast<int64_t>(static_cast<double>(max_density) * static_cast<double>(all));
  return cap - forced - DensePairs(g.sparse_end, g.n);
}

}  // namespace vsprefill::kernels::selection

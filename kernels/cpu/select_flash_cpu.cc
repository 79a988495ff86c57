// Block means, and FlashPrefill's selection: a task is one row tile of one index group, whose
// packed rows are the lanes of one product with the mean keys.
#include <algorithm>
#include <vector>

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/query_scores.h"
#include "kernels/scalar.h"

namespace vsprefill::kernels {
namespace {

using cpu::QueryLanes;

/// S[b] of the scored blocks of a row tile.
std::vector<uint64_t> Scores(const QuerySelectionInput& in, const FlashParams& params,
                             const TileIndexView& index, int group, int64_t tile_first,
                             const selection::TileRows& rows) {
  const int g = in.shape.num_q_heads / index.num_groups, d = in.shape.head_dim;
  const int64_t scored = selection::ScoredBlocks(params, tile_first, rows.end);
  if (scored == 0) return {};
  QueryLanes queries((rows.end - rows.begin) * g, d);
  for (int h = 0; h < g; ++h) queries.SetQueries(in, group * g + h, rows.begin, rows.end, h, g);
  const int live = static_cast<int>(rows.end - rows.begin) * g, lanes = queries.lanes();

  static thread_local std::vector<float> means, logits;
  means.resize(scored * d);
  logits.resize(scored * lanes);
  const int64_t kv_head = group * g / in.shape.group_size();
  cpu::WidenRows(index.k_means, kv_head * index.means_stride * d, d, scored, d, in.shape.dtype,
                 means.data());
  cpu::RowLogits(means.data(), scored, queries, in.shape.scale, logits.data());

  const auto first_lane = [&](int64_t block) {
    const int64_t row = std::max(rows.begin, selection::FirstScoringRow(params, block));
    return static_cast<int>(row - rows.begin) * g;
  };
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  float max = kHidden;
  for (int64_t b = 0; b < scored; ++b) {
    float* const row = logits.data() + b * lanes;
    const int first = first_lane(b);
    std::fill(row, row + first, kHidden);
    std::fill(row + live, row + lanes, kHidden);  // weights are of logits up to the maximum
    for (int i = first; i < live; ++i) max = std::max(max, row[i]);
  }
  const std::vector<float> reference(lanes, max);
  std::vector<uint64_t> weights(lanes), scores(scored, 0);
  for (int64_t b = 0; b < scored; ++b) {
    cpu::LaneWeights(logits.data() + b * lanes, reference.data(), lanes, weights.data());
    for (int i = 0; i < live; ++i) scores[b] += weights[i];
  }
  return scores;
}

void SelectTile(const QuerySelectionInput& in, const FlashParams& params, int group, int64_t tile,
                const selection::ChunkTiles& tiles, TileIndexView* index) {
  const selection::TileRows rows = selection::RowsOf(in.sequence, tiles, tile);
  const int64_t tile_first = tile * tiles.positions;
  uint32_t* const bits = index->BlocksOf(group, tile);
  const bool last = selection::IsLastTile(params, tile, tiles.positions, in.prompt_tokens);
  std::vector<uint64_t> scores;
  if (!last) scores = Scores(in, params, *index, group, tile_first, rows);
  const uint64_t best = scores.empty() ? 0 : *std::max_element(scores.begin(), scores.end());
  for (int64_t b = 0; b < KeyBlocks(rows.end); ++b) {
    if (last || selection::FlashForced(params, b, tile_first, rows.end) ||
        (b < std::ssize(scores) && selection::ReachesAlpha(scores[b], params.alpha, best))) {
      SetBit(bits, b);
    }
  }
  if (params.min_blocks == 0) return;
  for (int32_t b : cpu::TopPositions(scores.data(), std::ssize(scores), 0, params.min_blocks)) {
    SetBit(bits, b);
  }
}

}  // namespace

KernelStatus PoolBlocksCpu(const QuerySelectionInput& in, void* k_means, void* v_means,
                           int64_t means_stride, Stream /*stream*/) {
  if (!cpu::SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const int d = in.shape.head_dim;
  const int64_t blocks = KeyBlocks(s.kv_tokens);
  ParallelFor(blocks * in.shape.num_kv_heads, [&](int64_t i, int /*worker*/) {
    const int64_t kv_head = i / blocks, first = i % blocks * kKeyBlock;
    const int64_t rows = std::min<int64_t>(kKeyBlock, s.kv_tokens - first);
    const auto pool = [&](const void* from, void* to) {
      float mean[cpu::kMaxHeadDim];
      cpu::MeanRow(from, kv_head * s.kv_head_stride + first * s.kv_token_stride, s.kv_token_stride,
                   rows, d, in.shape.dtype, mean);
      const int64_t at = (kv_head * means_stride + i % blocks) * d;
      for (int e = 0; e < d; ++e) StoreScalar(to, at + e, in.shape.dtype, mean[e]);
    };
    pool(s.k, k_means);
    if (v_means != nullptr) pool(s.v, v_means);
  });
  return KernelStatus::kOk;
}

KernelStatus SelectFlashCpu(const QuerySelectionInput& in, const FlashParams& params,
                            TileIndexView* index, Stream /*stream*/) {
  if (!cpu::SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const int groups = index->num_groups, g = in.shape.num_q_heads / groups;
  const selection::ChunkTiles tiles = selection::TilesOf(in.sequence, g);
  cpu::ClearBlocks(in.sequence, groups, g, index);
  ParallelFor(tiles.count * groups, [&](int64_t i, int /*worker*/) {
    // Late tiles score the most blocks.
    const int64_t tile = tiles.first + tiles.count - 1 - i / groups;
    SelectTile(in, params, static_cast<int>(i % groups), tile, tiles, index);
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

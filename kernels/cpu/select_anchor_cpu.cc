// AnchorAttention's selection: a task is one set of row tiles of one query head.
#include <algorithm>
#include <vector>

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/query_scores.h"

namespace vsprefill::kernels {
namespace {

using cpu::QueryLanes;

constexpr float kNone = -std::numeric_limits<float>::infinity();

/// Mean over a tile's rows of their largest logit in the blocks that the tile reads.
float Anchor(const QuerySelectionInput& in, int head, int64_t tile, const selection::TileRows& rows,
             const uint32_t* blocks) {
  QueryLanes queries(rows.end - rows.begin, in.shape.head_dim);
  queries.SetQueries(in, head, rows.begin, rows.end, 0, 1);
  const int lanes = queries.lanes(), live = static_cast<int>(rows.end - rows.begin);
  static thread_local std::vector<float> logits;
  logits.resize(int64_t{kKeyBlock} * lanes);
  std::vector<float> max(lanes, kNone);
  for (int64_t b = 0; b <= tile; ++b) {
    if (!TestBit(blocks, b)) continue;
    const int64_t begin = b * kKeyBlock, end = std::min(begin + kKeyBlock, rows.end);
    cpu::KeyLogits(in, head / in.shape.group_size(), begin, end, queries, logits.data());
    for (int64_t c = begin; c < end; ++c) {
      const float* const row = logits.data() + (c - begin) * lanes;
      for (int i = std::max<int>(0, static_cast<int>(c - rows.begin)); i < live; ++i) {
        max[i] = std::max(max[i], row[i]);
      }
    }
  }
  float sum = 0;
  for (int i = 0; i < live; ++i) sum += max[i];
  return sum / static_cast<float>(live);
}

void SelectSet(const QuerySelectionInput& in, const AnchorParams& params, int head,
               int64_t set_first, const selection::ChunkTiles& tiles, TileIndexView* index) {
  const AttentionSequence& s = in.sequence;
  const int d = in.shape.head_dim;
  const int64_t window = selection::AnchorWindow(params, set_first);
  const int64_t begin = std::max(set_first, tiles.first);
  const int64_t end = std::min(set_first + index->tiles_per_set, tiles.first + tiles.count);
  QueryLanes means(end - begin, d);
  std::vector<float> anchors;
  for (int64_t t = begin; t < end; ++t) {
    const selection::TileRows rows = selection::RowsOf(s, tiles, t);
    uint32_t* const blocks = index->BlocksOf(head, t);
    for (int64_t b = 0; b <= t; ++b) {
      if (b < params.sink_blocks || b >= window) SetBit(blocks, b);
    }
    if (window <= params.sink_blocks) continue;  // no columns to choose from
    anchors.push_back(Anchor(in, head, t, rows, blocks));
    float mean[cpu::kMaxHeadDim];
    cpu::MeanRow(s.q, cpu::QueryOffset(s, head, rows.begin), s.q_token_stride,
                 rows.end - rows.begin, d, in.shape.dtype, mean);
    means.Set(static_cast<int>(t - begin), 0, mean, d);
  }
  if (anchors.empty()) return;

  static thread_local std::vector<float> logits;
  logits.resize(int64_t{kKeyBlock} * means.lanes());
  uint32_t* const columns = index->ColumnsOf(head, begin);
  for (int64_t b = params.sink_blocks; b < window; ++b) {
    const int64_t first = b * kKeyBlock;
    cpu::KeyLogits(in, head / in.shape.group_size(), first, first + kKeyBlock, means,
                   logits.data());
    for (int64_t c = 0; c < kKeyBlock; ++c) {
      const float* const row = logits.data() + c * means.lanes();
      bool keep = false;
      for (int64_t i = 0; i < std::ssize(anchors); ++i) {
        keep |= double{anchors[i]} - double{row[i]} <= params.theta;
      }
      if (keep) SetBit(columns, first + c);
    }
  }
}

}  // namespace

KernelStatus SelectAnchorCpu(const QuerySelectionInput& in, const AnchorParams& params,
                             TileIndexView* index, Stream /*stream*/) {
  if (!cpu::SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const int heads = in.shape.num_q_heads;
  const selection::ChunkTiles tiles = selection::TilesOf(in.sequence, 1);
  cpu::ClearBlocks(in.sequence, heads, 1, index);
  const int64_t sets = index->num_sets(), first_set = tiles.first / index->tiles_per_set;
  std::fill_n(index->columns, heads * sets * index->column_words, 0u);
  ParallelFor(sets * heads, [&](int64_t i, int /*worker*/) {
    const int64_t set = first_set + sets - 1 - i / heads;  // late ones see the most keys
    SelectSet(in, params, static_cast<int>(i % heads), set * index->tiles_per_set, tiles, index);
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

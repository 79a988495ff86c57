// XAttention's selection: a task is some neighbouring row tiles of one query head, whose strided
// queries fill the lanes of one product with the strided keys.
#include <algorithm>
#include <vector>

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/query_scores.h"

namespace vsprefill::kernels {
namespace {

using cpu::QueryLanes;

void SelectBlocks(const std::vector<uint64_t>& scores, int64_t tile, double threshold,
                  uint32_t* bits) {
  uint64_t total = 0;
  for (uint64_t score : scores) total += score;
  // The first block and the tile's own come before all others.
  std::vector<int32_t> order;
  for (int32_t b = 1; b < tile; ++b) order.push_back(b);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  SetBit(bits, 0);
  SetBit(bits, tile);
  uint64_t sum = scores[0] + (tile > 0 ? scores[tile] : 0);
  for (int32_t b : order) {
    if (threshold < 1 && selection::ReachesThreshold(sum, threshold, total)) break;
    SetBit(bits, b);
    sum += scores[b];
  }
}

void SelectTiles(const QuerySelectionInput& in, const XAttentionParams& params, int head,
                 int64_t first_tile, int64_t num_tiles, const selection::ChunkTiles& tiles,
                 TileIndexView* index) {
  const AttentionSequence& s = in.sequence;
  const int d = in.shape.head_dim;
  const int64_t n = s.kv_tokens, q_start = n - s.q_tokens, stride = params.stride;
  const int64_t per_tile = kKeyBlock / stride;  // strides

  // Lane i: strided query first_tile * per_tile + i; it sees as many strided keys and its own.
  QueryLanes queries(num_tiles * per_tile, stride * d);
  std::vector<int64_t> visible(queries.lanes(), 0);
  float row[cpu::kMaxHeadDim];
  int64_t columns = 0;
  for (int64_t i = 0; i < num_tiles * per_tile; ++i) {
    const int64_t a = first_tile * per_tile + i;
    if ((a + 1) * stride <= q_start || a * stride >= n) continue;  // no query of the chunk
    columns = visible[i] = a + 1;
    for (int64_t t = 0; t < stride; ++t) {
      const int64_t position = a * stride + stride - 1 - t;
      if (position < q_start || position >= n) continue;
      cpu::WidenRows(s.q, cpu::QueryOffset(s, head, position), 0, 1, d, in.shape.dtype, row);
      queries.Set(static_cast<int>(i), t * d, row, d);
    }
  }

  static thread_local std::vector<float> logits, keys;
  logits.resize(columns * queries.lanes());
  keys.resize(int64_t{kKeyBlock} * d);
  const int64_t kv_offset = head / in.shape.group_size() * s.kv_head_stride;
  for (int64_t b = 0; b < columns; b += per_tile) {
    const int64_t count = std::min(per_tile, columns - b);
    const int64_t live = std::min(count * stride, n - b * stride);
    cpu::WidenRows(s.k, kv_offset + b * stride * s.kv_token_stride, s.kv_token_stride, live, d,
                   in.shape.dtype, keys.data());
    std::fill(keys.begin() + live * d, keys.end(), 0.0f);
    cpu::RowLogits(keys.data(), count, queries, in.shape.scale / static_cast<float>(stride),
                   logits.data() + b * queries.lanes());
  }

  std::vector<std::vector<uint64_t>> scores(num_tiles);
  for (int64_t i = 0; i < num_tiles; ++i) scores[i].assign(first_tile + i + 1, 0);
  cpu::ForShares(logits.data(), columns, queries.lanes(), visible.data(),
                 [&](int64_t b, const uint64_t* shares) {
                   const int64_t block = b / per_tile;
                   for (int64_t i = std::max<int64_t>(0, block - first_tile); i < num_tiles; ++i) {
                     for (int64_t j = 0; j < per_tile; ++j) {
                       scores[i][block] += shares[i * per_tile + j];
                     }
                   }
                 });
  for (int64_t i = 0; i < num_tiles; ++i) {
    const int64_t tile = first_tile + i;
    SelectBlocks(scores[i], tile, params.threshold, index->BlocksOf(head, tile));
  }
}

}  // namespace

KernelStatus SelectXAttentionCpu(const QuerySelectionInput& in, const XAttentionParams& params,
                                 TileIndexView* index, Stream /*stream*/) {
  if (!cpu::SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const int heads = in.shape.num_q_heads;
  const selection::ChunkTiles tiles = selection::TilesOf(in.sequence, 1);
  cpu::ClearBlocks(in.sequence, heads, 1, index);
  const int64_t per_task = std::min<int64_t>(params.stride, cpu::kMaxLanes);  // fills the lanes
  const int64_t tasks = (tiles.count + per_task - 1) / per_task;
  ParallelFor(tasks * heads, [&](int64_t i, int /*worker*/) {
    const int64_t first = (tasks - 1 - i / heads) * per_task;  // late ones see the most keys
    SelectTiles(in, params, static_cast<int>(i % heads), tiles.first + first,
                std::min(per_task, tiles.count - first), tiles, index);
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

// AnchorAttention's selection, literally.
#include <vector>

#include "kernels/ref/query_scores_ref.h"

namespace vsprefill::kernels {

KernelStatus SelectAnchorRef(const QuerySelectionInput& in, const AnchorParams& params,
                             TileIndexView* index, Stream) {
  if (!ref::Supported(in)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const selection::ChunkTiles tiles = selection::TilesOf(s, 1);
  ref::Clear(s, in.shape.num_q_heads, 1, index);
  std::fill_n(index->columns, index->num_groups * index->num_sets() * index->column_words, 0u);
  for (int head = 0; head < in.shape.num_q_heads; ++head) {
    for (int64_t t = tiles.first; t < tiles.first + tiles.count; ++t) {
      const selection::TileRows rows = selection::RowsOf(s, tiles, t);
      const int64_t set_first = t / index->tiles_per_set * index->tiles_per_set;
      const int64_t window = selection::AnchorWindow(params, set_first);
      for (int64_t b = 0; b <= t; ++b) {
        if (b < params.sink_blocks || b >= window) SetBit(index->BlocksOf(head, t), b);
      }
      float anchors = 0;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        float anchor = -INFINITY;
        for (int64_t c = 0; c <= i; ++c) {
          if (!TestBit(index->BlocksOf(head, t), c / kKeyBlock)) continue;
          anchor = std::max(anchor, ref::Logit(in, ref::Query(in, head, i), ref::Key(in, head, c)));
        }
        anchors += anchor;
      }
      const float anchor = anchors / static_cast<float>(rows.end - rows.begin);
      const ref::Vector mean = ref::MeanQuery(in, head, rows.begin, rows.end);
      for (int64_t c = int64_t{params.sink_blocks} * kKeyBlock; c < window * kKeyBlock; ++c) {
        const float logit = ref::Logit(in, mean, ref::Key(in, head, c));
        if (double{anchor} - double{logit} <= params.theta) SetBit(index->ColumnsOf(head, t), c);
      }
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

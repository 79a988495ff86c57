// XAttention's selection, literally.
#include <vector>

#include "kernels/ref/query_scores_ref.h"

namespace vsprefill::kernels {

KernelStatus SelectXAttentionRef(const QuerySelectionInput& in, const XAttentionParams& params,
                                 TileIndexView* index, Stream) {
  if (!ref::Supported(in)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const int64_t n = s.kv_tokens, q_start = n - s.q_tokens, stride = params.stride;
  const float scale = in.shape.scale / static_cast<float>(stride);
  const ref::Vector zero(in.shape.head_dim, 0.0f);
  const selection::ChunkTiles tiles = selection::TilesOf(s, 1);
  ref::Clear(s, in.shape.num_q_heads, 1, index);
  for (int head = 0; head < in.shape.num_q_heads; ++head) {
    for (int64_t t = tiles.first; t < tiles.first + tiles.count; ++t) {
      const selection::TileRows rows = selection::RowsOf(s, tiles, t);
      std::vector<uint64_t> scores(t + 1, 0);
      for (int64_t a = rows.begin / stride; a <= (rows.end - 1) / stride; ++a) {
        ref::Vector logits;
        for (int64_t b = 0; b <= a; ++b) {
          float sum = 0;
          for (int64_t i = 0; i < stride; ++i) {
            const int64_t row = a * stride + stride - 1 - i, column = b * stride + i;
            sum = ref::Dot(row >= q_start && row < n ? ref::Query(in, head, row) : zero,
                           column < n ? ref::Key(in, head, column) : zero, sum);
          }
          logits.push_back(selection::Sanitize(sum * scale));
        }
        const std::vector<uint64_t> shares = ref::Shares(logits);
        for (int64_t b = 0; b <= a; ++b) scores[b * stride / kKeyBlock] += shares[b];
      }
      uint64_t total = 0;
      for (uint64_t score : scores) total += score;

      uint32_t* const bits = index->BlocksOf(head, t);
      SetBit(bits, 0);
      SetBit(bits, t);
      uint64_t sum = scores[0] + (t > 0 ? scores[t] : 0);
      for (int64_t b : ref::Descending(scores)) {
        if (b == 0 || b == t) continue;
        if (params.threshold < 1 && selection::ReachesThreshold(sum, params.threshold, total))
          break;
        SetBit(bits, b);
        sum += scores[b];
      }
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

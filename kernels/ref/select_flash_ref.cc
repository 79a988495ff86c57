// Block means and FlashPrefill's selection, literally.
#include <vector>

#include "kernels/ref/query_scores_ref.h"

namespace vsprefill::kernels {

KernelStatus PoolBlocksRef(const QuerySelectionInput& in, void* k_means, void* v_means,
                           int64_t means_stride, Stream) {
  if (!ref::Supported(in)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const int d = in.shape.head_dim;
  for (int kv_head = 0; kv_head < in.shape.num_kv_heads; ++kv_head) {
    for (int64_t b = 0; b < KeyBlocks(s.kv_tokens); ++b) {
      const auto mean_to = [&](const void* from, void* to) {
        std::vector<ref::Vector> rows;
        for (int64_t c = b * kKeyBlock; c < std::min((b + 1) * kKeyBlock, s.kv_tokens); ++c) {
          rows.push_back(ref::Row(from, kv_head * s.kv_head_stride + c * s.kv_token_stride, d,
                                  in.shape.dtype));
        }
        const ref::Vector mean = ref::Mean(rows, in.shape.dtype);
        for (int e = 0; e < d; ++e) {
          StoreScalar(to, (kv_head * means_stride + b) * d + e, in.shape.dtype, mean[e]);
        }
      };
      mean_to(s.k, k_means);
      if (v_means != nullptr) mean_to(s.v, v_means);
    }
  }
  return KernelStatus::kOk;
}

KernelStatus SelectFlashRef(const QuerySelectionInput& in, const FlashParams& params,
                            TileIndexView* index, Stream) {
  if (!ref::Supported(in)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const int groups = index->num_groups, g = in.shape.num_q_heads / groups;
  const selection::ChunkTiles tiles = selection::TilesOf(s, g);
  ref::Clear(s, groups, g, index);
  for (int group = 0; group < groups; ++group) {
    for (int64_t t = tiles.first; t < tiles.first + tiles.count; ++t) {
      const selection::TileRows rows = selection::RowsOf(s, tiles, t);
      const int64_t tile_first = t * tiles.positions;
      const int64_t visible = KeyBlocks(rows.end);
      const int64_t scored = selection::ScoredBlocks(params, tile_first, rows.end);

      struct Pair {
        int64_t block;
        float logit;
      };
      std::vector<Pair> pairs;
      for (int64_t b = 0; b < scored; ++b) {
        const int64_t kv_head = group * g / in.shape.group_size();
        const ref::Vector mean =
            ref::Row(index->k_means, (kv_head * index->means_stride + b) * in.shape.head_dim,
                     in.shape.head_dim, in.shape.dtype);
        for (int64_t i = std::max(rows.begin, selection::FirstScoringRow(params, b)); i < rows.end;
             ++i) {
          for (int head = group * g; head < (group + 1) * g; ++head) {
            pairs.push_back({b, ref::Logit(in, ref::Query(in, head, i), mean)});
          }
        }
      }
      float max = -INFINITY;
      for (const Pair& pair : pairs) max = std::max(max, pair.logit);
      std::vector<uint64_t> scores(scored, 0);
      for (const Pair& pair : pairs) scores[pair.block] += selection::Weight(pair.logit, max);
      const uint64_t best = scored > 0 ? *std::max_element(scores.begin(), scores.end()) : 0;

      uint32_t* const bits = index->BlocksOf(group, t);
      for (int64_t b = 0; b < visible; ++b) {
        if (selection::IsLastTile(params, t, tiles.positions, in.prompt_tokens) ||
            selection::FlashForced(params, b, tile_first, rows.end) ||
            (b < scored && selection::ReachesAlpha(scores[b], params.alpha, best))) {
          SetBit(bits, b);
        }
      }
      const std::vector<int64_t> order = ref::Descending(scores);
      for (int64_t i = 0; i < std::min<int64_t>(params.min_blocks, scored); ++i) {
        SetBit(bits, order[i]);
      }
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

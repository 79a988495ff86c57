// Selections that look at queries and keys: FlashPrefill (v1, V2), MInference vertical-slash,
// FlexPrefill, XAttention, AnchorAttention; and the fixed pattern of StreamingLLM. One function per
// method; what it selects, where the rule comes from and what is ours stands at its parameters and,
// with the differences from the published code, in docs/methods.md.
//
// A call selects for the queries of one chunk, positions [q_start, n) with q_start = kv_tokens -
// q_tokens and n = kv_tokens, among the n keys so far. Methods that estimate from the last queries
// use the chunk's last rows. Blocks are kKeyBlock = 128 tokens, aligned to token 0, in keys and
// (for methods that select per head, whose row tiles have 128 positions) in queries.
//
// Every implementation gives the same sets, bit for bit, because the arithmetic is fixed:
//   dot(q, k)   float32, one fused multiply-add per element in ascending order, from 0
//   logit       scale * dot, float32
//   weight      selection::Weight: exp(logit - maximum), 36 fractional bits, an integer
//   share       floor(weight * (2^40 / sum of the row's weights)): the softmax, 40 fractional bits
//   means       float32 sum in ascending order, divided by the count, rounded to the element type
// and sums of weights and shares are integers, so that their order does not matter.
//
// Ties are broken by position wherever a rule counts candidates (a top-k, the end of a cumulative
// sum): of equal candidates the one with the smaller number (column, offset, block) comes first.
// Where a rule is a threshold, equal candidates stand or fall together.
//
// CPU: done on return, ParallelFor inside, scratch per thread. CUDA: enqueued on
// `stream`, no host loop over heads or blocks, no synchronisation. kUnsupportedShape: what
// AttentionCpu refuses, q_tokens < 1, q_tokens > kv_tokens, kv_tokens > kMaxSelectionTokens,
// prompt_tokens < kv_tokens.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/selection.h"
#include "kernels/sparse_index.h"
#include "kernels/tile_index.h"

namespace vsprefill::kernels {

struct QuerySelectionInput {
  AttentionShape shape;
  AttentionSequence sequence;  // q, k, v and their sizes; out and the indexes are unused
  int64_t prompt_tokens = 0;   // whole prompt
  /// CUDA: device memory of at least the selection's *WorkspaceBytes, 256-byte aligned, its own
  /// until the enqueued work is done. CPU: unused.
  void* workspace = nullptr;
};

/// Means of the key blocks and, if v_means is not null, of the value blocks, to [num_kv_heads,
/// means_stride, head_dim] of k's type; the last block's mean is over the tokens it has.
using PoolBlocksFn = KernelStatus (*)(const QuerySelectionInput& input, void* k_means,
                                      void* v_means, int64_t means_stride, Stream stream);
KernelStatus PoolBlocksRef(const QuerySelectionInput&, void*, void*, int64_t, Stream);
KernelStatus PoolBlocksCpu(const QuerySelectionInput&, void*, void*, int64_t, Stream);
KernelStatus PoolBlocksCuda(const QuerySelectionInput&, void*, void*, int64_t, Stream);

/// StreamingLLM (arXiv 2309.17453): row i reads the columns [0, sink) and (i - window, i]. The
/// window is rounded up to whole blocks of distances (sparse_index.h), so a row reads at least its
/// window. Per KV group, the same for all. Needs no q, k or v.
struct WindowParams {
  int32_t sink_tokens = 1024;
  int32_t window_tokens = 8192;  // >= 1
};
using SelectWindowFn = KernelStatus (*)(const QuerySelectionInput& input,
                                        const WindowParams& params, SparseIndexView* index,
                                        Stream stream);
KernelStatus SelectWindowRef(const QuerySelectionInput&, const WindowParams&, SparseIndexView*,
                             Stream);
KernelStatus SelectWindowCpu(const QuerySelectionInput&, const WindowParams&, SparseIndexView*,
                             Stream);
KernelStatus SelectWindowCuda(const QuerySelectionInput&, const WindowParams&, SparseIndexView*,
                              Stream);

/// FlashPrefill. With x(i, b) = logit(query row i, mean key of block b), M the largest x of the row
/// tile's rows and S[b] = sum over those rows of exp(x(i, b) - M), block b is read if S[b] >= alpha
/// * max S, or b is one of the first `sink_blocks`, or one of the last `window_blocks` up to the
/// row's own, or the tile is one of the prompt's last `last_tiles` (these read everything).
/// `index->num_groups` says for whom: query heads (v1) or KV groups (V2); `whole_blocks` which rows
/// count for a block and which blocks are scored at all:
///   true (v1):  blocks left of the tile's own, for all rows
///   false (V2): blocks wholly visible to the tile's last row, for rows that see their first token
/// min_blocks > 0 also keeps the blocks of the largest S until that many are kept (v1).
/// Mean keys are read from index->k_means, where PoolBlocks has put them.
/// Ref: v1 arXiv 2603.06199, V2 arXiv 2608.19758.
struct FlashParams {
  double alpha = 0.1;  // >= 0; 0 reads everything
  bool whole_blocks = false;
  int32_t sink_blocks = 2, window_blocks = 4;  // window_blocks >= 1
  int32_t last_tiles = 8;
  int32_t min_blocks = 0;
};
using SelectFlashFn = KernelStatus (*)(const QuerySelectionInput& input, const FlashParams& params,
                                       TileIndexView* index, Stream stream);
KernelStatus SelectFlashRef(const QuerySelectionInput&, const FlashParams&, TileIndexView*, Stream);
KernelStatus SelectFlashCpu(const QuerySelectionInput&, const FlashParams&, TileIndexView*, Stream);
KernelStatus SelectFlashCuda(const QuerySelectionInput&, const FlashParams&, TileIndexView*,
                             Stream);

/// MInference, vertical-slash pattern, per query head. With P the causal softmax of the chunk's
/// last `last_queries` rows, keeps the `vertical_size` columns of the largest column sums, the
/// first `forced_verticals` before all others, and the `slash_size` offsets (row - column) of the
/// largest diagonal sums, the nearest `forced_slashes` before all others. An offset becomes the
/// blocks of distances that hold it for some row of a tile.
/// Sizes are raised to min_vertical and min_slash, and cut at n.
/// Ref: arXiv 2407.02490.
struct MInferenceParams {
  int64_t vertical_size = 1000, slash_size = 6096;
  int32_t last_queries = 64;  // 1..128
  int32_t forced_verticals = 30, forced_slashes = 100;
  int32_t min_vertical = 30, min_slash = 50;
};
using SelectMInferenceFn = KernelStatus (*)(const QuerySelectionInput& input,
                                            const MInferenceParams& params, SparseIndexView* index,
                                            Stream stream);
KernelStatus SelectMInferenceRef(const QuerySelectionInput&, const MInferenceParams&,
                                 SparseIndexView*, Stream);
KernelStatus SelectMInferenceCpu(const QuerySelectionInput&, const MInferenceParams&,
                                 SparseIndexView*, Stream);
KernelStatus SelectMInferenceCuda(const QuerySelectionInput&, const MInferenceParams&,
                                  SparseIndexView*, Stream);
/// Per head: two sums per key, and a maximum and a sum for each of up to 128 rows.
inline int64_t MInferenceWorkspaceBytes(const QuerySelectionInput& in) {
  return int64_t{in.shape.num_q_heads} * (in.sequence.kv_tokens * 16 + 128 * 12);
}

/// FlexPrefill, per query head. P is the causal softmax of the chunk's last 128 rows, v and s its
/// column and diagonal sums. cover(x) = 1 + the number of entries, largest first, whose running sum
/// is at most gamma of all rows' mass; n_v = cover(v) / 128 + 1 blocks, n_s likewise, both in
/// [ceil(min_budget / 128), ceil(max_budget / 128)]. D is the square root of the Jensen-Shannon
/// divergence between v summed by blocks and the softmax of the mean query with the mean keys. A
/// head with D < tau is query-aware: its n_v and n_s are the minimum, and it adds, of the softmaxes
/// of all block rows (mean queries with mean keys, causal by block), the largest entries while
/// their running sum is at most gamma per row. Block column c of v is read by the block rows >= c,
/// block offset o of s by block (r + o, r) for all r; the first of each are forced and count.
/// Ref: arXiv 2502.20766.
struct FlexParams {
  double gamma = 0.9, tau = 0.1;
  int64_t min_budget = 512, max_budget = kMaxSelectionTokens;  // tokens
};
using SelectFlexFn = KernelStatus (*)(const QuerySelectionInput& input, const FlexParams& params,
                                      TileIndexView* index, Stream stream);
KernelStatus SelectFlexRef(const QuerySelectionInput&, const FlexParams&, TileIndexView*, Stream);
KernelStatus SelectFlexCpu(const QuerySelectionInput&, const FlexParams&, TileIndexView*, Stream);
KernelStatus SelectFlexCuda(const QuerySelectionInput&, const FlexParams&, TileIndexView*, Stream);
/// MInference's, and block means and scores: 8 bytes per pair of blocks and head.
inline int64_t FlexWorkspaceBytes(const QuerySelectionInput& in) {
  const int64_t heads = in.shape.num_q_heads, d = in.shape.head_dim;
  const int64_t blocks = KeyBlocks(in.sequence.kv_tokens);
  const int64_t means =
      heads * (KeyBlocks(in.sequence.q_tokens) + 2);  // one tile may be cut in two
  return MInferenceWorkspaceBytes(in) + (means + 2 * heads) * blocks * 8 + means * d * 4 +
         in.shape.num_kv_heads * blocks * d * 4;
}

/// XAttention, per query head. Tokens are cut into strides of s; x(a, b) = scale / s * sum over
/// t < s of dot(q[s a + s - 1 - t], k[s b + t]) sums an antidiagonal of an s x s tile, and its
/// softmax over b <= a, summed over the 128 x 128 block, scores the block. In each row of blocks
/// the first block and the row's own are read, and then the largest until the read ones reach
/// `threshold` of the row's mass; threshold >= 1 reads everything. Strides without a query of the
/// chunk do not count; queries and keys outside of the chunk and the sequence are 0.
/// Ref: arXiv 2503.16428.
struct XAttentionParams {
  int32_t stride = 8;  // 4, 8, 16, 32 or 64
  double threshold = 0.9;
};
using SelectXAttentionFn = KernelStatus (*)(const QuerySelectionInput& input,
                                            const XAttentionParams& params, TileIndexView* index,
                                            Stream stream);
KernelStatus SelectXAttentionRef(const QuerySelectionInput&, const XAttentionParams&,
                                 TileIndexView*, Stream);
KernelStatus SelectXAttentionCpu(const QuerySelectionInput&, const XAttentionParams&,
                                 TileIndexView*, Stream);
KernelStatus SelectXAttentionCuda(const QuerySelectionInput&, const XAttentionParams&,
                                  TileIndexView*, Stream);

/// AnchorAttention, per query head. `step` neighbouring row tiles are a set. Each tile reads the
/// first `sink_blocks` blocks and its window: all from `window_blocks` before its set's first tile
/// on. Its anchor is the mean over its
/// rows of the largest logit among those; columns in between are read by the whole set where, for
/// some tile of the chunk in it, anchor - logit(mean query, key) <= theta.
/// Needs index->columns and tiles_per_set = step.
/// Ref: arXiv 2505.23520.
struct AnchorParams {
  double theta = 12;
  int32_t sink_blocks = 1, window_blocks = 1;
};
using SelectAnchorFn = KernelStatus (*)(const QuerySelectionInput& input,
                                        const AnchorParams& params, TileIndexView* index,
                                        Stream stream);
KernelStatus SelectAnchorRef(const QuerySelectionInput&, const AnchorParams&, TileIndexView*,
                             Stream);
KernelStatus SelectAnchorCpu(const QuerySelectionInput&, const AnchorParams&, TileIndexView*,
                             Stream);
KernelStatus SelectAnchorCuda(const QuerySelectionInput&, const AnchorParams&, TileIndexView*,
                              Stream);
/// An anchor and a mean query per row tile and head.
inline int64_t AnchorWorkspaceBytes(const QuerySelectionInput& in) {
  return int64_t{in.shape.num_q_heads} * (KeyBlocks(in.sequence.q_tokens) + 1) *
         (in.shape.head_dim + 1) * 4;
}

}  // namespace vsprefill::kernels

// From VSIndexer logits to a sparse index: softmax, threshold, compaction; no sort over tokens and,
// on CUDA, no host synchronisation. All implementations give the same index, bit for bit: the
// arithmetic is fixed (kernels/selection_math.h) and every set is a threshold set.
//
// Notation, for one KV group: n = kv_tokens; M = RowTilePositions(group_size); p_v[j] and p_s[o]
// are the softmaxes of its vertical and slash logits over the n tokens so far: the predicted share
// of attention mass in column j and on diagonal o. A block b of distances catches, averaged over
// the rows of a tile, mass_b = sum over distances d of b of (1/M) sum_{i<M} p_s[d - i].
//
// Forced part. The `sink_tokens` first columns; the local band: the first LB = max(2,
// ceil(local_tokens / 64)) blocks. Columns j >= E = ceil(n / M) * M - 64 LB are read through the
// local band by every row that sees them and are therefore never listed as verticals, not even as
// sinks. Candidates are the columns in [sinks, E) and the blocks >= LB.
//
// kMassPerCost keeps a candidate iff its predicted mass per computed pair is at least
// threshold * threshold_scale / n, i.e. iff score >= threshold * threshold_scale, with
//   score of column j = n * max(n p_v[j] - H(j), 0) / max(n - j - Lw, 64)
//   score of block b  = n * n mass_b / (64 * max(n - 64 b, 64))
// where H(j) = sum over offsets o < min(Lw, n - j) of n p_s[o] / (n - o) is the mass that an
// average column gives to the local band (Lw = 64 LB - M / 2 offsets wide on average), which reads
// it already.
//
// kCumulative (the paper's rule) keeps the smallest sets whose mass, forced part included, reaches
// tau_vertical of p_v and tau_slash of mass_b; a tau >= 1 keeps all. Diagonals are ranked as
// blocks.
//
// Then the minima lower the cut (per kind) until enough candidates are in, and max_density raises
// it (both kinds together, in ascending order of the kMassPerCost score) until the estimated
// density of the rows [q_start, n) is within the cap: the cap wins over the minima, never over the
// forced part. Estimate: pairs of columns and blocks as if they never overlapped, blocks unmasked,
// rows of tiles that reach dense_from dense; an upper bound of the density that CountPairs finds.
//
// Ties. Scores are compared as float32. Candidates with equal scores stand or fall together: minima
// and tau keep all that are equal to the cut, the cap drops all that are equal to it.
#pragma once

#include <cstdint>

#include "kernels/sparse_index.h"
#include "kernels/tensor_view.h"

namespace vsprefill::kernels {

enum class SelectionRule : uint8_t { kMassPerCost = 0, kCumulative = 1 };

struct SelectionParams {
  SelectionRule rule = SelectionRule::kMassPerCost;
  /// kMassPerCost: in units of the mean mass per pair, 1/n; more is sparser, 0 keeps everything.
  float threshold = 3.0f;
  float tau_vertical = 0.9f, tau_slash = 0.9f;  // kCumulative, in [0, 1]
  int32_t sink_tokens = 64;                     // first columns, always read
  int32_t local_tokens = 128;                   // nearest distances, always a band; >= 128
  int32_t last_dense_tokens = 64;               // the prompt's last positions attend densely
  float min_vertical_ratio = 0.0f;  // at least this share of kv_tokens as verticals (sinks count)
  float min_slash_ratio = 0.0f;     // at least this share of the distance blocks (local ones count)
  float max_density = 1.0f;         // cap on the estimated density of the chunk's rows; >= 1: none
};

struct SelectionInput {
  const float* vertical_logits = nullptr;  // float32 [num_groups, logit_stride]
  const float* slash_logits = nullptr;     // float32 [num_groups, logit_stride], prior included
  int64_t logit_stride = 0;
  int num_groups = 0;
  int group_size = 0;         // query heads per group: gives the row tile
  int64_t q_start = 0;        // first query position of this chunk
  int64_t kv_tokens = 0;      // end of the chunk = number of logits used; 1 .. kMaxSelectionTokens
  int64_t prompt_tokens = 0;  // whole prompt: decides dense_from
  /// Scales `threshold` per group (sensitivity of its layer), host memory, [num_groups]; null: 1.
  const float* threshold_scale = nullptr;
};

inline constexpr int64_t kMaxSelectionTokens = int64_t{1} << 20;

/// Bytes of scratch that Select* needs for one sequence (device memory for CUDA), 256-byte aligned.
int64_t SelectionWorkspaceBytes(int num_groups, int64_t kv_tokens);

/// Fills `index`, whose buffers the caller has sized: vertical_stride >= kv_tokens, band_stride >=
/// BandWords, band_list_stride >= BandBlocks (more than that is left untouched). Sets
/// index->num_groups and, on the host, index->dense_from = max(0, prompt_tokens -
/// last_dense_tokens), INT64_MAX where last_dense_tokens is 0.
/// CPU: done on return, ParallelFor over the groups. CUDA: enqueues on `stream`.
/// kUnsupportedShape: group_size not in 1..128, or not 0 <= q_start < kv_tokens <= prompt_tokens.
using SelectFn = KernelStatus (*)(const SelectionInput& input, const SelectionParams& params,
                                  void* workspace, SparseIndexView* index, Stream stream);
KernelStatus SelectRef(const SelectionInput& input, const SelectionParams& params, void* workspace,
                       SparseIndexView* index, Stream stream);
KernelStatus SelectCpu(const SelectionInput& input, const SelectionParams& params, void* workspace,
                       SparseIndexView* index, Stream stream);
KernelStatus SelectCuda(const SelectionInput& input, const SelectionParams& params, void* workspace,
                        SparseIndexView* index, Stream stream);

}  // namespace vsprefill::kernels

// From VSIndexer logits to a sparse index: softmax, threshold, compaction; no sort over tokens and,
// on CUDA, no host synchronisation.
//
// For one KV group let p_v[j] and p_s[o] be the softmaxes of its vertical and slash logits over the
// kv_tokens tokens so far: the predicted share of attention mass in column j and on diagonal o.
// kMassPerCost keeps a column iff n * p_v[j] / max(n - j, 64) >= threshold / n, and a block b of
// distances iff n * mass_b / (64 * max(n - 64 b, 64)) >= threshold / n, where
// mass_b = sum over distances d of block b of (1/M) sum_{i<M} p_s[d - i] (M = row tile positions) is
// the mean mass the block catches for the rows of a tile. kCumulative keeps the smallest sets whose
// mass reaches tau_vertical and tau_slash (the paper's rule; offsets expanded to blocks).
#pragma once

#include <cstdint>

#include "kernels/sparse_index.h"
#include "kernels/tensor_view.h"

namespace vsprefill::kernels {

enum class SelectionRule : uint8_t { kMassPerCost = 0, kCumulative = 1 };

struct SelectionParams {
  SelectionRule rule = SelectionRule::kMassPerCost;
  float threshold = 3.0f;  // kMassPerCost: in units of the mean mass per pair of 1/n; more = sparser
  float tau_vertical = 0.9f, tau_slash = 0.9f;  // kCumulative
  int32_t sink_tokens = 64;        // first columns, always verticals
  int32_t local_tokens = 128;      // nearest distances, always a band; >= 128
  int32_t last_dense_tokens = 64;  // the prompt's last positions attend densely
  float min_vertical_ratio = 0.0f;  // at least this share of kv_tokens as verticals
  float min_slash_ratio = 0.0f;     // at least this share of the distance blocks
  float max_density = 1.0f;  // cap on the estimated density; raises the cut where it would be exceeded
};

struct SelectionInput {
  const float* vertical_logits = nullptr;  // float32 [num_groups, logit_stride]
  const float* slash_logits = nullptr;     // float32 [num_groups, logit_stride], slash prior included
  int64_t logit_stride = 0;
  int num_groups = 0;
  int group_size = 0;       // query heads per group: gives the row tile
  int64_t q_start = 0;      // first query position of this chunk
  int64_t kv_tokens = 0;    // end of the chunk = number of logits used
  int64_t prompt_tokens = 0;  // whole prompt: decides dense_from
  /// Scales `threshold` per group (sensitivity of its layer), host memory, [num_groups]; null: 1.
  const float* threshold_scale = nullptr;
};

/// Bytes of scratch that Select* needs for one sequence.
int64_t SelectionWorkspaceBytes(int num_groups, int64_t kv_tokens);

/// Fills `index`, whose buffers the caller has sized: vertical_stride >= kv_tokens, band_stride >=
/// BandWords, band_list_stride >= BandBlocks. Sets index->dense_from on the host.
/// CUDA: enqueues on `stream`, deterministic (fixed-point sums).
using SelectFn = KernelStatus (*)(const SelectionInput& input, const SelectionParams& params,
                                  void* workspace, SparseIndexView* index, Stream stream);
KernelStatus SelectRef(const SelectionInput& input, const SelectionParams& params, void* workspace,
                       SparseIndexView* index, Stream stream);
KernelStatus SelectCpu(const SelectionInput& input, const SelectionParams& params, void* workspace,
                       SparseIndexView* index, Stream stream);
KernelStatus SelectCuda(const SelectionInput& input, const SelectionParams& params, void* workspace,
                        SparseIndexView* index, Stream stream);

}  // namespace vsprefill::kernels

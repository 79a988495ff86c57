// A C interface to the CPU kernels for the Python studies of this folder (ctypes): selection,
// attention and true sums of one sequence in bfloat16. Not part of any shipped program.
#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "kernels/distill.h"
#include "kernels/selection.h"

namespace {

using vsprefill::kernels::AttentionSequence;
using vsprefill::kernels::AttentionShape;
using vsprefill::kernels::KernelStatus;

/// q and out: [q_tokens, num_q_heads, head_dim]; k and v: [num_kv_heads, kv_tokens, head_dim].
AttentionSequence MakeSequence(const AttentionShape& shape, const void* q, const void* k,
                               const void* v, void* out, int64_t q_tokens, int64_t kv_tokens,
                               int64_t capacity) {
  AttentionSequence sequence;
  sequence.q = q;
  sequence.k = k;
  sequence.v = v;
  sequence.out = out;
  sequence.q_token_stride = sequence.out_token_stride = int64_t{shape.num_q_heads} * shape.head_dim;
  sequence.q_head_stride = sequence.out_head_stride = shape.head_dim;
  sequence.kv_head_stride = capacity * shape.head_dim;
  sequence.kv_token_stride = shape.head_dim;
  sequence.q_tokens = q_tokens;
  sequence.kv_tokens = kv_tokens;
  return sequence;
}

AttentionShape MakeShape(int num_q_heads, int num_kv_heads, int head_dim, float scale) {
  AttentionShape shape;
  shape.num_q_heads = num_q_heads;
  shape.num_kv_heads = num_kv_heads;
  shape.head_dim = head_dim;
  shape.dtype = vsprefill::kernels::DType::kBF16;
  shape.scale = scale;
  return shape;
}

}  // namespace

extern "C" {

/// Attention of rows [kv_tokens - q_tokens, kv_tokens); dense where `vertical_logits` is null, else
/// with the index selected from the logits [num_kv_heads, capacity] by `params` (rule, threshold,
/// tau_vertical, tau_slash, sinks, local, last dense, min vertical, min slash, max density). A null
/// `out` only counts. Adds to counts: unmasked, multiplied and dense pairs. `group_pairs`
/// [num_kv_heads] (may be null): estimated pairs per query head of each group. Returns 0 or a
/// KernelStatus.
int vsp_study_attend(const void* q, const void* k, const void* v, void* out, int64_t q_tokens,
                     int64_t kv_tokens, int64_t capacity, int num_q_heads, int num_kv_heads,
                     int head_dim, float scale, const float* vertical_logits,
                     const float* slash_logits, int64_t prompt_tokens, const double* params,
                     const float* threshold_scale, int64_t* counts, int64_t* group_pairs) {
  namespace kernels = vsprefill::kernels;
  const AttentionShape shape = MakeShape(num_q_heads, num_kv_heads, head_dim, scale);
  AttentionSequence sequence = MakeSequence(shape, q, k, v, out, q_tokens, kv_tokens, capacity);
  kernels::SparseIndexView index;
  std::vector<int32_t> verticals, num_verticals(num_kv_heads), bands, num_bands(num_kv_heads);
  std::vector<uint32_t> bits;
  if (vertical_logits != nullptr) {
    const int row_tile = kernels::RowTilePositions(shape.group_size());
    index.vertical_stride = kv_tokens;
    index.band_stride = kernels::BandWords(kv_tokens, row_tile);
    index.band_list_stride = kernels::BandBlocks(kv_tokens, row_tile);
    verticals.resize(num_kv_heads * index.vertical_stride);
    bits.resize(num_kv_heads * index.band_stride);
    bands.resize(num_kv_heads * index.band_list_stride);
    index.verticals = verticals.data();
    index.num_verticals = num_verticals.data();
    index.band_bits = bits.data();
    index.bands = bands.data();
    index.num_bands = num_bands.data();
    kernels::SelectionInput input;
    input.vertical_logits = vertical_logits;
    input.slash_logits = slash_logits;
    input.logit_stride = capacity;
    input.num_groups = num_kv_heads;
    input.group_size = shape.group_size();
    input.q_start = kv_tokens - q_tokens;
    input.kv_tokens = kv_tokens;
    input.prompt_tokens = prompt_tokens;
    input.threshold_scale = threshold_scale;
    kernels::SelectionParams selection;
    selection.rule = static_cast<kernels::SelectionRule>(static_cast<int>(params[0]));
    selection.threshold = static_cast<float>(params[1]);
    selection.tau_vertical = static_cast<float>(params[2]);
    selection.tau_slash = static_cast<float>(params[3]);
    selection.sink_tokens = static_cast<int32_t>(params[4]);
    selection.local_tokens = static_cast<int32_t>(params[5]);
    selection.last_dense_tokens = static_cast<int32_t>(params[6]);
    selection.min_vertical_ratio = static_cast<float>(params[7]);
    selection.min_slash_ratio = static_cast<float>(params[8]);
    selection.max_density = static_cast<float>(params[9]);
    std::vector<char> workspace(kernels::SelectionWorkspaceBytes(num_kv_heads, kv_tokens));
    const KernelStatus status =
        kernels::SelectCpu(input, selection, workspace.data(), &index, nullptr);
    if (status != KernelStatus::kOk) return static_cast<int>(status);
    sequence.index = &index;
  }
  if (out != nullptr) {
    const KernelStatus status = kernels::AttentionCpu(shape, &sequence, 1, nullptr);
    if (status != KernelStatus::kOk) return static_cast<int>(status);
  }
  kernels::PairCounts pairs;
  kernels::CountPairsCpu(shape, sequence, &pairs, nullptr);
  counts[0] += pairs.unmasked;
  counts[1] += pairs.multiplied;
  counts[2] += pairs.dense;
  for (int group = 0; group_pairs != nullptr && group < num_kv_heads; ++group) {
    for (int i = 0; i < num_verticals[group]; ++i) {
      group_pairs[group] += kv_tokens - verticals[group * index.vertical_stride + i];
    }
    for (int i = 0; i < num_bands[group]; ++i) {
      const int64_t first =
          int64_t{bands[group * index.band_list_stride + i]} * kernels::kBandBlock;
      if (first < kv_tokens) group_pairs[group] += (kv_tokens - first) * kernels::kBandBlock;
    }
  }
  return 0;
}

/// True column and diagonal sums, float32 [num_kv_heads, tokens] each (kernels/distill.h).
int vsp_study_sums(const void* q, const void* k, const void* v, int64_t tokens, int num_q_heads,
                   int num_kv_heads, int head_dim, float scale, float* columns, float* diagonals) {
  vsprefill::kernels::AttentionSumsArgs args;
  args.shape = MakeShape(num_q_heads, num_kv_heads, head_dim, scale);
  args.sequence = MakeSequence(args.shape, q, k, v, nullptr, tokens, tokens, tokens);
  std::vector<float> lse(num_q_heads * tokens);
  args.lse = lse.data();
  args.columns = columns;
  args.diagonals = diagonals;
  return static_cast<int>(vsprefill::kernels::AttentionSumsCpu(args, nullptr));
}

}  // extern "C"

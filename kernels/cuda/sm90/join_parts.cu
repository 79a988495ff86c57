// Joins what the parts of dense row tiles left (attention_sm90.cu): a softmax over all columns from
// softmaxes over some of them.
//
//   m = max over parts of m_p    out[r] = sum of 2^(m_p - m) o_p[r] / sum of 2^(m_p - m) sum_p[r]
#include <algorithm>
#include <cmath>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/sm90/attention_sm90.h"
#include "kernels/cuda/sm90/ptx.cuh"

namespace vsprefill::kernels::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 4;  // of a row, per thread

/// Grid: (divided row tiles of the sequence that has most, sequences, slices of a row tile).
__global__ void __launch_bounds__(kThreads)
    JoinPartsKernel(const __grid_constant__ AttentionBatch batch, int head_dim) {
  const SequenceParams& s = batch.sequences[blockIdx.y];
  const int unit = static_cast<int>(blockIdx.x);
  if (s.dense_parts == 1 || unit >= s.dense_tiles * batch.num_groups) return;
  const int at = static_cast<int>(blockIdx.z) * kThreads + static_cast<int>(threadIdx.x);
  const int row = at / (head_dim / kElements);
  const int element = at % (head_dim / kElements) * kElements;
  const int tile = s.first_tile + s.num_tiles - 1 - unit / batch.num_groups;
  const int position = tile * batch.row_tile + row / batch.group_size;
  if (row >= batch.row_tile * batch.group_size || position < s.q_start || position >= s.kv_tokens) {
    return;
  }
  float max = -INFINITY;
  for (int part = 0; part < s.dense_parts; ++part) {
    max = fmaxf(max, FindPartial(s, unit, part, head_dim).max[row]);
  }
  float o[kElements] = {};
  float sum = 0.0f;
  for (int part = 0; part < s.dense_parts; ++part) {
    const Partial from = FindPartial(s, unit, part, head_dim);
    // Every row sees itself, so `max` is finite.
    const float weight = Exp2(from.max[row] - max);
    const float4 values = *reinterpret_cast<const float4*>(from.o + row * head_dim + element);
    o[0] += weight * values.x;
    o[1] += weight * values.y;
    o[2] += weight * values.z;
    o[3] += weight * values.w;
    sum += weight * from.sum[row];
  }
  const int head = unit % batch.num_groups * batch.group_size + row % batch.group_size;
  auto* out = static_cast<__nv_bfloat16*>(s.out) + (position - s.q_start) * s.out_token_stride +
              head * s.out_head_stride + element;
  const float inverse = Reciprocal(sum);
  *reinterpret_cast<uint2*>(out) = make_uint2(PackBf16(o[0] * inverse, o[1] * inverse),
                                              PackBf16(o[2] * inverse, o[3] * inverse));
}

}  // namespace

KernelStatus JoinParts(const AttentionBatch& batch, int head_dim, cudaStream_t stream) {
  int units = 0;
  for (int i = 0; i < batch.num_sequences; ++i) {
    const SequenceParams& s = batch.sequences[i];
    if (s.dense_parts > 1) units = std::max(units, s.dense_tiles * batch.num_groups);
  }
  if (units == 0) return KernelStatus::kOk;
  const dim3 grid(units, batch.num_sequences, kPackedRows * head_dim / kElements / kThreads);
  JoinPartsKernel<<<grid, kThreads, 0, stream>>>(batch, head_dim);
  return LaunchStatus();
}

}  // namespace vsprefill::kernels::cuda::sm90

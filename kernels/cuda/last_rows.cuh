// Column and diagonal sums of the softmax of a chunk's last rows, as LastRowSums on the CPU: the
// same integers. Three launches over blocks of (head, run of columns), each of which meets all
// rows: the rows' largest logits, the sums of their weights, and the sums of their shares. Nothing
// is kept but one number per row and the results, so the products are made three times.
#pragma once

#include "kernels/cuda/exact_dot.cuh"
#include "kernels/cuda/launch.h"

namespace vsprefill::kernels::cuda {

inline constexpr int kRunColumns = 256;  // columns of a block

struct LastRows {
  SelectionTensors t;
  int rows;                     // at most kLanes
  uint32_t* max;                // OrderedBits [heads, kLanes]; zero at first
  unsigned long long* weights;  // [heads, kLanes]; zero at first
  unsigned long long* columns;  // shares, [heads, n]
  unsigned long long* offsets;  // [heads, n]; zero at first
};

inline int64_t LastRowsBytes(const QuerySelectionInput& in) {
  static_assert(kLanes == 128);
  return MInferenceWorkspaceBytes(in);
}
/// Cuts the workspace up and clears it.
inline KernelStatus MakeLastRows(const QuerySelectionInput& in, int64_t rows, void* workspace,
                                 cudaStream_t stream, LastRows* out) {
  const int64_t heads = in.shape.num_q_heads, n = in.sequence.kv_tokens;
  out->rows = static_cast<int>(rows < in.sequence.q_tokens ? rows : in.sequence.q_tokens);
  out->columns = static_cast<unsigned long long*>(workspace);
  out->offsets = out->columns + heads * n;
  out->weights = out->offsets + heads * n;
  out->max = reinterpret_cast<uint32_t*>(out->weights + heads * kLanes);
  return AsStatus(cudaMemsetAsync(workspace, 0, LastRowsBytes(in), stream));
}

template <typename Element, int kPass>
__global__ void __launch_bounds__(kLanes) LastRowsKernel(const __grid_constant__ LastRows p) {
  extern __shared__ uint4 shared_memory[];
  float* const queries = reinterpret_cast<float*>(shared_memory);
  float* const keys = queries + p.t.head_dim * kLanes;
  __shared__ unsigned long long column_sums[kRows];
  __shared__ unsigned long long offset_sums[kRunColumns + kLanes];
  const int head = blockIdx.y, row = threadIdx.x;
  const int64_t begin = int64_t{blockIdx.x} * kRunColumns;
  const int64_t end = begin + kRunColumns < p.t.n ? begin + kRunColumns : p.t.n;
  const int64_t position = p.t.n - p.rows + row;
  const bool live = row < p.rows;
  SetLane(queries, p.t.Query<Element>(head, live ? position : p.t.n - 1), live, p.t.head_dim);
  const int64_t at = int64_t{head} * kLanes + row;
  const float max = kPass > 0 && live ? FromOrderedBits(p.max[at]) : 0.0f;
  const double unit = kPass == 2 && live ? selection::ShareUnit(p.weights[at]) : 0.0;
  // Offset of element x of offset_sums: x + first_offset.
  const int64_t first_offset = p.t.n - p.rows - (begin + kRunColumns - 1);
  if (kPass == 2) {
    for (int i = row; i < kRunColumns + kLanes; i += kLanes) offset_sums[i] = 0;
  }
  float largest = -INFINITY;
  unsigned long long sum = 0;
  for (int64_t c0 = begin; c0 < end; c0 += kRows) {
    const int count = static_cast<int>(end - c0 < kRows ? end - c0 : int64_t{kRows});
    __syncthreads();
    SetRows(keys, p.t.Key<Element>(head, c0), p.t.s.kv_token_stride, count, p.t.head_dim);
    if (kPass == 2 && row < kRows) column_sums[row] = 0;
    __syncthreads();
    float dots[kRows] = {};
    AddDots(dots, queries, keys, p.t.head_dim);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool visible = live && i < count && c0 + i <= position;
      const float logit = Logit(dots[i], p.t.scale);
      if (kPass == 0) {
        if (visible) largest = fmaxf(largest, logit);
      } else if (kPass == 1) {
        if (visible) sum += selection::Weight(logit, max);
      } else if (visible) {
        const unsigned long long share = selection::Share(selection::Weight(logit, max), unit);
        // Integers: the order of the additions does not matter.
        atomicAdd(&column_sums[i], share);
        atomicAdd(&offset_sums[position - (c0 + i) - first_offset], share);
      }
    }
    if (kPass == 2) {
      __syncthreads();
      if (row < count) p.columns[head * p.t.n + c0 + row] = column_sums[row];
    }
  }
  if (kPass == 0 && live && largest != -INFINITY) atomicMax(&p.max[at], OrderedBits(largest));
  if (kPass == 1 && live) atomicAdd(&p.weights[at], sum);
  if (kPass == 2) {
    __syncthreads();
    for (int i = row; i < kRunColumns + kLanes; i += kLanes) {
      const int64_t offset = i + first_offset;
      if (offset_sums[i] != 0) atomicAdd(&p.offsets[head * p.t.n + offset], offset_sums[i]);
    }
  }
}

template <typename Element>
KernelStatus LaunchLastRows(const LastRows& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(p.t.n, kRunColumns)), p.t.num_q_heads);
  const int bytes = static_cast<int>(SharedDotBytes(p.t.head_dim));
  for (auto* kernel :
       {LastRowsKernel<Element, 0>, LastRowsKernel<Element, 1>, LastRowsKernel<Element, 2>}) {
    const KernelStatus status = AllowSharedMemory(kernel, bytes);
    if (status != KernelStatus::kOk) return status;
    kernel<<<grid, kLanes, bytes, stream>>>(p);
  }
  return LaunchStatus();
}

}  // namespace vsprefill::kernels::cuda

// The float32 dot products of query_selection.h on CUDA cores, one fused multiply-add per element
// in ascending order, for blocks of kLanes threads: each thread has one vector (its lane), in
// shared memory as [element][lane], and meets kRows others at a time, in shared memory as
// [row][element]. Also what its users share: widening, sums over a block, order-preserving bits.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/query_selection_math.h"

namespace vsprefill::kernels::cuda {

inline constexpr int kLanes = 128;
inline constexpr int kRows = 8;

__device__ __forceinline__ float Widen(float x) { return x; }
__device__ __forceinline__ float Widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float Round(float x, float) { return x; }
__device__ __forceinline__ float Round(float x, __nv_bfloat16) {
  return __bfloat162float(__float2bfloat16_rn(x));
}

/// sums[r] += lane . rows[r]
__device__ __forceinline__ void AddDots(float (&sums)[kRows], const float* lanes, const float* rows,
                                        int head_dim) {
#pragma unroll 4
  for (int e = 0; e < head_dim; ++e) {
    const float x = lanes[e * kLanes + threadIdx.x];
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = fmaf(x, rows[r * head_dim + e], sums[r]);
  }
}
__device__ __forceinline__ float Logit(float dot, float scale) {
  return selection::Sanitize(__fmul_rn(dot, scale));
}

/// This thread's lane: head_dim elements of `from`, or zeros.
template <typename Element>
__device__ __forceinline__ void SetLane(float* lanes, const Element* from, bool valid,
                                        int head_dim) {
  for (int e = 0; e < head_dim; ++e) {
    lanes[e * kLanes + threadIdx.x] = valid ? Widen(from[e]) : 0.0f;
  }
}
/// kRows rows of a contiguous head_dim, `stride` apart, of which `count` exist; by the whole block.
template <typename Element>
__device__ __forceinline__ void SetRows(float* rows, const Element* from, int64_t stride, int count,
                                        int head_dim) {
  for (int i = threadIdx.x; i < kRows * head_dim; i += blockDim.x) {
    const int r = i / head_dim;
    rows[i] = r < count ? Widen(from[r * stride + i % head_dim]) : 0.0f;
  }
}

constexpr int64_t SharedDotBytes(int head_dim) { return int64_t{head_dim} * (kLanes + kRows) * 4; }

/// Combines a value of each thread; all get the result. `partial`: one per warp.
template <typename T, typename Combine>
__device__ T BlockReduce(T value, T* partial, const Combine& combine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / 32; ++i) value = combine(value, partial[i]);
  return value;
}

/// Bits that compare as the floats do; 0 is below all.
__device__ __forceinline__ uint32_t OrderedBits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float FromOrderedBits(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

/// What query-based selections take; head_dim up to 256, which shared memory holds.
inline bool SupportedSelection(const QuerySelectionInput& in) {
  return in.shape.num_kv_heads > 0 && in.shape.num_q_heads % in.shape.num_kv_heads == 0 &&
         in.shape.group_size() <= kPackedRows && in.shape.head_dim >= 1 &&
         in.shape.head_dim <= 256 && selection::Supported(in);
}

/// Sizes and pointers of one sequence, for kernels.
struct SelectionTensors {
  AttentionSequence s;
  int num_q_heads, group_size, head_dim;
  float scale;
  int64_t n, q_start;

  explicit SelectionTensors(const QuerySelectionInput& in)
      : s(in.sequence),
        num_q_heads(in.shape.num_q_heads),
        group_size(in.shape.group_size()),
        head_dim(in.shape.head_dim),
        scale(in.shape.scale),
        n(in.sequence.kv_tokens),
        q_start(in.sequence.kv_tokens - in.sequence.q_tokens) {}
  template <typename Element>
  __device__ const Element* Query(int head, int64_t position) const {
    return static_cast<const Element*>(s.q) + (position - q_start) * s.q_token_stride +
           head * s.q_head_stride;
  }
  template <typename Element>
  __device__ const Element* Key(int head, int64_t column) const {
    return static_cast<const Element*>(s.k) + head / group_size * s.kv_head_stride +
           column * s.kv_token_stride;
  }
};

}  // namespace vsprefill::kernels::cuda

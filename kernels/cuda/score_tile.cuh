// One score tile on tensor cores: 128 query rows times 64 key rows, both bf16 in shared memory.
//
// Four warps, 32 rows each. Shared rows are padded by 16 bytes: the row stride is then an odd
// multiple of 16 bytes, so the eight rows of an ldmatrix lie in different banks.
//
// Accumulator layout s[mt][nt][e] of lane l: row 32 * warp + 16 * mt + 8 * (e / 2) + l / 4, column
// 8 * nt + 2 * (l % 4) + e % 2.
#pragma once

#include <cuda_bf16.h>

#include "kernels/cuda/ptx.cuh"

namespace vsprefill::kernels::cuda {

inline constexpr int kTileRows = 128;
inline constexpr int kTileColumns = 64;
inline constexpr int kTileThreads = 128;

template <int kHeadDim>
inline constexpr int kSharedStride = kHeadDim + 8;  // elements

/// Address of this lane's row for the A operand (rows of q), first 16 x 16 block of the warp.
template <int kHeadDim>
__device__ __forceinline__ uint32_t QueryLaneAddress(uint32_t q_shared, int warp, int lane) {
  return q_shared + ((warp * 32 + (lane & 15)) * kSharedStride<kHeadDim> + (lane >> 4) * 8) * 2;
}

/// Address of this lane's row for the B operand (rows of k), first 16 keys.
template <int kHeadDim>
__device__ __forceinline__ uint32_t KeyLaneAddress(uint32_t k_shared, int lane) {
  const int key = (lane & 7) + ((lane >> 4) << 3);
  return k_shared + (key * kSharedStride<kHeadDim> + ((lane >> 3) & 1) * 8) * 2;
}

/// s = q k^T, unscaled.
template <int kHeadDim>
__device__ __forceinline__ void ScoreTile(float (&s)[2][8][4], uint32_t q_lane, uint32_t k_lane) {
  constexpr int kStride = kSharedStride<kHeadDim>;
#pragma unroll
  for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
    for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[mt][nt][e] = 0.0f;
    }
  }
#pragma unroll
  for (int kt = 0; kt < kHeadDim / 16; ++kt) {
    uint32_t a[2][4];
    LoadMatrix4(a[0], q_lane + kt * 32);
    LoadMatrix4(a[1], q_lane + kt * 32 + 16 * kStride * 2);
#pragma unroll
    for (int np = 0; np < 4; ++np) {
      uint32_t b[4];
      LoadMatrix4(b, k_lane + kt * 32 + np * 16 * kStride * 2);
#pragma unroll
      for (int mt = 0; mt < 2; ++mt) {
        MmaBf16(s[mt][2 * np], a[mt], b[0], b[1]);
        MmaBf16(s[mt][2 * np + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

}  // namespace vsprefill::kernels::cuda

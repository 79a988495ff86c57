// Scores of one tile: the product of two tiles in shared memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sm90/ptx.cuh"

namespace vsprefill::kernels::cuda::sm90 {

/// s = a b^T of 64 rows of `a` and 128 rows of `b`, unscaled; committed, not waited for. Both lie
/// as [kHeadDim / 64][rows][64 elements] with 128-byte swizzle, kSliceA and kSliceB bytes from one
/// slice of 64 elements to the next; each 8 rows of `a` kAtomA bytes behind those before.
template <int kHeadDim, int kSliceA, int kAtomA, int kSliceB>
__device__ __forceinline__ void StartScores(float (&s)[64], uint32_t a, uint32_t b) {
  a = Uniform(a);
  b = Uniform(b);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int slice = step / 4, offset = step % 4 * 32;
    WgmmaSharedN128(s, MatrixDescriptor<kAtomA>(a, 0, slice * kSliceA + offset),
                    MatrixDescriptor(b, 0, slice * kSliceB + offset), step != 0);
  }
  WgmmaCommit();
}

}  // namespace vsprefill::kernels::cuda::sm90

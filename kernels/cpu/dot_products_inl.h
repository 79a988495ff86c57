// Plain float32 dot products whose result does not depend on the instruction set: the scores that
// selections compare.
#pragma once

#include "kernels/cpu/matmul_inl.h"

namespace vsprefill::kernels::cpu {
namespace {

void DotProducts(const float* a, int64_t rows, const float* b, int64_t depth, int lanes, float* c) {
  const auto* words = reinterpret_cast<const uint32_t*>(a);
  ForLaneBlocks(lanes, [&]<int kVectors>(int first) VSP_LAMBDA_INLINE {
    ForRowBlocks<RegisterRows<kVectors>()>(
        static_cast<int>(rows), [&]<int kM>(int m) VSP_LAMBDA_INLINE {
          V16 acc[kM][kVectors];
#pragma GCC unroll 16
          for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) acc[i][v] = Zero();
          }
          MultiplyBlock<F32Words, kM, kVectors>(words + m * depth, depth, 1, b + first, lanes,
                                                depth, acc);
#pragma GCC unroll 16
          for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              Store(c + (int64_t{m} + i) * lanes + first + 16 * v, acc[i][v]);
            }
          }
        });
  });
}

}  // namespace
}  // namespace vsprefill::kernels::cpu

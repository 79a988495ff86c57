// 16-byte loads and stores of float32 or bf16 as float32 registers.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace vsprefill::kernels::cuda {

/// Elements of T in 16 bytes.
template <typename T>
inline constexpr int kVector = 16 / sizeof(T);

__device__ __forceinline__ void LoadVector(const float* source, float (&x)[4]) {
  const float4 raw = *reinterpret_cast<const float4*>(source);
  x[0] = raw.x;
  x[1] = raw.y;
  x[2] = raw.z;
  x[3] = raw.w;
}

__device__ __forceinline__ void LoadVector(const __nv_bfloat16* source, float (&x)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(source);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void StoreVector(float* target, const float (&x)[4]) {
  *reinterpret_cast<float4*>(target) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void StoreVector(__nv_bfloat16* target, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(target) = make_uint4(PackBf16(x[0], x[1]), PackBf16(x[2], x[3]),
                                                 PackBf16(x[4], x[5]), PackBf16(x[6], x[7]));
}

/// The value that a tensor of T holds after storing x.
template <typename T>
__device__ __forceinline__ float RoundTo(float x) {
  if constexpr (sizeof(T) == 2) {
    return __bfloat162float(__float2bfloat16_rn(x));
  } else {
    return x;
  }
}

}  // namespace vsprefill::kernels::cuda

// Rows of the element-wise passes. float32 inside; tails shorter than a vector go through a buffer.
#pragma once

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/matmul_inl.h"

namespace vsprefill::kernels::cpu {
namespace {

VSP_INLINE float InverseRms(V16 squares, int64_t width, float eps) {
  return 1.0f / __builtin_sqrtf(SumLanes(squares) / static_cast<float>(width) + eps);
}

template <DType kDType>
void RmsNormRow(const RmsNormArgs& a, int64_t token) {
  const int64_t row = token * a.width;
  V16 squares = Zero();
  for (int64_t i = 0; i < a.width; i += 16) {
    const int64_t count = a.width - i;
    V16 x = LoadElements<kDType>(a.residual, row + i, count);
    if (a.delta != nullptr) {
      StoreElements<kDType>(a.residual, row + i,
                            Add(x, LoadElements<kDType>(a.delta, row + i, count)), count);
      // The norm sees what was stored.
      x = LoadElements<kDType>(a.residual, row + i, count);
    }
    squares = Fma(x, x, squares);
  }
  if (a.out == nullptr) return;
  const V16 inverse = Set1(InverseRms(squares, a.width, a.eps));
  for (int64_t i = 0; i < a.width; i += 16) {
    const int64_t count = a.width - i;
    const V16 x = Mul(LoadElements<kDType>(a.residual, row + i, count), inverse);
    StoreElements<kDType>(a.out, row + i, Mul(x, LoadElements<kDType>(a.weight, i, count)), count);
  }
}

void RmsNorm(const RmsNormArgs& a, int64_t token) {
  a.dtype == DType::kBF16 ? RmsNormRow<DType::kBF16>(a, token) : RmsNormRow<DType::kF32>(a, token);
}

/// Normalises (where `norm` is set) and rotates the head at element `from` of `source` into `to`.
template <DType kDType>
VSP_INLINE void RotateHead(const QkvRopeAppendArgs& a, const void* source, int64_t from,
                           const void* norm, int64_t position, void* target, int64_t to) {
  const int half = a.head_dim / 2;
  V16 scale = Set1(1.0f);
  if (norm != nullptr) {
    V16 squares = Zero();
    for (int i = 0; i < a.head_dim; i += 16) {
      const V16 x = LoadElements<kDType>(source, from + i, a.head_dim - i);
      squares = Fma(x, x, squares);
    }
    scale = Set1(InverseRms(squares, a.head_dim, a.norm_eps));
  }
  const float* cosines = a.cos + position * half;
  const float* sines = a.sin + position * half;
  for (int i = 0; i < half; i += 16) {
    const int64_t count = half - i;
    V16 x = LoadElements<kDType>(source, from + i, count);
    V16 y = LoadElements<kDType>(source, from + half + i, count);
    if (norm != nullptr) {
      x = Mul(Mul(x, scale), LoadElements<kDType>(norm, i, count));
      y = Mul(Mul(y, scale), LoadElements<kDType>(norm, half + i, count));
    }
    const V16 c = LoadElements<DType::kF32>(cosines, i, count);
    const V16 s = LoadElements<DType::kF32>(sines, i, count);
    StoreElements<kDType>(target, to + i, Sub(Mul(x, c), Mul(y, s)), count);
    StoreElements<kDType>(target, to + half + i, Fma(x, s, Mul(y, c)), count);
  }
}

template <DType kDType>
void QkvRopeAppendRow(const QkvRopeAppendArgs& a, int64_t token) {
  const int64_t d = a.head_dim, position = a.position_begin + token;
  const int64_t row = token * (a.num_q_heads + 2 * a.num_kv_heads) * d;
  for (int head = 0; head < a.num_q_heads; ++head) {
    RotateHead<kDType>(a, a.qkv, row + head * d, a.q_norm, position, a.qkv, row + head * d);
  }
  for (int head = 0; head < a.num_kv_heads; ++head) {
    const int64_t k = row + (a.num_q_heads + head) * d, v = k + a.num_kv_heads * d;
    const int64_t cache = head * a.cache_head_stride + position * d;
    RotateHead<kDType>(a, a.qkv, k, a.k_norm, position, a.k_cache, cache);
    constexpr int64_t kSize = kDType == DType::kF32 ? 4 : 2;
    __builtin_memcpy(static_cast<char*>(a.v_cache) + cache * kSize,
                     static_cast<const char*>(a.qkv) + v * kSize, d * kSize);
  }
}

void QkvRopeAppend(const QkvRopeAppendArgs& a, int64_t token) {
  a.dtype == DType::kBF16 ? QkvRopeAppendRow<DType::kBF16>(a, token)
                          : QkvRopeAppendRow<DType::kF32>(a, token);
}

template <DType kDType>
void SiluMulRow(const SiluMulArgs& a, int64_t token) {
  const int64_t gate = token * 2 * a.width, up = gate + a.width, out = token * a.width;
  for (int64_t i = 0; i < a.width; i += 16) {
    const int64_t count = a.width - i;
    const V16 x = Silu<kDType == DType::kF32>(LoadElements<kDType>(a.gate_up, gate + i, count));
    StoreElements<kDType>(a.out, out + i, Mul(x, LoadElements<kDType>(a.gate_up, up + i, count)),
                          count);
  }
}

void SiluMul(const SiluMulArgs& a, int64_t token) {
  a.dtype == DType::kBF16 ? SiluMulRow<DType::kBF16>(a, token) : SiluMulRow<DType::kF32>(a, token);
}

}  // namespace
}  // namespace vsprefill::kernels::cpu

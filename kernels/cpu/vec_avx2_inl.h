// 16 floats in two AVX registers, with the same operations as vec_avx512_inl.h. Included by
// isa_avx2.cc only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define VSP_INLINE inline __attribute__((always_inline))
#define VSP_LAMBDA_INLINE __attribute__((always_inline))

namespace vsprefill::kernels::cpu {
namespace {

constexpr int kVectorRegisters = 8;  // of one V16 each

struct V16 {
  __m256 lo, hi;
};

VSP_INLINE V16 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
VSP_INLINE V16 Set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
VSP_INLINE V16 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
VSP_INLINE void Store(float* p, V16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
VSP_INLINE V16 Add(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
VSP_INLINE V16 Sub(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
VSP_INLINE V16 Mul(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
VSP_INLINE V16 Div(V16 a, V16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
VSP_INLINE V16 Max(V16 a, V16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
VSP_INLINE V16 Min(V16 a, V16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
/// 1 / a, relative error below 1e-4: the estimate and one Newton step.
VSP_INLINE V16 Reciprocal(V16 a) {
  const V16 x = {_mm256_rcp_ps(a.lo), _mm256_rcp_ps(a.hi)};
  const V16 error = {_mm256_fnmadd_ps(a.lo, x.lo, _mm256_set1_ps(2.0f)),
                     _mm256_fnmadd_ps(a.hi, x.hi, _mm256_set1_ps(2.0f))};
  return Mul(x, error);
}
VSP_INLINE V16 Fma(V16 a, V16 b, V16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
VSP_INLINE bool AnyGreater(V16 a, V16 b) {
  const __m256 greater =
      _mm256_or_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
  return _mm256_movemask_ps(greater) != 0;
}
/// a > b ? x : y
VSP_INLINE V16 SelectGreater(V16 a, V16 b, V16 x, V16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
VSP_INLINE float SumLanes(V16 a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

/// a where positions[lane] >= column, else -infinity.
VSP_INLINE V16 MaskAfter(V16 a, const int32_t* positions, int32_t column) {
  const __m256i c = _mm256_set1_epi32(column);
  const __m256i* p = reinterpret_cast<const __m256i*>(positions);
  const __m256 minus_infinity = _mm256_set1_ps(-__builtin_inff());
  const __m256 hidden_lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(c, _mm256_loadu_si256(p)));
  const __m256 hidden_hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(c, _mm256_loadu_si256(p + 1)));
  return {_mm256_blendv_ps(a.lo, minus_infinity, hidden_lo),
          _mm256_blendv_ps(a.hi, minus_infinity, hidden_hi)};
}

VSP_INLINE __m256 ScaleByPowerOf2(__m256 p, __m256 shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n));
}
/// p * 2^n for the integer n that `shifted` = n + 1.5 * 2^23 holds; n in [-126, 127].
VSP_INLINE V16 ScaleByPowerOf2(V16 p, V16 shifted) {
  return {ScaleByPowerOf2(p.lo, shifted.lo), ScaleByPowerOf2(p.hi, shifted.hi)};
}

VSP_INLINE __m256 WidenBF16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
VSP_INLINE V16 LoadBF16(const uint16_t* p) {
  return {WidenBF16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          WidenBF16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}

VSP_INLINE __m256i RoundToBF16(__m256 a) {  // in the low half of each word
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
VSP_INLINE void StoreBF16(uint16_t* p, V16 a) {
  const __m256i packed = _mm256_packus_epi32(RoundToBF16(a.lo), RoundToBF16(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

/// dst[j * dst_stride + i] = rows[i][j] for an 8 x 8 block of 32-bit words.
VSP_INLINE void TransposeWords8(const uint32_t* const* rows, int first, uint32_t* dst,
                                int64_t dst_stride) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + first));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(dst + i * dst_stride),
                     _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(dst + (4 + i) * dst_stride),
                     _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
}
/// dst[j * dst_stride + i] = rows[i][j] for a 16 x 16 block of 32-bit words.
VSP_INLINE void TransposeWords(const uint32_t* const* rows, uint32_t* dst, int64_t dst_stride) {
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 16; j += 8) {
      TransposeWords8(rows + i, j, dst + j * dst_stride + i, dst_stride);
    }
  }
}

/// A word holds one float.
struct F32Words {
  static constexpr int kPerWord = 1;
  static VSP_INLINE V16 MulAdd(V16 acc, const uint32_t* a, V16 b) {
    const __m256 x = _mm256_broadcast_ss(reinterpret_cast<const float*>(a));
    return {_mm256_fmadd_ps(x, b.lo, acc.lo), _mm256_fmadd_ps(x, b.hi, acc.hi)};
  }
};

}  // namespace
}  // namespace vsprefill::kernels::cpu

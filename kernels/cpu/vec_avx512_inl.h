// 16 floats in one AVX-512 register. Included by isa_avx512*.cc only (isa_kernels.h says why
// everything lies in an anonymous namespace).
#pragma once

#include <immintrin.h>

#include <cstdint>

#define VSP_INLINE inline __attribute__((always_inline))
#define VSP_LAMBDA_INLINE __attribute__((always_inline))

namespace vsprefill::kernels::cpu {
namespace {

constexpr int kVectorRegisters = 32;  // of one V16 each

struct V16 {
  __m512 v;
};

VSP_INLINE V16 Zero() { return {_mm512_setzero_ps()}; }
VSP_INLINE V16 Set1(float x) { return {_mm512_set1_ps(x)}; }
VSP_INLINE V16 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
VSP_INLINE void Store(float* p, V16 a) { _mm512_storeu_ps(p, a.v); }
VSP_INLINE V16 Add(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
VSP_INLINE V16 Sub(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
VSP_INLINE V16 Mul(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
VSP_INLINE V16 Div(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
VSP_INLINE V16 Max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
VSP_INLINE V16 Min(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
/// 1 / a, relative error below 1e-4.
VSP_INLINE V16 Reciprocal(V16 a) { return {_mm512_rcp14_ps(a.v)}; }
VSP_INLINE V16 Fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
VSP_INLINE bool AnyGreater(V16 a, V16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
/// a > b ? x : y
VSP_INLINE V16 SelectGreater(V16 a, V16 b, V16 x, V16 y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
VSP_INLINE float SumLanes(V16 a) { return _mm512_reduce_add_ps(a.v); }

/// a where positions[lane] >= column, else -infinity.
VSP_INLINE V16 MaskAfter(V16 a, const int32_t* positions, int32_t column) {
  const __mmask16 hidden =
      _mm512_cmplt_epi32_mask(_mm512_loadu_si512(positions), _mm512_set1_epi32(column));
  return {_mm512_mask_mov_ps(a.v, hidden, _mm512_set1_ps(-__builtin_inff()))};
}

/// p * 2^n for the integer n that `shifted` = n + 1.5 * 2^23 holds; n in [-126, 127].
VSP_INLINE V16 ScaleByPowerOf2(V16 p, V16 shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), n))};
}

VSP_INLINE V16 LoadBF16(const uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

#ifdef __AVX512BF16__
VSP_INLINE void StoreBF16(uint16_t* p, V16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
#else
VSP_INLINE void StoreBF16(uint16_t* p, V16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif

/// dst[j * dst_stride + i] = rows[i][j] for a 16 x 16 block of 32-bit words.
VSP_INLINE void TransposeWords(const uint32_t* const* rows, uint32_t* dst, int64_t dst_stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(dst + i * dst_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_si512(dst + (8 + i) * dst_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
    _mm512_storeu_si512(dst + (4 + i) * dst_stride,
                        _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
    _mm512_storeu_si512(dst + (12 + i) * dst_stride,
                        _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
  }
}

/// A word of A, wherever it lies (weights in a mapped file need not be aligned).
VSP_INLINE __m512i BroadcastWord(const uint32_t* a) {
  int word;
  __builtin_memcpy(&word, a, sizeof(word));
  return _mm512_set1_epi32(word);
}

/// A word holds one float.
struct F32Words {
  static constexpr int kPerWord = 1;
  static VSP_INLINE V16 MulAdd(V16 acc, const uint32_t* a, V16 b) {
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(BroadcastWord(a)), b.v, acc.v)};
  }
};

#ifdef __AVX512BF16__
/// A word holds two consecutive bf16 of the summed dimension.
struct BF16Words {
  static constexpr int kPerWord = 2;
  static VSP_INLINE V16 MulAdd(V16 acc, const uint32_t* a, V16 b) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)BroadcastWord(a), (__m512bh)b.v)};
  }
};

/// 16 words (lo[i], hi[i]), rounded to bf16.
VSP_INLINE void StorePairs(uint32_t* p, V16 lo, V16 hi) {
  // cvtne2 puts its second argument into the low half; the permutation interleaves the halves.
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(hi.v, lo.v);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
}

/// words[i] = (a[i], b[i]) for 16 elements of two bf16 rows.
VSP_INLINE void InterleaveRows(const uint16_t* a, const uint16_t* b, uint32_t* words) {
  const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  _mm512_storeu_si512(words, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
}
#endif

}  // namespace
}  // namespace vsprefill::kernels::cpu

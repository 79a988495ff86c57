// The one matrix kernel of all CPU operations: C[m][lane] = sum_k A[m][k] * B[k][lane] in 32-bit
// words (a float, or a pair of bf16), A broadcast, lanes along the vectors. Plus exp2.
#pragma once

// The includer has chosen an instruction set: vec_*_inl.h comes first.
#include <cstdint>

#include "kernels/tensor_view.h"

namespace vsprefill::kernels::cpu {
namespace {

/// Rows of A per register block for kVectors lane vectors: as many accumulators as registers allow.
template <int kVectors>
constexpr int RegisterRows() {
  return kVectorRegisters == 32 ? (kVectors == 1   ? 12
                                   : kVectors == 2 ? 12
                                   : kVectors == 3 ? 8
                                                   : 6)
                                : 6;
}
/// Lane vectors that a block may have.
constexpr int kMaxBlockVectors = kVectorRegisters == 32 ? 4 : 1;

/// Vectors of the next lane block where `left` remain: 8 = 4 + 4, 7 = 4 + 3, 6 = 3 + 3, 5 = 3 + 2,
/// so that no block has one vector where it can be avoided. Queries and sums are stored block by
/// block.
VSP_INLINE int BlockVectors(int left) {
  if (kMaxBlockVectors == 1) return 1;
  return left >= 7 ? 4 : left >= 5 ? 3 : left;
}

/// Calls body.template operator()<vectors>(first lane) for each lane block.
template <class Body>
VSP_INLINE void ForLaneBlocks(int lanes, const Body& body) {
  int take;
  for (int first = 0; first < lanes; first += 16 * take) {
    take = BlockVectors((lanes - first) / 16);
    if constexpr (kMaxBlockVectors == 4) {
      if (take == 4) body.template operator()<4>(first);
      if (take == 3) body.template operator()<3>(first);
      if (take == 2) body.template operator()<2>(first);
    }
    if (take == 1) body.template operator()<1>(first);
  }
}

/// acc[m][v] += over k of A and B. Strides in words.
template <class Words, int kRows, int kVectors>
VSP_INLINE void MultiplyBlock(const uint32_t* a, int64_t row_stride, int64_t k_stride,
                              const float* b, int64_t b_stride, int64_t depth,
                              V16 (&acc)[kRows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    V16 bv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bv[v] = Load(b + 16 * v);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        acc[m][v] = Words::MulAdd(acc[m][v], a + m * row_stride, bv[v]);
      }
    }
    a += k_stride;
    b += b_stride;
  }
}

/// Calls body.template operator()<kRows>(m) for register blocks that cover [0, rows).
template <int kRows, class Body>
VSP_INLINE void ForRowBlocks(int rows, const Body& body) {
  int m = 0;
  for (; m + kRows <= rows; m += kRows) body.template operator()<kRows>(m);
  if constexpr (kRows > 8) {
    for (; m + 8 <= rows; m += 8) body.template operator()<8>(m);
  }
  if constexpr (kRows > 4) {
    for (; m + 4 <= rows; m += 4) body.template operator()<4>(m);
  }
  for (; m + 2 <= rows; m += 2) body.template operator()<2>(m);
  if (m < rows) body.template operator()<1>(m);
}

/// 2^x, relative error 7.5e-5 (kPrecise: 1e-7). x is clamped to [-120, 127]: what would be smaller
/// is 2^-120, which no sum of ours can see.
template <bool kPrecise>
VSP_INLINE V16 Exp2(V16 x) {
  const V16 magic = Set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = Max(x, Set1(-120.0f));
  const V16 shifted = Add(x, magic);
  const V16 f = Sub(x, Sub(shifted, magic));  // [-0.5, 0.5]
  V16 p;
  if constexpr (kPrecise) {
    p = Fma(f, Set1(0x1.5c08e6p-10f), Set1(0x1.3d0c52p-7f));
    p = Fma(f, p, Set1(0x1.c6b6e4p-5f));
    p = Fma(f, p, Set1(0x1.ebf918p-3f));
    p = Fma(f, p, Set1(0x1.62e428p-1f));
    p = Fma(f, p, Set1(0x1.000002p+0f));
  } else {
    p = Fma(f, Set1(0x1.c3f760p-5f), Set1(0x1.f0de1ap-3f));
    p = Fma(f, p, Set1(0x1.62f31ap-1f));
    p = Fma(f, p, Set1(0x1.fff692p-1f));
  }
  return ScaleByPowerOf2(p, shifted);
}

/// x * sigmoid(x).
template <bool kPrecise>
VSP_INLINE V16 Silu(V16 x) {
  // exp(-x) is cut at 2^126, where the result is 0 for all purposes.
  const V16 e = Exp2<kPrecise>(Min(Mul(x, Set1(-1.44269504f)), Set1(126.0f)));
  const V16 denominator = Add(Set1(1.0f), e);
  if constexpr (kPrecise) return Div(x, denominator);
  return Mul(x, Reciprocal(denominator));
}

/// Elements [p, p + count), count <= 16, the rest zero.
template <DType kDType>
VSP_INLINE V16 LoadElements(const void* base, int64_t first, int64_t count = 16) {
  if constexpr (kDType == DType::kF32) {
    const float* p = static_cast<const float*>(base) + first;
    if (count >= 16) return Load(p);
    alignas(64) float part[16] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return Load(part);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(base) + first;
    if (count >= 16) return LoadBF16(p);
    alignas(64) uint16_t part[16] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return LoadBF16(part);
  }
}

template <DType kDType>
VSP_INLINE void StoreElements(void* base, int64_t first, V16 x, int64_t count = 16) {
  if constexpr (kDType == DType::kF32) {
    float* p = static_cast<float*>(base) + first;
    if (count >= 16) return Store(p, x);
    alignas(64) float part[16];
    Store(part, x);
    for (int64_t i = 0; i < count; ++i) p[i] = part[i];
  } else {
    uint16_t* p = static_cast<uint16_t*>(base) + first;
    if (count >= 16) return StoreBF16(p, x);
    alignas(64) uint16_t part[16];
    StoreBF16(part, x);
    for (int64_t i = 0; i < count; ++i) p[i] = part[i];
  }
}

}  // namespace
}  // namespace vsprefill::kernels::cpu

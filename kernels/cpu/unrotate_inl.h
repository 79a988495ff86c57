// Block pools of queries and keys with their RoPE undone, for SeerAttention's gate
// (kernels/select_seer.h fixes the arithmetic).
#pragma once

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/matmul_inl.h"

namespace vsprefill::kernels::cpu {
namespace {

template <DType kDType>
void UnrotatePoolRows(const UnrotatePoolTask& t) {
  const int half = t.head_dim / 2;
  for (int i = 0; i < half; i += 16) {
    const int64_t count = half - i;
    V16 max_low = Zero(), max_high = Zero(), min_low = Zero(), min_high = Zero();
    V16 sum_low = Zero(), sum_high = Zero();
    for (int64_t row = 0; row < t.rows; ++row) {
      const int64_t at = t.offset + row * t.row_stride + i;
      const V16 x = LoadElements<kDType>(t.base, at, count);
      const V16 y = LoadElements<kDType>(t.base, at + half, count);
      const V16 c = LoadElements<DType::kF32>(t.cos, row * half + i, count);
      const V16 s = LoadElements<DType::kF32>(t.sin, row * half + i, count);
      // Products only as addends of an explicit Fma: nothing is left for the compiler to contract.
      const V16 low = Fma(y, s, Mul(x, c)), high = Fma(Sub(Zero(), x), s, Mul(y, c));
      max_low = row == 0 ? low : Max(low, max_low);
      max_high = row == 0 ? high : Max(high, max_high);
      min_low = row == 0 ? low : Min(low, min_low);
      min_high = row == 0 ? high : Min(high, min_high);
      sum_low = Add(sum_low, low);
      sum_high = Add(sum_high, high);
    }
    const auto store = [&](float* out, V16 low, V16 high) VSP_LAMBDA_INLINE {
      if (out == nullptr) return;
      StoreElements<DType::kF32>(out, i, low, count);
      StoreElements<DType::kF32>(out, half + i, high, count);
    };
    store(t.max, max_low, max_high);
    store(t.min, min_low, min_high);
    store(t.sum, sum_low, sum_high);
  }
}

void UnrotatePool(const UnrotatePoolTask& task) {
  task.dtype == DType::kBF16 ? UnrotatePoolRows<DType::kBF16>(task)
                             : UnrotatePoolRows<DType::kF32>(task);
}

}  // namespace
}  // namespace vsprefill::kernels::cpu

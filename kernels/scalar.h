// Scalar access to tensors by element type, for code where speed does not matter: references,
// tests, reductions. Vector code has its own conversions (kernels/cpu/*_inl.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/tensor_view.h"

namespace vsprefill::kernels {

inline float BF16ToFloat(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

/// Rounds to nearest even; a NaN stays a (quiet) NaN.
inline uint16_t FloatToBF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// Element `i` of a tensor of `dtype`.
inline float LoadScalar(const void* base, int64_t i, DType dtype) {
  return dtype == DType::kF32 ? static_cast<const float*>(base)[i]
                              : BF16ToFloat(static_cast<const uint16_t*>(base)[i]);
}

inline void StoreScalar(void* base, int64_t i, DType dtype, float value) {
  if (dtype == DType::kF32) {
    static_cast<float*>(base)[i] = value;
  } else {
    static_cast<uint16_t*>(base)[i] = FloatToBF16(value);
  }
}

}  // namespace vsprefill::kernels

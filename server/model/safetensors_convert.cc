#include <bit>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/model/safetensors.h"

namespace vsprefill::model {
namespace {

// The stored bytes may lie at any address, so elements are read with memcpy.
template <typename Bits>
Bits Load(const uint8_t* data, int64_t i) {
  Bits bits;
  std::memcpy(&bits, data + i * sizeof(Bits), sizeof(Bits));
  return bits;
}

float FloatFromBFloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

float FloatFromHalf(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1f;
  const uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) {
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  }
  // Zero and subnormal numbers: mantissa * 2^-24, exact in float32.
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

uint16_t BFloat16FromFloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

absl::Status CheckSize(const TensorView& tensor, size_t elements) {
  if (static_cast<int64_t>(elements) == tensor.num_elements) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("tensor of ", tensor.num_elements, " elements, room for ", elements));
}

absl::Status UnsupportedDType(const TensorView& tensor) {
  return absl::InvalidArgumentError(
      absl::StrCat("dtype ", tensor.dtype, " (supported: F32, BF16, F16)"));
}

}  // namespace

absl::Status ConvertToFloat(const TensorView& tensor, absl::Span<float> out) {
  VSP_RETURN_IF_ERROR(CheckSize(tensor, out.size()));
  const uint8_t* data = tensor.data.data();
  const int64_t n = tensor.num_elements;
  if (tensor.dtype == "F32") {
    if (n > 0) std::memcpy(out.data(), data, tensor.data.size());
  } else if (tensor.dtype == "BF16") {
    for (int64_t i = 0; i < n; ++i) out[i] = FloatFromBFloat16(Load<uint16_t>(data, i));
  } else if (tensor.dtype == "F16") {
    for (int64_t i = 0; i < n; ++i) out[i] = FloatFromHalf(Load<uint16_t>(data, i));
  } else {
    return UnsupportedDType(tensor);
  }
  return absl::OkStatus();
}

absl::Status ConvertToBFloat16(const TensorView& tensor, absl::Span<uint16_t> out) {
  VSP_RETURN_IF_ERROR(CheckSize(tensor, out.size()));
  const uint8_t* data = tensor.data.data();
  const int64_t n = tensor.num_elements;
  if (tensor.dtype == "BF16") {
    if (n > 0) std::memcpy(out.data(), data, tensor.data.size());
  } else if (tensor.dtype == "F32") {
    for (int64_t i = 0; i < n; ++i) out[i] = BFloat16FromFloat(Load<float>(data, i));
  } else if (tensor.dtype == "F16") {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = BFloat16FromFloat(FloatFromHalf(Load<uint16_t>(data, i)));
    }
  } else {
    return UnsupportedDType(tensor);
  }
  return absl::OkStatus();
}

}  // namespace vsprefill::model

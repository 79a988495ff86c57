#include "server/model/rope.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace vsprefill::model {
namespace {

// Tables grow in steps, so that a prompt that is decoded token by token does not rebuild them.
constexpr int64_t kGrowthStep = 1024;

// Dimension (index of a frequency, fractional) that turns `rotations` times over `positions`
// tokens.
double CorrectionDim(double rotations, int head_dim, double theta, double positions) {
  return head_dim * std::log(positions / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(theta));
}

at::Tensor YarnFrequencies(const RopeConfig& rope, int head_dim, const at::Tensor& powers) {
  const double positions = static_cast<double>(rope.original_max_position_embeddings);
  double low = CorrectionDim(rope.beta_fast, head_dim, rope.theta, positions);
  double high = CorrectionDim(rope.beta_slow, head_dim, rope.theta, positions);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;  // as transformers: no division by zero
  const at::Tensor ramp = ((at::arange(head_dim / 2, at::kFloat) - low) / (high - low)).clamp(0, 1);
  const at::Tensor keep = 1 - ramp;
  return at::reciprocal(rope.factor * powers) * (1 - keep) + at::reciprocal(powers) * keep;
}

at::Tensor Llama3Frequencies(const RopeConfig& rope, const at::Tensor& frequencies) {
  const double positions = static_cast<double>(rope.original_max_position_embeddings);
  const double low_wavelength = positions / rope.low_freq_factor;
  const double high_wavelength = positions / rope.high_freq_factor;
  const at::Tensor wavelengths = 2 * std::numbers::pi / frequencies;
  const at::Tensor scaled =
      at::where(wavelengths > low_wavelength, frequencies / rope.factor, frequencies);
  const at::Tensor smooth = (positions / wavelengths - rope.low_freq_factor) /
                            (rope.high_freq_factor - rope.low_freq_factor);
  const at::Tensor smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled;
  const at::Tensor between =
      at::logical_and(wavelengths >= high_wavelength, wavelengths <= low_wavelength);
  return at::where(between, smoothed, scaled);
}

}  // namespace

std::vector<float> RopeInverseFrequencies(const RopeConfig& rope, int head_dim) {
  const at::Tensor exponents = at::arange(0, head_dim, 2, at::kFloat) / head_dim;
  const at::Tensor powers = at::pow(rope.theta, exponents);
  at::Tensor frequencies = at::reciprocal(powers);
  if (rope.type == "linear") {
    frequencies = frequencies / rope.factor;
  } else if (rope.type == "llama3") {
    frequencies = Llama3Frequencies(rope, frequencies);
  } else if (rope.type == "yarn") {
    frequencies = YarnFrequencies(rope, head_dim, powers);
  }
  frequencies = frequencies.contiguous();
  const float* data = frequencies.const_data_ptr<float>();
  return std::vector<float>(data, data + frequencies.numel());
}

RopeTable::RopeTable(const RopeConfig& rope, int head_dim)
    : inverse_frequencies_(RopeInverseFrequencies(rope, head_dim)),
      attention_factor_(static_cast<float>(ResolvedAttentionFactor(rope))) {}

bool RopeTable::Grow(int64_t positions) {
  if (positions <= positions_) return false;
  const int64_t begin = positions_;
  positions_ = (positions + kGrowthStep - 1) / kGrowthStep * kGrowthStep;
  const int64_t half = static_cast<int64_t>(inverse_frequencies_.size());
  cos_.resize(positions_ * half);
  sin_.resize(positions_ * half);
  for (int64_t position = begin; position < positions_; ++position) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * inverse_frequencies_[i];
      cos_[position * half + i] = std::cos(angle) * attention_factor_;
      sin_[position * half + i] = std::sin(angle) * attention_factor_;
    }
  }
  return true;
}

}  // namespace vsprefill::model

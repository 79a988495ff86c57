// Tables of cos and sin for rotary position embeddings, as transformers 5.17 computes them.
#pragma once

#include <cstdint>
#include <vector>

#include "server/model/model_config.h"

namespace vsprefill::model {

/// Rotations per token, in radians: float32 [head_dim / 2]. Computed with LibTorch, because an
/// error of one unit in the last place grows with the position.
std::vector<float> RopeInverseFrequencies(const RopeConfig& rope, int head_dim);

/// Tables for positions [0, size()), grown on demand. Not thread-safe.
class RopeTable {
 public:
  RopeTable(const RopeConfig& rope, int head_dim);

  /// Makes the tables at least `positions` long. Returns true where they moved.
  bool Grow(int64_t positions);
  int64_t size() const { return positions_; }
  /// float32 [size(), head_dim / 2], attention factor included.
  const float* cos() const { return cos_.data(); }
  const float* sin() const { return sin_.data(); }

 private:
  std::vector<float> inverse_frequencies_;
  float attention_factor_;
  int64_t positions_ = 0;
  std::vector<float> cos_, sin_;
};

}  // namespace vsprefill::model

// A random SeerAttention gate with RoPE tables for a selection's input, in host memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/select_seer.h"

namespace vsprefill::kernels::testing {

struct SeerTestGate {
  int gate_dim;
  std::vector<float> wq, wk, cos, sin, block_cos, block_sin;

  /// `ties`: weights of 0 and 1 and no rotation, so that shares of whole-number problems are equal
  /// often.
  SeerTestGate(const QuerySelectionInput& in, int width, bool ties) : gate_dim(width) {
    const int64_t n = in.sequence.kv_tokens, d = in.shape.head_dim;
    std::mt19937 rng(static_cast<uint32_t>(width + n));
    std::normal_distribution<float> normal;
    wq.resize(in.shape.num_q_heads * width * d);
    wk.resize(in.shape.num_kv_heads * width * 3 * d);
    for (auto* weights : {&wq, &wk}) {
      for (float& w : *weights) w = ties ? static_cast<float>(rng() % 2) : 2 * normal(rng);
    }
    Rotations(n, d / 2, 1, ties, &cos, &sin);
    Rotations(SeerBlocks(n), width / 2, kSeerBlock, ties, &block_cos, &block_sin);
  }
  /// Valid as long as this object.
  SeerInput Input(const QuerySelectionInput& in) const {
    SeerInput input;
    input.base = in;
    // An attention factor as YaRN has: the tables need not be rotations of length 1.
    input.gate = {gate_dim, wq.data(), wk.data(), block_cos.data(), block_sin.data(), 0.75f};
    input.rope_cos = cos.data();
    input.rope_sin = sin.data();
    return input;
  }

 private:
  static void Rotations(int64_t rows, int64_t half, int64_t step, bool none,
                        std::vector<float>* cosines, std::vector<float>* sines) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < half; ++i) {
        const double frequency = std::pow(1e3, -static_cast<double>(i) / static_cast<double>(half));
        const double angle = none ? 0 : static_cast<double>(r * step) * frequency;
        cosines->push_back(static_cast<float>(std::cos(angle)));
        sines->push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
};

}  // namespace vsprefill::kernels::testing

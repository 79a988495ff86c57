// SeerAttention's gate while it learns: all layers and heads, float32 master weights, KL loss
// against the block-max attention. kernels/select_seer.h runs what Export writes.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "server/model/model_config.h"
#include "server/model/seer_gate.h"
#include "training/teacher.h"

namespace vsprefill::training {

/// What the teacher saw of one text. float32, on the student's device.
struct SeerSample {
  int64_t tokens = 0;
  torch::Tensor queries;  // [layers, q heads, blocks, head_dim]: mean before RoPE
  torch::Tensor keys;     // [layers, groups, blocks, 3 * head_dim]: maximum, minimum, mean
  torch::Tensor target;   // [layers, q heads, blocks, blocks]: rows sum to 1
};

struct SeerShape {
  int num_layers = 0, num_q_heads = 0, num_groups = 0, head_dim = 0, gate_dim = 0;
  model::RopeConfig rope;  // the model's

  static SeerShape Of(const model::ModelConfig& config, int gate_dim) {
    return {config.num_layers, config.num_q_heads, config.num_kv_heads,
            config.head_dim,   gate_dim,           config.rope};
  }
};

/// KL(target || gate), mean over layers, heads and rows of blocks, in nat.
struct SeerLoss {
  double kl = 0;
  double total() const { return kl; }
  void Add(double weight, const SeerLoss& other) { kl += weight * other.kl; }
  std::string ToString() const;
};

class SeerStudent {
 public:
  using Sample = SeerSample;
  using Loss = SeerLoss;
  using Shape = SeerShape;
  static constexpr bool kNeedsQueries = true, kNeedsSums = false;

  /// Where gate_dim is a multiple of head_dim, the gate begins as the attention of mean queries and
  /// mean keys, plus a little noise from `seed`; else from noise alone.
  SeerStudent(const SeerShape& shape, torch::Device device, uint64_t seed);

  /// The student's view of a capture with queries.
  static SeerSample ToSample(const SeerShape& shape, const Capture& capture, int64_t slab_bytes);

  /// Logits of one layer, causal: float32 [q heads, blocks, blocks], -1e9 right of the diagonal.
  torch::Tensor Logits(const SeerSample& sample, int layer) const;

  /// Adds weight * d(sum over layers of the KL) to the gradients; returns the mean. The first
  /// quarter of the rows of blocks does not count (as in the paper's training).
  SeerLoss Accumulate(const SeerSample& sample, double weight, int64_t slab_bytes);
  SeerLoss Evaluate(const SeerSample& sample, int64_t slab_bytes) const;

  /// Share of the target in the tenth of the visible blocks that the gate rates highest, mean over
  /// layers, heads and the rows that count.
  double ProxyRecall(const SeerSample& sample, int64_t slab_bytes) const;

  /// Trained tensors, which are also all that a checkpoint must hold.
  std::vector<torch::Tensor> Parameters() const { return {wq_, wk_}; }
  std::vector<torch::Tensor> State() const { return Parameters(); }

  /// Weights in the kernels' form, rounded to bfloat16. weights_id and facts are left empty.
  model::SeerGateWeights Export() const;

  const SeerShape& shape() const { return shape_; }

 private:
  torch::Tensor LayerLoss(const SeerSample& sample, int layer) const;
  /// R x of [heads, blocks, gate_dim], block b rotated by b.
  torch::Tensor RotateBlocks(const torch::Tensor& x) const;

  SeerShape shape_;
  torch::Device device_;
  torch::Tensor wq_;           // [layers, q heads, gate_dim, head_dim]
  torch::Tensor wk_;           // [layers, groups, gate_dim, 3 * head_dim]
  torch::Tensor frequencies_;  // [gate_dim / 2]: radians per token
  float attention_factor_;
};

}  // namespace vsprefill::training

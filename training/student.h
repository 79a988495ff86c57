// The VSIndexer while it learns: all layers and KV groups as one set of batched tensors, float32
// master weights, KL loss against the teacher's sums. kernels/indexer.h runs what Export writes.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/model/vs_indexer.h"

namespace vsprefill::training {

/// What the teacher saw of one text. float32, on the student's device.
struct Sample {
  int64_t tokens = 0;
  torch::Tensor
      features;  // [layers, groups, tokens, 2 * head_dim]: normalised key, normalised value
  torch::Tensor columns;    // [layers, groups, tokens]: true attention mass per column, sums to 1
  torch::Tensor diagonals;  // [layers, groups, tokens]: per offset, sums to 1
};

struct StudentShape {
  int num_layers = 0, num_groups = 0, head_dim = 0, hidden = 0;
};

/// Mean over layers and groups, in nat.
struct KlLoss {
  double vertical = 0, slash = 0;
  double total() const { return vertical + slash; }
  void Add(double weight, const KlLoss& other) {
    vertical += weight * other.vertical;
    slash += weight * other.slash;
  }
  std::string ToString() const;
};

/// x / sqrt(mean of squares over the last dimension + 1e-6), float32: what the indexer does to K
/// and V.
torch::Tensor RmsNormalize(const torch::Tensor& x);

class Student {
 public:
  using Sample = training::Sample;
  using Loss = KlLoss;
  using Shape = StudentShape;
  static constexpr bool kNeedsQueries = false, kNeedsSums = true;

  /// Random weights from `seed`. `bf16_hidden`: the hidden layer's product in bfloat16.
  Student(const StudentShape& shape, torch::Device device, uint64_t seed, bool bf16_hidden);

  /// Standardises the features and starts the slash prior from a few samples; call once, before
  /// training.
  void Calibrate(const std::vector<Sample>& samples);

  /// Logits of layers [layer_begin, layer_end): [layers, groups, 2, tokens] (vertical, slash; prior
  /// included).
  torch::Tensor Logits(const torch::Tensor& features, int layer_begin) const;

  /// Adds weight * d(sum over layers and groups of both KLs) to the gradients, some layers at a
  /// time so that at most about `slab_bytes` of hidden activations live at once; returns the loss.
  KlLoss Accumulate(const Sample& sample, double weight, int64_t slab_bytes);
  /// The loss alone.
  KlLoss Evaluate(const Sample& sample, int64_t slab_bytes) const;

  /// Share of attention mass that columns and 64-wide offset blocks chosen from the student's
  /// logits cover at 10 % cost (half each), were the two independent: a quick figure for the
  /// progress bar, mean over layers and groups.
  double ProxyRecall(const Sample& sample, int64_t slab_bytes) const;

  /// Trained tensors, for the optimiser and checkpoints.
  std::vector<torch::Tensor> Parameters() const;
  /// Everything that a checkpoint must hold: the parameters and the standardisation.
  std::vector<torch::Tensor> State() const;

  /// Weights in the kernels' form: standardisation folded into w1 and b1, w1 rounded to bfloat16.
  /// weights_id and facts are left empty.
  model::IndexerWeights Export() const;

  const StudentShape& shape() const { return shape_; }

 private:
  /// Calls fn(layer_begin, layer_end) over slabs of layers.
  template <typename Fn>
  void ForSlabs(int64_t tokens, int64_t slab_bytes, const Fn& fn) const;
  /// {sum of vertical KLs, sum of slash KLs} over the slab's layers and groups.
  torch::Tensor SlabLoss(const Sample& sample, int layer_begin, int layer_end) const;

  StudentShape shape_;
  torch::Device device_;
  bool bf16_hidden_;
  torch::Tensor w1_;            // [layers, groups, hidden, 2 * head_dim], of standardised features
  torch::Tensor b1_;            // [layers, groups, hidden]
  torch::Tensor w2_;            // [layers, groups, 2, hidden]
  torch::Tensor slash_prior_;   // [layers, groups, kSlashBuckets]
  torch::Tensor mean_, scale_;  // [layers, groups, 2 * head_dim]: (x - mean) * scale
};

}  // namespace vsprefill::training

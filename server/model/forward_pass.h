// The layers of a forward call, one after the other (transformer.h is the interface). Buffers of
// activations are kept between calls and grow to the largest batch seen. Engine thread only.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/kernel_set.h"
#include "server/base/allocator.h"
#include "server/model/model_weights.h"
#include "server/model/rope.h"
#include "server/model/torch_backend.h"
#include "server/model/transformer.h"
#include "server/model/vs_indexer.h"

namespace vsprefill::model {

class ForwardPass {
 public:
  /// What a forward pass works with; all outlive it. `indexer` may be null.
  struct Model {
    const ModelConfig* config;
    const kv::KvLayout* kv_layout;
    const ModelWeights* weights;
    const VsIndexer* indexer;
    const kernels::KernelSet* kernels;
    TorchBackend* backend;
  };

  explicit ForwardPass(const Model& model);

  /// See Transformer::Forward.
  absl::StatusOr<ForwardResult> Run(absl::Span<const SequenceChunk> batch,
                                    const ForwardOptions& options);

 private:
  absl::Status Validate(absl::Span<const SequenceChunk> batch, const ForwardOptions& options) const;
  absl::Status PrepareBuffers(absl::Span<const SequenceChunk> batch);
  /// Tables of RoPE for positions [0, positions) on the device.
  absl::Status PrepareRope(int64_t positions);
  absl::Status RunLayer(int layer, absl::Span<const SequenceChunk> batch,
                        const ForwardOptions& options, ForwardResult* result);
  absl::Status AppendKv(int layer, absl::Span<const SequenceChunk> batch);
  absl::Status ScoreTokens(int layer, absl::Span<const SequenceChunk> batch);
  absl::Status Attend(int layer, absl::Span<const SequenceChunk> batch,
                      const ForwardOptions& options);
  absl::Status Mlp(const LayerWeights& weights);
  absl::Status LastLogits(absl::Span<const SequenceChunk> batch, ForwardResult* result);
  absl::Status AllScores(absl::Span<const SequenceChunk> batch, ForwardResult* result);

  absl::Status Linear(const void* x, const Buffer& weight, const Buffer& bias, int64_t rows,
                      int64_t in, int64_t out_features, void* out);
  /// residual[row..] += delta[row..] where `add_delta`; normed[row..] = norm(residual[row..]).
  absl::Status Norm(const void* weight, int64_t row, int64_t rows, bool add_delta);
  void* Row(const Buffer& buffer, int64_t row, int64_t width) const;

  const Model model_;
  const kernels::DType dtype_;
  RopeTable rope_;
  Buffer device_cos_, device_sin_;  // CUDA only
  const float* cos_ = nullptr;
  const float* sin_ = nullptr;

  double linear_seconds_ = 0;  // of this call, where work is done on return
  int64_t total_rows_ = 0;     // of this batch
  int64_t capacity_rows_ = 0;
  Buffer residual_, normed_, delta_;  // [rows, hidden]
  Buffer qkv_;                        // [rows, (q_heads + 2 kv_heads) * head_dim]
  Buffer attended_;                   // [rows, q_heads * head_dim]
  Buffer gate_up_, gated_;            // [mlp_rows, 2 * intermediate], [mlp_rows, intermediate]
  Buffer logits_;                     // [score_rows, vocab]
};

}  // namespace vsprefill::model

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
  /// Rows [begin, begin + count) of the batch.
  struct RowRange {
    int64_t begin = 0, count = 0;
  };

  absl::Status RunLayer(int layer, absl::Span<const SequenceChunk> batch,
                        const ForwardOptions& options, ForwardResult* result);
  absl::Status AppendKv(int layer, absl::Span<const SequenceChunk> batch);
  absl::Status ScoreTokens(int layer, absl::Span<const SequenceChunk> batch,
                           const attention::AttentionMethod& method);
  /// Attention of each chunk's tokens, or of its last one only.
  absl::Status Attend(int layer, absl::Span<const SequenceChunk> batch, bool last_token_only,
                      const ForwardOptions& options);
  /// Everything behind the attention: output projection, norm, MLP, and the norm before the next
  /// layer (none after the last). A block of rows passes through all of it before the next one.
  absl::Status FinishLayer(int layer, RowRange rows);
  absl::Status LastLogits(absl::Span<const SequenceChunk> batch, ForwardResult* result);
  absl::Status AllScores(absl::Span<const SequenceChunk> batch, const ForwardOptions& options,
                         ForwardResult* result);

  absl::StatusOr<Activation> Linear(const LinearLayer& layer, const void* x, int64_t rows);
  /// residual[rows] += delta [rows.count, hidden], where not null; normed[rows] =
  /// norm(residual[rows]) * weight, where not null.
  absl::Status Norm(RowRange rows, const void* delta, const void* weight);
  void* Row(const Buffer& buffer, int64_t row, int64_t width) const;
  int64_t q_width() const { return int64_t{model_.config->num_q_heads} * model_.config->head_dim; }
  int64_t qkv_width() const {
    return q_width() + int64_t{2} * model_.config->num_kv_heads * model_.config->head_dim;
  }

  const Model model_;
  const kernels::DType dtype_;
  RopeTable rope_;
  Buffer device_cos_, device_sin_;  // CUDA only
  const float* cos_ = nullptr;
  const float* sin_ = nullptr;

  double linear_seconds_ = 0;  // of this call, where work is done on return
  int64_t total_rows_ = 0;     // of this batch
  int64_t capacity_rows_ = 0;
  Buffer residual_, normed_;  // [rows, hidden]
  Activation qkv_;            // [rows, q, k and v of a row], of the current layer
  Buffer attended_;           // [rows, q_heads * head_dim]
  Buffer gated_;              // [block rows, intermediate]
};

}  // namespace vsprefill::model

// A model's weights in memory of the compute device, in the compute dtype, q/k/v and gate/up fused.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/tensor_view.h"
#include "server/base/allocator.h"
#include "server/model/linear.h"
#include "server/model/model_config.h"
#include "server/model/safetensors.h"
#include "server/model/torch_backend.h"

namespace vsprefill::model {

/// A buffer without data: the model has no such tensor.
struct LayerWeights {
  Buffer input_norm;                     // [hidden]
  std::unique_ptr<LinearLayer> qkv;      // to q rows, k rows, v rows
  Buffer q_norm, k_norm;                 // [head_dim]
  std::unique_ptr<LinearLayer> o;        // from q_heads * head_dim
  Buffer post_norm;                      // [hidden]
  std::unique_ptr<LinearLayer> gate_up;  // to gate rows, up rows
  std::unique_ptr<LinearLayer> down;     // from intermediate
};

struct ModelWeights {
  Buffer embedding;                      // [vocab, hidden]
  std::unique_ptr<LinearLayer> lm_head;  // to vocab; uses the embedding's memory where tied
  Buffer final_norm;                     // [hidden]
  std::vector<LayerWeights> layers;
};

/// Copies all weights of `config` out of `file`. INVALID_ARGUMENT names a tensor that is missing,
/// unexpected, of a wrong shape or dtype, or a norm weight or bias that is not finite.
absl::StatusOr<ModelWeights> LoadWeights(const SafetensorsReader& file, const ModelConfig& config,
                                         kernels::DType dtype, TorchBackend& backend);

}  // namespace vsprefill::model

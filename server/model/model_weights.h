// A model's weights in memory of the compute device, in the compute dtype, q/k/v and gate/up fused.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "kernels/tensor_view.h"
#include "server/base/allocator.h"
#include "server/model/model_config.h"
#include "server/model/safetensors.h"
#include "server/model/torch_backend.h"

namespace vsprefill::model {

/// Matrices are [out_features, in], row-major. A buffer without data: the model has no such tensor.
struct LayerWeights {
  Buffer input_norm;      // [hidden]
  Buffer qkv, qkv_bias;   // [(q_heads + 2 kv_heads) * head_dim, hidden]: q rows, k rows, v rows
  Buffer q_norm, k_norm;  // [head_dim]
  Buffer o, o_bias;       // [hidden, q_heads * head_dim]
  Buffer post_norm;       // [hidden]
  Buffer gate_up, gate_up_bias;  // [2 * intermediate, hidden]: gate rows, up rows
  Buffer down, down_bias;        // [hidden, intermediate]
};

struct ModelWeights {
  Buffer embedding;   // [vocab, hidden]
  Buffer lm_head;     // [vocab, hidden]; no data where tied to the embedding
  Buffer final_norm;  // [hidden]
  std::vector<LayerWeights> layers;

  const void* head() const { return lm_head.data() != nullptr ? lm_head.data() : embedding.data(); }
};

/// Copies all weights of `config` out of `file`. INVALID_ARGUMENT names a tensor that is missing,
/// unexpected, of a wrong shape or dtype, or a norm weight or bias that is not finite.
absl::StatusOr<ModelWeights> LoadWeights(const SafetensorsReader& file, const ModelConfig& config,
                                         kernels::DType dtype, TorchBackend& backend);

}  // namespace vsprefill::model

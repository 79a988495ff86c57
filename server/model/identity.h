// The two identities that bind things made for a model to it (docs/identities.md; the same in
// Python: client/python).
#pragma once

#include <string>

#include "absl/strings/string_view.h"
#include "kernels/tensor_view.h"
#include "server/model/model_config.h"
#include "server/model/safetensors.h"

namespace vsprefill::model {

/// Identity of a model's weights: lower-case hex SHA-256 over names, dtypes, shapes and sampled
/// bytes, independent of sharding.
std::string WeightsId(const TensorMap& tensors);

/// Canonical JSON of what two programs must share to exchange KV.
std::string KvIdJson(const ModelConfig& config, absl::string_view weights_id,
                     kernels::DType kv_dtype);
/// Lower-case hex SHA-256 of KvIdJson.
std::string KvId(const ModelConfig& config, absl::string_view weights_id, kernels::DType kv_dtype);

}  // namespace vsprefill::model

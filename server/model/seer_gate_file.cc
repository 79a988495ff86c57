// The file half of the gate: needs no LibTorch, so tools and fuzzers link it alone.
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"
#include "server/model/checked_tensors.h"
#include "server/model/safetensors.h"
#include "server/model/seer_gate.h"

namespace vsprefill::model {
namespace {

std::string LayerName(int layer, absl::string_view part) {
  return absl::StrFormat("layers.%d.%s", layer, part);
}

}  // namespace

absl::StatusOr<SeerGateWeights> ReadSeerGate(const std::string& path,
                                             const SeerGateExpectation& expectation) {
  VSP_ASSIGN_OR_RETURN(const SafetensorsReader reader, SafetensorsReader::OpenFile(path));
  SeerGateWeights weights;
  weights.facts = reader.metadata();
  const auto take = [&](const char* key) {
    const auto node = weights.facts.extract(key);
    return node.empty() ? std::string() : node.mapped();
  };
  const std::string format = take("format");
  if (format != kSeerGateFormat) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: not a SeerAttention gate: metadata format is '%s', expected '%s'",
                        path, absl::CHexEscape(format), kSeerGateFormat));
  }
  weights.weights_id = take("weights_id");
  if (!expectation.weights_id.empty() && weights.weights_id != expectation.weights_id) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: the gate was trained for weights_id %s, the model has %s: train one for this model "
        "with vsprefill-distill --gate seer",
        path, absl::CHexEscape(weights.weights_id), expectation.weights_id));
  }
  const std::string gate_dim = take("gate_dim");
  if (!absl::SimpleAtoi(gate_dim, &weights.gate_dim) || weights.gate_dim < 2 ||
      weights.gate_dim > kernels::kMaxSeerGateDim || weights.gate_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: metadata gate_dim is '%s', expected an even number in [2, %d]", path,
                        absl::CHexEscape(gate_dim), kernels::kMaxSeerGateDim));
  }
  weights.num_q_heads = expectation.num_q_heads;
  weights.num_kv_heads = expectation.num_kv_heads;
  weights.head_dim = expectation.head_dim;
  if (reader.Find(LayerName(expectation.num_layers, "wq")) != nullptr) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: the gate has more layers than the model's %d", path, expectation.num_layers));
  }
  const int64_t width = weights.gate_dim, head_dim = weights.head_dim;
  weights.layers.resize(expectation.num_layers);
  for (int i = 0; i < expectation.num_layers; ++i) {
    SeerGateWeights::Layer& layer = weights.layers[i];
    VSP_RETURN_IF_ERROR(ReadBFloat16(reader, LayerName(i, "wq"),
                                     {weights.num_q_heads, width, head_dim}, &layer.wq));
    VSP_RETURN_IF_ERROR(ReadBFloat16(reader, LayerName(i, "wk"),
                                     {weights.num_kv_heads, width, 3 * head_dim}, &layer.wk));
  }
  return weights;
}

absl::Status WriteSeerGate(const std::string& path, const SeerGateWeights& weights) {
  const int64_t width = weights.gate_dim, head_dim = weights.head_dim;
  TensorMap tensors;
  for (int i = 0; i < weights.num_layers(); ++i) {
    const SeerGateWeights::Layer& layer = weights.layers[i];
    VSP_RETURN_IF_ERROR(AddTensor("gate", LayerName(i, "wq"),
                                  {weights.num_q_heads, width, head_dim}, layer.wq, &tensors));
    VSP_RETURN_IF_ERROR(AddTensor("gate", LayerName(i, "wk"),
                                  {weights.num_kv_heads, width, 3 * head_dim}, layer.wk, &tensors));
  }
  std::map<std::string, std::string> metadata = weights.facts;
  metadata["format"] = std::string(kSeerGateFormat);
  metadata["weights_id"] = weights.weights_id;
  metadata["gate_dim"] = std::to_string(weights.gate_dim);
  return WriteSafetensors(path, tensors, metadata);
}

}  // namespace vsprefill::model

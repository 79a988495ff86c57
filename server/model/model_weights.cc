#include "server/model/model_weights.h"

#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"

namespace vsprefill::model {
namespace {

// Copies tensors one after the other and remembers which ones were used.
class WeightLoader {
 public:
  WeightLoader(const SafetensorsReader& file, kernels::DType dtype, TorchBackend& backend)
      : file_(file), dtype_(dtype), backend_(backend) {}

  // The tensors `names`, stacked along their first dimension: part i is [rows[i], columns], or
  // [rows[i]] where columns is 0.
  absl::StatusOr<Buffer> Stack(const std::vector<std::string>& names,
                               const std::vector<int64_t>& rows, int64_t columns) {
    const int64_t row_elements = columns > 0 ? columns : 1;
    const auto shape_of = [&](size_t i) {
      return columns > 0 ? std::vector<int64_t>{rows[i], columns} : std::vector<int64_t>{rows[i]};
    };
    // Shapes first: a wrong configuration must not ask for more memory than the file can fill.
    int64_t elements = 0;
    for (size_t i = 0; i < names.size(); ++i) {
      VSP_RETURN_IF_ERROR(file_.Get(names[i], shape_of(i)).status());
      elements += rows[i] * row_elements;
    }
    const int64_t bytes = elements * kernels::SizeOf(dtype_);
    VSP_ASSIGN_OR_RETURN(Buffer target, Buffer::Create(backend_.allocator(), bytes));
    // The CPU converts straight into the weights; a device needs a copy on the host first.
    const bool on_host = backend_.device() == kernels::DeviceKind::kCpu;
    Buffer staging;
    if (!on_host) {
      VSP_ASSIGN_OR_RETURN(staging, Buffer::Create(HostAllocator(), bytes));
    }
    char* host = static_cast<char*>(on_host ? target.data() : staging.data());
    for (size_t i = 0; i < names.size(); ++i) {
      VSP_RETURN_IF_ERROR(Convert(names[i], shape_of(i), host));
      host += rows[i] * row_elements * kernels::SizeOf(dtype_);
    }
    if (!on_host) {
      VSP_RETURN_IF_ERROR(backend_.Upload(staging.data(), bytes, target.data()));
    }
    return target;
  }
  // The matrices `prefix` + names + ".weight" stacked, and their biases where there are any.
  absl::StatusOr<std::unique_ptr<LinearLayer>> Linear(const std::string& prefix,
                                                      const std::vector<std::string>& names,
                                                      const std::vector<int64_t>& rows, int64_t in,
                                                      bool with_bias) {
    std::vector<std::string> matrices, vectors;
    LinearWeights weights;
    weights.in = in;
    weights.dtype = dtype_;
    for (size_t i = 0; i < names.size(); ++i) {
      matrices.push_back(absl::StrCat(prefix, names[i], ".weight"));
      vectors.push_back(absl::StrCat(prefix, names[i], ".bias"));
      weights.out_features += rows[i];
    }
    VSP_ASSIGN_OR_RETURN(weights.weight, Stack(matrices, rows, in));
    if (with_bias) {
      VSP_ASSIGN_OR_RETURN(weights.bias, Stack(vectors, rows, 0));
    }
    return MakeLinearLayer(std::move(weights), backend_.device());
  }
  absl::StatusOr<Buffer> Vector(const std::string& name, int64_t size) {
    return Stack({name}, {size}, 0);
  }

  // A tensor that nobody asked for means that the model computes something that we do not.
  absl::Status CheckAllUsed(bool tied) const {
    for (const auto& [name, tensor] : file_.tensors()) {
      if (used_.contains(name) || absl::EndsWith(name, ".rotary_emb.inv_freq") ||
          (tied && name == "lm_head.weight")) {
        continue;
      }
      return absl::InvalidArgumentError(
          absl::StrCat(file_.source(), ": unexpected tensor \"", name, "\" ", tensor.dtype, " ",
                       ShapeString(tensor.shape), " is not part of this architecture"));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Convert(const std::string& name, const std::vector<int64_t>& shape, char* out) {
    VSP_ASSIGN_OR_RETURN(const TensorView* tensor, file_.Get(name, shape));
    used_.insert(name);
    absl::Status status;
    if (dtype_ == kernels::DType::kF32) {
      status = ConvertToFloat(*tensor,
                              absl::MakeSpan(reinterpret_cast<float*>(out), tensor->num_elements));
    } else {
      status = ConvertToBFloat16(
          *tensor, absl::MakeSpan(reinterpret_cast<uint16_t*>(out), tensor->num_elements));
    }
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(file_.source(), ": tensor \"", name, "\": ", status.message()));
    }
    // One bad element of a vector spoils every token, so vectors (norms, biases) are checked.
    if (shape.size() == 1) VSP_RETURN_IF_ERROR(CheckFinite(name, *tensor));
    file_.DropPages(*tensor);
    return absl::OkStatus();
  }

  absl::Status CheckFinite(const std::string& name, const TensorView& tensor) const {
    std::vector<float> values(tensor.num_elements);
    VSP_RETURN_IF_ERROR(ConvertToFloat(tensor, absl::MakeSpan(values)));
    for (size_t i = 0; i < values.size(); ++i) {
      if (!std::isfinite(values[i])) {
        return absl::InvalidArgumentError(absl::StrCat(file_.source(), ": tensor \"", name,
                                                       "\": element ", i, " is ", values[i],
                                                       ", not a finite number"));
      }
    }
    return absl::OkStatus();
  }

  const SafetensorsReader& file_;
  const kernels::DType dtype_;
  TorchBackend& backend_;
  std::set<std::string> used_;
};

absl::StatusOr<LayerWeights> LoadLayer(WeightLoader& loader, const ModelConfig& config, int layer) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const std::string attention = absl::StrCat(prefix, "self_attn.");
  const std::string mlp = absl::StrCat(prefix, "mlp.");
  const int64_t hidden = config.hidden_size;
  const int64_t q_rows = int64_t{config.num_q_heads} * config.head_dim;
  const int64_t kv_rows = int64_t{config.num_kv_heads} * config.head_dim;
  const int64_t inner = config.intermediate_size;
  LayerWeights weights;
  VSP_ASSIGN_OR_RETURN(weights.input_norm,
                       loader.Vector(prefix + "input_layernorm.weight", hidden));
  VSP_ASSIGN_OR_RETURN(weights.qkv,
                       loader.Linear(attention, {"q_proj", "k_proj", "v_proj"},
                                     {q_rows, kv_rows, kv_rows}, hidden, config.qkv_bias));
  if (config.qk_norm) {
    VSP_ASSIGN_OR_RETURN(weights.q_norm,
                         loader.Vector(attention + "q_norm.weight", config.head_dim));
    VSP_ASSIGN_OR_RETURN(weights.k_norm,
                         loader.Vector(attention + "k_norm.weight", config.head_dim));
  }
  VSP_ASSIGN_OR_RETURN(weights.o,
                       loader.Linear(attention, {"o_proj"}, {hidden}, q_rows, config.o_bias));
  VSP_ASSIGN_OR_RETURN(weights.post_norm,
                       loader.Vector(prefix + "post_attention_layernorm.weight", hidden));
  VSP_ASSIGN_OR_RETURN(weights.gate_up, loader.Linear(mlp, {"gate_proj", "up_proj"}, {inner, inner},
                                                      hidden, config.mlp_bias));
  VSP_ASSIGN_OR_RETURN(weights.down,
                       loader.Linear(mlp, {"down_proj"}, {hidden}, inner, config.mlp_bias));
  return weights;
}

}  // namespace

absl::StatusOr<ModelWeights> LoadWeights(const SafetensorsReader& file, const ModelConfig& config,
                                         kernels::DType dtype, TorchBackend& backend) {
  WeightLoader loader(file, dtype, backend);
  ModelWeights weights;
  VSP_ASSIGN_OR_RETURN(weights.embedding, loader.Stack({"model.embed_tokens.weight"},
                                                       {config.vocab_size}, config.hidden_size));
  for (int layer = 0; layer < config.num_layers; ++layer) {
    VSP_ASSIGN_OR_RETURN(LayerWeights layer_weights, LoadLayer(loader, config, layer));
    weights.layers.push_back(std::move(layer_weights));
  }
  VSP_ASSIGN_OR_RETURN(weights.final_norm, loader.Vector("model.norm.weight", config.hidden_size));
  if (config.tied_embeddings) {
    LinearWeights head;
    head.shared_weight = weights.embedding.data();
    head.in = config.hidden_size;
    head.out_features = config.vocab_size;
    head.dtype = dtype;
    VSP_ASSIGN_OR_RETURN(weights.lm_head, MakeLinearLayer(std::move(head), backend.device()));
  } else {
    VSP_ASSIGN_OR_RETURN(weights.lm_head,
                         loader.Linear("", {"lm_head"}, {config.vocab_size}, config.hidden_size,
                                       /*with_bias=*/false));
  }
  VSP_RETURN_IF_ERROR(loader.CheckAllUsed(config.tied_embeddings));
  return weights;
}

}  // namespace vsprefill::model

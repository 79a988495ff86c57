#include "client/cli/kv_dump.h"

#include "absl/strings/str_cat.h"
#include "server/model/safetensors.h"

namespace vsprefill::cli {

absl::Status WriteKvDump(const std::string& path, const client::HostKv& kv,
                         const std::map<std::string, std::string>& metadata) {
  const client::KvShape& shape = kv.shape();
  model::TensorMap tensors;
  const auto add = [&](const std::string& name, absl::Span<const uint8_t> data) {
    model::TensorView& t = tensors[name];
    t.dtype = shape.layout.dtype == kernels::DType::kF32 ? "F32" : "BF16";
    t.shape = {shape.layout.num_kv_heads, shape.sent_tokens(), shape.layout.head_dim};
    t.num_elements = t.shape[0] * t.shape[1] * t.shape[2];
    t.data = data;
  };
  for (int l = 0; l < shape.layout.num_layers; ++l) {
    add(absl::StrCat("layers.", l, ".k"), kv.k(l));
    add(absl::StrCat("layers.", l, ".v"), kv.v(l));
  }
  return model::WriteSafetensors(path, tensors, metadata);
}

}  // namespace vsprefill::cli

#include "server/model/torch_ops.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "server/model/torch_guard.h"

namespace vsprefill::model {
namespace {

c10::Device ToDevice(kernels::DeviceKind device) {
  return c10::Device(device == kernels::DeviceKind::kCpu ? c10::kCPU : c10::kCUDA);
}

// A tensor over memory that somebody else owns. LibTorch has no const tensors.
at::Tensor Wrap(const void* data, at::IntArrayRef shape, kernels::DType dtype,
                kernels::DeviceKind device) {
  const auto type = dtype == kernels::DType::kF32 ? at::kFloat : at::kBFloat16;
  return at::from_blob(const_cast<void*>(data), shape,
                       at::TensorOptions(type).device(ToDevice(device)));
}

}  // namespace

absl::Status TorchEmbed(absl::Span<const int32_t> ids, const void* table, int64_t vocab,
                        int64_t width, kernels::DType dtype, void* out,
                        kernels::DeviceKind device) {
  return TorchGuard("embedding", [&] {
    const c10::InferenceMode inference;
    const int64_t rows = static_cast<int64_t>(ids.size());
    const at::Tensor index =
        at::from_blob(const_cast<int32_t*>(ids.data()), {rows}, at::kInt).to(ToDevice(device));
    at::Tensor target = Wrap(out, {rows, width}, dtype, device);
    at::index_select_out(target, Wrap(table, {vocab, width}, dtype, device), 0, index);
    return absl::OkStatus();
  });
}

absl::Status TorchScore(const void* logits, int64_t vocab, kernels::DType dtype,
                        absl::Span<const int32_t> targets, float* log_probs, uint8_t* top1,
                        kernels::DeviceKind device) {
  return TorchGuard("scoring of logits", [&] {
    const c10::InferenceMode inference;
    const int64_t rows = static_cast<int64_t>(targets.size());
    const at::Tensor values = Wrap(logits, {rows, vocab}, dtype, device).to(at::kFloat);
    const at::Tensor ids = at::from_blob(const_cast<int32_t*>(targets.data()), {rows}, at::kInt)
                               .to(ToDevice(device), at::kLong)
                               .unsqueeze(1);
    const at::Tensor scores =
        (values.gather(1, ids).squeeze(1) - values.logsumexp(1)).to(at::kCPU).contiguous();
    const at::Tensor best =
        values.argmax(1).eq(ids.squeeze(1)).to(at::kCPU, at::kByte).contiguous();
    for (int64_t i = 0; i < rows; ++i) {
      log_probs[i] = scores.const_data_ptr<float>()[i];
      top1[i] = best.const_data_ptr<uint8_t>()[i];
    }
    return absl::OkStatus();
  });
}

absl::Status TorchToHostFloat(const void* data, int64_t elements, kernels::DType dtype, float* out,
                              kernels::DeviceKind device) {
  return TorchGuard("copy to the host", [&] {
    const c10::InferenceMode inference;
    at::Tensor target = at::from_blob(out, {elements}, at::kFloat);
    target.copy_(Wrap(data, {elements}, dtype, device));
    return absl::OkStatus();
  });
}

}  // namespace vsprefill::model

#include "server/model/linear.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>

#include <optional>
#include <string_view>

#include "kernels/cpu/isa.h"
#include "server/base/status_macros.h"
#include "server/model/torch_guard.h"

namespace vsprefill::model {
namespace {

// Rows for which oneDNN lays the weights out; any number of rows runs with the result.
constexpr int64_t kTypicalRows = 1024;

using PackFn = at::Tensor(const at::Tensor&, std::optional<int64_t>);
using PackedLinearFn = at::Tensor(const at::Tensor&, const at::Tensor&,
                                  const std::optional<at::Tensor>&, std::string_view,
                                  c10::List<std::optional<at::Scalar>>,
                                  std::optional<std::string_view>);

template <typename Fn>
c10::TypedOperatorHandle<Fn> FindOperator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Fn>();
}

at::Tensor View(const void* data, at::IntArrayRef shape, kernels::DType dtype,
                kernels::DeviceKind device) {
  const auto type = dtype == kernels::DType::kF32 ? at::kFloat : at::kBFloat16;
  const c10::Device place(device == kernels::DeviceKind::kCpu ? c10::kCPU : c10::kCUDA);
  return at::from_blob(const_cast<void*>(data), shape, at::TensorOptions(type).device(place));
}

at::Tensor RunPacked(const at::Tensor& x, const at::Tensor& packed,
                     const std::optional<at::Tensor>& bias) {
  static const auto run = FindOperator<PackedLinearFn>("mkldnn::_linear_pointwise");
  return run.call(x, packed, bias, "none", c10::List<std::optional<at::Scalar>>(), std::nullopt);
}

at::Tensor Pack(const at::Tensor& weight) {
  return FindOperator<PackFn>("mkldnn::_reorder_linear_weight").call(weight, kTypicalRows);
}

class TorchLinearLayer final : public LinearLayer {
 public:
  TorchLinearLayer(LinearWeights weights, kernels::DeviceKind device)
      : weights_(std::move(weights)), device_(device) {}

  // May throw, as LibTorch does.
  void Prepare() {
    const c10::InferenceMode inference;
    if (weights_.bias.data() != nullptr) {
      bias_ = View(weights_.bias.data(), {weights_.out_features}, weights_.dtype, device_);
    }
    const void* data =
        weights_.shared_weight != nullptr ? weights_.shared_weight : weights_.weight.data();
    weight_ = View(data, {weights_.out_features, weights_.in}, weights_.dtype, device_);
    // A shared weight cannot be freed, so packing it would cost its size a second time.
    if (device_ != kernels::DeviceKind::kCpu || weights_.shared_weight != nullptr) return;
    // oneDNN multiplies bfloat16 from AVX-512 on; below, LibTorch's own code does.
    if (weights_.dtype == kernels::DType::kBF16 &&
        !kernels::CpuIsaSupported(kernels::CpuIsa::kAvx512)) {
      return;
    }
    // The products are the same (bfloat16 factors are exact in float32, both add in float32); the
    // weights take twice their memory.
    widened_ = weights_.dtype == kernels::DType::kBF16 && kernels::CpuBf16IsSlow();
    if (widened_) {
      weight_ = weight_.to(at::kFloat);
      if (bias_.has_value()) bias_ = bias_->to(at::kFloat);
    }
    packed_ = Pack(weight_);
    weight_ = at::Tensor();
    weights_.weight.Reset();
  }

  absl::StatusOr<Activation> Run(const void* x, int64_t rows) const override {
    Activation activation;
    VSP_RETURN_IF_ERROR(TorchGuard("linear layer", [&] {
      const c10::InferenceMode inference;
      at::Tensor input = View(x, {rows, weights_.in}, weights_.dtype, device_);
      if (widened_) input = input.to(at::kFloat);
      at::Tensor output;
      if (packed_.defined()) {
        output = RunPacked(input, packed_, bias_);
        if (widened_) output = output.to(at::kBFloat16);
      } else {
        output = at::linear(input, weight_, bias_);
      }
      auto owner = std::make_shared<at::Tensor>(std::move(output));
      void* data = owner->data_ptr();
      activation = Activation(std::move(owner), data);
      return absl::OkStatus();
    }));
    return activation;
  }

 private:
  LinearWeights weights_;
  const kernels::DeviceKind device_;
  at::Tensor weight_, packed_;  // one of them is defined
  std::optional<at::Tensor> bias_;
  bool widened_ = false;  // packed_ and bias_ are float32, the layer's dtype is bfloat16
};

}  // namespace

absl::StatusOr<std::unique_ptr<LinearLayer>> MakeLinearLayer(LinearWeights weights,
                                                             kernels::DeviceKind device) {
  std::unique_ptr<LinearLayer> result;
  VSP_RETURN_IF_ERROR(TorchGuard("weights of a linear layer", [&] {
    auto layer = std::make_unique<TorchLinearLayer>(std::move(weights), device);
    layer->Prepare();
    result = std::move(layer);
    return absl::OkStatus();
  }));
  return result;
}

}  // namespace vsprefill::model

#include "server/model/seer_gate.h"

#include <torch/torch.h>

#include <cmath>

#include "absl/strings/str_format.h"
#include "server/model/rope.h"

namespace vsprefill::model {
namespace {

class TorchSeerGate : public SeerGate {
 public:
  const std::vector<kernels::SeerGateLayer>& layers() const override { return layers_; }

  void Fill(const SeerGateWeights& weights, const RopeConfig& rope, int64_t max_positions,
            const torch::Device& device) {
    kernels::SeerGateLayer layer;
    layer.gate_dim = weights.gate_dim;
    const float factor = static_cast<float>(ResolvedAttentionFactor(rope));
    layer.rope_inverse = 1 / (factor * factor);

    const std::vector<float> frequencies = RopeInverseFrequencies(rope, weights.gate_dim);
    std::vector<float> cosines, sines;
    for (int64_t block = 0; block < kernels::SeerBlocks(max_positions); ++block) {
      for (const float frequency : frequencies) {
        const float angle = static_cast<float>(block * kernels::kSeerBlock) * frequency;
        cosines.push_back(std::cos(angle) * factor);
        sines.push_back(std::sin(angle) * factor);
      }
    }
    layer.block_cos = Upload(cosines.data(), cosines.size(), torch::kFloat32, device);
    layer.block_sin = Upload(sines.data(), sines.size(), torch::kFloat32, device);
    for (const SeerGateWeights::Layer& stored : weights.layers) {
      layer.wq = Upload(stored.wq.data(), stored.wq.size(), torch::kBFloat16, device);
      layer.wk = Upload(stored.wk.data(), stored.wk.size(), torch::kBFloat16, device);
      layers_.push_back(layer);
    }
  }

 private:
  /// A float32 copy on the device.
  const float* Upload(const void* values, size_t count, torch::Dtype dtype,
                      const torch::Device& device) {
    const torch::Tensor host =
        torch::from_blob(const_cast<void*>(values), {static_cast<int64_t>(count)},
                         torch::TensorOptions().dtype(dtype));
    tensors_.push_back(host.to(device, torch::kFloat32, /*non_blocking=*/false, /*copy=*/true));
    return tensors_.back().const_data_ptr<float>();
  }

  std::vector<torch::Tensor> tensors_;
  std::vector<kernels::SeerGateLayer> layers_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<SeerGate>> SeerGate::Create(const SeerGateWeights& weights,
                                                           const RopeConfig& rope,
                                                           int64_t max_positions,
                                                           kernels::DeviceKind device) {
  try {
    auto gate = std::make_unique<TorchSeerGate>();
    gate->Fill(weights, rope, max_positions,
               device == kernels::DeviceKind::kCuda ? torch::Device(torch::kCUDA, 0)
                                                    : torch::Device(torch::kCPU));
    return gate;
  } catch (const c10::OutOfMemoryError& e) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("no device memory for the gate: %s", e.what_without_backtrace()));
  } catch (const std::exception& e) {
    return absl::InternalError(absl::StrFormat("gate to device: %s", e.what()));
  }
}

}  // namespace vsprefill::model

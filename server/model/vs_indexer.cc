#include "server/model/vs_indexer.h"

#include <torch/torch.h>

#include "absl/strings/str_format.h"

namespace vsprefill::model {
namespace {

/// Tensors of one device behind the pointers that kernels take.
class TorchVsIndexer : public VsIndexer {
 public:
  const kernels::IndexerLayer& layer(int index) const override { return layers_[index]; }
  int num_layers() const override { return static_cast<int>(layers_.size()); }
  int hidden() const override { return hidden_; }
  const std::vector<std::vector<float>>& threshold_scale() const override { return scale_; }

  void Fill(const IndexerWeights& weights, const torch::Device& device) {
    hidden_ = weights.hidden;
    scale_ = weights.threshold_scale;
    auto upload = [&](const auto& values, torch::Dtype dtype) {
      const torch::Tensor host = torch::from_blob(
          const_cast<void*>(static_cast<const void*>(values.data())),
          {static_cast<int64_t>(values.size())}, torch::TensorOptions().dtype(dtype));
      // clone: on the CPU `to` would keep pointing into the caller's vector.
      tensors_.push_back(device.is_cpu() ? host.clone() : host.to(device));
      return tensors_.back().data_ptr();
    };
    for (const IndexerWeights::Layer& stored : weights.layers) {
      kernels::IndexerLayer layer;
      layer.num_groups = weights.num_groups;
      layer.head_dim = weights.head_dim;
      layer.hidden = weights.hidden;
      layer.weight_dtype = kernels::DType::kBF16;
      layer.w1 = upload(stored.w1, torch::kBFloat16);
      layer.b1 = static_cast<float*>(upload(stored.b1, torch::kFloat32));
      layer.w2 = static_cast<float*>(upload(stored.w2, torch::kFloat32));
      layer.b2 = static_cast<float*>(upload(stored.b2, torch::kFloat32));
      layer.slash_prior = static_cast<float*>(upload(stored.slash_prior, torch::kFloat32));
      layers_.push_back(layer);
    }
  }

 private:
  int hidden_ = 0;
  std::vector<std::vector<float>> scale_;
  std::vector<torch::Tensor> tensors_;
  std::vector<kernels::IndexerLayer> layers_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<VsIndexer>> VsIndexer::Create(const IndexerWeights& weights,
                                                             kernels::DeviceKind device) {
  try {
    auto indexer = std::make_unique<TorchVsIndexer>();
    indexer->Fill(weights, device == kernels::DeviceKind::kCuda ? torch::Device(torch::kCUDA, 0)
                                                                : torch::Device(torch::kCPU));
    return indexer;
  } catch (const c10::OutOfMemoryError& e) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("no device memory for the indexer: %s", e.what_without_backtrace()));
  } catch (const std::exception& e) {
    return absl::InternalError(absl::StrFormat("indexer to device: %s", e.what()));
  }
}

}  // namespace vsprefill::model

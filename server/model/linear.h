// A linear layer whose weights lie as the device's library likes them best.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/tensor_view.h"
#include "server/base/allocator.h"

namespace vsprefill::model {

/// A result of LibTorch, [rows, out_features], row-major; the memory goes with the object.
class Activation {
 public:
  Activation() = default;
  Activation(std::shared_ptr<void> owner, void* data) : owner_(std::move(owner)), data_(data) {}
  void* data() const { return data_; }

 private:
  std::shared_ptr<void> owner_;
  void* data_ = nullptr;
};

/// What a layer is made of. Either `weight` holds data and is taken over, or `shared_weight` points
/// at memory that outlives the layer (an embedding that is also the LM head).
struct LinearWeights {
  Buffer weight;  // [out_features, in]
  const void* shared_weight = nullptr;
  Buffer bias;  // [out_features], or without data
  int64_t in = 0, out_features = 0;
  kernels::DType dtype = kernels::DType::kBF16;
};

class LinearLayer {
 public:
  virtual ~LinearLayer() = default;
  /// x w^T + bias for x [rows, in]. CUDA: enqueued on the thread's current stream.
  virtual absl::StatusOr<Activation> Run(const void* x, int64_t rows) const = 0;
};

/// CPU: packs the weights for oneDNN where it takes them, and frees the originals.
absl::StatusOr<std::unique_ptr<LinearLayer>> MakeLinearLayer(LinearWeights weights,
                                                             kernels::DeviceKind device);

}  // namespace vsprefill::model

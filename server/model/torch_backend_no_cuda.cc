#include "absl/status/status.h"
#include "server/model/torch_backend_cuda.h"

namespace vsprefill::model {

absl::StatusOr<std::string> DescribeGpu() {
  return absl::UnavailableError("this binary was built without CUDA (VSP_CUDA=OFF)");
}

absl::StatusOr<std::unique_ptr<TorchBackend>> CreateCudaBackend() { return DescribeGpu().status(); }

}  // namespace vsprefill::model

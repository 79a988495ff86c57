#include "server/model/torch_backend_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/kernel_set.h"
#include "server/base/device_cuda.h"
#include "server/base/kernel_status.h"
#include "server/base/memory_cuda.h"
#include "server/base/status_macros.h"
#include "server/base/stream_cuda.h"
#include "server/model/library_attention.h"
#include "server/model/torch_guard.h"
#include "server/model/torch_ops.h"

namespace vsprefill::model {
namespace {

constexpr int kOrdinal = 0;

class CudaBackend final : public TorchBackend {
 public:
  CudaBackend(std::string description, std::unique_ptr<Allocator> allocator, CudaStream stream)
      : description_(std::move(description)),
        allocator_(std::move(allocator)),
        stream_(std::move(stream)) {}

  kernels::DeviceKind device() const override { return kernels::DeviceKind::kCuda; }
  std::string description() const override { return description_; }
  Allocator& allocator() override { return *allocator_; }
  kernels::Stream stream() const override { return stream_.get(); }

  attention::LibraryAttentionFn library_attention() const override {
    return [this](const kernels::AttentionShape& shape,
                  absl::Span<const kernels::AttentionSequence> sequences,
                  kernels::Stream stream) -> absl::Status {
      if (shape.dtype != kernels::DType::kBF16) {
        // No library has exact float32 attention without an n x n matrix.
        return FromKernelStatus(kernels::AttentionCuda(shape, sequences.data(),
                                                       static_cast<int>(sequences.size()), stream),
                                "attention");
      }
      return OnStream([&] { return LibraryAttention(shape, sequences); });
    };
  }

  absl::Status EnterThread() override { return absl::OkStatus(); }
  absl::StatusOr<Activation> Linear(const LinearLayer& layer, const void* x,
                                    int64_t rows) override {
    Activation activation;
    VSP_RETURN_IF_ERROR(OnStream([&]() -> absl::Status {
      VSP_ASSIGN_OR_RETURN(activation, layer.Run(x, rows));
      return absl::OkStatus();
    }));
    return activation;
  }
  absl::Status Embed(absl::Span<const int32_t> ids, const void* table, int64_t vocab, int64_t width,
                     kernels::DType dtype, void* out) override {
    return OnStream([&] {
      return TorchEmbed(ids, table, vocab, width, dtype, out, kernels::DeviceKind::kCuda);
    });
  }
  absl::Status Score(const void* logits, int64_t vocab, kernels::DType dtype,
                     absl::Span<const int32_t> targets, float* log_probs, uint8_t* top1) override {
    return OnStream([&] {
      return TorchScore(logits, vocab, dtype, targets, log_probs, top1, kernels::DeviceKind::kCuda);
    });
  }
  absl::Status ToHostFloat(const void* data, int64_t elements, kernels::DType dtype,
                           float* out) override {
    return OnStream(
        [&] { return TorchToHostFloat(data, elements, dtype, out, kernels::DeviceKind::kCuda); });
  }
  absl::Status Upload(const void* host, int64_t bytes, void* device) override {
    VSP_RETURN_IF_ERROR(CopyAsync(device, host, bytes, stream_.get()));
    return stream_.Synchronize();
  }
  absl::Status Download(const void* device, int64_t bytes, void* host) override {
    VSP_RETURN_IF_ERROR(CopyAsync(host, device, bytes, stream_.get()));
    return stream_.Synchronize();
  }
  absl::Status Synchronize() override { return stream_.Synchronize(); }

 private:
  // Runs LibTorch calls with our device and stream as the thread's current ones.
  template <typename Body>
  absl::Status OnStream(const Body& body) const {
    return TorchGuard("CUDA stream", [&] {
      const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromExternal(
          static_cast<cudaStream_t>(stream_.get()), static_cast<c10::DeviceIndex>(kOrdinal)));
      return body();
    });
  }

  const std::string description_;
  const std::unique_ptr<Allocator> allocator_;
  const CudaStream stream_;
};

}  // namespace

absl::StatusOr<std::string> DescribeGpu() {
  VSP_ASSIGN_OR_RETURN(const CudaDeviceInfo info, ProbeCudaDevice(kOrdinal));
  return absl::StrFormat("cuda (%s, compute capability %d.%d, %.0f GiB)", info.name, info.major,
                         info.minor, static_cast<double>(info.memory_bytes) / (1 << 30));
}

absl::StatusOr<std::unique_ptr<TorchBackend>> CreateCudaBackend() {
  VSP_ASSIGN_OR_RETURN(std::string description, DescribeGpu());
  VSP_ASSIGN_OR_RETURN(std::unique_ptr<Allocator> allocator, CreateCudaAllocator(kOrdinal));
  VSP_ASSIGN_OR_RETURN(CudaStream stream, CudaStream::Create(kOrdinal));
  return std::make_unique<CudaBackend>(std::move(description), std::move(allocator),
                                       std::move(stream));
}

}  // namespace vsprefill::model

#include "server/base/memory_cuda.h"

#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "server/base/device_cuda.h"
#include "server/base/status_macros.h"

namespace vsprefill {
namespace {

class DeviceMemory final : public Allocator {
 public:
  explicit DeviceMemory(int ordinal) : ordinal_(ordinal) {}

  absl::StatusOr<void*> Allocate(int64_t bytes) override {
    if (bytes < 0) {
      return absl::InvalidArgumentError(absl::StrCat("cannot allocate ", bytes, " bytes"));
    }
    VSP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(ordinal_), "cudaSetDevice"));
    void* data = nullptr;
    // A null pointer means "no buffer" to Buffer, so that empty ones get memory, too.
    const size_t size = bytes > 0 ? static_cast<size_t>(bytes) : 1;
    const std::string what = absl::StrCat("allocating ", bytes, " bytes on CUDA device ", ordinal_);
    VSP_RETURN_IF_ERROR(CudaStatus(cudaMalloc(&data, size), what.c_str()));
    return data;
  }

  void Free(void* data, int64_t bytes) noexcept override {
    // Errors here are those of earlier work and show at the next call that can return them.
    if (cudaSetDevice(ordinal_) == cudaSuccess) (void)cudaFree(data);
  }

  kernels::DeviceKind device() const override { return kernels::DeviceKind::kCuda; }

 private:
  const int ordinal_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Allocator>> CreateCudaAllocator(int ordinal) {
  VSP_RETURN_IF_ERROR(ProbeCudaDevice(ordinal).status());
  return std::make_unique<DeviceMemory>(ordinal);
}

absl::StatusOr<CudaMemory> GetCudaMemory(int ordinal) {
  VSP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(ordinal), "cudaSetDevice"));
  size_t free_bytes = 0, total_bytes = 0;
  VSP_RETURN_IF_ERROR(CudaStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo"));
  return CudaMemory{static_cast<int64_t>(free_bytes), static_cast<int64_t>(total_bytes)};
}

absl::StatusOr<PinnedBuffer> PinnedBuffer::Create(int64_t bytes) {
  if (bytes < 0) {
    return absl::InvalidArgumentError(absl::StrCat("cannot allocate ", bytes, " bytes"));
  }
  PinnedBuffer buffer;
  if (bytes == 0) return buffer;
  const std::string what = absl::StrCat("allocating ", bytes, " bytes of pinned memory");
  VSP_RETURN_IF_ERROR(CudaStatus(cudaMallocHost(&buffer.data_, bytes), what.c_str()));
  buffer.bytes_ = bytes;
  return buffer;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) (void)cudaFreeHost(data_);
}

absl::Status CopyAsync(void* destination, const void* source, int64_t bytes,
                       kernels::Stream stream) {
  return CudaStatus(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault,
                                    static_cast<cudaStream_t>(stream)),
                    "cudaMemcpyAsync");
}

}  // namespace vsprefill

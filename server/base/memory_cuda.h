// Device memory and pinned host memory.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor_view.h"
#include "server/base/allocator.h"

namespace vsprefill {

/// Memory of one CUDA device, straight from the driver: meant for large, long-lived buffers.
/// Freeing waits for the device. Thread-safe. UNAVAILABLE where the device cannot be used.
absl::StatusOr<std::unique_ptr<Allocator>> CreateCudaAllocator(int ordinal);

/// Free and total bytes of the device.
struct CudaMemory {
  int64_t free_bytes = 0, total_bytes = 0;
};
absl::StatusOr<CudaMemory> GetCudaMemory(int ordinal);

/// Page-locked host memory, which the copy engines read and write while kernels run. Move-only.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  static absl::StatusOr<PinnedBuffer> Create(int64_t bytes);
  PinnedBuffer(PinnedBuffer&& other) noexcept { *this = std::move(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedBuffer();

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// Enqueues a copy on `stream`; the pointers tell the direction. Asynchronous to the host only
/// where the host side is pinned.
absl::Status CopyAsync(void* destination, const void* source, int64_t bytes,
                       kernels::Stream stream);

}  // namespace vsprefill

// Where large buffers come from: host memory, or a CUDA device. One allocator per device lives as
// long as the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/tensor_view.h"

namespace vsprefill {

class Allocator {
 public:
  virtual ~Allocator() = default;
  /// 64-byte aligned (256 on CUDA) uninitialised memory. RESOURCE_EXHAUSTED where there is none.
  virtual absl::StatusOr<void*> Allocate(int64_t bytes) = 0;
  virtual void Free(void* data, int64_t bytes) noexcept = 0;
  virtual kernels::DeviceKind device() const = 0;
};

/// The process's allocator of host memory (transparent huge pages for large buffers).
Allocator& HostAllocator();

/// Owns memory of one allocator; move-only.
class Buffer {
 public:
  Buffer() = default;
  static absl::StatusOr<Buffer> Create(Allocator& allocator, int64_t bytes);
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      Reset();
      allocator_ = std::exchange(other.allocator_, nullptr);
      data_ = std::exchange(other.data_, nullptr);
      bytes_ = std::exchange(other.bytes_, 0);
    }
    return *this;
  }
  ~Buffer() { Reset(); }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  void Reset() noexcept {
    if (data_ != nullptr) allocator_->Free(data_, bytes_);
    allocator_ = nullptr;
    data_ = nullptr;
    bytes_ = 0;
  }

 private:
  Allocator* allocator_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace vsprefill

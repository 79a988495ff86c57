// Owners of CUDA streams and events. Move-only; views are kernels::Stream.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor_view.h"

namespace vsprefill {

/// A point in the work of a stream. Not thread-safe.
class CudaEvent {
 public:
  CudaEvent() = default;
  /// `timing`: ElapsedMilliseconds may be asked; costs a little at each Record.
  static absl::StatusOr<CudaEvent> Create(bool timing);
  CudaEvent(CudaEvent&& other) noexcept { *this = std::move(other); }
  CudaEvent& operator=(CudaEvent&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~CudaEvent();

  /// Marks the end of the work that `stream` holds now.
  absl::Status Record(kernels::Stream stream);
  /// Blocks this thread until the mark is reached (at once where nothing was recorded).
  absl::Status Synchronize() const;
  /// Whether the mark is reached; never blocks.
  absl::StatusOr<bool> Reached() const;
  /// Later work of `stream` waits for the mark; the host does not.
  absl::Status MakeWait(kernels::Stream stream) const;
  /// Time from `begin` to this mark; both recorded, reached, and made with timing.
  absl::StatusOr<float> ElapsedMilliseconds(const CudaEvent& begin) const;

 private:
  void* event_ = nullptr;  // cudaEvent_t
};

/// A stream of its own, which does not synchronise with the default stream. Destruction does not
/// wait for its work.
class CudaStream {
 public:
  CudaStream() = default;
  static absl::StatusOr<CudaStream> Create(int ordinal);
  CudaStream(CudaStream&& other) noexcept { *this = std::move(other); }
  CudaStream& operator=(CudaStream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  ~CudaStream();

  kernels::Stream get() const { return stream_; }
  /// Blocks this thread until all work enqueued so far is done; errors of that work show here.
  absl::Status Synchronize() const;

 private:
  kernels::Stream stream_ = nullptr;
};

}  // namespace vsprefill

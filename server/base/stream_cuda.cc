#include "server/base/stream_cuda.h"

#include <cuda_runtime_api.h>

#include "server/base/device_cuda.h"
#include "server/base/status_macros.h"

namespace vsprefill {
namespace {

cudaStream_t AsStream(kernels::Stream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t AsEvent(void* event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

absl::StatusOr<CudaEvent> CudaEvent::Create(bool timing) {
  CudaEvent event;
  cudaEvent_t raw = nullptr;
  VSP_RETURN_IF_ERROR(
      CudaStatus(cudaEventCreateWithFlags(&raw, timing ? cudaEventDefault : cudaEventDisableTiming),
                 "cudaEventCreateWithFlags"));
  event.event_ = raw;
  return event;
}

CudaEvent::~CudaEvent() {
  if (event_ != nullptr) (void)cudaEventDestroy(AsEvent(event_));
}

absl::Status CudaEvent::Record(kernels::Stream stream) {
  return CudaStatus(cudaEventRecord(AsEvent(event_), AsStream(stream)), "cudaEventRecord");
}

absl::Status CudaEvent::Synchronize() const {
  return CudaStatus(cudaEventSynchronize(AsEvent(event_)), "cudaEventSynchronize");
}

absl::StatusOr<bool> CudaEvent::Reached() const {
  const cudaError_t error = cudaEventQuery(AsEvent(event_));
  if (error == cudaErrorNotReady) return false;
  VSP_RETURN_IF_ERROR(CudaStatus(error, "cudaEventQuery"));
  return true;
}

absl::Status CudaEvent::MakeWait(kernels::Stream stream) const {
  return CudaStatus(cudaStreamWaitEvent(AsStream(stream), AsEvent(event_), 0),
                    "cudaStreamWaitEvent");
}

absl::StatusOr<float> CudaEvent::ElapsedMilliseconds(const CudaEvent& begin) const {
  float milliseconds = 0;
  VSP_RETURN_IF_ERROR(
      CudaStatus(cudaEventElapsedTime(&milliseconds, AsEvent(begin.event_), AsEvent(event_)),
                 "cudaEventElapsedTime"));
  return milliseconds;
}

absl::StatusOr<CudaStream> CudaStream::Create(int ordinal) {
  VSP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(ordinal), "cudaSetDevice"));
  CudaStream stream;
  cudaStream_t raw = nullptr;
  VSP_RETURN_IF_ERROR(CudaStatus(cudaStreamCreateWithFlags(&raw, cudaStreamNonBlocking),
                                 "cudaStreamCreateWithFlags"));
  stream.stream_ = raw;
  return stream;
}

CudaStream::~CudaStream() {
  if (stream_ != nullptr) (void)cudaStreamDestroy(AsStream(stream_));
}

absl::Status CudaStream::Synchronize() const {
  return CudaStatus(cudaStreamSynchronize(AsStream(stream_)), "cudaStreamSynchronize");
}

}  // namespace vsprefill

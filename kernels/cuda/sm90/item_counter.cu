#include <map>
#include <mutex>
#include <utility>

#include "kernels/cuda/sm90/item_counter.h"

namespace vsprefill::kernels::cuda::sm90 {
namespace {

constexpr int kStreams = 256;
// A line each: blocks of concurrent launches do not share one.
struct alignas(128) Counter {
  uint32_t draws;
};
__device__ Counter counters[kStreams];

}  // namespace

uint32_t* ItemCounter(cudaStream_t stream) {
  cudaStreamCaptureStatus capture;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess ||
      capture != cudaStreamCaptureStatusNone) {
    return nullptr;
  }
  unsigned long long stream_id;
  int device;
  void* base;
  if (cudaStreamGetId(stream, &stream_id) != cudaSuccess || cudaGetDevice(&device) != cudaSuccess ||
      cudaGetSymbolAddress(&base, counters) != cudaSuccess) {
    return nullptr;
  }
  // Launches of one stream run one after the other, so a counter per stream is never shared by two
  // that run at once. Stream ids are not used again.
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, int> slots;
  const std::lock_guard lock(mutex);
  const auto [slot, added] = slots.try_emplace({device, stream_id}, static_cast<int>(slots.size()));
  if (slot->second >= kStreams) {
    slots.erase(slot);
    return nullptr;
  }
  return &static_cast<Counter*>(base)[slot->second].draws;
}

}  // namespace vsprefill::kernels::cuda::sm90

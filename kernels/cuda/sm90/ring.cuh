// Rings in shared memory between producer and consumer warps, with a full and an empty mbarrier for
// each entry.
#pragma once

#include "kernels/cuda/sm90/ptx.cuh"

namespace vsprefill::kernels::cuda::sm90 {

/// Entry `count` (0, 1, ...) of a ring of kSize: where it lies, and the parity of its full barrier.
template <int kSize>
struct Slot {
  uint32_t index;
  uint32_t parity;
  __device__ __forceinline__ explicit Slot(uint32_t count)
      : index(count % kSize), parity(count / kSize & 1) {}
};

__device__ __forceinline__ void WaitFull(uint64_t* barriers, uint32_t index, uint32_t parity) {
  BarrierWait(SharedAddress(&barriers[index]), parity);
}
/// Before the first use of an entry this returns at once.
__device__ __forceinline__ void WaitEmpty(uint64_t* barriers, uint32_t index, uint32_t parity) {
  BarrierWait(SharedAddress(&barriers[index]), parity ^ 1);
}

}  // namespace vsprefill::kernels::cuda::sm90

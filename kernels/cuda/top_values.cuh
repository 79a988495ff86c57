// The largest of many 64-bit values without a sort, for one block of threads: the smallest value
// that is still in, found digit by digit, and how many that are equal to it are. Of equal values
// the earlier comes first, so the set is one comparison and one rank per value.
#pragma once

#include <cstdint>

namespace vsprefill::kernels::cuda {

inline constexpr int kTopThreads = 1024;

/// Values larger than `value` are in, and the first `ties` that are equal to it.
struct TopCut {
  unsigned long long value;
  int64_t ties;
};

/// The `count` largest of key(0..size); by the whole block. `histogram`: 256 counters.
template <typename KeyFn>
__device__ TopCut FindTop(const KeyFn& key, int64_t size, int64_t count, unsigned int* histogram) {
  if (count <= 0) return {~0ull, 0};
  unsigned long long prefix = 0;
  int64_t left = count < size ? count : size;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      const unsigned long long k = key(i);
      const bool counts = shift == 56 || (k >> (shift + 8)) == (prefix >> (shift + 8));
      if (counts) atomicAdd(&histogram[(k >> shift) & 255], 1u);
    }
    __syncthreads();
    int digit = 255;
    for (; digit > 0 && histogram[digit] < left; --digit) left -= histogram[digit];
    prefix |= static_cast<unsigned long long>(digit) << shift;
  }
  return {prefix, left};
}

/// Rank of this thread among the threads of the block whose flag is on; *total: how many are.
/// `warp_counts`: one per warp. By the whole block.
__device__ __forceinline__ int BlockRank(bool flag, int* warp_counts, int* total) {
  const uint32_t ballot = __ballot_sync(0xffffffffu, flag);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
  if (lane == 0) warp_counts[warp] = __popc(ballot);
  __syncthreads();
  int before = 0, all = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) {
    before += i < warp ? warp_counts[i] : 0;
    all += warp_counts[i];
  }
  *total = all;
  return before + __popc(ballot & ((1u << lane) - 1));
}

/// Calls take(i, rank) for every value that is in, rank counting in ascending i; returns how many.
template <typename KeyFn, typename Take>
__device__ int ForTop(const KeyFn& key, int64_t size, const TopCut& cut, int* warp_counts,
                      const Take& take) {
  int64_t ties = 0;
  int taken = 0;
  for (int64_t begin = 0; begin < size; begin += blockDim.x) {
    const int64_t i = begin + threadIdx.x;
    const unsigned long long k = i < size ? key(i) : 0;
    const bool equal = i < size && k == cut.value;
    int total;
    const int tie = BlockRank(equal, warp_counts, &total);
    const bool in = i < size && (k > cut.value || (equal && ties + tie < cut.ties));
    ties += total;
    const int rank = BlockRank(in, warp_counts, &total);
    if (in) take(i, taken + rank);
    taken += total;
  }
  return taken;
}

}  // namespace vsprefill::kernels::cuda

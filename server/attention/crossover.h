// When a sparse index is not worth running: measured crossovers, per device. Used where a method's
// parameter `dense_fallback` is 1 (sparse_method.h).
//
// CPU. Selection has been done and its pairs are counted, so what is left to compare is the
// attention itself: dense wins where pairs multiplied by the index x kCpuPairCost >= pairs that
// dense multiplies.
//
// CUDA. Nothing is known on the host when attention is enqueued, and waiting for it would cost more
// than it saves, so the prompt's length and the model's width decide before anything is selected
// (the indexer is not run either): where dense attention is so little work that indexer, selection
// and the sparse kernel's start cost more.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/attention.h"

namespace vsprefill::attention {

/// Time of a pair multiplied under an index / under dense attention, where the two are close: 0.97
/// to 1.01 in kernel_bench_cpu (docs/results/crossover.md). Gathered columns cost what consecutive
/// ones cost; sparse indexes have dearer pairs (short tiles), but are far from the crossover.
inline constexpr double kCpuPairCost = 1.0;

/// Query heads x head_dim x n^2 of a prompt of n tokens from which an index is not more than 3 %
/// slower than dense attention at any density up to one half. NVIDIA H100, H200
/// (docs/results/crossover.md): 9 heads of 64 have 0.90 of dense's speed at 4,096 tokens and
/// density 0.5 (1.12 at 0.2), 1.27 at 8,192; 32 heads of 128 have 0.96 to 1.01 at 2,048 tokens,
/// which is 1.7e10, and 1.32 at 4,096.
inline constexpr double kCudaMinDenseWork = 1.85e10;

/// The shortest prompt for which an index pays on CUDA; 0 where the width is not known.
inline int64_t CudaMinTokens(int num_q_heads, int head_dim) {
  const double width = double{1} * num_q_heads * head_dim;
  return width > 0 ? static_cast<int64_t>(std::ceil(std::sqrt(kCudaMinDenseWork / width))) : 0;
}

/// Whether attention by an index is faster than dense attention on the CPU.
/// `index` and `dense`: counts of the same rows, each as it would be run.
inline bool IndexPaysOnCpu(const kernels::PairCounts& index, const kernels::PairCounts& dense) {
  return static_cast<double>(index.multiplied) * kCpuPairCost <
         static_cast<double>(dense.multiplied);
}

}  // namespace vsprefill::attention

// When a sparse index is not worth running: measured crossovers, per device. Used where a method's
// parameter `dense_fallback` is 1 (sparse_method.h).
//
// CPU. Selection has been done and its pairs are counted, so what is left to compare is the
// attention itself: dense wins where pairs multiplied by the index x kCpuPairCost >= pairs that
// dense multiplies.
//
// CUDA. Nothing is known on the host when attention is enqueued, and waiting for it would cost more
// than it saves, so the length of the prompt decides before anything is selected (the indexer is
// not run either): below kCudaMinTokens the default's density does not pay for indexer and
// selection.
#pragma once

#include <cstdint>

#include "kernels/attention.h"

namespace vsprefill::attention {

/// Time of a pair multiplied under an index / under dense attention, where the two are close: 0.97
/// to 1.01 in kernel_bench_cpu (docs/results/crossover.md). Gathered columns cost what consecutive
/// ones cost; sparse indexes have dearer pairs (short tiles), but are far from the crossover.
inline constexpr double kCpuPairCost = 1.0;

/// NVIDIA H100, docs/results/gpu_service.md: at 8,192 tokens dense and VSPrefill are equal for an
/// 8B-shaped model (0.20 s both), at 32,768 VSPrefill is 1.8 times faster; SmolLM2 at 8,000 tokens
/// is faster densely.
inline constexpr int64_t kCudaMinTokens = 8192;

/// Whether attention by an index is faster than dense attention on the CPU.
/// `index` and `dense`: counts of the same rows, each as it would be run.
inline bool IndexPaysOnCpu(const kernels::PairCounts& index, const kernels::PairCounts& dense) {
  return static_cast<double>(index.multiplied) * kCpuPairCost <
         static_cast<double>(dense.multiplied);
}

}  // namespace vsprefill::attention

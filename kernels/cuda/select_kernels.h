// Launchers behind SelectCuda, which picks by device.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/kernel_choice.h"
#include "kernels/selection.h"
#include "kernels/selection_math.h"

namespace vsprefill::kernels::cuda {

inline constexpr int kSelectGroups = 64;  // per launch

/// Where the parts of a group's scratch begin, in bytes; 256-byte aligned. Global memory, and in
/// the launch parameters so that eight pointers take no registers.
struct ScratchLayout {
  int64_t column_weights;  // uint64 [n]
  int64_t offset_weights;  // uint64 [n]
  int64_t local_mass;      // uint64 [n + 1]: of offsets [0, i), for i <= local width
  int64_t block_weights;   // uint64 [blocks]
  int64_t column_scores;   // uint32 [n] keys
  int64_t column_ranks;    // uint32 [n]; the scores themselves for kMassPerCost
  int64_t block_scores;    // uint32 [blocks] keys
  int64_t block_ranks;     // uint32 [blocks]
  int64_t bytes;           // of a group
};

struct SelectLaunch {
  SelectionInput input;  // threshold_scale unused: host memory
  SelectionParams params;
  selection::Geometry geometry;
  SparseIndexView index;
  char* workspace;
  ScratchLayout scratch;
  int first_group;
  int num_groups;  // of this launch
  float threshold_scale[kSelectGroups];
};

/// The Hopper kernel, a cluster per group; kUnsupportedShape where one block is as fast.
KernelStatus LaunchSelectSm90(const SelectLaunch& launch, cudaStream_t stream);

/// SelectCuda with the choice of its kernel, for tests and benchmarks.
KernelStatus SelectWith(KernelChoice choice, const SelectionInput& input,
                        const SelectionParams& params, void* workspace, SparseIndexView* index,
                        Stream stream);

}  // namespace vsprefill::kernels::cuda

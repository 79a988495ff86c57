// Launchers behind SelectCuda, which picks by device.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/kernel_choice.h"
#include "kernels/selection.h"
#include "kernels/selection_math.h"

namespace vsprefill::kernels::cuda {

inline constexpr int kSelectGroups = 64;  // per launch

struct SelectLaunch {
  SelectionInput input;  // threshold_scale unused: host memory
  SelectionParams params;
  selection::Geometry geometry;
  SparseIndexView index;
  char* workspace;
  int64_t workspace_stride;  // bytes per group
  int first_group;
  int num_groups;  // of this launch
  float threshold_scale[kSelectGroups];
};

/// The Hopper kernel, a cluster per group.
KernelStatus LaunchSelectSm90(const SelectLaunch& launch, cudaStream_t stream);

/// SelectCuda with the choice of its kernel, for tests and benchmarks.
KernelStatus SelectWith(KernelChoice choice, const SelectionInput& input,
                        const SelectionParams& params, void* workspace, SparseIndexView* index,
                        Stream stream);

}  // namespace vsprefill::kernels::cuda

// SelectCuda: one block per KV group, or Hopper's clusters (sm90/select_sm90.cu).
#include <algorithm>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/select_steps.cuh"

namespace vsprefill::kernels {
namespace {

using cuda::kSelectGroups;
using cuda::kSelectThreads;
using cuda::SelectLaunch;

struct BlockTeam {
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ void Sync() const { __syncthreads(); }
  template <typename T>
  __device__ T* In(int /*rank*/, T* object) const {
    return object;
  }
};

__global__ void __launch_bounds__(kSelectThreads)
    SelectKernel(const __grid_constant__ SelectLaunch launch) {
  __shared__ cuda::select::Shared shared;
  cuda::select::Selector(launch, blockIdx.x, shared, BlockTeam()).Run();
}

cuda::ScratchLayout Layout(const selection::Geometry& g, bool ranks_differ_from_scores) {
  cuda::ScratchLayout layout;
  int64_t bytes = 0;
  const auto take = [&bytes](int64_t size) {
    const int64_t begin = bytes;
    bytes += (size + 255) / 256 * 256;
    return begin;
  };
  layout.column_weights = take(g.n * 8);
  layout.offset_weights = take(g.n * 8);
  layout.local_mass = take((g.n + 1) * 8);
  layout.block_weights = take(g.num_blocks * 8);
  layout.column_scores = layout.column_ranks = take(g.n * 4);
  layout.block_scores = layout.block_ranks = take(g.num_blocks * 4);
  if (ranks_differ_from_scores) {
    layout.column_ranks = take(g.n * 4);
    layout.block_ranks = take(g.num_blocks * 4);
  }
  layout.bytes = bytes;
  return layout;
}

}  // namespace

KernelStatus cuda::SelectWith(KernelChoice choice, const SelectionInput& input,
                              const SelectionParams& params, void* workspace,
                              SparseIndexView* index, Stream stream) {
  if (!selection::Supported(input)) return KernelStatus::kUnsupportedShape;
  SelectLaunch launch = {};
  launch.input = input;
  launch.params = params;
  launch.geometry = selection::MakeGeometry(input, params);
  index->num_groups = input.num_groups;
  index->dense_from = launch.geometry.dense_from;
  launch.index = *index;
  launch.workspace = static_cast<char*>(workspace);
  launch.scratch = Layout(launch.geometry, params.rule == SelectionRule::kCumulative);
  if (launch.scratch.bytes * input.num_groups >
      SelectionWorkspaceBytes(input.num_groups, input.kv_tokens)) {
    return KernelStatus::kUnsupportedShape;
  }
  const bool sm90 = choice == KernelChoice::kFastest && DeviceIsSm90();
  for (int first = 0; first < input.num_groups; first += kSelectGroups) {
    launch.first_group = first;
    launch.num_groups = std::min(kSelectGroups, input.num_groups - first);
    for (int i = 0; i < launch.num_groups; ++i) {
      launch.threshold_scale[i] =
          input.threshold_scale != nullptr ? input.threshold_scale[first + i] : 1.0f;
    }
    KernelStatus status =
        sm90 ? LaunchSelectSm90(launch, AsCuda(stream)) : KernelStatus::kUnsupportedShape;
    if (status == KernelStatus::kUnsupportedShape) {
      SelectKernel<<<launch.num_groups, kSelectThreads, 0, AsCuda(stream)>>>(launch);
      status = LaunchStatus();
    }
    if (status != KernelStatus::kOk) return status;
  }
  return KernelStatus::kOk;
}

KernelStatus SelectCuda(const SelectionInput& input, const SelectionParams& params, void* workspace,
                        SparseIndexView* index, Stream stream) {
  return cuda::SelectWith(cuda::KernelChoice::kFastest, input, params, workspace, index, stream);
}

}  // namespace vsprefill::kernels

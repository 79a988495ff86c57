// Selection on Hopper: a cluster of four or eight blocks per KV group, in one launch for all
// groups. The blocks exchange sums, histograms and counts through each other's shared memory.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/select_steps.cuh"
#include "kernels/cuda/sm90/ptx.cuh"

namespace vsprefill::kernels::cuda {
namespace sm90 {
namespace {

constexpr int64_t kMinTokens = 4097;  // below, a cluster's launch costs more than it saves
constexpr int64_t kTokensPerBlock = 2 * kSelectThreads;

struct ClusterTeam {
  __device__ int rank() const { return static_cast<int>(ClusterRank()); }
  __device__ int size() const { return static_cast<int>(ClusterSize()); }
  __device__ void Sync() const { ClusterSync(); }
  template <typename T>
  __device__ T* In(int rank, T* object) const {
    return InBlock(object, rank);
  }
};

__global__ void __launch_bounds__(kSelectThreads)
    SelectSm90Kernel(const __grid_constant__ SelectLaunch launch) {
  __shared__ select::Shared shared;
  const ClusterTeam team;
  select::Selector(launch, blockIdx.x / team.size(), shared, team).Run();
}

}  // namespace
}  // namespace sm90

KernelStatus LaunchSelectSm90(const SelectLaunch& launch, cudaStream_t stream) {
  if (launch.geometry.n < sm90::kMinTokens) return KernelStatus::kUnsupportedShape;
  int blocks = 2;
  while (blocks < kMaxTeam && blocks * sm90::kTokensPerBlock < launch.geometry.n) blocks *= 2;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.num_groups * blocks);
  config.blockDim = dim3(kSelectThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return AsStatus(cudaLaunchKernelEx(&config, sm90::SelectSm90Kernel, launch));
}

}  // namespace vsprefill::kernels::cuda

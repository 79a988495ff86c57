// MInference's vertical-slash selection, the same sets as on the CPU bit for bit: the sums of
// last_rows.cuh, then one block per (head, columns or offsets) that takes the largest.
#include "kernels/cuda/last_rows.cuh"
#include "kernels/cuda/top_values.cuh"

namespace vsprefill::kernels {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): the vocabulary of this folder

struct TopParams {
  LastRows sums;
  SparseIndexView index;
  int64_t num_columns, num_offsets;
  int forced_columns, forced_offsets;
};

__global__ void __launch_bounds__(kTopThreads) TopKernel(const __grid_constant__ TopParams p) {
  __shared__ unsigned int histogram[256];
  __shared__ int warp_counts[kTopThreads / 32];
  const int head = blockIdx.x;
  const bool slashes = blockIdx.y == 1;
  const int64_t n = p.sums.t.n;
  const unsigned long long* const values = (slashes ? p.sums.offsets : p.sums.columns) + head * n;
  const int forced = slashes ? p.forced_offsets : p.forced_columns;
  const auto key = [&](int64_t i) { return i < forced ? ~0ull : values[i]; };
  const TopCut cut = FindTop(key, n, slashes ? p.num_offsets : p.num_columns, histogram);
  if (!slashes) {
    int32_t* const verticals = p.index.verticals + head * p.index.vertical_stride;
    const int count = ForTop(key, n, cut, warp_counts, [&](int64_t i, int rank) {
      verticals[rank] = static_cast<int32_t>(i);
    });
    if (threadIdx.x == 0) p.index.num_verticals[head] = count;
    return;
  }
  constexpr int kRowTile = RowTilePositions(1);
  uint32_t* const bits = p.index.band_bits + head * p.index.band_stride;
  for (int64_t w = threadIdx.x; w < p.index.band_stride; w += blockDim.x) bits[w] = 0;
  __syncthreads();
  ForTop(key, n, cut, warp_counts, [&](int64_t offset, int) {
    for (int64_t b = offset / kBandBlock; b <= (offset + kRowTile - 1) / kBandBlock; ++b) {
      atomicOr(&bits[b / 32], 1u << (b % 32));
    }
  });
  __syncthreads();
  int32_t* const bands = p.index.bands + head * p.index.band_list_stride;
  int count = 0;
  for (int64_t begin = 0; begin < BandBlocks(n, kRowTile); begin += blockDim.x) {
    const int64_t b = begin + threadIdx.x;
    // Written by atomics of this block: past the first-level cache.
    const bool set = b < BandBlocks(n, kRowTile) && (__ldcg(&bits[b / 32]) >> (b % 32) & 1u) != 0;
    int total;
    const int rank = BlockRank(set, warp_counts, &total);
    if (set) bands[count + rank] = static_cast<int32_t>(b);
    count += total;
  }
  if (threadIdx.x == 0) p.index.num_bands[head] = count;
}

}  // namespace

KernelStatus SelectMInferenceCuda(const QuerySelectionInput& in, const MInferenceParams& params,
                                  SparseIndexView* index, Stream stream) {
  if (!SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  index->num_groups = in.shape.num_q_heads;
  index->dense_from = INT64_MAX;
  TopParams p = {{SelectionTensors(in)}};
  KernelStatus status =
      MakeLastRows(in, params.last_queries, in.workspace, AsCuda(stream), &p.sums);
  if (status != KernelStatus::kOk) return status;
  status = in.shape.dtype == DType::kBF16 ? LaunchLastRows<__nv_bfloat16>(p.sums, AsCuda(stream))
                                          : LaunchLastRows<float>(p.sums, AsCuda(stream));
  if (status != KernelStatus::kOk) return status;
  p.index = *index;
  p.num_columns = params.vertical_size > params.min_vertical ? params.vertical_size
                                                             : int64_t{params.min_vertical};
  p.num_offsets =
      params.slash_size > params.min_slash ? params.slash_size : int64_t{params.min_slash};
  p.forced_columns = params.forced_verticals;
  p.forced_offsets = params.forced_slashes;
  TopKernel<<<dim3(in.shape.num_q_heads, 2), kTopThreads, 0, AsCuda(stream)>>>(p);
  return LaunchStatus();
}

}  // namespace vsprefill::kernels

// StreamingLLM's pattern: one block per KV group writes the lists and the bits.
#include "kernels/cuda/launch.h"
#include "kernels/query_selection_math.h"

namespace vsprefill::kernels {
namespace {

__global__ void SelectWindowKernel(const __grid_constant__ SparseIndexView index, int sinks,
                                   int bands) {
  const int group = blockIdx.x;
  for (int64_t i = threadIdx.x; i < sinks; i += blockDim.x) {
    index.verticals[group * index.vertical_stride + i] = static_cast<int32_t>(i);
  }
  for (int64_t i = threadIdx.x; i < bands; i += blockDim.x) {
    index.bands[group * index.band_list_stride + i] = static_cast<int32_t>(i);
  }
  for (int64_t w = threadIdx.x; w < index.band_stride; w += blockDim.x) {
    const int64_t set = bands - w * 32;  // bits of this word that are on, from the lowest
    index.band_bits[group * index.band_stride + w] = set >= 32 ? 0xffffffffu
                                                     : set > 0 ? (1u << set) - 1
                                                               : 0;
  }
  if (threadIdx.x == 0) {
    index.num_verticals[group] = sinks;
    index.num_bands[group] = bands;
  }
}

}  // namespace

KernelStatus SelectWindowCuda(const QuerySelectionInput& in, const WindowParams& params,
                              SparseIndexView* index, Stream stream) {
  const AttentionShape& shape = in.shape;
  if (shape.num_kv_heads <= 0 || shape.num_q_heads % shape.num_kv_heads != 0 ||
      shape.group_size() > kPackedRows || !selection::Supported(in)) {
    return KernelStatus::kUnsupportedShape;
  }
  const int64_t n = in.sequence.kv_tokens;
  const int row_tile = RowTilePositions(shape.group_size());
  index->num_groups = shape.num_kv_heads;
  index->dense_from = INT64_MAX;
  const int sinks = static_cast<int>(params.sink_tokens < n ? params.sink_tokens : n);
  const int bands = static_cast<int>(
      selection::WindowBands(params.window_tokens, row_tile, BandBlocks(n, row_tile)));
  SelectWindowKernel<<<shape.num_kv_heads, 256, 0, cuda::AsCuda(stream)>>>(*index, sinks, bands);
  return cuda::LaunchStatus();
}

}  // namespace vsprefill::kernels

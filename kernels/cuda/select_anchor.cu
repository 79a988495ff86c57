// AnchorAttention's selection, the same sets as on the CPU bit for bit. First a block per (row
// tile, head), a thread per row: the tile's blocks, its anchor and its mean query. Then a block per
// (128 columns, set, head), a thread per column: the columns that come near an anchor.
#include "kernels/cuda/exact_dot.cuh"
#include "kernels/cuda/launch.h"

namespace vsprefill::kernels {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): the vocabulary of this folder

struct AnchorKernelParams {
  SelectionTensors t;
  AnchorParams params;
  TileIndexView index;
  selection::ChunkTiles tiles;
  float* anchors;  // [heads, tiles]
  float* means;    // [heads, tiles, head_dim]
};

template <typename Element>
__global__ void __launch_bounds__(kLanes)
    AnchorKernel(const __grid_constant__ AnchorKernelParams p) {
  extern __shared__ uint4 shared_memory[];
  float* const queries = reinterpret_cast<float*>(shared_memory);
  float* const keys = queries + p.t.head_dim * kLanes;
  __shared__ float largest[kLanes];
  const int64_t i = p.tiles.count - 1 - blockIdx.x, tile = p.tiles.first + i;  // heavy ones first
  const int head = blockIdx.y;
  const selection::TileRows rows = selection::RowsOf(p.t.s, p.tiles, tile);
  const int64_t set_first = tile / p.index.tiles_per_set * p.index.tiles_per_set;
  const int64_t window = selection::AnchorWindow(p.params, set_first);
  const auto reads = [&](int64_t b) {
    return b <= tile && (b < p.params.sink_blocks || b >= window);
  };
  uint32_t* const bits = p.index.blocks + (head * p.index.num_tiles + i) * p.index.block_words;
  for (int64_t b = threadIdx.x; b < p.index.block_words * 32; b += kLanes) {
    const uint32_t word = __ballot_sync(0xffffffffu, reads(b));
    if (b % 32 == 0) bits[b / 32] = word;
  }
  if (window <= p.params.sink_blocks) return;  // no columns to choose from

  const int count_rows = static_cast<int>(rows.end - rows.begin), row = threadIdx.x;
  const int64_t position = rows.begin + row;
  const bool live = row < count_rows;
  SetLane(queries, p.t.Query<Element>(head, live ? position : rows.begin), live, p.t.head_dim);
  float max = -INFINITY;
  for (int64_t b = 0; b <= tile; ++b) {
    if (!reads(b)) continue;
    const int64_t end = (b + 1) * kKeyBlock < rows.end ? (b + 1) * kKeyBlock : rows.end;
    for (int64_t c0 = b * kKeyBlock; c0 < end; c0 += kRows) {
      const int count = static_cast<int>(end - c0 < kRows ? end - c0 : int64_t{kRows});
      __syncthreads();
      SetRows(keys, p.t.Key<Element>(head, c0), p.t.s.kv_token_stride, count, p.t.head_dim);
      __syncthreads();
      float dots[kRows] = {};
      AddDots(dots, queries, keys, p.t.head_dim);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (live && k < count && c0 + k <= position) max = fmaxf(max, Logit(dots[k], p.t.scale));
      }
    }
  }
  largest[row] = max;
  __syncthreads();
  const int64_t at = head * p.tiles.count + i;
  if (row == 0) {  // in the order that query_selection.h fixes
    float sum = 0;
    for (int k = 0; k < count_rows; ++k) sum += largest[k];
    p.anchors[at] = __fdiv_rn(sum, static_cast<float>(count_rows));
  }
  for (int e = row; e < p.t.head_dim; e += kLanes) {
    float sum = 0;
    for (int k = 0; k < count_rows; ++k) sum += queries[e * kLanes + k];
    p.means[at * p.t.head_dim + e] =
        Round(__fdiv_rn(sum, static_cast<float>(count_rows)), Element());
  }
}

template <typename Element>
__global__ void __launch_bounds__(kLanes)
    ColumnsKernel(const __grid_constant__ AnchorKernelParams p) {
  extern __shared__ uint4 shared_memory[];
  float* const keys = reinterpret_cast<float*>(shared_memory);
  float* const means = keys + p.t.head_dim * kLanes;
  const int head = blockIdx.z;
  const int64_t set = p.tiles.first / p.index.tiles_per_set + blockIdx.y;
  const int64_t set_first = set * p.index.tiles_per_set;
  const int64_t column = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  const int64_t begin = set_first > p.tiles.first ? set_first : p.tiles.first;
  const int64_t tiles_end = p.tiles.first + p.tiles.count;
  const int64_t end =
      set_first + p.index.tiles_per_set < tiles_end ? set_first + p.index.tiles_per_set : tiles_end;
  // The block's columns are one key block.
  const bool candidates = blockIdx.x >= p.params.sink_blocks &&
                          blockIdx.x < selection::AnchorWindow(p.params, set_first);
  bool keep = false;
  if (candidates) {
    SetLane(keys, p.t.Key<Element>(head, column), true, p.t.head_dim);
    for (int64_t t = begin; t < end; t += kRows) {
      const int count = static_cast<int>(end - t < kRows ? end - t : int64_t{kRows});
      const int64_t at = head * p.tiles.count + t - p.tiles.first;
      __syncthreads();
      SetRows(means, p.means + at * p.t.head_dim, p.t.head_dim, count, p.t.head_dim);
      __syncthreads();
      float dots[kRows] = {};
      AddDots(dots, keys, means, p.t.head_dim);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (k >= count) continue;
        const double below =
            static_cast<double>(p.anchors[at + k]) - static_cast<double>(Logit(dots[k], p.t.scale));
        keep |= below <= p.params.theta;
      }
    }
  }
  const uint32_t word = __ballot_sync(0xffffffffu, keep);
  if (threadIdx.x % 32 == 0 && column / 32 < p.index.column_words) {
    p.index.columns[(head * p.index.num_sets() + blockIdx.y) * p.index.column_words + column / 32] =
        word;
  }
}

template <typename Element>
KernelStatus Launch(const AnchorKernelParams& p, cudaStream_t stream) {
  const int bytes = static_cast<int>(SharedDotBytes(p.t.head_dim));
  for (auto* kernel : {AnchorKernel<Element>, ColumnsKernel<Element>}) {
    const KernelStatus status = AllowSharedMemory(kernel, bytes);
    if (status != KernelStatus::kOk) return status;
  }
  AnchorKernel<Element>
      <<<dim3(static_cast<unsigned>(p.tiles.count), p.t.num_q_heads), kLanes, bytes, stream>>>(p);
  const dim3 grid(static_cast<unsigned>(CeilDiv(p.index.column_words * 32, kLanes)),
                  static_cast<unsigned>(p.index.num_sets()), p.t.num_q_heads);
  ColumnsKernel<Element><<<grid, kLanes, bytes, stream>>>(p);
  return LaunchStatus();
}

}  // namespace

KernelStatus SelectAnchorCuda(const QuerySelectionInput& in, const AnchorParams& params,
                              TileIndexView* index, Stream stream) {
  if (!SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const selection::ChunkTiles tiles = selection::TilesOf(in.sequence, 1);
  index->num_groups = in.shape.num_q_heads;
  index->first_tile = tiles.first;
  index->num_tiles = tiles.count;
  auto* const means = static_cast<float*>(in.workspace);
  const AnchorKernelParams p = {SelectionTensors(in),
                                params,
                                *index,
                                tiles,
                                means + in.shape.num_q_heads * tiles.count * in.shape.head_dim,
                                means};
  return in.shape.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(p, AsCuda(stream))
                                        : Launch<float>(p, AsCuda(stream));
}

}  // namespace vsprefill::kernels

// XAttention's selection, the same sets as on the CPU bit for bit: a block per (row tile, head), a
// thread per strided key, eight strided queries at a time. Three passes over the keys: the queries'
// largest logits, the sums of their weights, and the blocks' sums of shares. On CUDA cores and
// without storing a score: right before fast.
#include "kernels/cuda/exact_dot.cuh"
#include "kernels/cuda/launch.h"

namespace vsprefill::kernels {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): the vocabulary of this folder

constexpr int64_t kMaxSharedBytes = 200 << 10;

struct XAttentionKernelParams {
  SelectionTensors t;
  TileIndexView index;
  selection::ChunkTiles tiles;
  int stride;
  double threshold;
};

/// Logit numerators of this thread's strided key b with the strided queries a0 .. a0 + kRows - 1.
template <typename Element>
__device__ __forceinline__ void StridedDots(const XAttentionKernelParams& p, int head, int64_t a0,
                                            int64_t b, float* lanes, float* rows,
                                            float (&dots)[kRows]) {
  const SelectionTensors& t = p.t;
#pragma unroll
  for (int r = 0; r < kRows; ++r) dots[r] = 0;
#pragma unroll 1
  for (int i = 0; i < p.stride; ++i) {
    __syncthreads();
    const int64_t column = b * p.stride + i;
    SetLane(lanes, t.Key<Element>(head, column < t.n ? column : 0), column < t.n, t.head_dim);
    for (int x = threadIdx.x; x < kRows * t.head_dim; x += kLanes) {
      const int64_t position = (a0 + x / t.head_dim) * p.stride + p.stride - 1 - i;
      const bool there = position >= t.q_start && position < t.n;
      rows[x] = there ? Widen(t.Query<Element>(head, position)[x % t.head_dim]) : 0.0f;
    }
    __syncthreads();
    AddDots(dots, lanes, rows, t.head_dim);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kLanes)
    XAttentionKernel(const __grid_constant__ XAttentionKernelParams p) {
  extern __shared__ uint4 shared_memory[];
  auto* const scores = reinterpret_cast<unsigned long long*>(shared_memory);  // [blocks]
  float* const lanes = reinterpret_cast<float*>(scores + p.index.block_words * 32);
  float* const rows = lanes + p.t.head_dim * kLanes;
  __shared__ uint32_t row_max[kRows];            // OrderedBits
  __shared__ unsigned long long row_sum[kRows];  // of weights
  __shared__ unsigned long long sum_partial[kLanes / 32];
  const int64_t i = p.tiles.count - 1 - blockIdx.x, tile = p.tiles.first + i;  // heavy ones first
  const int head = blockIdx.y;
  const int64_t per_tile = kKeyBlock / p.stride;
  const float scale = __fdiv_rn(p.t.scale, static_cast<float>(p.stride));
  for (int64_t b = threadIdx.x; b <= tile; b += kLanes) scores[b] = 0;

  const int64_t end = (tile + 1) * per_tile;
  for (int64_t a0 = tile * per_tile; a0 < end; a0 += kRows) {
    __syncthreads();
    if (threadIdx.x < kRows) {
      row_max[threadIdx.x] = 0;
      row_sum[threadIdx.x] = 0;
    }
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {
#pragma unroll 1
      for (int64_t b0 = 0; b0 < a0 + kRows && b0 < end; b0 += kLanes) {
        const int64_t b = b0 + threadIdx.x;
        float dots[kRows];
        StridedDots<Element>(p, head, a0, b, lanes, rows, dots);
        unsigned long long shares = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t a = a0 + r;
          const bool counts =
              a < end && b <= a && (a + 1) * p.stride > p.t.q_start && a * p.stride < p.t.n;
          const float logit = Logit(dots[r], scale);
          if (pass == 0) {
            const uint32_t most = __reduce_max_sync(0xffffffffu, counts ? OrderedBits(logit) : 0);
            if (threadIdx.x % 32 == 0) atomicMax(&row_max[r], most);
            continue;
          }
          unsigned long long weight =
              counts ? selection::Weight(logit, FromOrderedBits(row_max[r])) : 0;
          if (pass == 2) {
            if (counts) shares += selection::Share(weight, selection::ShareUnit(row_sum[r]));
            continue;
          }
          for (int offset = 16; offset > 0; offset /= 2) {
            weight += __shfl_xor_sync(0xffffffffu, weight, offset);
          }
          // Integers: the order of the additions does not matter.
          if (threadIdx.x % 32 == 0) atomicAdd(&row_sum[r], weight);
        }
        if (pass == 2 && shares != 0) atomicAdd(&scores[b / per_tile], shares);
      }
      __syncthreads();
    }
  }
  __syncthreads();
  unsigned long long total = 0;
  for (int64_t b = threadIdx.x; b <= tile; b += kLanes) total += scores[b];
  total = BlockReduce(total, sum_partial,
                      [](unsigned long long x, unsigned long long y) { return x + y; });
  const unsigned long long forced = scores[0] + (tile > 0 ? scores[tile] : 0);
  uint32_t* const bits = p.index.blocks + (head * p.index.num_tiles + i) * p.index.block_words;
  for (int64_t b = threadIdx.x; b < p.index.block_words * 32; b += kLanes) {
    bool keep = b == 0 || b == tile;
    if (!keep && b < tile) {
      // What is read before it: the forced ones, larger scores, and equal ones of smaller blocks.
      unsigned long long before = forced;
      for (int64_t other = 1; other < tile; ++other) {
        const bool first = scores[other] > scores[b] || (scores[other] == scores[b] && other < b);
        before += first ? scores[other] : 0;
      }
      keep = p.threshold >= 1 || !selection::ReachesThreshold(before, p.threshold, total);
    }
    const uint32_t word = __ballot_sync(0xffffffffu, keep);
    if (b % 32 == 0) bits[b / 32] = word;
  }
}

}  // namespace

KernelStatus SelectXAttentionCuda(const QuerySelectionInput& in, const XAttentionParams& params,
                                  TileIndexView* index, Stream stream) {
  if (!SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const selection::ChunkTiles tiles = selection::TilesOf(in.sequence, 1);
  index->num_groups = in.shape.num_q_heads;
  index->first_tile = tiles.first;
  index->num_tiles = tiles.count;
  const int64_t bytes = index->block_words * 32 * 8 + SharedDotBytes(in.shape.head_dim);
  if (bytes > kMaxSharedBytes) return KernelStatus::kUnsupportedShape;
  const XAttentionKernelParams p = {SelectionTensors(in), *index, tiles, params.stride,
                                    params.threshold};
  const auto kernel =
      in.shape.dtype == DType::kBF16 ? XAttentionKernel<__nv_bfloat16> : XAttentionKernel<float>;
  const KernelStatus status = AllowSharedMemory(kernel, static_cast<int>(bytes));
  if (status != KernelStatus::kOk) return status;
  kernel<<<dim3(static_cast<unsigned>(tiles.count), in.shape.num_q_heads), kLanes, bytes,
           AsCuda(stream)>>>(p);
  return LaunchStatus();
}

}  // namespace vsprefill::kernels

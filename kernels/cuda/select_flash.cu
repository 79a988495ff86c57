// Block means and FlashPrefill's selection, the same sets as on the CPU bit for bit: scores are
// plain float32 chains on CUDA cores, not tensor cores. Right before fast.
//
// PoolBlocks: one thread block per (key block, KV head), a thread per element of the head.
// SelectFlash: one thread block per (row tile, index group), a thread per packed row, whose query
// stays in shared memory, [element][row]. Two passes over the mean keys, 8 at a time: the largest
// logit, then the sums of weights, which stay in shared memory as 64-bit integers.
// Shared memory: 512 head_dim bytes of queries, 32 head_dim bytes of means, 8 bytes per block.
#include <climits>

#include "kernels/cuda/exact_dot.cuh"
#include "kernels/cuda/launch.h"

namespace vsprefill::kernels {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): the vocabulary of this folder

constexpr int64_t kMaxSharedBytes = 200 << 10;

struct PoolParams {
  const void* from;
  void* to;
  int64_t head_stride, token_stride, means_stride, kv_tokens;
  int head_dim;
};

template <typename Element>
__global__ void PoolBlocksKernel(const __grid_constant__ PoolParams p) {
  const int64_t block = blockIdx.x, head = blockIdx.y;
  const int64_t first = block * kKeyBlock;
  const int count =
      static_cast<int>(p.kv_tokens - first < kKeyBlock ? p.kv_tokens - first : int64_t{kKeyBlock});
  for (int e = threadIdx.x; e < p.head_dim; e += blockDim.x) {
    const Element* from =
        static_cast<const Element*>(p.from) + head * p.head_stride + first * p.token_stride + e;
    float sum = 0;
    for (int i = 0; i < count; ++i) sum += Widen(from[i * p.token_stride]);
    static_cast<Element*>(p.to)[(head * p.means_stride + block) * p.head_dim + e] =
        static_cast<Element>(__fdiv_rn(sum, static_cast<float>(count)));
  }
}

struct FlashKernelParams {
  FlashParams params;
  AttentionSequence sequence;
  TileIndexView index;
  selection::ChunkTiles tiles;
  int64_t prompt_tokens;
  int group_size, groups_per_kv_head, head_dim;
  float scale;
};

template <typename Element>
__global__ void __launch_bounds__(kLanes)
    SelectFlashKernel(const __grid_constant__ FlashKernelParams p) {
  extern __shared__ uint4 shared_memory[];
  auto* scores = reinterpret_cast<unsigned long long*>(shared_memory);  // [blocks of the row]
  __shared__ float max_partial[kLanes / 32];
  __shared__ unsigned long long best_partial[kLanes / 32];
  const AttentionSequence& s = p.sequence;
  const int64_t tile = p.tiles.first + p.tiles.count - 1 - blockIdx.x;  // heavy ones first
  const int group = blockIdx.y;
  const selection::TileRows rows = selection::RowsOf(s, p.tiles, tile);
  const int64_t tile_first = tile * p.tiles.positions;
  const int64_t visible = KeyBlocks(rows.end);
  const bool last = selection::IsLastTile(p.params, tile, p.tiles.positions, p.prompt_tokens);
  const int64_t scored = last ? 0 : selection::ScoredBlocks(p.params, tile_first, rows.end);
  float* const queries = reinterpret_cast<float*>(scores + p.index.block_words * 32);
  float* const means = queries + p.head_dim * kLanes;

  const int64_t position = rows.begin + threadIdx.x / p.group_size;
  const bool live = position < rows.end;
  const int64_t head = static_cast<int64_t>(group) * p.group_size + threadIdx.x % p.group_size;
  SetLane(queries,
          static_cast<const Element*>(s.q) +
              (position - (s.kv_tokens - s.q_tokens)) * s.q_token_stride + head * s.q_head_stride,
          live, p.head_dim);
  for (int64_t b = threadIdx.x; b < scored; b += kLanes) scores[b] = 0;
  const Element* k_means = static_cast<const Element*>(p.index.k_means) +
                           group / p.groups_per_kv_head * p.index.means_stride * p.head_dim;

  float max = -INFINITY;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int64_t begin = 0; begin < scored; begin += kRows) {
      const int count = static_cast<int>(scored - begin < kRows ? scored - begin : int64_t{kRows});
      __syncthreads();
      SetRows(means, k_means + begin * p.head_dim, p.head_dim, count, p.head_dim);
      __syncthreads();
      float sums[kRows] = {};
      AddDots(sums, queries, means, p.head_dim);
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        const float logit = Logit(sums[b], p.scale);
        const bool counts =
            live && b < count && position >= selection::FirstScoringRow(p.params, begin + b);
        if (pass == 0) {
          if (counts) max = fmaxf(max, logit);
          continue;
        }
        unsigned long long weight = counts ? selection::Weight(logit, max) : 0;
        for (int offset = 16; offset > 0; offset /= 2) {
          weight += __shfl_xor_sync(0xffffffffu, weight, offset);
        }
        // Integers: the order of the additions does not matter.
        if (threadIdx.x % 32 == 0 && b < count) atomicAdd(&scores[begin + b], weight);
      }
    }
    if (pass == 0) {
      max = BlockReduce(max, max_partial, [](float a, float b) { return fmaxf(a, b); });
    }
  }
  __syncthreads();
  unsigned long long best = 0;
  for (int64_t b = threadIdx.x; b < scored; b += kLanes) best = scores[b] > best ? scores[b] : best;
  best = BlockReduce(best, best_partial,
                     [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });

  uint32_t* const bits =
      p.index.blocks + (group * p.index.num_tiles + tile - p.tiles.first) * p.index.block_words;
  for (int64_t b = threadIdx.x; b < p.index.block_words * 32; b += kLanes) {
    bool keep =
        b < visible && (last || selection::FlashForced(p.params, b, tile_first, rows.end) ||
                        (b < scored && selection::ReachesAlpha(scores[b], p.params.alpha, best)));
    if (!keep && b < scored && p.params.min_blocks > 0) {
      // Its place among all: larger scores, and equal ones of smaller blocks, come before it.
      int64_t place = 0;
      for (int64_t other = 0; other < scored; ++other) {
        place += scores[other] > scores[b] || (scores[other] == scores[b] && other < b);
      }
      keep = place < p.params.min_blocks;
    }
    // A warp makes a word; whole warps leave the loop together.
    const uint32_t word = __ballot_sync(0xffffffffu, keep);
    if (b % 32 == 0) bits[b / 32] = word;
  }
}

}  // namespace

KernelStatus PoolBlocksCuda(const QuerySelectionInput& in, void* k_means, void* v_means,
                            int64_t means_stride, Stream stream) {
  if (!SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const dim3 grid(static_cast<unsigned>(KeyBlocks(s.kv_tokens)), in.shape.num_kv_heads);
  PoolParams p = {s.k,          k_means,     s.kv_head_stride, s.kv_token_stride,
                  means_stride, s.kv_tokens, in.shape.head_dim};
  for (const bool values : {false, true}) {
    if (values && v_means == nullptr) break;
    if (values) {
      p.from = s.v;
      p.to = v_means;
    }
    if (in.shape.dtype == DType::kBF16) {
      PoolBlocksKernel<__nv_bfloat16><<<grid, 128, 0, cuda::AsCuda(stream)>>>(p);
    } else {
      PoolBlocksKernel<float><<<grid, 128, 0, cuda::AsCuda(stream)>>>(p);
    }
  }
  return cuda::LaunchStatus();
}

KernelStatus SelectFlashCuda(const QuerySelectionInput& in, const FlashParams& params,
                             TileIndexView* index, Stream stream) {
  if (!SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  FlashKernelParams p;
  p.params = params;
  p.sequence = in.sequence;
  p.group_size = in.shape.num_q_heads / index->num_groups;
  p.tiles = selection::TilesOf(in.sequence, p.group_size);
  index->first_tile = p.tiles.first;
  index->num_tiles = p.tiles.count;
  p.index = *index;
  p.prompt_tokens = in.prompt_tokens;
  p.groups_per_kv_head = index->num_groups / in.shape.num_kv_heads;
  p.head_dim = in.shape.head_dim;
  p.scale = in.shape.scale;
  const int64_t bytes = index->block_words * 32 * 8 + SharedDotBytes(p.head_dim);
  if (bytes > kMaxSharedBytes) return KernelStatus::kUnsupportedShape;
  const bool bf16 = in.shape.dtype == DType::kBF16;
  const auto kernel = bf16 ? SelectFlashKernel<__nv_bfloat16> : SelectFlashKernel<float>;
  const KernelStatus status = cuda::AllowSharedMemory(kernel, static_cast<int>(bytes));
  if (status != KernelStatus::kOk) return status;
  const dim3 grid(static_cast<unsigned>(p.tiles.count), index->num_groups);
  kernel<<<grid, kLanes, bytes, cuda::AsCuda(stream)>>>(p);
  return cuda::LaunchStatus();
}

}  // namespace vsprefill::kernels

// FlexPrefill's selection, the same sets as on the CPU bit for bit but for the logarithm in the
// divergence, which may differ in its last bit (a head whose divergence is tau to 15 digits).
//
// The sums of last_rows.cuh; mean keys (PoolBlocks); mean queries of the row tiles and of the last
// rows; the softmax of each with the mean keys; then a block per head that decides and writes.
#include "kernels/cuda/last_rows.cuh"
#include "kernels/cuda/top_values.cuh"

namespace vsprefill::kernels {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): the vocabulary of this folder

using Sum = unsigned long long;

struct FlexKernelParams {
  LastRows last;
  FlexParams params;
  TileIndexView index;
  selection::ChunkTiles tiles;
  int64_t blocks;
  const void* mean_keys;  // element type, [kv_heads, blocks, head_dim]
  float* mean_queries;    // [heads, tiles + 1, head_dim]; the last: of the last rows
  Sum* shares;            // [heads, tiles + 1, blocks]
  Sum* column_blocks;     // [heads, blocks]
  Sum* offset_blocks;     // [heads, blocks]
};

/// Block (tile, or the last rows; head): the mean query and its softmax over the mean keys.
template <typename Element>
__global__ void __launch_bounds__(kLanes)
    BlockSharesKernel(const __grid_constant__ FlexKernelParams p) {
  __shared__ float max_partial[kLanes / 32];
  __shared__ Sum sum_partial[kLanes / 32];
  const SelectionTensors& t = p.last.t;
  const int d = t.head_dim, head = blockIdx.y;
  const bool of_last_rows = blockIdx.x == p.tiles.count;
  const int64_t tile = p.tiles.first + blockIdx.x;
  selection::TileRows rows = selection::RowsOf(t.s, p.tiles, tile);
  if (of_last_rows) rows = {t.n - p.last.rows, t.n};
  const int64_t visible = of_last_rows ? p.blocks : tile + 1;
  const int64_t at = head * (p.tiles.count + 1) + blockIdx.x;
  float* const mean = p.mean_queries + at * d;
  for (int e = threadIdx.x; e < d; e += kLanes) {
    float sum = 0;
    for (int64_t i = rows.begin; i < rows.end; ++i) sum += Widen(t.Query<Element>(head, i)[e]);
    mean[e] = Round(__fdiv_rn(sum, static_cast<float>(rows.end - rows.begin)), Element());
  }
  __syncthreads();
  const Element* const keys =
      static_cast<const Element*>(p.mean_keys) + head / t.group_size * p.blocks * d;
  const auto logit = [&](int64_t b) {
    float sum = 0;
    for (int e = 0; e < d; ++e) sum = fmaf(mean[e], Widen(keys[b * d + e]), sum);
    return Logit(sum, t.scale);
  };
  float max = -INFINITY;
  for (int64_t b = threadIdx.x; b < visible; b += kLanes) max = fmaxf(max, logit(b));
  max = BlockReduce(max, max_partial, [](float x, float y) { return fmaxf(x, y); });
  Sum sum = 0;
  for (int64_t b = threadIdx.x; b < visible; b += kLanes) sum += selection::Weight(logit(b), max);
  sum = BlockReduce(sum, sum_partial, [](Sum x, Sum y) { return x + y; });
  const double unit = selection::ShareUnit(sum);
  for (int64_t b = threadIdx.x; b < p.blocks; b += kLanes) {
    p.shares[at * p.blocks + b] =
        b < visible ? selection::Share(selection::Weight(logit(b), max), unit) : 0;
  }
}

struct FlexShared {
  Sum sums[256];
  unsigned int counts[256];
  int warp_counts[kTopThreads / 32];
  Sum above;
  int64_t within;
  Sum prefix;
  bool done;
  bool aware;
};

/// Entries, largest first, whose running sum is within gamma of `rows` rows' mass; by the block.
__device__ int64_t CountWithin(const Sum* values, int64_t size, double gamma, int64_t rows,
                               FlexShared& shared) {
  if (threadIdx.x == 0) {
    shared.above = shared.prefix = 0;
    shared.within = 0;
    shared.done = false;
  }
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared.sums[i] = shared.counts[i] = 0;
    __syncthreads();
    if (shared.done) continue;  // the same for all threads
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      const Sum x = values[i];
      if (shift != 56 && (x >> (shift + 8)) != (shared.prefix >> (shift + 8))) continue;
      atomicAdd(&shared.sums[(x >> shift) & 255], x);
      atomicAdd(&shared.counts[(x >> shift) & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      for (; digit >= 0; --digit) {
        const Sum with = shared.above + shared.sums[digit];
        if (!selection::WithinGamma(with, gamma, rows)) break;
        shared.above = with;
        shared.within += shared.counts[digit];
      }
      if (digit < 0) {
        shared.done = true;
      } else {
        shared.prefix |= static_cast<Sum>(digit) << shift;
        if (shift == 0) {
          // All that is left is equal to the prefix: as many as fit.
          int64_t low = 0, high = shared.counts[digit];
          while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (selection::WithinGamma(shared.above + middle * shared.prefix, gamma, rows)) {
              low = middle;
            } else {
              high = middle - 1;
            }
          }
          shared.within += low;
        }
      }
    }
  }
  __syncthreads();
  const int64_t within = shared.within;
  __syncthreads();
  return within;
}

__device__ void SumBlocks(const Sum* values, int64_t n, int64_t blocks, Sum* out) {
  for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) {
    Sum sum = 0;
    for (int64_t i = b * kKeyBlock; i < (b + 1) * kKeyBlock && i < n; ++i) sum += values[i];
    out[b] = sum;
  }
}

/// selection::SqrtJsDivergence without contraction to fused multiply-adds.
__device__ double SqrtJsDivergence(const Sum* a, double a_total, const Sum* b, double b_total,
                                   int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double p = __ddiv_rn(static_cast<double>(a[i]), a_total);
    const double q = __ddiv_rn(static_cast<double>(b[i]), b_total);
    const double middle = __dadd_rn(p, q) / 2;
    if (p > 0) sum = __dadd_rn(sum, __dmul_rn(p, log(__ddiv_rn(p, middle))));
    if (q > 0) sum = __dadd_rn(sum, __dmul_rn(q, log(__ddiv_rn(q, middle))));
  }
  return sqrt(sum > 0 ? sum / 2 : 0.0);
}

__global__ void __launch_bounds__(kTopThreads)
    DecideKernel(const __grid_constant__ FlexKernelParams p) {
  __shared__ FlexShared shared;
  const SelectionTensors& t = p.last.t;
  const int head = blockIdx.x;
  const int64_t tiles_end = p.tiles.first + p.tiles.count;
  const Sum* const columns = p.last.columns + head * t.n;
  const Sum* const offsets = p.last.offsets + head * t.n;
  const Sum* const shares = p.shares + head * (p.tiles.count + 1) * p.blocks;
  Sum* const column_blocks = p.column_blocks + head * p.blocks;
  Sum* const offset_blocks = p.offset_blocks + head * p.blocks;
  uint32_t* const bits = p.index.blocks + head * p.index.num_tiles * p.index.block_words;
  const auto read = [&](int64_t tile, int64_t block) {
    atomicOr(&bits[(tile - p.tiles.first) * p.index.block_words + block / 32], 1u << (block % 32));
  };
  for (int64_t w = threadIdx.x; w < p.index.num_tiles * p.index.block_words; w += blockDim.x) {
    bits[w] = 0;
  }
  SumBlocks(columns, t.n, p.blocks, column_blocks);
  SumBlocks(offsets, t.n, p.blocks, offset_blocks);
  __syncthreads();
  if (threadIdx.x == 0) {
    const double one = static_cast<double>(selection::kShareOne);
    shared.aware = SqrtJsDivergence(shares + p.tiles.count * p.blocks, one, column_blocks,
                                    one * p.last.rows, p.blocks) < p.params.tau;
  }
  __syncthreads();
  int64_t num_columns, num_offsets;
  if (shared.aware) {
    FlexParams least = p.params;
    least.max_budget = least.min_budget;
    num_columns = num_offsets = selection::FlexBlocks(0, least, p.blocks);
    const int64_t pairs = p.tiles.count * p.blocks;
    const int64_t kept = CountWithin(shares, pairs, p.params.gamma, p.tiles.count, shared);
    const auto key = [shares](int64_t i) { return shares[i]; };
    const TopCut cut = FindTop(key, pairs, kept, shared.counts);
    ForTop(key, pairs, cut, shared.warp_counts, [&](int64_t pair, int) {
      const int64_t tile = p.tiles.first + pair / p.blocks, block = pair % p.blocks;
      if (block <= tile) read(tile, block);
    });
  } else {
    const auto blocks_of = [&](const Sum* sums) {
      const int64_t within = CountWithin(sums, t.n, p.params.gamma, p.last.rows, shared);
      return selection::FlexBlocks(1 + within, p.params, p.blocks);
    };
    num_columns = blocks_of(columns);
    num_offsets = blocks_of(offsets);
  }
  for (const bool slashes : {false, true}) {
    const Sum* const values = slashes ? offset_blocks : column_blocks;
    const auto key = [values](int64_t b) { return b == 0 ? ~0ull : values[b]; };
    const TopCut cut = FindTop(key, p.blocks, slashes ? num_offsets : num_columns, shared.counts);
    ForTop(key, p.blocks, cut, shared.warp_counts, [&](int64_t b, int) {
      const int64_t first = b > p.tiles.first ? b : p.tiles.first;
      for (int64_t tile = first; tile < tiles_end; ++tile) read(tile, slashes ? tile - b : b);
    });
  }
}

template <typename Element>
KernelStatus Launch(const FlexKernelParams& p, cudaStream_t stream) {
  const KernelStatus status = LaunchLastRows<Element>(p.last, stream);
  if (status != KernelStatus::kOk) return status;
  const dim3 grid(static_cast<unsigned>(p.tiles.count + 1), p.last.t.num_q_heads);
  BlockSharesKernel<Element><<<grid, kLanes, 0, stream>>>(p);
  DecideKernel<<<p.last.t.num_q_heads, kTopThreads, 0, stream>>>(p);
  return LaunchStatus();
}

}  // namespace

KernelStatus SelectFlexCuda(const QuerySelectionInput& in, const FlexParams& params,
                            TileIndexView* index, Stream stream) {
  if (!SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const int64_t heads = in.shape.num_q_heads, d = in.shape.head_dim;
  FlexKernelParams p = {{SelectionTensors(in)}};
  KernelStatus status = MakeLastRows(in, kKeyBlock, in.workspace, AsCuda(stream), &p.last);
  if (status != KernelStatus::kOk) return status;
  p.params = params;
  p.tiles = selection::TilesOf(in.sequence, 1);
  p.blocks = KeyBlocks(in.sequence.kv_tokens);
  index->num_groups = in.shape.num_q_heads;
  index->first_tile = p.tiles.first;
  index->num_tiles = p.tiles.count;
  p.index = *index;
  char* next = static_cast<char*>(in.workspace) + LastRowsBytes(in);
  const auto take = [&next](int64_t bytes) {
    char* const piece = next;
    next += bytes;
    return piece;
  };
  const int64_t means = heads * (p.tiles.count + 1);
  p.shares = reinterpret_cast<Sum*>(take(means * p.blocks * 8));
  p.column_blocks = reinterpret_cast<Sum*>(take(heads * p.blocks * 8));
  p.offset_blocks = reinterpret_cast<Sum*>(take(heads * p.blocks * 8));
  p.mean_queries = reinterpret_cast<float*>(take(means * d * 4));
  void* const mean_keys = next;
  p.mean_keys = mean_keys;
  status = PoolBlocksCuda(in, mean_keys, nullptr, p.blocks, stream);
  if (status != KernelStatus::kOk) return status;
  return in.shape.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(p, AsCuda(stream))
                                        : Launch<float>(p, AsCuda(stream));
}

}  // namespace vsprefill::kernels

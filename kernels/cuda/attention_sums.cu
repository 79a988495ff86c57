// Column and diagonal sums of the causal softmax (kernels/distill.h) without an n x n matrix.
//
// Three passes over score tiles of 128 rows x 64 columns: log-sum-exp per row; then a column tile
// stays put while the rows of all heads of its group pass by; then a band of offsets stays put
// while tiles walk down the diagonal. Each sum lives in registers for a whole pass and is reduced
// once, in a fixed order: no atomics but one addition where two neighbouring bands overlap (two
// operands on a zero, so their order does not matter). The result is the same in every run.
#include <initializer_list>

#include "kernels/cuda/attention_sums_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/distill.h"

namespace vsprefill::kernels {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): the tile vocabulary of this folder

struct SumsParams {
  const void* q;
  const void* k;
  int64_t q_token_stride, q_head_stride, kv_head_stride, kv_token_stride;
  float* lse;
  float* columns;
  float* diagonals;
  int32_t n, num_groups, group_size, head_dim;
  float scale;
  float mean;  // 1 / (n g)
};

template <int kHeadDim>
struct alignas(16) SumsShared {
  __nv_bfloat16 q[2][kTileRows * kSharedStride<kHeadDim>];
  __nv_bfloat16 k[2][kTileColumns * kSharedStride<kHeadDim>];
  float lse[2][kTileRows];
};

/// Starts the copy of rows [first, first + kRows) of one head; rows past n are zero.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void LoadRows(uint32_t shared, const __nv_bfloat16* head,
                                         int64_t token_stride, int first, int n) {
  constexpr int kChunks = kHeadDim / 8;
  for (int index = threadIdx.x; index < kRows * kChunks; index += kTileThreads) {
    const int row = index / kChunks;
    const int chunk = index % kChunks;
    const bool valid = first + row < n;
    const int64_t offset = valid ? (first + row) * token_stride : 0;
    CopyAsync16(shared + (row * kSharedStride<kHeadDim> + chunk * 8) * 2, head + offset + chunk * 8,
                valid);
  }
}

template <int kHeadDim>
__device__ __forceinline__ const __nv_bfloat16* QueryHead(const SumsParams& p, int head) {
  return static_cast<const __nv_bfloat16*>(p.q) + head * p.q_head_stride;
}

template <int kHeadDim>
__device__ __forceinline__ const __nv_bfloat16* KeyHead(const SumsParams& p, int group) {
  return static_cast<const __nv_bfloat16*>(p.k) + group * p.kv_head_stride;
}

/// P of one tile in place of its scores: exp(scale s - lse), 0 above the diagonal and past n.
__device__ __forceinline__ void Probabilities(float (&s)[2][8][4], const float* lse, int first_row,
                                              int first_column, int n, float scale_log2, int warp,
                                              int lane) {
#pragma unroll
  for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = warp * 32 + mt * 16 + half * 8 + lane / 4;
      const int row = first_row + local;
      const float reference = lse[local];  // base 2
#pragma unroll
      for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = first_column + nt * 8 + (lane & 3) * 2 + e;
          float& p = s[mt][nt][half * 2 + e];
          p = row < n && column <= row ? Exp2(fmaf(p, scale_log2, -reference)) : 0.0f;
        }
      }
    }
  }
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

/// Copies the tile's lse to shared memory, in base 2.
__device__ __forceinline__ void LoadLse(float* shared, const float* lse, int first_row, int n) {
  const int row = first_row + threadIdx.x;
  shared[threadIdx.x] = row < n ? lse[row] * kLog2E : 0.0f;
}

/// Pass 1: one block per (row tile, head). Natural logarithm.
template <int kHeadDim>
__global__ void __launch_bounds__(kTileThreads, 2) LseKernel(const __grid_constant__ SumsParams p) {
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<SumsShared<kHeadDim>*>(shared_memory);
  constexpr uint32_t kKeyStage = sizeof(shared.k[0]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.y;
  const int first_row = (gridDim.x - 1 - blockIdx.x) * kTileRows;  // heavy ones first
  const int last_row = min(first_row + kTileRows, p.n) - 1;
  const int steps = last_row / kTileColumns + 1;
  const auto* k = KeyHead<kHeadDim>(p, head / p.group_size);
  const uint32_t k_shared = SharedAddress(shared.k);
  LoadRows<kHeadDim, kTileRows>(SharedAddress(shared.q[0]), QueryHead<kHeadDim>(p, head),
                                p.q_token_stride, first_row, p.n);
  LoadRows<kHeadDim, kTileColumns>(k_shared, k, p.kv_token_stride, 0, p.n);
  CommitCopies();
  const float scale_log2 = p.scale * kLog2E;
  const uint32_t q_lane = QueryLaneAddress<kHeadDim>(SharedAddress(shared.q[0]), warp, lane);
  float row_max[4], row_sum[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    row_max[r] = -INFINITY;
    row_sum[r] = 0;
  }
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      LoadRows<kHeadDim, kTileColumns>(k_shared + ((step + 1) & 1) * kKeyStage, k,
                                       p.kv_token_stride, (step + 1) * kTileColumns, p.n);
    }
    CommitCopies();
    WaitCopies<1>();
    __syncthreads();
    float s[2][8][4];
    ScoreTile<kHeadDim>(s, q_lane,
                        KeyLaneAddress<kHeadDim>(k_shared + (step & 1) * kKeyStage, lane));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row + warp * 32 + r * 8 + lane / 4;
      float m = row_max[r];
#pragma unroll
      for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[r / 2][nt][(r & 1) * 2 + e];
          if (step * kTileColumns + nt * 8 + (lane & 3) * 2 + e > row) x = -INFINITY;
          m = fmaxf(m, x);
        }
      }
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
      const float reference = m * scale_log2;  // finite: column 0 is visible to every row
      float sum = 0;
#pragma unroll
      for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sum += Exp2(fmaf(s[r / 2][nt][(r & 1) * 2 + e], scale_log2, -reference));
        }
      }
      row_sum[r] = row_sum[r] * Exp2(row_max[r] * scale_log2 - reference) + sum;
      row_max[r] = m;
    }
    __syncthreads();  // before the next copy lands in the buffer just read
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float sum = row_sum[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int row = first_row + warp * 32 + r * 8 + lane / 4;
    if (lane % 4 == 0 && row < p.n) {
      p.lse[int64_t{head} * p.n + row] = row_max[r] * p.scale + log2f(sum) * kLn2;
    }
  }
}

/// Pass 2: one block per (column tile, group); rows from the diagonal down, head after head.
template <int kHeadDim>
__global__ void __launch_bounds__(kTileThreads, 2)
    ColumnSumsKernel(const __grid_constant__ SumsParams p) {
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<SumsShared<kHeadDim>*>(shared_memory);
  constexpr uint32_t kQueryStage = sizeof(shared.q[0]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.y;
  const int first_column = blockIdx.x * kTileColumns;  // left columns have the most rows
  const int row_tiles = (p.n - first_column + kTileRows - 1) / kTileRows;
  const int steps = row_tiles * p.group_size;
  const uint32_t q_shared = SharedAddress(shared.q);
  const auto load = [&](int step) {
    const int head = group * p.group_size + step / row_tiles;
    const int first_row = first_column + step % row_tiles * kTileRows;
    LoadRows<kHeadDim, kTileRows>(q_shared + (step & 1) * kQueryStage, QueryHead<kHeadDim>(p, head),
                                  p.q_token_stride, first_row, p.n);
    LoadLse(shared.lse[step & 1], p.lse + int64_t{head} * p.n, first_row, p.n);
  };
  LoadRows<kHeadDim, kTileColumns>(SharedAddress(shared.k[0]), KeyHead<kHeadDim>(p, group),
                                   p.kv_token_stride, first_column, p.n);
  load(0);
  CommitCopies();
  const uint32_t k_lane = KeyLaneAddress<kHeadDim>(SharedAddress(shared.k[0]), lane);
  float sums[8][2] = {};
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    CommitCopies();
    WaitCopies<1>();
    __syncthreads();
    float s[2][8][4];
    ScoreTile<kHeadDim>(
        s, QueryLaneAddress<kHeadDim>(q_shared + (step & 1) * kQueryStage, warp, lane), k_lane);
    Probabilities(s, shared.lse[step & 1], first_column + step % row_tiles * kTileRows,
                  first_column, p.n, p.scale * kLog2E, warp, lane);
#pragma unroll
    for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sums[nt][e] += (s[0][nt][e] + s[0][nt][2 + e]) + (s[1][nt][e] + s[1][nt][2 + e]);
      }
    }
    __syncthreads();  // before the next copy lands in the buffers just read
  }
  WaitCopies<0>();
  float* partial = reinterpret_cast<float*>(shared.q);  // [thread][16 + 1]
#pragma unroll
  for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
    for (int e = 0; e < 2; ++e) partial[threadIdx.x * 17 + nt * 2 + e] = sums[nt][e];
  }
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= kTileColumns || first_column + column >= p.n) return;
  float sum = 0;
  for (int w = 0; w < 4; ++w) {
    for (int g = 0; g < 8; ++g) {
      const int thread = w * 32 + g * 4 + column % 8 / 2;
      sum += partial[thread * 17 + column / 8 * 2 + column % 2];
    }
  }
  p.columns[int64_t{group} * p.n + first_column + column] = sum * p.mean;
}

/// Pass 3: block x of a group owns the tiles whose first row is 128 x below their first column.
/// Accumulator [q][e] of lane l in warp w: offset 128 x + 32 w + 8 (q - 7) + l / 4 - 2 (l % 4) - e.
template <int kHeadDim>
__global__ void __launch_bounds__(kTileThreads, 2)
    DiagonalSumsKernel(const __grid_constant__ SumsParams p) {
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<SumsShared<kHeadDim>*>(shared_memory);
  constexpr uint32_t kQueryStage = sizeof(shared.q[0]);
  constexpr uint32_t kKeyStage = sizeof(shared.k[0]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.y;
  const int shift = blockIdx.x * kTileRows;  // small offsets have the most rows
  const int tiles = (p.n - shift + kTileColumns - 1) / kTileColumns;
  const int steps = tiles * p.group_size;
  const uint32_t q_shared = SharedAddress(shared.q);
  const uint32_t k_shared = SharedAddress(shared.k);
  const auto load = [&](int step) {
    const int head = group * p.group_size + step / tiles;
    const int first_column = step % tiles * kTileColumns;
    const int first_row = shift + first_column;
    LoadRows<kHeadDim, kTileRows>(q_shared + (step & 1) * kQueryStage, QueryHead<kHeadDim>(p, head),
                                  p.q_token_stride, first_row, p.n);
    LoadRows<kHeadDim, kTileColumns>(k_shared + (step & 1) * kKeyStage, KeyHead<kHeadDim>(p, group),
                                     p.kv_token_stride, first_column, p.n);
    LoadLse(shared.lse[step & 1], p.lse + int64_t{head} * p.n, first_row, p.n);
  };
  load(0);
  CommitCopies();
  float sums[11][2] = {};
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    CommitCopies();
    WaitCopies<1>();
    __syncthreads();
    float s[2][8][4];
    ScoreTile<kHeadDim>(s,
                        QueryLaneAddress<kHeadDim>(q_shared + (step & 1) * kQueryStage, warp, lane),
                        KeyLaneAddress<kHeadDim>(k_shared + (step & 1) * kKeyStage, lane));
    const int first_column = step % tiles * kTileColumns;
    Probabilities(s, shared.lse[step & 1], shift + first_column, first_column, p.n,
                  p.scale * kLog2E, warp, lane);
#pragma unroll
    for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            sums[mt * 2 + half - nt + 7][e] += s[mt][nt][half * 2 + e];
          }
        }
      }
    }
    __syncthreads();  // before the next copy lands in the buffers just read
  }
  WaitCopies<0>();
  float* partial = reinterpret_cast<float*>(shared.q);  // [thread][22 + 1]
#pragma unroll
  for (int q = 0; q < 11; ++q) {
#pragma unroll
    for (int e = 0; e < 2; ++e) partial[threadIdx.x * 23 + q * 2 + e] = sums[q][e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows + kTileColumns - 1; i += kTileThreads) {
    const int relative = i - (kTileColumns - 1);  // offset - shift
    const int offset = shift + relative;
    if (offset < 0 || offset >= p.n) continue;
    float sum = 0;
    for (int w = 0; w < 4; ++w) {
      for (int t = 0; t < 4; ++t) {
        for (int e = 0; e < 2; ++e) {
          // relative = 32 w + 8 (q - 7) + g - 2 t - e with 0 <= g < 8
          const int x = relative - 32 * w + 2 * t + e + 56;
          if (x < 0 || x >= 88) continue;
          sum += partial[(w * 32 + x % 8 * 4 + t) * 23 + x / 8 * 2 + e];
        }
      }
    }
    // Offsets of this block's upper half-band belong to its left neighbour, too.
    atomicAdd(&p.diagonals[int64_t{group} * p.n + offset], sum * p.mean);
  }
}

// float32: plain loops, one warp or thread per result; for small inputs.

__device__ __forceinline__ float ScoreF32(const SumsParams& p, int head, int row, int column) {
  const float* q = static_cast<const float*>(p.q) + row * p.q_token_stride + head * p.q_head_stride;
  const float* k = static_cast<const float*>(p.k) + column * p.kv_token_stride +
                   head / p.group_size * p.kv_head_stride;
  float sum = 0;
  for (int i = 0; i < p.head_dim; ++i) sum = fmaf(q[i], k[i], sum);
  return sum * p.scale;
}

__device__ __forceinline__ float WarpSum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

/// One warp per (row, head).
__global__ void LseF32Kernel(const __grid_constant__ SumsParams p) {
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int head = blockIdx.y;
  if (row >= p.n) return;
  float max = -INFINITY, sum = 0;
  for (int column = lane; column <= row; column += 32) {
    const float s = ScoreF32(p, head, row, column);
    const float m = fmaxf(max, s);
    sum = sum * expf(max - m) + expf(s - m);
    max = m;
  }
  float all = max;
  for (int offset = 16; offset > 0; offset /= 2) {
    all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, offset));
  }
  sum = WarpSum(max == -INFINITY ? 0.0f : sum * expf(max - all));
  if (lane == 0) p.lse[int64_t{head} * p.n + row] = all + logf(sum);
}

/// One warp per (column or offset, group).
template <bool kDiagonal>
__global__ void SumsF32Kernel(const __grid_constant__ SumsParams p) {
  const int lane = threadIdx.x % 32;
  const int index = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int group = blockIdx.y;
  if (index >= p.n) return;
  float sum = 0;
  for (int head = group * p.group_size; head < (group + 1) * p.group_size; ++head) {
    for (int row = index + lane; row < p.n; row += 32) {
      const int column = kDiagonal ? row - index : index;
      sum += expf(ScoreF32(p, head, row, column) - p.lse[int64_t{head} * p.n + row]);
    }
  }
  sum = WarpSum(sum);
  if (lane == 0) (kDiagonal ? p.diagonals : p.columns)[int64_t{group} * p.n + index] = sum * p.mean;
}

KernelStatus LaunchF32(const SumsParams& p, cudaStream_t stream) {
  constexpr int kWarps = 8;
  const unsigned blocks = static_cast<unsigned>(CeilDiv(p.n, kWarps));
  LseF32Kernel<<<dim3(blocks, p.num_groups * p.group_size), kWarps * 32, 0, stream>>>(p);
  SumsF32Kernel<false><<<dim3(blocks, p.num_groups), kWarps * 32, 0, stream>>>(p);
  SumsF32Kernel<true><<<dim3(blocks, p.num_groups), kWarps * 32, 0, stream>>>(p);
  return LaunchStatus();
}

template <int kHeadDim>
KernelStatus LaunchBf16(const SumsParams& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SumsShared<kHeadDim>);
  for (auto* kernel :
       {LseKernel<kHeadDim>, ColumnSumsKernel<kHeadDim>, DiagonalSumsKernel<kHeadDim>}) {
    const KernelStatus status = AllowSharedMemory(kernel, kBytes);
    if (status != KernelStatus::kOk) return status;
  }
  const unsigned row_tiles = static_cast<unsigned>(CeilDiv(p.n, kTileRows));
  const unsigned column_tiles = static_cast<unsigned>(CeilDiv(p.n, kTileColumns));
  const cudaError_t cleared = cudaMemsetAsync(
      p.diagonals, 0, sizeof(float) * static_cast<size_t>(p.num_groups) * p.n, stream);
  if (cleared != cudaSuccess) return AsStatus(cleared);
  LseKernel<kHeadDim>
      <<<dim3(row_tiles, p.num_groups * p.group_size), kTileThreads, kBytes, stream>>>(p);
  ColumnSumsKernel<kHeadDim><<<dim3(column_tiles, p.num_groups), kTileThreads, kBytes, stream>>>(p);
  DiagonalSumsKernel<kHeadDim><<<dim3(row_tiles, p.num_groups), kTileThreads, kBytes, stream>>>(p);
  return LaunchStatus();
}

}  // namespace

KernelStatus AttentionSumsCuda(const AttentionSumsArgs& args, Stream stream) {
  return cuda::AttentionSumsWith(cuda::KernelChoice::kFastest, args, stream);
}

KernelStatus cuda::AttentionSumsWith(KernelChoice kernel, const AttentionSumsArgs& args,
                                     Stream stream) {
  const AttentionShape& shape = args.shape;
  const AttentionSequence& s = args.sequence;
  const int64_t elements = 16 / SizeOf(shape.dtype);
  if (shape.num_kv_heads <= 0 || shape.num_q_heads % shape.num_kv_heads != 0 ||
      s.q_tokens != s.kv_tokens || s.kv_tokens > (1 << 24) || !Aligned16(s.q) || !Aligned16(s.k) ||
      s.q_token_stride % elements != 0 || s.q_head_stride % elements != 0 ||
      s.kv_head_stride % elements != 0 || s.kv_token_stride % elements != 0) {
    return KernelStatus::kUnsupportedShape;
  }
  if (s.kv_tokens == 0) return KernelStatus::kOk;
  if (kernel == KernelChoice::kFastest && shape.dtype == DType::kBF16 && DeviceIsSm90()) {
    const KernelStatus status = LaunchAttentionSumsSm90(args, AsCuda(stream));
    if (status != KernelStatus::kUnsupportedShape) return status;
  }
  SumsParams p = {};
  p.q = s.q;
  p.k = s.k;
  p.q_token_stride = s.q_token_stride;
  p.q_head_stride = s.q_head_stride;
  p.kv_head_stride = s.kv_head_stride;
  p.kv_token_stride = s.kv_token_stride;
  p.lse = args.lse;
  p.columns = args.columns;
  p.diagonals = args.diagonals;
  p.n = static_cast<int32_t>(s.kv_tokens);
  p.num_groups = shape.num_kv_heads;
  p.group_size = shape.group_size();
  p.head_dim = shape.head_dim;
  p.scale = shape.scale;
  p.mean = static_cast<float>(1.0 / (double(s.kv_tokens) * shape.group_size()));
  const cudaStream_t cuda_stream = AsCuda(stream);
  if (shape.dtype == DType::kF32) return LaunchF32(p, cuda_stream);
  switch (shape.head_dim) {
    case 16:
      return LaunchBf16<16>(p, cuda_stream);
    case 32:
      return LaunchBf16<32>(p, cuda_stream);
    case 64:
      return LaunchBf16<64>(p, cuda_stream);
    case 80:
      return LaunchBf16<80>(p, cuda_stream);
    case 96:
      return LaunchBf16<96>(p, cuda_stream);
    case 128:
      return LaunchBf16<128>(p, cuda_stream);
    default:
      return KernelStatus::kUnsupportedShape;
  }
}

}  // namespace vsprefill::kernels

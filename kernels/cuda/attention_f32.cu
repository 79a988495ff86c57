// Causal attention, dense, vertical-slash or block-sparse, float32 without tensor cores: for
// float32 models and as a second opinion on the bf16 kernel. Right before fast.
//
// A block of 128 threads takes 32 packed rows of one work item (blockIdx.y is the quarter). Four
// neighbouring threads share a row: thread p of the four holds the elements 16 i + 4 p .. + 3 of q
// and of the output, so that a warp reads 64 consecutive bytes of a key at a time.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/column_walk.cuh"
#include "kernels/cuda/launch.h"

namespace vsprefill::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 32;
constexpr int kColumns = 64;
constexpr int kColumnsPerStep = 8;  // between two corrections of the running maximum

template <int kHeadDim>
struct alignas(16) AttentionSharedF32 {
  float4 k[kColumns][kHeadDim / 4];
  float4 v[kColumns][kHeadDim / 4];
  ColumnWalk walk;
};

__device__ __forceinline__ float Dot(const float4& a, const float4& b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 3)
    AttentionF32Kernel(const __grid_constant__ AttentionBatch batch) {
  constexpr int kParts = kHeadDim / 16;  // float4 per thread and row
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<AttentionSharedF32<kHeadDim>*>(shared_memory);

  const WorkItem item = FindWorkItem(batch, blockIdx.x);
  const SequenceParams& sequence = batch.sequences[item.sequence];
  const int group_size = batch.group_size;
  const int part = threadIdx.x % 4;
  const int row = blockIdx.y * kRows + threadIdx.x / 4;
  const int position = item.tile * batch.row_tile + row / group_size;
  const bool used = row < batch.row_tile * group_size && position >= sequence.q_start &&
                    position < sequence.kv_tokens;
  const int64_t head = item.group * group_size + row % group_size;

  float4 q[kParts], o[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) q[i] = o[i] = make_float4(0, 0, 0, 0);
  if (used) {
    const float* source = static_cast<const float*>(sequence.q) +
                          (position - sequence.q_start) * sequence.q_token_stride +
                          head * sequence.q_head_stride;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      q[i] = *reinterpret_cast<const float4*>(source + i * 16 + part * 4);
      q[i].x *= batch.scale;
      q[i].y *= batch.scale;
      q[i].z *= batch.scale;
      q[i].w *= batch.scale;
    }
  }
  const int kv_head = item.group / batch.groups_per_kv_head;

  if (threadIdx.x == 0) {
    StartWalk(shared.walk, sequence, item.group, item.tile, batch.row_tile);
  }
  float row_max = -INFINITY, row_sum = 0;
  for (;;) {
    __syncthreads();
    if (threadIdx.x < 32) NextTile(shared.walk, &shared.walk.tiles[0]);
    __syncthreads();
    const ColumnTile tile = shared.walk.tiles[0];
    if (tile.count == 0) break;
    const TileSource k =
        SourceOf<float>(tile, sequence, sequence.k, sequence.k_means, kv_head, kHeadDim);
    const TileSource v =
        SourceOf<float>(tile, sequence, sequence.v, sequence.v_means, kv_head, kHeadDim);
    const float bias = tile.means ? kMeansBiasLog2 * 0.6931471805599453f : 0.0f;
    for (int index = threadIdx.x; index < kColumns * (kHeadDim / 4); index += kThreads) {
      const int n = index / (kHeadDim / 4);
      const int chunk = index % (kHeadDim / 4);
      const int column = TileColumn(shared.walk, tile, n);
      float4 key = make_float4(0, 0, 0, 0), value = key;
      if (static_cast<uint32_t>(column) < static_cast<uint32_t>(k.end)) {
        const int64_t offset = column * k.stride + chunk * 4;
        key = *reinterpret_cast<const float4*>(static_cast<const float*>(k.rows) + offset);
        value = *reinterpret_cast<const float4*>(static_cast<const float*>(v.rows) + offset);
      }
      shared.k[n][chunk] = key;
      shared.v[n][chunk] = value;
    }
    __syncthreads();
    for (int first = 0; first < tile.count; first += kColumnsPerStep) {
      float s[kColumnsPerStep];
      float step_max = row_max;
#pragma unroll
      for (int n = 0; n < kColumnsPerStep; ++n) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kParts; ++i) sum = Dot(q[i], shared.k[first + n][i * 4 + part], sum);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int column = TileColumn(shared.walk, tile, first + n);
        // Unsigned: a negative column is right of every row.
        s[n] = static_cast<uint32_t>(column) <= static_cast<uint32_t>(position) ? sum + bias
                                                                                : -INFINITY;
        step_max = fmaxf(step_max, s[n]);
      }
      if (step_max == -INFINITY) continue;  // nothing visible to this row so far
      const float correction = expf(row_max - step_max);
      row_max = step_max;
      row_sum *= correction;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        o[i].x *= correction;
        o[i].y *= correction;
        o[i].z *= correction;
        o[i].w *= correction;
      }
#pragma unroll
      for (int n = 0; n < kColumnsPerStep; ++n) {
        const float p = expf(s[n] - step_max);
        row_sum += p;
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          const float4 value = shared.v[first + n][i * 4 + part];
          o[i].x = fmaf(p, value.x, o[i].x);
          o[i].y = fmaf(p, value.y, o[i].y);
          o[i].z = fmaf(p, value.z, o[i].z);
          o[i].w = fmaf(p, value.w, o[i].w);
        }
      }
    }
  }
  if (!used) return;
  const float inverse = row_sum > 0 ? 1.0f / row_sum : 0.0f;
  float* out = static_cast<float*>(sequence.out) +
               (position - sequence.q_start) * sequence.out_token_stride +
               head * sequence.out_head_stride;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    *reinterpret_cast<float4*>(out + i * 16 + part * 4) =
        make_float4(o[i].x * inverse, o[i].y * inverse, o[i].z * inverse, o[i].w * inverse);
  }
}

template <int kHeadDim>
KernelStatus Launch(const AttentionBatch& batch, int num_items, cudaStream_t stream) {
  constexpr int kBytes = sizeof(AttentionSharedF32<kHeadDim>);
  const KernelStatus status = AllowSharedMemory(AttentionF32Kernel<kHeadDim>, kBytes);
  if (status != KernelStatus::kOk) return status;
  const int rows = batch.row_tile * batch.group_size;
  const dim3 grid(num_items, (rows + kRows - 1) / kRows);
  AttentionF32Kernel<kHeadDim><<<grid, kThreads, kBytes, stream>>>(batch);
  return LaunchStatus();
}

}  // namespace

KernelStatus LaunchAttentionF32(const AttentionBatch& batch, int num_items, int head_dim,
                                cudaStream_t stream) {
  switch (head_dim) {
    case 16:
      return Launch<16>(batch, num_items, stream);
    case 32:
      return Launch<32>(batch, num_items, stream);
    case 64:
      return Launch<64>(batch, num_items, stream);
    case 80:
      return Launch<80>(batch, num_items, stream);
    case 96:
      return Launch<96>(batch, num_items, stream);
    case 128:
      return Launch<128>(batch, num_items, stream);
    default:
      return KernelStatus::kUnsupportedShape;
  }
}

}  // namespace vsprefill::kernels::cuda

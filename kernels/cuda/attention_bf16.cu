// Causal attention, dense, vertical-slash or block-sparse, bf16 on tensor cores (mma.sync, sm_80+).
//
//   S[r, n] = scale * q[r] . k[col(n)]     [128 packed rows] x [64 columns of this step]
//   O[r]    = sum over steps of exp(S - rowmax) v[col(n)], online softmax, float32
//
// One block of four warps per work item (index group, row tile); each warp owns 32 packed rows, so
// every key fragment read from shared memory serves two MMAs. Packed row r is query position
// first_row + r / g, head r % g. Columns come from ColumnWalk, contiguous or gathered: a K or V row
// is head_dim * 2 bytes, fetched by 16-byte cp.async either way. The values of step j travel while
// its scores are computed, the keys of step j + 1 while its values are used; two blocks per SM fill
// the gaps.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/column_walk.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/score_tile.cuh"

namespace vsprefill::kernels::cuda {
namespace {

template <int kHeadDim>
struct alignas(16) AttentionShared {
  __nv_bfloat16 q[kTileRows * kSharedStride<kHeadDim>];  // later the output rows
  __nv_bfloat16 k[kTileColumns * kSharedStride<kHeadDim>];
  __nv_bfloat16 v[kTileColumns * kSharedStride<kHeadDim>];
  ColumnWalk walk;
  int32_t row_position[kTileRows];  // -1: idle row
};

/// Starts the copy of one tile's K or V rows. Columns outside the sequence and slots past a
/// gathered tile's end are zero-filled: their probability is zero, but zero times garbage may be
/// NaN.
template <int kHeadDim>
__device__ __forceinline__ void LoadColumns(uint32_t shared, const TileSource& from,
                                            const ColumnWalk& walk, const ColumnTile& tile) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kTotal = kTileColumns * kChunks;
#pragma unroll 4
  for (int i = 0; i < (kTotal + kTileThreads - 1) / kTileThreads; ++i) {
    const int index = threadIdx.x + i * kTileThreads;
    if (kTotal % kTileThreads != 0 && index >= kTotal) break;
    const int n = index / kChunks;
    const int chunk = index % kChunks;
    const int column = TileColumn(walk, tile, n);
    const bool valid = static_cast<uint32_t>(column) < static_cast<uint32_t>(from.end);
    const __nv_bfloat16* source = static_cast<const __nv_bfloat16*>(from.rows) +
                                  (valid ? column * from.stride : 0) + chunk * 8;
    CopyAsync16(shared + (n * kSharedStride<kHeadDim> + chunk * 8) * 2, source, valid);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kTileThreads, 2)
    AttentionBf16Kernel(const __grid_constant__ AttentionBatch batch) {
  constexpr int kStride = kSharedStride<kHeadDim>;
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kDimTiles = kHeadDim / 8;
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<AttentionShared<kHeadDim>*>(shared_memory);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const WorkItem item = FindWorkItem(batch, blockIdx.x);
  const SequenceParams& sequence = batch.sequences[item.sequence];
  const int group_size = batch.group_size;

  // Queries, and the start of the walk.
  {
    const int position = item.tile * batch.row_tile + static_cast<int>(threadIdx.x) / group_size;
    const bool used = threadIdx.x < batch.row_tile * group_size && position >= sequence.q_start &&
                      position < sequence.kv_tokens;
    shared.row_position[threadIdx.x] = used ? position : -1;
    if (threadIdx.x == 0) {
      StartWalk(shared.walk, sequence, item.group, item.tile, batch.row_tile);
    }
  }
  __syncthreads();
  if (warp == 0) NextTile(shared.walk, &shared.walk.tiles[0]);
  const uint32_t q_shared = SharedAddress(shared.q);
  const uint32_t k_shared = SharedAddress(shared.k);
  const uint32_t v_shared = SharedAddress(shared.v);
  {
    const auto* q = static_cast<const __nv_bfloat16*>(sequence.q);
    for (int index = threadIdx.x; index < kTileRows * kChunks; index += kTileThreads) {
      const int row = index / kChunks;
      const int chunk = index % kChunks;
      const int position = shared.row_position[row];
      const int64_t head = item.group * group_size + row % group_size;
      const int64_t offset = position < 0
                                 ? 0
                                 : (position - sequence.q_start) * sequence.q_token_stride +
                                       head * sequence.q_head_stride;
      CopyAsync16(q_shared + (row * kStride + chunk * 8) * 2, q + offset + chunk * 8,
                  position >= 0);
    }
  }
  __syncthreads();
  const int kv_head = item.group / batch.groups_per_kv_head;
  const auto load = [&](uint32_t to, const void* rows, const void* means, const ColumnTile& tile) {
    const TileSource from = SourceOf<__nv_bfloat16>(tile, sequence, rows, means, kv_head, kHeadDim);
    LoadColumns<kHeadDim>(to, from, shared.walk, tile);
  };
  if (shared.walk.tiles[0].count > 0) {
    load(k_shared, sequence.k, sequence.k_means, shared.walk.tiles[0]);
  }
  CommitCopies();

  const uint32_t q_lane = QueryLaneAddress<kHeadDim>(q_shared, warp, lane);
  const uint32_t k_lane = KeyLaneAddress<kHeadDim>(k_shared, lane);
  const uint32_t v_lane =
      v_shared + (((lane & 7) + ((lane >> 3) & 1) * 8) * kStride + (lane >> 4) * 8) * 2;
  const float scale_log2 = batch.scale * 1.4426950408889634f;

  float o[2][kDimTiles][4];
  float row_max[2][2], row_sum[2][2];
#pragma unroll
  for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
    for (int nt = 0; nt < kDimTiles; ++nt) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[mt][nt][e] = 0.0f;
    }
    row_max[mt][0] = row_max[mt][1] = -INFINITY;
    row_sum[mt][0] = row_sum[mt][1] = 0.0f;
  }

  for (int step = 0;; step ^= 1) {
    WaitCopies<0>();
    __syncthreads();  // keys of this step are there; everybody has left the values of the last one
    const ColumnTile tile = shared.walk.tiles[step];
    if (tile.count == 0) break;
    load(v_shared, sequence.v, sequence.v_means, tile);
    CommitCopies();
    if (warp == 0) NextTile(shared.walk, &shared.walk.tiles[step ^ 1]);

    float s[2][8][4];
    ScoreTile<kHeadDim>(s, q_lane, k_lane);

    WaitCopies<0>();
    __syncthreads();  // values and the next tile's columns are there; everybody has left the keys
    if (shared.walk.tiles[step ^ 1].count > 0) {
      load(k_shared, sequence.k, sequence.k_means, shared.walk.tiles[step ^ 1]);
    }
    CommitCopies();

    if (tile.masked) {
      uint32_t limit[2][2];
#pragma unroll
      for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          limit[mt][half] =
              static_cast<uint32_t>(shared.row_position[warp * 32 + mt * 16 + half * 8 + lane / 4]);
        }
      }
#pragma unroll
      for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // Unsigned: a negative column is right of every row.
          const uint32_t column =
              static_cast<uint32_t>(TileColumn(shared.walk, tile, nt * 8 + (lane & 3) * 2 + e));
#pragma unroll
          for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if (column > limit[mt][half]) s[mt][nt][half * 2 + e] = -INFINITY;
            }
          }
        }
      }
    }

    if (tile.means) {
      const float bias = kMeansBiasLog2 / scale_log2;
#pragma unroll
      for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
        for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[mt][nt][e] += bias;
        }
      }
    }

    // Online softmax: s becomes the probabilities relative to the new row maximum.
    float correction[2][2];
    bool changed = false;
#pragma unroll
    for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = row_max[mt][half];
#pragma unroll
        for (int nt = 0; nt < 8; ++nt) {
          m = fmaxf(m, fmaxf(s[mt][nt][half * 2], s[mt][nt][half * 2 + 1]));
        }
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        // A row that has seen no column yet: any finite reference keeps exp2 at zero, not NaN.
        const float reference = m == -INFINITY ? 0.0f : __fmul_rn(m, scale_log2);
        // Both products rounded: exactly 1 where nothing changed (the warp corrects all its rows if
        // one of them changed), and 0 for a row that has seen nothing, whose sums are 0.
        correction[mt][half] = Exp2(__fmul_rn(row_max[mt][half], scale_log2) - reference);
        changed |= m != row_max[mt][half];
        row_max[mt][half] = m;
        float sum = 0.0f;
#pragma unroll
        for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& p = s[mt][nt][half * 2 + e];
            p = Exp2(p * scale_log2 - reference);
            sum += p;
          }
        }
        row_sum[mt][half] = row_sum[mt][half] * correction[mt][half] + sum;
      }
    }
    if (__any_sync(0xffffffffu, changed)) {
#pragma unroll
      for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
        for (int nt = 0; nt < kDimTiles; ++nt) {
#pragma unroll
          for (int e = 0; e < 4; ++e) o[mt][nt][e] *= correction[mt][e / 2];
        }
      }
    }

    // O += P V, P rounded to bf16.
#pragma unroll
    for (int kt = 0; kt < 4; ++kt) {
      uint32_t p[2][4];
#pragma unroll
      for (int mt = 0; mt < 2; ++mt) {
        p[mt][0] = PackBf16(s[mt][2 * kt][0], s[mt][2 * kt][1]);
        p[mt][1] = PackBf16(s[mt][2 * kt][2], s[mt][2 * kt][3]);
        p[mt][2] = PackBf16(s[mt][2 * kt + 1][0], s[mt][2 * kt + 1][1]);
        p[mt][3] = PackBf16(s[mt][2 * kt + 1][2], s[mt][2 * kt + 1][3]);
      }
#pragma unroll
      for (int dp = 0; dp < kHeadDim / 16; ++dp) {
        uint32_t b[4];
        LoadMatrix4Transposed(b, v_lane + kt * 16 * kStride * 2 + dp * 32);
#pragma unroll
        for (int mt = 0; mt < 2; ++mt) {
          MmaBf16(o[mt][2 * dp], p[mt], b[0], b[1]);
          MmaBf16(o[mt][2 * dp + 1], p[mt], b[2], b[3]);
        }
      }
    }
  }

  // Output: through this warp's own query rows, so that the stores are 16 bytes wide.
#pragma unroll
  for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[mt][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      const int row = warp * 32 + mt * 16 + half * 8 + lane / 4;
      auto* out = reinterpret_cast<uint32_t*>(shared.q + row * kStride + (lane & 3) * 2);
#pragma unroll
      for (int nt = 0; nt < kDimTiles; ++nt) {
        out[nt * 4] = PackBf16(o[mt][nt][half * 2] * inverse, o[mt][nt][half * 2 + 1] * inverse);
      }
    }
  }
  __syncwarp();
  auto* out = static_cast<__nv_bfloat16*>(sequence.out);
  for (int index = lane; index < 32 * kChunks; index += 32) {
    const int row = warp * 32 + index / kChunks;
    const int chunk = index % kChunks;
    const int position = shared.row_position[row];
    if (position < 0) continue;
    const int64_t head = item.group * group_size + row % group_size;
    const int64_t offset =
        (position - sequence.q_start) * sequence.out_token_stride + head * sequence.out_head_stride;
    *reinterpret_cast<uint4*>(out + offset + chunk * 8) =
        *reinterpret_cast<const uint4*>(shared.q + row * kStride + chunk * 8);
  }
}

template <int kHeadDim>
KernelStatus Launch(const AttentionBatch& batch, int num_items, cudaStream_t stream) {
  constexpr int kBytes = sizeof(AttentionShared<kHeadDim>);
  const KernelStatus status = AllowSharedMemory(AttentionBf16Kernel<kHeadDim>, kBytes);
  if (status != KernelStatus::kOk) return status;
  AttentionBf16Kernel<kHeadDim><<<num_items, kTileThreads, kBytes, stream>>>(batch);
  return LaunchStatus();
}

}  // namespace

KernelStatus LaunchAttentionBf16(const AttentionBatch& batch, int num_items, int head_dim,
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

// Causal attention, dense, vertical-slash or block-sparse, bf16 on Hopper (sm_90a): wgmma fed by
// TMA and cp.async.
//
//   S[r, n] = scale * q[r] . k[column(n)]     [128 packed rows] x [128 columns of this tile]
//   O[r]    = sum over tiles of exp(S - rowmax) v[column(n)], online softmax, float32
//
// One persistent block per multiprocessor: a producer warpgroup and two consumer warpgroups. A work
// item is an (index group, row tile) as in attention_params.cuh; consumer w owns packed rows 64 w
// to 64 w + 63 (packed row r: position first + r / g, head r % g).
//
// Column tiles. A tile has two halves of 64 columns; half h of an item's tile t is number 2 t + h
// of its walk: first the selected distance blocks, nearest first (contiguous columns: TMA, rows
// outside the sequence arrive as zeros), then the verticals that no band covers, compacted on the
// fly, 64 at a time (gathered: cp.async). A tile may hold one half of each kind. Block-sparse: the
// selected key blocks of 128, then likewise the single columns outside of them. What is missing in
// the last tile is masked, and zeros, so that nothing stale meets a zero probability.
//
// Shared memory, tiles as [head_dim / 64][128 rows][64 elements] with 128-byte swizzle (16-byte
// chunk c of row r lies at c ^ (r % 8)), the layout of TMA and wgmma:
//   q            packed rows of two items; an item's output takes the place of its queries
//   k, v         kStages tiles each, with a full and an empty barrier each
//   plans        ring of kPlans tiles: what each is made of
//   columns      ring of column numbers, 128 for each plan. Written for gathered halves and for
//                masked tiles, read by the gather and by the mask.
//
// Producer warps: 0 loads queries and bands (TMA); 1 plans: draws work items and walks their index,
// some tiles ahead; 2 and 3 gather, each half of the rows. Consumers overlap the softmax of one
// tile with the products S = Q K of the next, of the next item's first one too, and O += P V of the
// one before.
//
// Dense last rows: where the caller gives a workspace, a dense row tile is several items, each over
// a part of its columns, that leave unnormalised sums there; join_parts.cu makes the output of
// them.
//
// Files: attention_tiles.cuh (plans, shared memory), attention_planner.cuh, attention_loads.cuh,
// attention_consumer.cuh, and the launch here.
//
// Scheduling: items are drawn from a counter (item_counter.h), heaviest first; while a stream is
// captured each block takes every gridDim-th item. An item's result does not depend on who
// computes it.
#include <algorithm>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sm90/attention_consumer.cuh"
#include "kernels/cuda/sm90/attention_loads.cuh"
#include "kernels/cuda/sm90/attention_planner.cuh"
#include "kernels/cuda/sm90/item_counter.h"
#include "kernels/cuda/sm90/tensor_map.h"

namespace vsprefill::kernels::cuda {
namespace sm90::attention {
namespace {

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    AttentionSm90Kernel(const __grid_constant__ AttentionBatchSm90 batch) {
  using C = Config<kHeadDim>;
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    // The swizzle counts from 1024-byte boundaries.
    if (SharedAddress(&shared) % 1024 != 0) __trap();
    for (int i = 0; i < C::kStages; ++i) {
      // Full: the loader and both gatherers. Empty: each consumer warp.
      BarrierInit(SharedAddress(&shared.k_full[i]), 3);
      BarrierInit(SharedAddress(&shared.v_full[i]), 3);
      BarrierInit(SharedAddress(&shared.k_empty[i]), 8);
      BarrierInit(SharedAddress(&shared.v_empty[i]), 8);
    }
    for (int i = 0; i < 2; ++i) {
      BarrierInit(SharedAddress(&shared.q_full[i]), 1);
      BarrierInit(SharedAddress(&shared.q_empty[i]), 1);
    }
    for (int i = 0; i < kPlans; ++i) {
      // Full: the planner's threads. Empty: the loader (for the consumers, too) and the gatherers'.
      BarrierInit(SharedAddress(&shared.plan_full[i]), 32);
      BarrierInit(SharedAddress(&shared.plan_empty[i]), 1 + 2 * 32);
    }
    FenceBarrierInit();
  }
  // Padding rows are never loaded: any finite number does.
  for (int i = threadIdx.x; i < 2 * C::kTileBytes / 16; i += kThreads) {
    reinterpret_cast<uint4*>(shared.q)[i] = make_uint4(0, 0, 0, 0);
  }
  FenceProxyAsync();
  __syncthreads();
  const int warpgroup = Uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    LowerRegisters<kProducerRegisters>();
    const int warp = Uniform(threadIdx.x / 32);
    if (warp == 0) {
      if (threadIdx.x == 0) Load(batch, shared);
    } else if (warp == 1) {
      Planner<kHeadDim>(batch, shared).Run();
    } else if (warp == 2) {
      Gather<kHeadDim, 0>(batch, shared);
    } else {
      Gather<kHeadDim, 1>(batch, shared);
    }
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consume(batch, shared, warpgroup - 1);
  }
}

template <int kHeadDim>
KernelStatus Launch(const AttentionBatchSm90& batch, cudaStream_t stream) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return AsStatus(error);
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return AsStatus(error);
  constexpr int kBytes = sizeof(Shared<kHeadDim>);
  KernelStatus status = AllowSharedMemory(AttentionSm90Kernel<kHeadDim>, kBytes);
  if (status != KernelStatus::kOk) return status;
  const int blocks = std::min(batch.num_items, multiprocessors);
  AttentionSm90Kernel<kHeadDim><<<blocks, kThreads, kBytes, stream>>>(batch);
  status = LaunchStatus();
  return status == KernelStatus::kOk ? JoinParts(batch.base, kHeadDim, stream) : status;
}

}  // namespace
}  // namespace sm90::attention

KernelStatus LaunchAttentionSm90(const AttentionBatch& base, int num_items, int head_dim,
                                 cudaStream_t stream) {
  if (head_dim != 64 && head_dim != 128) return KernelStatus::kUnsupportedShape;
  sm90::AttentionBatchSm90 batch;
  batch.base = base;
  for (int i = 0; i < base.num_sequences; ++i) {
    const SequenceParams& s = base.sequences[i];
    // Gathering multiplies 32-bit numbers.
    if (s.kv_token_stride >= int64_t{1} << 31) return KernelStatus::kUnsupportedShape;
    const int q_heads = base.num_groups * base.group_size;
    const int q_tokens = s.kv_tokens - s.q_start;
    const auto columns = [&](CUtensorMap* map, const void* rows) {
      return sm90::DescribeTensor(
          map, rows, {head_dim, s.kv_tokens, base.num_groups / base.groups_per_kv_head},
          {s.kv_token_stride, s.kv_head_stride}, {64, kBandBlock, 1});
    };
    const auto rows = [&](CUtensorMap* map, const void* data, int64_t head_stride,
                          int64_t token_stride) {
      return sm90::DescribeTensor(map, data, {head_dim, q_heads, q_tokens},
                                  {head_stride, token_stride},
                                  {64, base.group_size, base.row_tile});
    };
    const bool described = columns(&batch.k_maps[i], s.k) && columns(&batch.v_maps[i], s.v) &&
                           rows(&batch.q_maps[i], s.q, s.q_head_stride, s.q_token_stride) &&
                           rows(&batch.out_maps[i], s.out, s.out_head_stride, s.out_token_stride);
    if (!described) return KernelStatus::kUnsupportedShape;
  }
  batch.counter = sm90::ItemCounter(stream);
  batch.num_items = num_items;
  batch.group_reciprocal = (65536 + base.group_size - 1) / base.group_size;
  return head_dim == 128 ? sm90::attention::Launch<128>(batch, stream)
                         : sm90::attention::Launch<64>(batch, stream);
}

}  // namespace vsprefill::kernels::cuda

// The warps of the Hopper attention kernel that fill tiles: the loader (TMA) and the gatherers
// (cp.async).
#pragma once

#include <cstdint>

#include "kernels/cuda/sm90/attention_tiles.cuh"
#include "kernels/cuda/sm90/ptx.cuh"

namespace vsprefill::kernels::cuda::sm90::attention {

/// Starts the TMA copies of the halves of a K or V tile that are not gathered. One thread.
template <int kHeadDim>
__device__ __forceinline__ void LoadBands(uint32_t tile_shared, const CUtensorMap* map,
                                          uint64_t& full, const Plan& plan, int kv_head) {
  using C = Config<kHeadDim>;
  const uint32_t barrier = SharedAddress(&full);
  const bool load[2] = {(plan.flags & kGather0) == 0, (plan.flags & kGather1) == 0};
  BarrierArriveExpect(barrier, (load[0] + load[1]) * (C::kTileBytes / 2));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!load[half]) continue;
#pragma unroll
    for (int slice = 0; slice < C::kSlices; ++slice) {
      TmaLoad3D(tile_shared + slice * C::kSliceBytes + half * kHalf * 128, map, barrier, slice * 64,
                plan.first_column[half], kv_head);
    }
  }
}

/// Loads queries and bands. One thread.
template <int kHeadDim>
__device__ __forceinline__ void Load(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared) {
  using C = Config<kHeadDim>;
  uint32_t items = 0;
  for (uint32_t tile = 0;; ++tile) {
    const Slot<kPlans> slot(tile);
    const Stage<kHeadDim> stage(tile);
    WaitFull(shared.plan_full, slot.index, slot.parity);
    const Plan plan = shared.plans[slot.index];
    const int sequence = plan.work.sequence;
    const int group = plan.work.group;
    const int kv_head = group / batch.base.groups_per_kv_head;
    if (plan.flags & kFirst) {
      const int rows = batch.base.row_tile * batch.base.group_size;
      const Slot<2> q(items++);
      WaitEmpty(shared.q_empty, q.index, q.parity);
      const uint32_t full = SharedAddress(&shared.q_full[q.index]);
      shared.q_work[q.index] = plan.work;
      BarrierArriveExpect(full, rows * kHeadDim * 2);
#pragma unroll
      for (int slice = 0; slice < C::kSlices; ++slice) {
        TmaLoad3D(SharedAddress(shared.q[q.index]) + slice * C::kSliceBytes,
                  &batch.q_maps[sequence], full, slice * 64, group * batch.base.group_size,
                  FirstQuery(batch, plan.work));
      }
    }
    WaitEmpty(shared.k_empty, stage.index, stage.parity);
    // Consumers have left the keys of tile - kStages and with them its plan.
    if (tile >= C::kStages) {
      BarrierArrive(SharedAddress(&shared.plan_empty[(tile - C::kStages) % kPlans]));
    }
    if (sequence < 0) {
      BarrierArrive(SharedAddress(&shared.k_full[stage.index]), 3);
      return;
    }
    LoadBands<kHeadDim>(SharedAddress(shared.k[stage.index]), &batch.k_maps[sequence],
                        shared.k_full[stage.index], plan, kv_head);
    WaitEmpty(shared.v_empty, stage.index, stage.parity);
    LoadBands<kHeadDim>(SharedAddress(shared.v[stage.index]), &batch.v_maps[sequence],
                        shared.v_full[stage.index], plan, kv_head);
  }
}

/// Starts the copies of one half of a K or V tile from `rows`. `kCheck`: a column may lie outside
/// the sequence; its row becomes zeros. One warp.
template <int kHeadDim, bool kCheck>
__device__ __forceinline__ void GatherHalf(uint32_t half_shared, const char* rows,
                                           uint32_t token_bytes, int kv_tokens,
                                           const int32_t* columns) {
  constexpr int kChunks = kHeadDim / 8;    // 16-byte pieces of a row
  constexpr int kStep = 4 * 32 / kChunks;  // rows per step: each lane copies a piece of four
  static_assert(kStep % 8 == 0);           // so that the swizzle is the same in each step
  const int lane = threadIdx.x & 31;
  const int chunk = lane % kChunks;
  const int row = lane / kChunks * 4;
  uint32_t target[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    target[i] = half_shared + chunk / 8 * Config<kHeadDim>::kSliceBytes + (row + i) * 128 +
                ((chunk ^ (row + i)) & 7) * 16;
  }
  rows += chunk * 16;
  asm volatile("" : "+l"(rows));  // one addition for each address, not two
  // Column numbers of several steps before their copies: the latencies overlap.
  constexpr int kSteps = 4;
  static_assert(kHalf % (kSteps * kStep) == 0);
  for (int n = 0; n < kHalf; n += kSteps * kStep) {
    int4 quads[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      quads[i] = *reinterpret_cast<const int4*>(columns + n + i * kStep + row);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int column[4] = {quads[i].x, quads[i].y, quads[i].z, quads[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool valid =
            !kCheck || static_cast<uint32_t>(column[j]) < static_cast<uint32_t>(kv_tokens);
        const uint64_t offset =
            uint64_t{valid ? static_cast<uint32_t>(column[j]) : 0} * token_bytes;
        CopyAsync16(target[j] + (n + i * kStep) * 128, rows + offset, valid);
      }
    }
  }
}

/// Gathers half `kTileHalf` of the tiles' keys and values, the keys one tile ahead of the values:
/// the order in which consumers give them back. One warp.
template <int kHeadDim, int kTileHalf>
__device__ __forceinline__ void Gather(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared) {
  constexpr int kGathered = kTileHalf == 0 ? kGather0 : kGather1;
  constexpr int kMayMask = kTileHalf == 0 ? kMasked0 : kMasked1;
  struct Source {
    const char *k, *v;
    uint32_t token_bytes;
    int kv_tokens;
    int flags;
  };
  const bool leader = threadIdx.x % 32 == 0;
  uint32_t copying = 0;  // full barrier of the tile whose copies are in flight
  // cp.async writes in the generic proxy, wgmma reads in the async proxy: the writer fences.
  const auto finish = [&] {
    FenceProxyAsync();
    __syncwarp();
    if (leader) BarrierArrive(copying);
  };
  const auto finish_all = [&] {
    if (copying == 0) return;
    WaitCopies<0>();
    finish();
    copying = 0;
  };
  const auto wait = [&](uint64_t& barrier, uint32_t parity) {
    if (__all_sync(0xffffffffu, BarrierTest(SharedAddress(&barrier), parity))) return;
    finish_all();  // consumers may wait for these before they free anything
    BarrierWait(SharedAddress(&barrier), parity);
    __syncwarp();
  };
  const auto gather = [&](uint8_t* tile, uint64_t& full, const char* rows, const Source& source,
                          const int32_t* columns) {
    const uint32_t target = SharedAddress(tile) + kTileHalf * kHalf * 128;
    if (source.flags & kMayMask) {
      GatherHalf<kHeadDim, true>(target, rows, source.token_bytes, source.kv_tokens, columns);
    } else {
      GatherHalf<kHeadDim, false>(target, rows, source.token_bytes, source.kv_tokens, columns);
    }
    CommitCopies();
    if (copying != 0) {
      WaitCopies<1>();
      finish();
    }
    copying = SharedAddress(&full);
  };
  Source source = {}, last = {};  // of the keys' tile and of the values' tile
  for (uint32_t tile = 0;; ++tile) {
    const Slot<kPlans> slot(tile);
    const Stage<kHeadDim> stage(tile);
    wait(shared.plan_full[slot.index], slot.parity);
    const WorkItem item = shared.plans[slot.index].work;
    source.flags = shared.plans[slot.index].flags;
    if (item.sequence >= 0) {
      if (source.flags & kFirst) {
        const SequenceParams& s = batch.base.sequences[item.sequence];
        const int64_t head = item.group / batch.base.groups_per_kv_head * s.kv_head_stride * 2;
        source.k = static_cast<const char*>(s.k) + head;
        source.v = static_cast<const char*>(s.v) + head;
        source.token_bytes = static_cast<uint32_t>(s.kv_token_stride * 2);
        source.kv_tokens = s.kv_tokens;
      }
      // A wait tells only neighbouring phases apart, so gatherers take part in every tile.
      wait(shared.k_empty[stage.index], stage.parity ^ 1);
      if (source.flags & kGathered) {
        gather(shared.k[stage.index], shared.k_full[stage.index], source.k, source,
               shared.columns[slot.index] + kTileHalf * kHalf);
      } else if (leader) {
        BarrierArrive(SharedAddress(&shared.k_full[stage.index]));
      }
    }
    if (tile > 0) {
      const Slot<kPlans> last_slot(tile - 1);
      const Stage<kHeadDim> last_stage(tile - 1);
      wait(shared.v_empty[last_stage.index], last_stage.parity ^ 1);
      if (last.flags & kGathered) {
        gather(shared.v[last_stage.index], shared.v_full[last_stage.index], last.v, last,
               shared.columns[last_slot.index] + kTileHalf * kHalf);
      } else if (leader) {
        BarrierArrive(SharedAddress(&shared.v_full[last_stage.index]));
      }
      // Each lane has read columns.
      BarrierArrive(SharedAddress(&shared.plan_empty[last_slot.index]));
    }
    if (item.sequence < 0) break;
    last = source;
  }
  finish_all();
}

}  // namespace vsprefill::kernels::cuda::sm90::attention

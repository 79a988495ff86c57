// The consumer warpgroups of the Hopper attention kernel: products, softmax, output.
#pragma once

#include <cstdint>

#include "kernels/cuda/sm90/attention_tiles.cuh"
#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/sm90/scores.cuh"

namespace vsprefill::kernels::cuda::sm90::attention {

/// o += p v, or o = p v where `add` is false; committed, not waited for.
template <int kHeadDim>
__device__ __forceinline__ void StartValues(float (&o)[kHeadDim / 2],
                                            const uint32_t (&p)[kColumns / 16][4],
                                            uint32_t v_shared, bool add) {
  v_shared = Uniform(v_shared);
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    const uint64_t b = MatrixDescriptor(v_shared, Config<kHeadDim>::kSliceBytes, step * 16 * 128);
    if constexpr (kHeadDim == 128) {
      WgmmaRegistersN128<Contiguous::kN>(o, p[step], b, step != 0 || add);
    } else {
      WgmmaRegistersN64(o, p[step], b, step != 0 || add);
    }
  }
  WgmmaCommit();
}

/// Scores of invisible pairs of half `kTileHalf` become -inf. `limit`: position of the thread's two
/// rows; idle rows have the largest one. A negative column is, unsigned, right of every row.
template <int kTileHalf>
__device__ __forceinline__ void Mask(float (&s)[kColumns / 2], const int32_t* columns,
                                     const uint32_t (&limit)[2]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = kTileHalf * kHalf / 8; n < (kTileHalf + 1) * kHalf / 8; ++n) {
    const int2 pair = *reinterpret_cast<const int2*>(columns + n * 8 + (lane & 3) * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (static_cast<uint32_t>(pair.x) > limit[half]) s[n * 4 + half * 2] = -INFINITY;
      if (static_cast<uint32_t>(pair.y) > limit[half]) s[n * 4 + half * 2 + 1] = -INFINITY;
    }
  }
}

/// Running maximum and sum of the thread's two rows. The sum covers this thread's columns only.
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

/// Sum over the four threads of a row. Called by a whole warp.
__device__ __forceinline__ float RowSum(float sum) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

/// 1 / the whole row's sum, from its threads' parts; 0 for a row that saw no column. Called by a
/// whole warp.
__device__ __forceinline__ float Inverse(float sum) {
  sum = RowSum(sum);
  return sum > 0.0f ? Reciprocal(sum) : 0.0f;
}

/// Online softmax: s becomes the probabilities relative to the new maximum. What was accumulated
/// before has to be multiplied by `correction`; returns whether that matters to some row of the
/// warp.
__device__ __forceinline__ bool Softmax(float (&s)[kColumns / 2], RowState& rows, float scale_log2,
                                        float (&correction)[2]) {
  bool changed = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float m = rows.max[half];
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      m = fmaxf(m, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
    }
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
    // A row that has seen no column yet: any finite reference keeps exp2 at zero, not NaN.
    const float reference = m == -INFINITY ? 0.0f : m * scale_log2;
    // Exactly 1 where nothing changed (the rounding of `reference` would show): whether the warp
    // corrects must not show in a row, for idle rows take part in the vote.
    correction[half] = m == rows.max[half] ? 1.0f : Exp2(rows.max[half] * scale_log2 - reference);
    changed |= m != rows.max[half];
    rows.max[half] = m;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& p = s[n * 4 + half * 2 + e];
        p = Exp2(p * scale_log2 - reference);
        sum += p;
      }
    }
    rows.sum[half] = rows.sum[half] * correction[half] + sum;
  }
  return __any_sync(0xffffffffu, changed);
}

/// Probabilities rounded to bf16, as the A operand of StartValues.
__device__ __forceinline__ void PackProbabilities(uint32_t (&p)[kColumns / 16][4],
                                                  const float (&s)[kColumns / 2]) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[step][i] = PackBf16(s[step * 8 + i * 2], s[step * 8 + i * 2 + 1]);
    }
  }
}

/// o / sum of this warp's 16 rows, rounded to bf16, into the queries' place: `rows_shared` is the
/// address of the warp's first row.
template <int kHeadDim>
__device__ __forceinline__ void WriteRows(uint32_t rows_shared, const float (&o)[kHeadDim / 2],
                                          const float (&sums)[2]) {
  const float inverse[2] = {Inverse(sums[0]), Inverse(sums[1])};
  // Matrix lane / 8 of each store: rows 8 * (matrix % 2), 16-byte chunk matrix / 2 of two.
  const int lane = threadIdx.x & 31;
  const int row = lane % 16;
  const int chunk = lane / 16;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; n += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (n + i / 2) * 4 + i % 2 * 2;
      words[i] = PackBf16(o[at] * inverse[i % 2], o[at + 1] * inverse[i % 2]);
    }
    StoreMatrix4(rows_shared + n / 8 * Config<kHeadDim>::kSliceBytes + row * 128 +
                     (((n + chunk) ^ row) & 7) * 16,
                 words);
  }
}

/// Starts the copy of a row tile's output to where it belongs. One thread.
template <int kHeadDim>
__device__ __forceinline__ void SendRows(const AttentionBatchSm90& batch, const WorkItem& work,
                                         uint32_t out_shared) {
#pragma unroll
  for (int slice = 0; slice < Config<kHeadDim>::kSlices; ++slice) {
    TmaStore3D(&batch.out_maps[work.sequence], out_shared + slice * Config<kHeadDim>::kSliceBytes,
               slice * 64, work.group * batch.base.group_size, FirstQuery(batch, work));
  }
  CommitBulk();
}

/// The same without the copy engine, which refuses to store at negative coordinates: the row tile
/// in which the queries begin. `row`: this thread's first row.
template <int kHeadDim>
__device__ __forceinline__ void StoreRows(const AttentionBatchSm90& batch, const WorkItem& work,
                                          int row, const float (&o)[kHeadDim / 2],
                                          const float (&sums)[2]) {
  const SequenceParams& sequence = batch.base.sequences[work.sequence];
  const int group_size = batch.base.group_size;
  const float inverse[2] = {Inverse(sums[0]), Inverse(sums[1])};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int packed = row + half * 8;
    const int position = RowPosition(batch, sequence, work.tile, packed);
    if (position < 0) continue;
    const int head =
        work.group * group_size + packed - DivideRow(packed, batch.group_reciprocal) * group_size;
    auto* out = static_cast<__nv_bfloat16*>(sequence.out) +
                (position - sequence.q_start) * sequence.out_token_stride +
                head * sequence.out_head_stride + (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(out + n * 8) =
          PackBf16(o[n * 4 + half * 2] * inverse[half], o[n * 4 + half * 2 + 1] * inverse[half]);
    }
  }
}

/// What a part of a dense row tile leaves. `row`: this thread's first row.
template <int kHeadDim>
__device__ __forceinline__ void StorePartial(const AttentionBatchSm90& batch, const WorkItem& work,
                                             int row, const float (&o)[kHeadDim / 2],
                                             const float (&maxima)[2], const float (&sums)[2]) {
  const SequenceParams& s = batch.base.sequences[work.sequence];
  const int last_tile = s.first_tile + s.num_tiles - 1;
  const Partial to = FindPartial(s, (last_tile - work.tile) * batch.base.num_groups + work.group,
                                 work.part, kHeadDim);
  const int lane = threadIdx.x & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int packed = row + half * 8;
    const float sum = RowSum(sums[half]);
    if (lane == 0) {
      to.max[packed] = maxima[half] * (batch.base.scale * kLog2E);
      to.sum[packed] = sum;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(to.o + packed * kHeadDim + n * 8 + lane * 2) =
          make_float2(o[n * 4 + half * 2], o[n * 4 + half * 2 + 1]);
    }
  }
}

/// The products and the softmax of packed rows 64 `consumer` to 64 `consumer` + 63.
template <int kHeadDim>
__device__ __forceinline__ void Consume(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared,
                                        int consumer) {
  using C = Config<kHeadDim>;
  const int thread = threadIdx.x % kWarpgroup;
  const bool warp_leader = thread % 32 == 0;
  const int first_row = consumer * 64 + thread / 32 * 16 + thread % 32 / 4;
  const uint32_t q_shared = SharedAddress(shared.q[0]) + consumer * 64 * 128;
  // Sends the output of both consumers, the last one to write, and gives the queries' place back.
  const bool sender = consumer == 1 && thread == 0;
  const float scale_log2 = batch.base.scale * kLog2E;
  const auto release = [&](uint64_t& barrier) {
    __syncwarp();  // all lanes have read what their leader gives back: plan and columns, too
    if (warp_leader) BarrierArrive(SharedAddress(&barrier));
  };

  float s[kColumns / 2], o[kHeadDim / 2];
  uint32_t p[kColumns / 16][4];
  float correction[2];
  RowState rows;
  uint32_t limit[2];

  uint32_t items = 0;  // finished ones
  const auto start_item = [&](const WorkItem& item) {
    const SequenceParams& sequence = batch.base.sequences[item.sequence];
    limit[0] = static_cast<uint32_t>(RowPosition(batch, sequence, item.tile, first_row));
    limit[1] = static_cast<uint32_t>(RowPosition(batch, sequence, item.tile, first_row + 8));
    rows = RowState();
  };
  // After the scores of a tile: gives its keys back.
  // In blocks of their own, for the compiler would move them down past the softmax.
  const auto mask_and_release = [&](uint32_t tile, int flags) {
    if (flags & kMasked0) Mask<0>(s, shared.columns[tile % kPlans], limit);
    if (flags & kMasked1) Mask<1>(s, shared.columns[tile % kPlans], limit);
    release(shared.k_empty[Stage<kHeadDim>(tile).index]);
  };

  // The block has at least one item.
  WaitFull(shared.k_full, 0, 0);
  int flags = shared.plans[0].flags;
  start_item(shared.plans[0].work);
  WaitFull(shared.q_full, 0, 0);
  WgmmaFence();
  StartScores<kHeadDim, C::kSliceBytes, 1024, C::kSliceBytes>(s, q_shared,
                                                              SharedAddress(shared.k[0]));
  WgmmaWait<0>();
  PinRegisters(s);
  mask_and_release(0, flags);
  Softmax(s, rows, scale_log2, correction);
  PackProbabilities(p, s);
  if (consumer == 1) NamedBarrierArrive(kTurnBarrier, 2 * kWarpgroup);  // consumer 0 starts

  for (uint32_t tile = 0;; ++tile) {
    // p holds the probabilities of `tile`, o the sum over the item's tiles before it.
    const Stage<kHeadDim> stage(tile), next(tile + 1);
    if ((flags & kFirst) && sender && items > 0) {
      // The last item's output has left by now. The queries waited for below may need its place.
      WaitBulkReads();
      BarrierArrive(SharedAddress(&shared.q_empty[(items - 1) % 2]));
    }
    WaitFull(shared.k_full, next.index, next.parity);
    const int next_flags = shared.plans[(tile + 1) % kPlans].flags;
    const Slot<2> q(items + (next_flags & kFirst ? 1 : 0));
    // An item's end waits like any other tile: under the next item's first softmax.
    const bool ends = (flags & kLast) != 0;
    const float sums[2] = {rows.sum[0], rows.sum[1]};
    const float maxima[2] = {rows.max[0], rows.max[1]};
    if (next_flags & kFirst) {
      WaitFull(shared.q_full, q.index, q.parity);
      start_item(shared.q_work[q.index]);
    }
    NamedBarrierSync(kTurnBarrier + consumer, 2 * kWarpgroup);
    WgmmaFence();
    // After the last item of all these scores mean nothing.
    StartScores<kHeadDim, C::kSliceBytes, 1024, C::kSliceBytes>(
        s, q_shared + q.index * Config<kHeadDim>::kTileBytes, SharedAddress(shared.k[next.index]));
    WaitFull(shared.v_full, stage.index, stage.parity);
    WgmmaFence();
    StartValues<kHeadDim>(o, p, SharedAddress(shared.v[stage.index]), (flags & kFirst) == 0);
    NamedBarrierArrive(kTurnBarrier + (consumer ^ 1), 2 * kWarpgroup);
    WgmmaWait<1>();
    PinRegisters(s);
    if ((next_flags & kMasked) == 0) release(shared.k_empty[next.index]);
    if (next_flags & kMasked) mask_and_release(tile + 1, next_flags);
    const bool changed = Softmax(s, rows, scale_log2, correction);
    // Never true. The assembler would wait for the product o += p v before the softmax instead of
    // computing the one under the other; it does not move the wait across a way out.
    if (rows.sum[0] + rows.sum[1] < 0.0f) return;
    WgmmaWait<0>();
    PinRegisters(o);
    release(shared.v_empty[stage.index]);
    if (changed && !ends) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
    }
    PackProbabilities(p, s);
    if (ends) {
      const uint32_t out_shared = SharedAddress(shared.q[items % 2]);
      const WorkItem ended = shared.q_work[items % 2];
      const bool divided = batch.base.sequences[ended.sequence].dense_parts > 1 &&
                           IsDense(batch.base.sequences[ended.sequence], ended.tile);
      const bool send = !divided && FirstQuery(batch, ended) >= 0;
      if (divided) {
        StorePartial<kHeadDim>(batch, ended, first_row, o, maxima, sums);
      } else if (send) {
        WriteRows<kHeadDim>(out_shared + (consumer * 64 + thread / 32 * 16) * 128, o, sums);
        FenceProxyAsync();
      } else {
        StoreRows<kHeadDim>(batch, ended, first_row, o, sums);
      }
      if (consumer == 0) {
        NamedBarrierArrive(kOutputBarrier + items % 2, 2 * kWarpgroup);
      } else {
        NamedBarrierSync(kOutputBarrier + items % 2, 2 * kWarpgroup);
        if (send && sender) SendRows<kHeadDim>(batch, ended, out_shared);
      }
      if ((next_flags & kFirst) == 0) break;  // that was the last item
      ++items;
    }
    flags = next_flags;
  }
  if (sender) WaitBulk();
  if (consumer == 0) NamedBarrierSync(kTurnBarrier, 2 * kWarpgroup);  // the turn left over
}

}  // namespace vsprefill::kernels::cuda::sm90::attention

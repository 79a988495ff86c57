// Column and diagonal sums of the causal softmax (kernels/distill.h), bf16 on Hopper (sm_90a).
//
// Two passes over score tiles of 256 x 128, wgmma fed by TMA, no n x n memory:
//   LseKernel   S = Q K^T: 256 rows of a query head stay, its keys pass by; log-sum-exp per row.
//   SumsKernel  S^T = K Q^T: tiles of 256 keys x 128 queries walk down a band of diagonals, all
//               heads of the group at each step. A thread holds whole runs of queries of a few
//               keys: its column sums need no exchange until the keys change, and its diagonals
//               stay in registers for the whole walk.
// Partial sums meet in 64-bit fixed point: additions of integers give the same bits in any order.
//
// A block has two consumer warpgroups of 128 rows of the 256 (an "A" tile), and a producer warp.
// A consumer's rows are two sets of 64, its even and odd 8-row groups: u = 0, 1. While one set's
// scores become probabilities the tensor cores compute the other's, or the other consumer's. Row of
// the A tile held by lane l of warp w of consumer c in accumulator [4 (n / 8) + 2 h + e] of set u:
// 128 c + 32 w + 16 h + 8 u + l / 4, and column n + 2 (l % 4) + e of the B tile.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/attention_sums_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/sm90/ring.cuh"
#include "kernels/cuda/sm90/scores.cuh"
#include "kernels/cuda/sm90/tensor_map.h"

namespace vsprefill::kernels::cuda {
namespace sm90 {
namespace {

constexpr int kRowsA = 256;
constexpr int kRowsB = 128;
constexpr int kStagesB = 3;
constexpr int kConsumers = 256;             // threads
constexpr int kThreads = kConsumers + 128;  // the last warpgroup's first warp loads
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
constexpr int kAtom = 8 * 128;  // bytes of 8 rows of a slice
constexpr int kSliceA = kRowsA * 128;
constexpr int kSliceB = kRowsB * 128;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
/// Offsets of 8 that a thread meets in a tile: n / 8 - 2 h - u + 3.
constexpr int kOffsets = kRowsB / 8 + 3;

struct SumsParams {
  CUtensorMap a_map, b_map;       // (element, token, head), boxes of 64 x kRowsA and 64 x kRowsB
  float* lse;                     // [query heads, n], natural logarithm
  unsigned long long* columns;    // [groups, n] in units of 1 / fixed_scale
  unsigned long long* diagonals;  // the same
  int32_t n, group_size;
  int32_t run;  // SumsKernel: A tiles of a block's walk
  float scale, fixed_scale;
};

template <int kHeadDim>
struct alignas(1024) Shared {
  static constexpr int kSlices = kHeadDim / 64;
  uint8_t a[2][kSlices * kSliceA];
  uint8_t b[kStagesB][kSlices * kSliceB];
  float lse[kStagesB][kRowsB];  // base 2, +inf past the sequence
  uint64_t a_full[2], a_empty[2];
  uint64_t b_full[kStagesB], b_empty[kStagesB];
};
/// What a thread leaves in shared memory at the end of SumsKernel: an odd number of words.
constexpr int kPartial = 2 * kOffsets + 1;

using SlotA = Slot<2>;
using SlotB = Slot<kStagesB>;

template <int kHeadDim>
__device__ __forceinline__ Shared<kHeadDim>& Begin(int b_arrivals) {
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    if (SharedAddress(&shared) % 1024 != 0) __trap();  // the swizzle counts from there
    for (int i = 0; i < 2; ++i) {
      BarrierInit(SharedAddress(&shared.a_full[i]), 1);
      BarrierInit(SharedAddress(&shared.a_empty[i]), kConsumers);
    }
    for (int i = 0; i < kStagesB; ++i) {
      BarrierInit(SharedAddress(&shared.b_full[i]), b_arrivals);
      BarrierInit(SharedAddress(&shared.b_empty[i]), kConsumers);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  return shared;
}

/// Starts the copy of kRows rows of a head; rows past the sequence become zeros. One thread.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void LoadTile(const uint8_t* tile, const CUtensorMap* map,
                                         uint64_t& full, int row, int head) {
  const uint32_t barrier = SharedAddress(&full);
  BarrierArriveExpect(barrier, kRows * kHeadDim * 2);
#pragma unroll
  for (int slice = 0; slice < kHeadDim / 64; ++slice) {
    TmaLoad3D(SharedAddress(tile) + slice * kRows * 128, map, barrier, slice * 64, row, head);
  }
}

/// Starts the scores of the consumer's rows of set u.
template <int kHeadDim>
__device__ __forceinline__ void Start(float (&s)[64], const uint8_t* a, const uint8_t* b,
                                      int consumer, int u) {
  StartScores<kHeadDim, kSliceA, 2 * kAtom, kSliceB>(
      s, SharedAddress(a) + consumer * 128 * 128 + u * kAtom, SharedAddress(b));
}

/// A consumer thread's place: see the top of the file.
struct Place {
  int consumer, warp, lane;
  __device__ __forceinline__ Place()
      : consumer(static_cast<int>(Uniform(threadIdx.x / 128))),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32) {}
  /// Row of the A tile of set u, half h.
  __device__ __forceinline__ int row(int u, int h) const {
    return consumer * 128 + warp * 32 + h * 16 + u * 8 + lane / 4;
  }
  /// First of this lane's columns.
  __device__ __forceinline__ int column() const { return lane % 4 * 2; }
};

/// Scores of pairs with row + shift < column (kColumnsAhead) or column + shift < row become -inf.
template <bool kColumnsAhead>
__device__ __forceinline__ void Mask(float (&s)[64], const Place& place, int u, int shift) {
#pragma unroll
  for (int n = 0; n < kRowsB / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = place.row(u, i / 2);
      const int column = n * 8 + place.column() + i % 2;
      const bool hidden = kColumnsAhead ? row + shift < column : column + shift < row;
      if (hidden) s[n * 4 + i] = -INFINITY;
    }
  }
}

/// One block per (256 rows, query head).
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) LseKernel(const __grid_constant__ SumsParams p) {
  auto& shared = Begin<kHeadDim>(1);
  const int head = blockIdx.y;
  const int tile = gridDim.x - 1 - blockIdx.x;  // heavy ones first
  const int first_row = tile * kRowsA;
  const int steps = (min(first_row + kRowsA, p.n) + kRowsB - 1) / kRowsB;
  if (threadIdx.x >= kConsumers) {
    LowerRegisters<kProducerRegisters>();
    if (threadIdx.x != kConsumers) return;
    LoadTile<kHeadDim, kRowsA>(shared.a[0], &p.a_map, shared.a_full[0], first_row, head);
    for (int step = 0; step < steps; ++step) {
      const SlotB slot(step);
      WaitEmpty(shared.b_empty, slot.index, slot.parity);
      LoadTile<kHeadDim, kRowsB>(shared.b[slot.index], &p.b_map, shared.b_full[slot.index],
                                 step * kRowsB, head / p.group_size);
    }
    return;
  }
  RaiseRegisters<kConsumerRegisters>();
  const Place place;
  const float scale_log2 = p.scale * kLog2E;
  float max[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};  // of set u, half h at 2 u + h
  float sum[4] = {};
  const auto add = [&](float(&s)[64], int u, int step) {
    // Tiles that end before the consumer's first row are visible whole.
    if (step >= 2 * tile + place.consumer) {
      Mask<true>(s, place, u, first_row - step * kRowsB);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = max[2 * u + h];
#pragma unroll
      for (int n = 0; n < kRowsB / 8; ++n) {
        m = fmaxf(m, fmaxf(s[n * 4 + h * 2], s[n * 4 + h * 2 + 1]));
      }
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
      const float reference = m * scale_log2;  // finite: column 0 is visible to every row
      float part[2] = {};
#pragma unroll
      for (int n = 0; n < kRowsB / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          part[e] += Exp2(fmaf(s[n * 4 + h * 2 + e], scale_log2, -reference));
        }
      }
      sum[2 * u + h] =
          sum[2 * u + h] * Exp2(max[2 * u + h] * scale_log2 - reference) + (part[0] + part[1]);
      max[2 * u + h] = m;
    }
  };
  float even[64], odd[64];
  WaitFull(shared.a_full, 0, 0);
  for (int step = 0; step < steps; ++step) {
    const SlotB slot(step);
    WaitFull(shared.b_full, slot.index, slot.parity);
    WgmmaFence();
    Start<kHeadDim>(even, shared.a[0], shared.b[slot.index], place.consumer, 0);
    Start<kHeadDim>(odd, shared.a[0], shared.b[slot.index], place.consumer, 1);
    WgmmaWait<1>();
    PinRegisters(even);
    add(even, 0, step);
    WgmmaWait<0>();
    PinRegisters(odd);
    BarrierArrive(SharedAddress(&shared.b_empty[slot.index]));  // each lane, for what it read
    add(odd, 1, step);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float total = sum[i];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int row = first_row + place.row(i / 2, i % 2);
    if (place.lane % 4 == 0 && row < p.n) {
      p.lse[int64_t{head} * p.n + row] = max[i] * p.scale + log2f(total) * kLn2;
    }
  }
}

__device__ __forceinline__ void AddFixed(unsigned long long* target, float x, float fixed_scale) {
  atomicAdd(target, __float2ull_rn(x * fixed_scale));
}

/// Block (x, y, z): tiles y * run, ... of band x of group z; tile t of band x is keys [256 t, 256 t
/// + 256) and queries [256 t + 128 x, 256 t + 128 x + 128).
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) SumsKernel(const __grid_constant__ SumsParams p) {
  const int band = blockIdx.x;
  const int group = blockIdx.z;
  const int begin = blockIdx.y * p.run;
  const int queries = p.n - band * kRowsB;  // of tile 0 and behind
  const int tiles = min((queries + kRowsA - 1) / kRowsA - begin, p.run);
  if (tiles <= 0) return;
  auto& shared = Begin<kHeadDim>(1 + 32);
  const int steps = tiles * p.group_size;
  const int first_head = group * p.group_size;
  if (threadIdx.x >= kConsumers) {
    LowerRegisters<kProducerRegisters>();
    if (threadIdx.x >= kConsumers + 32) return;
    const int lane = threadIdx.x % 32;
    constexpr int kPerLane = kRowsB / 32;
    float ahead[kPerLane];
    const auto fetch = [&](int tile, int head) {
      const float* lse = p.lse + int64_t{first_head + head} * p.n;
      const int first = (begin + tile) * kRowsA + band * kRowsB;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int row = first + i * 32 + lane;
        ahead[i] = row < p.n ? lse[row] * kLog2E : INFINITY;
      }
    };
    fetch(0, 0);
    int tile = 0, head = 0;
    for (int step = 0; step < steps; ++step) {
      const SlotB slot(step);
      WaitEmpty(shared.b_empty, slot.index, slot.parity);
      if (lane == 0) {
        const int first_key = (begin + tile) * kRowsA;
        if (head == 0) {
          const SlotA a(tile);
          WaitEmpty(shared.a_empty, a.index, a.parity);
          LoadTile<kHeadDim, kRowsA>(shared.a[a.index], &p.a_map, shared.a_full[a.index], first_key,
                                     group);
        }
        LoadTile<kHeadDim, kRowsB>(shared.b[slot.index], &p.b_map, shared.b_full[slot.index],
                                   first_key + band * kRowsB, first_head + head);
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) shared.lse[slot.index][i * 32 + lane] = ahead[i];
      BarrierArrive(SharedAddress(&shared.b_full[slot.index]));  // each lane, for what it wrote
      if (++head == p.group_size) {
        head = 0;
        ++tile;
      }
      if (step + 1 < steps) fetch(tile, head);
    }
    return;
  }

  RaiseRegisters<kConsumerRegisters>();
  const Place place;
  const float scale_log2 = p.scale * kLog2E;
  float diagonals[kOffsets][2] = {};
  float columns[4] = {};  // of the key of set u, half h at 2 u + h
  const auto add = [&](float(&s)[64], int u, const float* lse) {
    if (band < kRowsA / kRowsB) Mask<false>(s, place, u, band * kRowsB);
#pragma unroll
    for (int n = 0; n < kRowsB / 8; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(lse + n * 8 + place.column());
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float probability[2] = {Exp2(fmaf(s[n * 4 + h * 2], scale_log2, -pair.x)),
                                      Exp2(fmaf(s[n * 4 + h * 2 + 1], scale_log2, -pair.y))};
        columns[2 * u + h] += probability[0] + probability[1];
#pragma unroll
        for (int e = 0; e < 2; ++e) diagonals[n - 2 * h - u + 3][e] += probability[e];
      }
    }
  };
  float even[64], odd[64];
  int tile = 0, head = 0;
  for (int step = 0; step < steps; ++step) {
    const SlotB slot(step);
    const SlotA a(tile);
    const bool last_head = head + 1 == p.group_size;
    if (head == 0) WaitFull(shared.a_full, a.index, a.parity);
    WaitFull(shared.b_full, slot.index, slot.parity);
    WgmmaFence();
    Start<kHeadDim>(even, shared.a[a.index], shared.b[slot.index], place.consumer, 0);
    Start<kHeadDim>(odd, shared.a[a.index], shared.b[slot.index], place.consumer, 1);
    WgmmaWait<1>();
    PinRegisters(even);
    add(even, 0, shared.lse[slot.index]);
    WgmmaWait<0>();
    PinRegisters(odd);
    if (last_head) BarrierArrive(SharedAddress(&shared.a_empty[a.index]));
    add(odd, 1, shared.lse[slot.index]);
    BarrierArrive(SharedAddress(&shared.b_empty[slot.index]));  // each lane, for what it read
    ++head;
    if (!last_head) continue;
      // The keys change: their sums over all heads of this tile.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = columns[i];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int key = (begin + tile) * kRowsA + place.row(i / 2, i % 2);
      if (place.lane % 4 == 0 && key < p.n) {
        AddFixed(&p.columns[int64_t{group} * p.n + key], sum, p.fixed_scale);
      }
      columns[i] = 0;
    }
    head = 0;
    ++tile;
  }

  // All tiles have been read: their place holds the threads' diagonals, summed up in a fixed order.
  NamedBarrierSync(1, kConsumers);
  auto* partial = reinterpret_cast<float*>(shared.a);
  static_assert(sizeof(shared.a) >= kConsumers * kPartial * sizeof(float));
#pragma unroll
  for (int i = 0; i < kOffsets; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) partial[threadIdx.x * kPartial + i * 2 + e] = diagonals[i][e];
  }
  NamedBarrierSync(1, kConsumers);
  for (int i = threadIdx.x; i < kRowsA + kRowsB - 1; i += kConsumers) {
    const int relative = i - (kRowsA - 1);  // offset - 128 band
    const int offset = band * kRowsB + relative;
    if (offset < 0 || offset >= p.n) continue;
    float sum = 0;
    for (int warp = 0; warp < kConsumers / 32; ++warp) {
      for (int t = 0; t < 4; ++t) {
        for (int e = 0; e < 2; ++e) {
          // relative = 8 (index - 3) + 2 t + e - 32 warp - g with 0 <= g < 8
          const int x = relative - 2 * t - e + 32 * warp + 24;  // 8 index - g
          const int index = (x + 7) / 8;
          if (x + 7 < 0 || index >= kOffsets) continue;
          const int thread = warp * 32 + (8 * index - x) * 4 + t;
          sum += partial[thread * kPartial + index * 2 + e];
        }
      }
    }
    AddFixed(&p.diagonals[int64_t{group} * p.n + offset], sum, p.fixed_scale);
  }
}

/// out = fixed * unit.
__global__ void ToFloatKernel(const unsigned long long* fixed, float* out, int64_t count,
                              double unit) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) out[i] = static_cast<float>(static_cast<double>(fixed[i]) * unit);
}

template <int kHeadDim>
KernelStatus Launch(const SumsParams& lse, const SumsParams& sums, int groups,
                    cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kHeadDim>);
  KernelStatus status = AllowSharedMemory(LseKernel<kHeadDim>, kBytes);
  if (status == KernelStatus::kOk) status = AllowSharedMemory(SumsKernel<kHeadDim>, kBytes);
  if (status != KernelStatus::kOk) return status;
  const auto tiles = static_cast<unsigned>(CeilDiv(lse.n, kRowsA));
  LseKernel<kHeadDim><<<dim3(tiles, groups * lse.group_size), kThreads, kBytes, stream>>>(lse);
  status = LaunchStatus();
  if (status != KernelStatus::kOk) return status;
  const auto bands = static_cast<unsigned>(CeilDiv(sums.n, kRowsB));
  const auto runs = static_cast<unsigned>(CeilDiv(tiles, sums.run));
  SumsKernel<kHeadDim><<<dim3(bands, runs, groups), kThreads, kBytes, stream>>>(sums);
  return LaunchStatus();
}

}  // namespace
}  // namespace sm90

KernelStatus LaunchAttentionSumsSm90(const AttentionSumsArgs& args, cudaStream_t stream) {
  const AttentionShape& shape = args.shape;
  const AttentionSequence& s = args.sequence;
  const int64_t n = s.kv_tokens;
  if (shape.head_dim != 64 && shape.head_dim != 128) return KernelStatus::kUnsupportedShape;
  sm90::SumsParams lse = {};
  lse.lse = args.lse;
  lse.columns =
      reinterpret_cast<unsigned long long*>(args.lse + AttentionSumsFixedOffset(shape, n));
  lse.diagonals = lse.columns + shape.num_kv_heads * n;
  lse.n = static_cast<int32_t>(n);
  lse.group_size = shape.group_size();
  // Enough blocks for an even load, few enough that the sums at a walk's end do not show.
  lse.run = static_cast<int32_t>(std::max<int64_t>(4, n / (8 * sm90::kRowsB)));
  lse.scale = shape.scale;
  // The largest power of two with which n group_size, the sum of all, fits.
  int exponent;
  std::frexp(static_cast<double>(n) * shape.group_size(), &exponent);
  lse.fixed_scale = std::ldexp(1.0f, 62 - exponent);
  sm90::SumsParams sums = lse;
  const auto queries = [&](CUtensorMap* map, int rows) {
    return sm90::DescribeTensor(map, s.q, {shape.head_dim, n, shape.num_q_heads},
                                {s.q_token_stride, s.q_head_stride}, {64, rows, 1});
  };
  const auto keys = [&](CUtensorMap* map, int rows) {
    return sm90::DescribeTensor(map, s.k, {shape.head_dim, n, shape.num_kv_heads},
                                {s.kv_token_stride, s.kv_head_stride}, {64, rows, 1});
  };
  if (!queries(&lse.a_map, sm90::kRowsA) || !keys(&lse.b_map, sm90::kRowsB) ||
      !keys(&sums.a_map, sm90::kRowsA) || !queries(&sums.b_map, sm90::kRowsB)) {
    return KernelStatus::kUnsupportedShape;
  }
  const int64_t count = shape.num_kv_heads * n;
  const cudaError_t cleared =
      cudaMemsetAsync(lse.columns, 0, 2 * count * sizeof(*lse.columns), stream);
  if (cleared != cudaSuccess) return AsStatus(cleared);
  const KernelStatus status = shape.head_dim == 128
                                  ? sm90::Launch<128>(lse, sums, shape.num_kv_heads, stream)
                                  : sm90::Launch<64>(lse, sums, shape.num_kv_heads, stream);
  if (status != KernelStatus::kOk) return status;
  const double unit = 1.0 / (double{lse.fixed_scale} * static_cast<double>(n) * shape.group_size());
  const auto blocks = static_cast<unsigned>(CeilDiv(count, 256));
  sm90::ToFloatKernel<<<blocks, 256, 0, stream>>>(lse.columns, args.columns, count, unit);
  sm90::ToFloatKernel<<<blocks, 256, 0, stream>>>(lse.diagonals, args.diagonals, count, unit);
  return LaunchStatus();
}

}  // namespace vsprefill::kernels::cuda

// VSIndexer inference, bf16 on Hopper (sm_90a): wgmma fed by TMA.
//
//   X[t, u]   = f[t] . w1[u] + b1[u]       [192 tokens] x [128 hidden units of this tile]
//   logits[t] = sum over tiles of silu(X[t]) w2^T
//
// where f is the token's key and value, each RMS-normalised and rounded to bf16.
//
// One persistent block per multiprocessor: a producer warpgroup and three consumer warpgroups. A
// work item is 192 tokens of one KV group; consumer w owns tokens 64 w to 64 w + 63. It keeps their
// features in registers as the A operand (64 registers at head_dim 128), so that shared memory
// feeds w1 alone to the tensor cores; the hidden layer never leaves the accumulators.
//
// silu(x) = h + h tanh(h) with h = x / 2: one special function. Features and b1 are halved (exact).
//
// Per hidden unit and token at head_dim 128 the tensor cores need 1/8 cycle of the multiprocessor,
// tanh 1/16 and the issue slots 1/20: the activations of two consumers hide under the products of
// the third. They take turns, so that their phases stay apart (a product with A in registers holds
// its warps, so a consumer does not overlap its own). 0.50 to 0.53 ms for 8 groups of 131,072
// tokens, width 512, head_dim 128: 520 to 550 TFLOP/s (H200, 2026-11-26; docs/results/kernels.md).
//
// Shared memory, 16-byte chunk c of row r at c ^ (r % 8), the layout of TMA and wgmma:
//   features      [3 consumers][2 head_dim / 64][64 tokens][64 elements]   96 KiB at head_dim 128
//   w1            ring of slices [128 units][64 elements]                  16 KiB each
//   coefficients  ring of tiles: b1 / 2 and w2 of 128 units; zeros past the last unit
//
// Producer warps: 0 loads w1 and, once a consumer has its features in registers, those of the next
// item; 1 writes coefficients.
#include <algorithm>
#include <climits>

#include "kernels/cuda/indexer_logits.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/sm90/ring.cuh"
#include "kernels/cuda/sm90/tensor_map.h"

namespace vsprefill::kernels::cuda {
namespace sm90 {
namespace {

constexpr int kUnits = 128;  // of a tile
constexpr int kConsumers = 3;
constexpr int kTokens = kConsumers * 64;  // of an item
constexpr int kWarpgroup = 128;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 32;
constexpr int kConsumerRegisters = 160;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kCoefficientTiles = 4;     // in the ring
constexpr int kTurnBarrier = 1;          // named barrier 1 + w: it is consumer w's turn
constexpr int kFeaturePiece = 64 * 128;  // bytes of 64 features of a consumer's tokens
constexpr int kW1Slice = kUnits * 128;

template <int kHeadDim>
struct Config {
  static constexpr int kSlices = 2 * kHeadDim / 64;  // of 64 features = 128 bytes
  static constexpr int kSteps = 2 * kHeadDim / 16;   // of a product
  static constexpr int kStages = kHeadDim == 128 ? 7 : 8;
};

struct Coefficients {
  float b1[kUnits];     // halved
  float w2[kUnits][2];  // of units 2 i and 2 i + 1: vertical ones, slash ones
};

template <int kHeadDim>
struct alignas(1024) Shared {
  using C = Config<kHeadDim>;
  uint8_t features[kConsumers][C::kSlices][kFeaturePiece];
  uint8_t w1[C::kStages][kW1Slice];
  Coefficients coefficients[kCoefficientTiles];
  uint64_t features_full[kConsumers], features_empty[kConsumers];
  uint64_t w1_full[C::kStages], w1_empty[C::kStages];
  uint64_t coefficients_full[kCoefficientTiles], coefficients_empty[kCoefficientTiles];
};

struct IndexerLaunch {
  CUtensorMap k_map, v_map;  // (element, token, group), boxes of 64 x 64 x 1
  CUtensorMap w1_map;        // (element, unit, group), boxes of 64 x 128 x 1
  IndexerParams params;
  int32_t num_items;
  int32_t num_tiles;  // of the hidden layer
};

struct Item {
  int group;
  int token;  // the first one
  __device__ __forceinline__ Item(const IndexerLaunch& launch, int item)
      : group(item % launch.params.layer.num_groups),
        token(static_cast<int>(launch.params.input.token_begin) +
              item / launch.params.layer.num_groups * kTokens) {}
};

// ---------------------------------------------------------------------------- producers

/// Loads the features of one item after the other, a piece (64 tokens, 64 features) at a time.
template <int kHeadDim>
class FeatureLoader {
 public:
  static constexpr int kSlices = Config<kHeadDim>::kSlices;
  static constexpr int kPieces = kConsumers * kSlices;

  __device__ __forceinline__ FeatureLoader(const IndexerLaunch& launch, Shared<kHeadDim>& shared)
      : launch_(launch), shared_(shared), item_(launch, blockIdx.x), number_(blockIdx.x) {}

  /// Starts a piece, unless it would have to wait or all are loaded; returns whether it did.
  __device__ __forceinline__ bool TryNext() {
    if (number_ >= launch_.num_items) return false;
    const int consumer = piece_ / kSlices;
    if (!BarrierTest(SharedAddress(&shared_.features_empty[consumer]), parity_ ^ 1)) return false;
    const int slice = piece_ % kSlices;
    const uint32_t full = SharedAddress(&shared_.features_full[consumer]);
    if (slice == 0) BarrierArriveExpect(full, kSlices * kFeaturePiece);
    TmaLoad3D(SharedAddress(shared_.features[consumer][slice]),
              slice < kSlices / 2 ? &launch_.k_map : &launch_.v_map, full,
              slice % (kSlices / 2) * 64, item_.token + consumer * 64, item_.group);
    if (++piece_ == kPieces) {
      piece_ = 0;
      parity_ ^= 1;
      number_ += gridDim.x;
      item_ = Item(launch_, number_);
    }
    return true;
  }

  /// Waits until the pieces of item `number` are on their way.
  __device__ __forceinline__ void Finish(int number) {
    while (number_ <= number) TryNext();
  }

 private:
  const IndexerLaunch& launch_;
  Shared<kHeadDim>& shared_;
  Item item_;
  int number_;
  int piece_ = 0;
  uint32_t parity_ = 0;
};

/// Loads w1, and between its slices the features of the next item: the copy engine works in order,
/// and w1 from L2 would wait behind 96 KiB from memory. One thread.
template <int kHeadDim>
__device__ __forceinline__ void Load(const IndexerLaunch& launch, Shared<kHeadDim>& shared) {
  using C = Config<kHeadDim>;
  FeatureLoader<kHeadDim> features(launch, shared);
  // Done by the middle of the item.
  const int pieces = static_cast<int>(
      CeilDiv(2 * FeatureLoader<kHeadDim>::kPieces, launch.num_tiles * C::kSlices));
  uint32_t slices = 0;
  for (int number = blockIdx.x; number < launch.num_items; number += gridDim.x) {
    const Item item(launch, number);
    features.Finish(number);
    for (int tile = 0; tile < launch.num_tiles; ++tile) {
      for (int slice = 0; slice < C::kSlices; ++slice) {
        const Slot<C::kStages> slot(slices++);
        WaitEmpty(shared.w1_empty, slot.index, slot.parity);
        const uint32_t full = SharedAddress(&shared.w1_full[slot.index]);
        BarrierArriveExpect(full, kW1Slice);
        TmaLoad3D(SharedAddress(shared.w1[slot.index]), &launch.w1_map, full, slice * 64,
                  tile * kUnits, item.group);
        for (int i = 0; i < pieces && features.TryNext(); ++i) {
        }
      }
    }
  }
}

/// One warp.
template <int kHeadDim>
__device__ __forceinline__ void WriteCoefficients(const IndexerLaunch& launch,
                                                  Shared<kHeadDim>& shared) {
  const IndexerLayer& layer = launch.params.layer;
  const int lane = threadIdx.x % 32;
  uint32_t tiles = 0;
  for (int number = blockIdx.x; number < launch.num_items; number += gridDim.x) {
    const int64_t group = Item(launch, number).group;
    const float* b1 = layer.b1 + group * layer.hidden;
    const float* w2 = layer.w2 + group * 2 * layer.hidden;
    for (int tile = 0; tile < launch.num_tiles; ++tile) {
      const Slot<kCoefficientTiles> slot(tiles++);
      WaitEmpty(shared.coefficients_empty, slot.index, slot.parity);
      Coefficients& target = shared.coefficients[slot.index];
      for (int i = lane; i < kUnits; i += 32) {
        const int unit = tile * kUnits + i;
        const bool valid = unit < layer.hidden;
        target.b1[i] = valid ? 0.5f * b1[unit] : 0.0f;
        target.w2[i / 2 * 2][i % 2] = valid ? w2[unit] : 0.0f;
        target.w2[i / 2 * 2 + 1][i % 2] = valid ? w2[layer.hidden + unit] : 0.0f;
      }
      BarrierArrive(SharedAddress(&shared.coefficients_full[slot.index]));  // each lane
    }
  }
}

// ---------------------------------------------------------------------------- consumers

__device__ __forceinline__ float LowBf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float HighBf16(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

/// One half (keys or values) of the features of this warp's 16 tokens: divides each token's by
/// twice their root mean square. Registers as wgmma's A operand.
template <int kSteps>
__device__ __forceinline__ void Normalise(uint32_t (*features)[4]) {
  float squares[2] = {0.0f, 0.0f};  // of rows lane / 4 and lane / 4 + 8
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = features[step][i];
      squares[i % 2] = fmaf(LowBf16(pair), LowBf16(pair), squares[i % 2]);
      squares[i % 2] = fmaf(HighBf16(pair), HighBf16(pair), squares[i % 2]);
    }
  }
  float scale[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    squares[row] += __shfl_xor_sync(0xffffffffu, squares[row], 1);
    squares[row] += __shfl_xor_sync(0xffffffffu, squares[row], 2);
    scale[row] = 0.5f / sqrtf(squares[row] / (kSteps * 16) + kFeatureEps);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = features[step][i];
      features[step][i] = PackBf16(LowBf16(pair) * scale[i % 2], HighBf16(pair) * scale[i % 2]);
    }
  }
}

/// Two dot products for each of the thread's two tokens.
struct Sums {
  float vertical[2] = {0.0f, 0.0f};
  float slash[2] = {0.0f, 0.0f};

  /// Adds a tile: x is half of the hidden layer's input, without the bias.
  __device__ __forceinline__ void Add(const float (&x)[kUnits / 2], const Coefficients& c) {
    const int first = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kUnits / 8; ++n) {
      const float2 b1 = *reinterpret_cast<const float2*>(c.b1 + n * 8 + first);
      const float4 w2 = *reinterpret_cast<const float4*>(c.w2[n * 8 + first]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float left = x[n * 4 + row * 2] + b1.x;
        const float right = x[n * 4 + row * 2 + 1] + b1.y;
        const float silu_left = fmaf(left, Tanh(left), left);
        const float silu_right = fmaf(right, Tanh(right), right);
        vertical[row] = fmaf(w2.x, silu_left, vertical[row]);
        slash[row] = fmaf(w2.z, silu_left, slash[row]);
        vertical[row] = fmaf(w2.y, silu_right, vertical[row]);
        slash[row] = fmaf(w2.w, silu_right, slash[row]);
      }
    }
  }

  /// Writes the logits; `token`: of the thread's first row, negative: none. A whole warp.
  __device__ __forceinline__ void Store(const IndexerParams& params, int group, int token) {
    if (token < 0) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int offset = 1; offset <= 2; offset *= 2) {
        vertical[row] += __shfl_xor_sync(0xffffffffu, vertical[row], offset);
        slash[row] += __shfl_xor_sync(0xffffffffu, slash[row], offset);
      }
    }
    // Of the four lanes that hold a token's sums, the first writes one row and the second the
    // other.
    const int row = threadIdx.x % 4;
    if (row < 2 && token + row * 8 < params.input.token_end) {
      StoreLogits(params, group, token + row * 8, row == 0 ? vertical[0] : vertical[1],
                  row == 0 ? slash[0] : slash[1]);
    }
  }
};

template <int kHeadDim>
__device__ __forceinline__ void Consume(const IndexerLaunch& launch, Shared<kHeadDim>& shared,
                                        int consumer) {
  using C = Config<kHeadDim>;
  const int lane = threadIdx.x % 32;
  const int first_row = consumer * 64 + threadIdx.x % kWarpgroup / 32 * 16;  // of this warp
  const int next_consumer = consumer == kConsumers - 1 ? 0 : consumer + 1;
  const uint32_t rows_shared = SharedAddress(shared.features[consumer]) +
                               (threadIdx.x % kWarpgroup / 32 * 16 + lane % 16) * 128;
  if (consumer == kConsumers - 1) NamedBarrierArrive(kTurnBarrier, 2 * kWarpgroup);  // 0 starts

  uint32_t items = 0, tiles = 0, slices = 0;
  Sums sums, last_sums;
  int last_group = 0, last_token = -1;
  for (int number = blockIdx.x; number < launch.num_items; number += gridDim.x) {
    const Item item(launch, number);
    uint32_t features[C::kSteps][4];
    WaitFull(shared.features_full, consumer, items++ & 1);
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      LoadMatrix4(features[step], rows_shared + step / 4 * kFeaturePiece +
                                      ((step % 4 * 2 + lane / 16) ^ (lane % 8)) * 16);
    }
    Normalise<C::kSteps / 2>(features);
    Normalise<C::kSteps / 2>(features + C::kSteps / 2);
    BarrierArrive(SharedAddress(&shared.features_empty[consumer]));  // each lane

    sums = Sums();
    for (int tile = 0; tile < launch.num_tiles; ++tile) {
      float x[kUnits / 2];
      NamedBarrierSync(kTurnBarrier + consumer, 2 * kWarpgroup);
      uint32_t reading = 0;  // empty barrier of the slice before
      const auto release = [&] {
        if (lane == 0) BarrierArrive(reading);
      };
#pragma unroll
      for (int slice = 0; slice < C::kSlices; ++slice) {
        const Slot<C::kStages> slot(slices++);
        WaitFull(shared.w1_full, slot.index, slot.parity);
        const uint32_t w1_shared = Uniform(SharedAddress(shared.w1[slot.index]));
        WgmmaFence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          WgmmaRegistersN128<Contiguous::kK>(x, features[slice * 4 + step],
                                             MatrixDescriptor(w1_shared, 0, step * 32),
                                             slice + step != 0);
        }
        WgmmaCommit();
        if (slice > 0) {
          WgmmaWait<1>();
          release();
        }
        reading = SharedAddress(&shared.w1_empty[slot.index]);
      }
      NamedBarrierArrive(kTurnBarrier + next_consumer, 2 * kWarpgroup);
      // The logits of the last item, under the first product of this one.
      if (tile == 0) last_sums.Store(launch.params, last_group, last_token);
      WgmmaWait<0>();
      PinRegisters(x);
      release();
      const Slot<kCoefficientTiles> slot(tiles++);
      WaitFull(shared.coefficients_full, slot.index, slot.parity);
      sums.Add(x, shared.coefficients[slot.index]);
      BarrierArrive(SharedAddress(&shared.coefficients_empty[slot.index]));  // each lane
    }
    last_sums = sums;
    last_group = item.group;
    last_token = item.token + first_row + lane / 4;
  }
  last_sums.Store(launch.params, last_group, last_token);
  if (consumer == 0) NamedBarrierSync(kTurnBarrier, 2 * kWarpgroup);  // the turn left over
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    IndexerSm90Kernel(const __grid_constant__ IndexerLaunch launch) {
  using C = Config<kHeadDim>;
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    // The swizzle counts from 1024-byte boundaries.
    if (SharedAddress(&shared) % 1024 != 0) __trap();
    for (int i = 0; i < kConsumers; ++i) {
      BarrierInit(SharedAddress(&shared.features_full[i]), 1);
      BarrierInit(SharedAddress(&shared.features_empty[i]), kWarpgroup);
    }
    for (int i = 0; i < C::kStages; ++i) {
      BarrierInit(SharedAddress(&shared.w1_full[i]), 1);
      BarrierInit(SharedAddress(&shared.w1_empty[i]), kConsumerWarps);
    }
    for (int i = 0; i < kCoefficientTiles; ++i) {
      BarrierInit(SharedAddress(&shared.coefficients_full[i]), 32);
      BarrierInit(SharedAddress(&shared.coefficients_empty[i]), kConsumers * kWarpgroup);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  const int warpgroup = Uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    LowerRegisters<kProducerRegisters>();
    const int warp = Uniform(threadIdx.x / 32);
    if (warp == 0) {
      if (threadIdx.x == 0) Load(launch, shared);
    } else if (warp == 1) {
      WriteCoefficients(launch, shared);
    }
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consume(launch, shared, warpgroup - 1);
  }
}

template <int kHeadDim>
KernelStatus Launch(const IndexerLaunch& launch, cudaStream_t stream) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return AsStatus(error);
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return AsStatus(error);
  constexpr int kBytes = sizeof(Shared<kHeadDim>);
  static_assert(kBytes <= 227 * 1024);
  const KernelStatus status = AllowSharedMemory(IndexerSm90Kernel<kHeadDim>, kBytes);
  if (status != KernelStatus::kOk) return status;
  const int blocks = std::min(launch.num_items, multiprocessors);
  IndexerSm90Kernel<kHeadDim><<<blocks, kThreads, kBytes, stream>>>(launch);
  return LaunchStatus();
}

}  // namespace
}  // namespace sm90

KernelStatus LaunchIndexerSm90(const IndexerParams& params, cudaStream_t stream) {
  const IndexerLayer& layer = params.layer;
  const IndexerInput& input = params.input;
  if ((layer.head_dim != 64 && layer.head_dim != 128) || input.dtype != DType::kBF16 ||
      layer.weight_dtype != DType::kBF16) {
    return KernelStatus::kUnsupportedShape;
  }
  const int64_t items =
      CeilDiv(input.token_end - input.token_begin, sm90::kTokens) * layer.num_groups;
  // Half of the range: persistent blocks count on past the last item.
  if (items > INT_MAX / 2 || input.token_end > INT_MAX / 2) return KernelStatus::kUnsupportedShape;
  sm90::IndexerLaunch launch;
  const auto describe_rows = [&](CUtensorMap* map, const void* rows) {
    return sm90::DescribeTensor(map, rows, {layer.head_dim, input.token_end, layer.num_groups},
                                {input.token_stride, input.head_stride}, {64, 64, 1});
  };
  const int64_t width = 2 * layer.head_dim;
  const bool described =
      describe_rows(&launch.k_map, input.k) && describe_rows(&launch.v_map, input.v) &&
      sm90::DescribeTensor(&launch.w1_map, layer.w1, {width, layer.hidden, layer.num_groups},
                           {width, layer.hidden * width}, {64, sm90::kUnits, 1});
  if (!described) return KernelStatus::kUnsupportedShape;
  launch.params = params;
  launch.num_items = static_cast<int32_t>(items);
  launch.num_tiles = static_cast<int32_t>(CeilDiv(layer.hidden, sm90::kUnits));
  return layer.head_dim == 128 ? sm90::Launch<128>(launch, stream)
                               : sm90::Launch<64>(launch, stream);
}

}  // namespace vsprefill::kernels::cuda

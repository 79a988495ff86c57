// VSIndexer inference: per KV group, hidden = silu(features w1^T + b1), two dot products with w2.
//
// bf16 on tensor cores: a block takes 128 tokens of one group; the normalised features stay in
// shared memory (rounded to bf16), w1 passes by in tiles of 64 hidden units, and the hidden layer
// never leaves the registers. Hopper has a kernel of its own (sm90/indexer_sm90.cu). Anything else
// runs in plain float32.
#include "kernels/cuda/indexer_logits.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/vector_io.cuh"

namespace vsprefill::kernels {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): the tile vocabulary of this folder

__device__ __forceinline__ float Silu(float x) { return x / (1.0f + expf(-x)); }

template <int kHeadDim>
struct alignas(16) IndexerShared {
  static constexpr int kFeatures = 2 * kHeadDim;
  __nv_bfloat16 features[kTileRows * kSharedStride<kFeatures>];
  __nv_bfloat16 w1[2][kTileColumns * kSharedStride<kFeatures>];
};

template <int kHeadDim>
__global__ void __launch_bounds__(kTileThreads)
    IndexerBf16Kernel(const __grid_constant__ IndexerParams p) {
  constexpr int kFeatures = 2 * kHeadDim;
  constexpr int kStride = kSharedStride<kFeatures>;
  constexpr int kChunks = kFeatures / 8;
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<IndexerShared<kHeadDim>*>(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.y;
  const int hidden = p.layer.hidden;
  const int64_t first = p.input.token_begin + int64_t{blockIdx.x} * kTileRows;

  const auto* w1 =
      static_cast<const __nv_bfloat16*>(p.layer.w1) + int64_t{group} * hidden * kFeatures;
  constexpr uint32_t kStage = sizeof(shared.w1[0]);
  const uint32_t w1_shared = SharedAddress(shared.w1);
  const auto load = [&](int step) {
    for (int index = threadIdx.x; index < kTileColumns * kChunks; index += kTileThreads) {
      const int row = index / kChunks;
      const int chunk = index % kChunks;
      const int unit = step * kTileColumns + row;
      const bool valid = unit < hidden;
      CopyAsync16(w1_shared + (step & 1) * kStage + (row * kStride + chunk * 8) * 2,
                  w1 + int64_t{valid ? unit : 0} * kFeatures + chunk * 8, valid);
    }
  };
  load(0);
  CommitCopies();

  // Features: one thread per token, both halves.
  {
    const int64_t token = first + threadIdx.x;
    const bool used = token < p.input.token_end;
    const int64_t offset = group * p.input.head_stride + (used ? token : 0) * p.input.token_stride;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const auto* source =
          static_cast<const __nv_bfloat16*>(part == 0 ? p.input.k : p.input.v) + offset;
      float squares = 0;
      for (int i = 0; i < kHeadDim; i += 8) {
        float x[8];
        LoadVector(source + i, x);
#pragma unroll
        for (int e = 0; e < 8; ++e) squares = fmaf(x[e], x[e], squares);
      }
      const float inverse = used ? 1.0f / sqrtf(squares / kHeadDim + kFeatureEps) : 0.0f;
      __nv_bfloat16* target = shared.features + threadIdx.x * kStride + part * kHeadDim;
      for (int i = 0; i < kHeadDim; i += 8) {
        float x[8];
        LoadVector(source + i, x);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] *= inverse;
        StoreVector(target + i, x);
      }
    }
  }

  const uint32_t q_lane = QueryLaneAddress<kFeatures>(SharedAddress(shared.features), warp, lane);
  const float* b1 = p.layer.b1 + int64_t{group} * hidden;
  const float* w2 = p.layer.w2 + int64_t{group} * 2 * hidden;
  float vertical[4] = {}, slash[4] = {};
  const int steps = (hidden + kTileColumns - 1) / kTileColumns;
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    CommitCopies();
    WaitCopies<1>();
    __syncthreads();
    float s[2][8][4];
    ScoreTile<kFeatures>(s, q_lane,
                         KeyLaneAddress<kFeatures>(w1_shared + (step & 1) * kStage, lane));
#pragma unroll
    for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int unit = step * kTileColumns + nt * 8 + (lane & 3) * 2 + e;
        const bool valid = unit < hidden;
        const float bias = valid ? b1[unit] : 0.0f;
        const float wv = valid ? w2[unit] : 0.0f;
        const float ws = valid ? w2[hidden + unit] : 0.0f;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float activation = Silu(s[r / 2][nt][(r & 1) * 2 + e] + bias);
          vertical[r] = fmaf(wv, activation, vertical[r]);
          slash[r] = fmaf(ws, activation, slash[r]);
        }
      }
    }
    __syncthreads();  // before the next copy lands in the buffer just read
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      vertical[r] += __shfl_xor_sync(0xffffffffu, vertical[r], offset);
      slash[r] += __shfl_xor_sync(0xffffffffu, slash[r], offset);
    }
    const int64_t token = first + warp * 32 + r * 8 + lane / 4;
    if (lane % 4 == 0 && token < p.input.token_end) {
      StoreLogits(p, group, token, vertical[r], slash[r]);
    }
  }
}

constexpr int kSimtTokens = 8;
constexpr int kSimtThreads = 256;

/// Float32 arithmetic, any head_dim: a block takes kSimtTokens tokens of one group, a thread
/// computes one hidden unit of all of them at a time.
template <typename T, typename W>
__global__ void __launch_bounds__(kSimtThreads, 2)
    IndexerSimtKernel(const __grid_constant__ IndexerParams p) {
  extern __shared__ uint4 shared_memory[];
  float* features = reinterpret_cast<float*>(shared_memory);  // [kSimtTokens][2 head_dim]
  __shared__ float partial[2][kSimtTokens][kSimtThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.y;
  const int head_dim = p.layer.head_dim, hidden = p.layer.hidden, width = 2 * head_dim;
  const int64_t first = p.input.token_begin + int64_t{blockIdx.x} * kSimtTokens;

  // One warp per token.
  const int64_t token = first + warp;
  for (int part = 0; part < 2; ++part) {
    const bool used = token < p.input.token_end;
    const T* source = static_cast<const T*>(part == 0 ? p.input.k : p.input.v) +
                      group * p.input.head_stride + (used ? token : 0) * p.input.token_stride;
    float squares = 0;
    for (int i = lane; i < head_dim; i += 32) {
      const float x = static_cast<float>(source[i]);
      squares = fmaf(x, x, squares);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    const float inverse =
        used ? 1.0f / sqrtf(squares / static_cast<float>(head_dim) + kFeatureEps) : 0.0f;
    for (int i = lane; i < head_dim; i += 32) {
      features[warp * width + part * head_dim + i] = static_cast<float>(source[i]) * inverse;
    }
  }
  __syncthreads();

  float vertical[kSimtTokens] = {}, slash[kSimtTokens] = {};
  for (int unit = threadIdx.x; unit < hidden; unit += kSimtThreads) {
    const int64_t row = int64_t{group} * hidden + unit;
    const W* w1 = static_cast<const W*>(p.layer.w1) + row * width;
    float x[kSimtTokens];
#pragma unroll
    for (int t = 0; t < kSimtTokens; ++t) x[t] = p.layer.b1[row];
    for (int i = 0; i < width; ++i) {
      const float w = static_cast<float>(w1[i]);
#pragma unroll
      for (int t = 0; t < kSimtTokens; ++t) x[t] = fmaf(w, features[t * width + i], x[t]);
    }
    const float wv = p.layer.w2[int64_t{group} * 2 * hidden + unit];
    const float ws = p.layer.w2[(int64_t{group} * 2 + 1) * hidden + unit];
#pragma unroll
    for (int t = 0; t < kSimtTokens; ++t) {
      const float activation = Silu(x[t]);
      vertical[t] = fmaf(wv, activation, vertical[t]);
      slash[t] = fmaf(ws, activation, slash[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kSimtTokens; ++t) {
    for (int offset = 16; offset > 0; offset /= 2) {
      vertical[t] += __shfl_xor_sync(0xffffffffu, vertical[t], offset);
      slash[t] += __shfl_xor_sync(0xffffffffu, slash[t], offset);
    }
    if (lane == 0) {
      partial[0][t][warp] = vertical[t];
      partial[1][t][warp] = slash[t];
    }
  }
  __syncthreads();
  if (threadIdx.x < kSimtTokens && first + threadIdx.x < p.input.token_end) {
    float sums[2] = {0, 0};
    for (int w = 0; w < kSimtThreads / 32; ++w) {
      sums[0] += partial[0][threadIdx.x][w];
      sums[1] += partial[1][threadIdx.x][w];
    }
    StoreLogits(p, group, first + threadIdx.x, sums[0], sums[1]);
  }
}

static_assert(kSimtTokens == kSimtThreads / 32, "one warp normalises one token");

template <int kHeadDim>
KernelStatus LaunchBf16(const IndexerParams& p, int64_t tokens, cudaStream_t stream) {
  constexpr int kBytes = sizeof(IndexerShared<kHeadDim>);
  const KernelStatus status = AllowSharedMemory(IndexerBf16Kernel<kHeadDim>, kBytes);
  if (status != KernelStatus::kOk) return status;
  const dim3 grid(static_cast<unsigned>(CeilDiv(tokens, kTileRows)), p.layer.num_groups);
  IndexerBf16Kernel<kHeadDim><<<grid, kTileThreads, kBytes, stream>>>(p);
  return LaunchStatus();
}

template <typename T, typename W>
KernelStatus LaunchSimt(const IndexerParams& p, int64_t tokens, cudaStream_t stream) {
  const int bytes = kSimtTokens * 2 * p.layer.head_dim * static_cast<int>(sizeof(float));
  if (bytes > 40 * 1024) return KernelStatus::kUnsupportedShape;
  const dim3 grid(static_cast<unsigned>(CeilDiv(tokens, kSimtTokens)), p.layer.num_groups);
  IndexerSimtKernel<T, W><<<grid, kSimtThreads, bytes, stream>>>(p);
  return LaunchStatus();
}

}  // namespace

KernelStatus cuda::IndexerWith(KernelChoice choice, const IndexerLayer& layer,
                               const IndexerInput& input, Stream stream) {
  if (layer.num_groups <= 0 || layer.num_groups > 65535 || layer.head_dim <= 0 ||
      layer.hidden <= 0) {
    return KernelStatus::kUnsupportedShape;
  }
  const int64_t tokens = input.token_end - input.token_begin;
  if (tokens <= 0) return KernelStatus::kOk;
  const IndexerParams p{layer, input};
  const cudaStream_t cuda_stream = AsCuda(stream);
  const bool bf16_weights = layer.weight_dtype == DType::kBF16;
  if (input.dtype == DType::kF32) {
    return bf16_weights ? LaunchSimt<float, __nv_bfloat16>(p, tokens, cuda_stream)
                        : LaunchSimt<float, float>(p, tokens, cuda_stream);
  }
  if (!bf16_weights) return LaunchSimt<__nv_bfloat16, float>(p, tokens, cuda_stream);
  if (choice == KernelChoice::kFastest && DeviceIsSm90()) {
    const KernelStatus status = LaunchIndexerSm90(p, cuda_stream);
    if (status != KernelStatus::kUnsupportedShape) return status;
  }
  const bool aligned = Aligned16(layer.w1) && Aligned16(input.k) && Aligned16(input.v) &&
                       input.head_stride % 8 == 0 && input.token_stride % 8 == 0;
  if (aligned) {
    switch (layer.head_dim) {
      case 16:
        return LaunchBf16<16>(p, tokens, cuda_stream);
      case 32:
        return LaunchBf16<32>(p, tokens, cuda_stream);
      case 64:
        return LaunchBf16<64>(p, tokens, cuda_stream);
      case 80:
        return LaunchBf16<80>(p, tokens, cuda_stream);
      case 96:
        return LaunchBf16<96>(p, tokens, cuda_stream);
      case 128:
        return LaunchBf16<128>(p, tokens, cuda_stream);
      default:
        break;
    }
  }
  return LaunchSimt<__nv_bfloat16, __nv_bfloat16>(p, tokens, cuda_stream);
}

KernelStatus IndexerCuda(const IndexerLayer& layer, const IndexerInput& input, Stream stream) {
  return cuda::IndexerWith(cuda::KernelChoice::kFastest, layer, input, stream);
}

}  // namespace vsprefill::kernels

// Element-wise passes of a layer: memory-bound, 16 bytes per access, one pass over each tensor.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/vector_io.cuh"
#include "kernels/layer_ops.h"

namespace vsprefill::kernels {
namespace {

using cuda::kVector;

constexpr int kNormThreads = 256;
/// Vectors of a row that a thread keeps in registers; wider rows are read a second time.
template <int kRowThreads>
constexpr int kNormCached = kRowThreads == 32 ? 3 : 2;

/// kRowThreads threads per token: a warp, or the block. The residual is rounded to its dtype before
/// the norm sees it.
template <typename T, int kRowThreads>
__global__ void __launch_bounds__(kNormThreads)
    RmsNormKernel(T* residual, const T* delta, const T* weight, T* out, int64_t tokens,
                  int64_t width, float eps) {
  static_assert(kRowThreads == 32 || kRowThreads == kNormThreads);
  constexpr int kN = kVector<T>;
  constexpr int kCached = kNormCached<kRowThreads>;
  const int64_t token =
      int64_t{blockIdx.x} * (kNormThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (token >= tokens) return;  // whole warps
  const int thread = threadIdx.x % kRowThreads;
  residual += token * width;
  if (delta != nullptr) delta += token * width;
  const int vectors = static_cast<int>(width / kN);

  float cached[kCached][kN], deltas[kCached][kN];
  float squares = 0;
  const auto load = [&](int vector, float(&x)[kN], float(&d)[kN]) {
    cuda::LoadVector(residual + vector * kN, x);
    if (delta != nullptr) cuda::LoadVector(delta + vector * kN, d);
  };
  const auto accumulate = [&](int vector, float(&x)[kN], const float(&d)[kN]) {
    if (delta != nullptr) {
#pragma unroll
      for (int i = 0; i < kN; ++i) x[i] = cuda::RoundTo<T>(x[i] + d[i]);
      cuda::StoreVector(residual + vector * kN, x);
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) squares = fmaf(x[i], x[i], squares);
  };
  // All loads before the first store: the compiler cannot know that it may move them up.
#pragma unroll
  for (int c = 0; c < kCached; ++c) {
    const int vector = thread + c * kRowThreads;
    if (vector < vectors) load(vector, cached[c], deltas[c]);
  }
#pragma unroll
  for (int c = 0; c < kCached; ++c) {
    const int vector = thread + c * kRowThreads;
    if (vector < vectors) accumulate(vector, cached[c], deltas[c]);
  }
  for (int vector = thread + kCached * kRowThreads; vector < vectors; vector += kRowThreads) {
    float x[kN], d[kN];
    load(vector, x, d);
    accumulate(vector, x, d);
  }
  if (out == nullptr) return;
  out += token * width;

#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  if constexpr (kRowThreads > 32) {
    __shared__ float partial[kRowThreads / 32];
    if (thread % 32 == 0) partial[thread / 32] = squares;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int i = 0; i < kRowThreads / 32; ++i) squares += partial[i];
  }
  const float inverse = 1.0f / sqrtf(squares / static_cast<float>(width) + eps);

  const auto write = [&](int vector, float(&x)[kN]) {
    float w[kN];
    cuda::LoadVector(weight + vector * kN, w);
#pragma unroll
    for (int i = 0; i < kN; ++i) x[i] = x[i] * inverse * w[i];
    cuda::StoreVector(out + vector * kN, x);
  };
#pragma unroll
  for (int c = 0; c < kCached; ++c) {
    const int vector = thread + c * kRowThreads;
    if (vector < vectors) write(vector, cached[c]);
  }
  for (int vector = thread + kCached * kRowThreads; vector < vectors; vector += kRowThreads) {
    float x[kN];
    cuda::LoadVector(residual + vector * kN, x);
    write(vector, x);
  }
}

template <typename T, int kRowThreads>
KernelStatus LaunchRmsNorm(const RmsNormArgs& a, cudaStream_t stream) {
  const int64_t blocks = cuda::CeilDiv(a.tokens, kNormThreads / kRowThreads);
  if (blocks > INT32_MAX) return KernelStatus::kUnsupportedShape;
  RmsNormKernel<T, kRowThreads><<<static_cast<unsigned>(blocks), kNormThreads, 0, stream>>>(
      static_cast<T*>(a.residual), static_cast<const T*>(a.delta), static_cast<const T*>(a.weight),
      static_cast<T*>(a.out), a.tokens, a.width, a.eps);
  return cuda::LaunchStatus();
}

template <typename T>
KernelStatus RmsNorm(const RmsNormArgs& a, cudaStream_t stream) {
  if (a.width % kVector<T> != 0 || a.width <= 0 || a.width > (1 << 24) ||
      !cuda::Aligned16(a.residual) || !cuda::Aligned16(a.delta) || !cuda::Aligned16(a.weight) ||
      !cuda::Aligned16(a.out)) {
    return KernelStatus::kUnsupportedShape;
  }
  if (a.tokens <= 0) return KernelStatus::kOk;
  // A warp keeps a narrow row in registers; a block of it would mostly wait.
  const bool narrow = a.width <= 32 * kNormCached<32> * kVector<T>;
  return narrow ? LaunchRmsNorm<T, 32>(a, stream) : LaunchRmsNorm<T, kNormThreads>(a, stream);
}

constexpr int kRopeThreads = 128;

/// Lanes that share a head: each holds one 16-byte vector of either half. A power of two.
template <typename T>
__host__ __device__ constexpr int HeadLanes(int head_dim) {
  int lanes = 1;
  while (lanes * 2 * kVector<T> < head_dim) lanes *= 2;
  return lanes;
}

/// `kLanes` consecutive threads per (token, head); heads in the order q, k, v.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kRopeThreads)
    QkvRopeAppendKernel(const __grid_constant__ QkvRopeAppendArgs a) {
  constexpr int kN = kVector<T>;
  const int heads = a.num_q_heads + 2 * a.num_kv_heads;
  const int64_t thread = int64_t{blockIdx.x} * kRopeThreads + threadIdx.x;
  const int64_t row_head = thread / kLanes;
  const int64_t token = row_head / heads;
  const int head = static_cast<int>(row_head % heads);
  const int half = a.head_dim / 2;
  const int first = static_cast<int>(thread % kLanes) * kN;
  // No early return: all lanes of a warp take part in the shuffles below.
  const bool active = token < a.tokens && first < half;

  float x[2][kN] = {};
  T* source = static_cast<T*>(a.qkv) + (token * heads + head) * a.head_dim + first;
  if (active) {
    cuda::LoadVector(source, x[0]);
    cuda::LoadVector(source + half, x[1]);
  }
  const bool is_q = head < a.num_q_heads;
  const bool is_v = head >= a.num_q_heads + a.num_kv_heads;
  const T* norm = static_cast<const T*>(is_v ? nullptr : is_q ? a.q_norm : a.k_norm);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) squares += x[0][i] * x[0][i] + x[1][i] * x[1][i];
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  if (!active) return;
  if (norm != nullptr) {
    const float inverse = 1.0f / sqrtf(squares / static_cast<float>(a.head_dim) + a.norm_eps);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float w[kN];
      cuda::LoadVector(norm + part * half + first, w);
#pragma unroll
      for (int i = 0; i < kN; ++i) x[part][i] = x[part][i] * inverse * w[i];
    }
  }
  const int64_t position = a.position_begin + token;
  if (!is_v) {
    const float* cosines = a.cos + position * half + first;
    const float* sines = a.sin + position * half + first;
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      float c[4], s[4];
      cuda::LoadVector(cosines + i, c);
      cuda::LoadVector(sines + i, s);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x0 = x[0][i + e], x1 = x[1][i + e];
        x[0][i + e] = x0 * c[e] - x1 * s[e];
        x[1][i + e] = x1 * c[e] + x0 * s[e];
      }
    }
  }
  T* target = source;
  if (!is_q) {
    const int kv_head = head - a.num_q_heads - (is_v ? a.num_kv_heads : 0);
    target = static_cast<T*>(is_v ? a.v_cache : a.k_cache) + kv_head * a.cache_head_stride +
             position * a.head_dim + first;
  }
  cuda::StoreVector(target, x[0]);
  cuda::StoreVector(target + half, x[1]);
}

template <typename T, int kLanes>
KernelStatus LaunchQkvRopeAppend(const QkvRopeAppendArgs& a, cudaStream_t stream) {
  const int64_t heads = a.num_q_heads + 2 * a.num_kv_heads;
  const int64_t blocks = cuda::CeilDiv(a.tokens * heads * kLanes, kRopeThreads);
  if (blocks > INT32_MAX) return KernelStatus::kUnsupportedShape;
  QkvRopeAppendKernel<T, kLanes><<<static_cast<unsigned>(blocks), kRopeThreads, 0, stream>>>(a);
  return cuda::LaunchStatus();
}

template <typename T>
KernelStatus QkvRopeAppend(const QkvRopeAppendArgs& a, cudaStream_t stream) {
  // Both halves of a head, and the rows of the cos and sin tables, must be whole vectors.
  if (a.head_dim <= 0 || a.head_dim % (2 * kVector<T>) != 0 ||
      a.cache_head_stride % kVector<T> != 0 || !cuda::Aligned16(a.qkv) ||
      !cuda::Aligned16(a.q_norm) || !cuda::Aligned16(a.k_norm) || !cuda::Aligned16(a.cos) ||
      !cuda::Aligned16(a.sin) || !cuda::Aligned16(a.k_cache) || !cuda::Aligned16(a.v_cache)) {
    return KernelStatus::kUnsupportedShape;
  }
  if (a.tokens <= 0) return KernelStatus::kOk;
  switch (HeadLanes<T>(a.head_dim)) {
    case 1:
      return LaunchQkvRopeAppend<T, 1>(a, stream);
    case 2:
      return LaunchQkvRopeAppend<T, 2>(a, stream);
    case 4:
      return LaunchQkvRopeAppend<T, 4>(a, stream);
    case 8:
      return LaunchQkvRopeAppend<T, 8>(a, stream);
    case 16:
      return LaunchQkvRopeAppend<T, 16>(a, stream);
    case 32:
      return LaunchQkvRopeAppend<T, 32>(a, stream);
    default:
      return KernelStatus::kUnsupportedShape;
  }
}

constexpr int kSiluThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSiluThreads)
    SiluMulKernel(const T* gate_up, T* out, int64_t vectors, int64_t vectors_per_row) {
  constexpr int kN = kVector<T>;
  const int64_t vector = int64_t{blockIdx.x} * kSiluThreads + threadIdx.x;
  if (vector >= vectors) return;
  const int64_t row = vector / vectors_per_row;
  const int64_t column = vector % vectors_per_row;
  const T* source = gate_up + (row * 2 * vectors_per_row + column) * kN;
  float gate[kN], up[kN];
  cuda::LoadVector(source, gate);
  cuda::LoadVector(source + vectors_per_row * kN, up);
#pragma unroll
  for (int i = 0; i < kN; ++i) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
  cuda::StoreVector(out + vector * kN, gate);
}

template <typename T>
KernelStatus SiluMul(const SiluMulArgs& a, cudaStream_t stream) {
  if (a.width % kVector<T> != 0 || a.width <= 0 || !cuda::Aligned16(a.gate_up) ||
      !cuda::Aligned16(a.out)) {
    return KernelStatus::kUnsupportedShape;
  }
  if (a.tokens <= 0) return KernelStatus::kOk;
  const int64_t per_row = a.width / kVector<T>;
  const int64_t blocks = cuda::CeilDiv(a.tokens * per_row, kSiluThreads);
  if (blocks > INT32_MAX) return KernelStatus::kUnsupportedShape;
  SiluMulKernel<T><<<static_cast<unsigned>(blocks), kSiluThreads, 0, stream>>>(
      static_cast<const T*>(a.gate_up), static_cast<T*>(a.out), a.tokens * per_row, per_row);
  return cuda::LaunchStatus();
}

}  // namespace

KernelStatus RmsNormCuda(const RmsNormArgs& args, Stream stream) {
  return args.dtype == DType::kBF16 ? RmsNorm<__nv_bfloat16>(args, cuda::AsCuda(stream))
                                    : RmsNorm<float>(args, cuda::AsCuda(stream));
}

KernelStatus QkvRopeAppendCuda(const QkvRopeAppendArgs& args, Stream stream) {
  return args.dtype == DType::kBF16 ? QkvRopeAppend<__nv_bfloat16>(args, cuda::AsCuda(stream))
                                    : QkvRopeAppend<float>(args, cuda::AsCuda(stream));
}

KernelStatus SiluMulCuda(const SiluMulArgs& args, Stream stream) {
  return args.dtype == DType::kBF16 ? SiluMul<__nv_bfloat16>(args, cuda::AsCuda(stream))
                                    : SiluMul<float>(args, cuda::AsCuda(stream));
}

}  // namespace vsprefill::kernels

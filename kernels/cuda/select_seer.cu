// SeerAttention's selection, the same sets as on the CPU bit for bit. Gate vectors of all key and
// row blocks first (eight blocks of tokens per block of threads, so that a weight is read once for
// eight), then a block of threads per few row blocks of a head: logits in shared memory, softmax,
// and the bits of whole row tiles, which no other block of threads writes.
#include <cmath>

#include "kernels/cuda/exact_dot.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/top_values.cuh"
#include "kernels/select_seer.h"

namespace vsprefill::kernels {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): the vocabulary of this folder

constexpr int kVectorThreads = 128;  // at least head_dim / 2
constexpr int kVectorBlocks = 8;     // blocks of tokens
constexpr int kSelectThreads = 256;
constexpr int kManyRows = 8, kFewRows = 2;  // even: two row blocks are a row tile
constexpr int64_t kMaxSharedBytes = 200 << 10;

struct SeerKernelParams {
  SelectionTensors t;
  SeerGateLayer gate;
  SeerParams params;
  TileIndexView index;
  const float *rope_cos, *rope_sin;
  float* keys;     // [kv heads, row_end, gate_dim]
  float* queries;  // [q heads, row_end - row_first, gate_dim]
  int64_t row_first, row_end;
  int64_t prompt_tokens;
  float scale;
};

/// Gate vectors of kVectorBlocks blocks of one head: pools in shared memory, then a thread per
/// element of the vectors, then the rotation.
template <typename Element, bool kKeys>
__global__ void __launch_bounds__(kVectorThreads)
    SeerVectorKernel(const __grid_constant__ SeerKernelParams p) {
  extern __shared__ float shared_pools[];
  const SelectionTensors& t = p.t;
  const int d = t.head_dim, half = d / 2, g = p.gate.gate_dim, head = blockIdx.y;
  const int features = kKeys ? 3 * d : d;
  float* const pools = shared_pools;                        // [kVectorBlocks, features]
  float* const vectors = pools + kVectorBlocks * features;  // [kVectorBlocks, g]
  const int64_t first = (kKeys ? 0 : p.row_first) + int64_t{blockIdx.x} * kVectorBlocks;
  const int64_t left = p.row_end - first;
  const int count = left < kVectorBlocks ? static_cast<int>(left) : kVectorBlocks;

  const int teams = kVectorThreads / half, team = threadIdx.x / half, i = threadIdx.x % half;
  for (int b = team; b < count && team < teams; b += teams) {
    const selection::SeerTokens tokens =
        kKeys ? selection::KeysOf(t.s, first + b) : selection::QueriesOf(t.s, first + b);
    float max_low = 0, max_high = 0, min_low = 0, min_high = 0, sum_low = 0, sum_high = 0;
    for (int64_t position = tokens.begin; position < tokens.end; ++position) {
      const Element* const row =
          kKeys ? t.Key<Element>(head * t.group_size, position) : t.Query<Element>(head, position);
      const float x = Widen(row[i]), y = Widen(row[i + half]);
      const float c = p.rope_cos[position * half + i], s = p.rope_sin[position * half + i];
      const float low = fmaf(y, s, __fmul_rn(x, c)), high = fmaf(-x, s, __fmul_rn(y, c));
      const bool begins = position == tokens.begin;
      max_low = begins || low > max_low ? low : max_low;
      max_high = begins || high > max_high ? high : max_high;
      min_low = begins || low < min_low ? low : min_low;
      min_high = begins || high < min_high ? high : min_high;
      sum_low = __fadd_rn(sum_low, low);
      sum_high = __fadd_rn(sum_high, high);
    }
    const float tokens_in = static_cast<float>(tokens.end - tokens.begin);
    float* out = pools + b * features;
    const auto put = [&](float low, float high) {
      out[i] = __fmul_rn(low, p.gate.rope_inverse);
      out[i + half] = __fmul_rn(high, p.gate.rope_inverse);
      out += d;
    };
    if (kKeys) {
      put(max_low, max_high);
      put(min_low, min_high);
    }
    put(__fdiv_rn(sum_low, tokens_in), __fdiv_rn(sum_high, tokens_in));
  }
  __syncthreads();

  const float* const weights = (kKeys ? p.gate.wk : p.gate.wq) + int64_t{head} * g * features;
  for (int row = threadIdx.x; row < g; row += kVectorThreads) {
    float sums[kVectorBlocks] = {};
    for (int e = 0; e < features; ++e) {
      const float w = weights[int64_t{row} * features + e];
#pragma unroll
      for (int b = 0; b < kVectorBlocks; ++b) {
        // Blocks past the end add up what shared memory happens to hold; nobody reads the result.
        sums[b] = fmaf(w, pools[b * features + e], sums[b]);
      }
    }
#pragma unroll
    for (int b = 0; b < kVectorBlocks; ++b) vectors[b * g + row] = sums[b];
  }
  __syncthreads();

  const int64_t rows = kKeys ? p.row_end : p.row_end - p.row_first;
  float* const out =
      (kKeys ? p.keys : p.queries) + (head * rows + first - (kKeys ? 0 : p.row_first)) * g;
  for (int x = threadIdx.x; x < count * (g / 2); x += kVectorThreads) {
    const int b = x / (g / 2), e = x % (g / 2);
    const float low = vectors[b * g + e], high = vectors[b * g + e + g / 2];
    const float c = p.gate.block_cos[(first + b) * (g / 2) + e];
    const float s = p.gate.block_sin[(first + b) * (g / 2) + e];
    out[b * g + e] = fmaf(-high, s, __fmul_rn(low, c));
    out[b * g + e + g / 2] = fmaf(low, s, __fmul_rn(high, c));
  }
}

template <int kRows>
int64_t SelectSharedBytes(int gate_dim, int64_t blocks, int64_t words) {
  return 4 * (int64_t{kRows} * gate_dim + kRows * blocks + kRows / 2 * words);
}

// Four blocks: left to itself, the assembler takes 48 registers and spills one.
template <int kRows>
__global__ void __launch_bounds__(kSelectThreads, 4)
    SeerSelectKernel(const __grid_constant__ SeerKernelParams p) {
  extern __shared__ float shared_logits[];
  __shared__ float max_partial[kSelectThreads / 32];
  __shared__ unsigned long long sum_partial[kSelectThreads / 32];
  __shared__ unsigned int histogram[256];
  __shared__ int warp_counts[kSelectThreads / 32];
  const int g = p.gate.gate_dim, head = blockIdx.y;
  const int64_t words = p.index.block_words;
  // Heavy ones first. base is even, so the rows are whole row tiles.
  const int64_t base = p.index.first_tile * 2 + int64_t{gridDim.x - 1 - blockIdx.x} * kRows;
  const int64_t end = base + kRows < p.row_end ? base + kRows : p.row_end;
  float* const queries = shared_logits;                                        // [kRows, g]
  float* const logits = queries + kRows * g;                                   // [kRows, row_end]
  auto* const bits = reinterpret_cast<uint32_t*>(logits + kRows * p.row_end);  // [tiles, words]

  const int64_t row_count = p.row_end - p.row_first;
  for (int x = threadIdx.x; x < kRows * g; x += kSelectThreads) {
    const int64_t row = base + x / g;
    const bool there = row >= p.row_first && row < p.row_end;
    queries[x] = there ? p.queries[(head * row_count + row - p.row_first) * g + x % g] : 0.0f;
  }
  for (int64_t x = threadIdx.x; x < kRows / 2 * words; x += kSelectThreads) bits[x] = 0;
  __syncthreads();
  const float* const keys = p.keys + head / p.t.group_size * p.row_end * g;
  for (int64_t b = threadIdx.x; b < end; b += kSelectThreads) {
    float sums[kRows] = {};
    for (int e = 0; e < g; ++e) {
      const float key = keys[b * g + e];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = fmaf(key, queries[r * g + e], sums[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) logits[r * p.row_end + b] = Logit(sums[r], p.scale);
  }
  __syncthreads();

  for (int r = 0; r < kRows; ++r) {
    const int64_t row = base + r, visible = row + 1;
    if (row < p.row_first || row >= p.row_end) continue;
    const float* const row_logits = logits + r * p.row_end;
    uint32_t* const row_bits = bits + r / 2 * words;
    const auto read = [row_bits](int64_t block) {
      const int64_t wide = block * kSeerBlock / kKeyBlock;
      atomicOr(&row_bits[wide / 32], 1u << (wide % 32));
    };
    if (threadIdx.x == 0) read(row);
    if (selection::IsLastBlock(p.params, row, p.prompt_tokens)) {
      for (int64_t b = threadIdx.x; b < visible; b += kSelectThreads) read(b);
      continue;
    }
    float max = row_logits[0];
    for (int64_t b = threadIdx.x; b < visible; b += kSelectThreads) {
      max = row_logits[b] > max ? row_logits[b] : max;
    }
    max = BlockReduce(max, max_partial, [](float x, float y) { return x > y ? x : y; });
    unsigned long long sum = 0;
    for (int64_t b = threadIdx.x; b < visible; b += kSelectThreads) {
      sum += selection::Weight(row_logits[b], max);
    }
    sum = BlockReduce(sum, sum_partial,
                      [](unsigned long long x, unsigned long long y) { return x + y; });
    const double unit = selection::ShareUnit(sum);
    const auto share = [&](int64_t b) -> unsigned long long {
      return selection::Share(selection::Weight(row_logits[b], max), unit);
    };
    if (p.params.density > 0) {
      const int64_t budget = selection::SeerBudget(p.params.density, visible);
      const TopCut cut = FindTop(share, visible, budget, histogram);
      ForTop(share, visible, cut, warp_counts, [&](int64_t b, int /*rank*/) { read(b); });
    } else {
      for (int64_t b = threadIdx.x; b < visible; b += kSelectThreads) {
        if (selection::ReachesThreshold(share(b), p.params.threshold, selection::kShareOne)) {
          read(b);
        }
      }
    }
  }
  __syncthreads();
  for (int64_t x = threadIdx.x; x < kRows / 2 * words; x += kSelectThreads) {
    const int64_t tile = base / 2 + x / words - p.index.first_tile;
    if (tile >= p.index.num_tiles) continue;
    p.index.blocks[(head * p.index.num_tiles + tile) * words + x % words] = bits[x];
  }
}

template <typename Element, bool kKeys>
KernelStatus LaunchVectors(const SeerKernelParams& p, int heads, cudaStream_t stream) {
  const int features = kKeys ? 3 * p.t.head_dim : p.t.head_dim;
  const int bytes = kVectorBlocks * (features + p.gate.gate_dim) * 4;
  const auto kernel = SeerVectorKernel<Element, kKeys>;
  const KernelStatus status = AllowSharedMemory(kernel, bytes);
  if (status != KernelStatus::kOk) return status;
  const int64_t blocks = p.row_end - (kKeys ? 0 : p.row_first);
  kernel<<<dim3(static_cast<unsigned>((blocks + kVectorBlocks - 1) / kVectorBlocks), heads),
           kVectorThreads, bytes, stream>>>(p);
  return LaunchStatus();
}

template <int kRows>
KernelStatus LaunchSelect(const SeerKernelParams& p, cudaStream_t stream) {
  const int64_t bytes = SelectSharedBytes<kRows>(p.gate.gate_dim, p.row_end, p.index.block_words);
  const auto kernel = SeerSelectKernel<kRows>;
  const KernelStatus status = AllowSharedMemory(kernel, static_cast<int>(bytes));
  if (status != KernelStatus::kOk) return status;
  const int64_t groups = (p.row_end - p.index.first_tile * 2 + kRows - 1) / kRows;
  kernel<<<dim3(static_cast<unsigned>(groups), p.t.num_q_heads), kSelectThreads, bytes, stream>>>(
      p);
  return LaunchStatus();
}

}  // namespace

KernelStatus SelectSeerCuda(const SeerInput& input, const SeerParams& params, TileIndexView* index,
                            Stream stream) {
  const QuerySelectionInput& in = input.base;
  if (!SupportedSelection(in) || !selection::Supported(input) || in.shape.head_dim % 2 != 0) {
    return KernelStatus::kUnsupportedShape;
  }
  const selection::ChunkTiles tiles = selection::TilesOf(in.sequence, 1);
  const selection::SeerRowBlocks rows = selection::RowBlocksOf(in.sequence);
  index->num_groups = in.shape.num_q_heads;
  index->first_tile = tiles.first;
  index->num_tiles = tiles.count;
  const int g = input.gate.gate_dim;
  float* const keys = static_cast<float*>(in.workspace);
  const SeerKernelParams p = {SelectionTensors(in),
                              input.gate,
                              params,
                              *index,
                              input.rope_cos,
                              input.rope_sin,
                              keys,
                              keys + in.shape.num_kv_heads * rows.end * g,
                              rows.first,
                              rows.end,
                              in.prompt_tokens,
                              1.0f / std::sqrt(static_cast<float>(g))};
  const cudaStream_t cuda_stream = AsCuda(stream);
  const bool bf16 = in.shape.dtype == DType::kBF16;
  KernelStatus status =
      bf16 ? LaunchVectors<__nv_bfloat16, true>(p, in.shape.num_kv_heads, cuda_stream)
           : LaunchVectors<float, true>(p, in.shape.num_kv_heads, cuda_stream);
  if (status != KernelStatus::kOk) return status;
  status = bf16 ? LaunchVectors<__nv_bfloat16, false>(p, in.shape.num_q_heads, cuda_stream)
                : LaunchVectors<float, false>(p, in.shape.num_q_heads, cuda_stream);
  if (status != KernelStatus::kOk) return status;
  return SelectSharedBytes<kManyRows>(g, rows.end, index->block_words) <= kMaxSharedBytes
             ? LaunchSelect<kManyRows>(p, cuda_stream)
             : LaunchSelect<kFewRows>(p, cuda_stream);
}

}  // namespace vsprefill::kernels

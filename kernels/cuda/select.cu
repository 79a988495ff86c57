// Selection on the device, without a sort and without the host: bit for bit what SelectCpu gives.
//
// One block of 1,024 threads per KV group walks the rules of kernels/selection.h: weights, scores,
// cuts by radix histograms over the score bits (three levels of 11, 11 and 9 bits, so exact), then
// compaction. All sums are integers, so the order in which threads add does not matter.
#include <algorithm>

#include "kernels/cuda/launch.h"
#include "kernels/selection.h"
#include "kernels/selection_math.h"

namespace vsprefill::kernels {
namespace {

using selection::Geometry;
using selection::kNothing;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;
constexpr int kGroupsPerLaunch = 64;
constexpr unsigned kAllLanes = 0xffffffffu;

struct SelectLaunch {
  SelectionInput input;  // threshold_scale unused: host memory
  SelectionParams params;
  Geometry geometry;
  SparseIndexView index;
  char* workspace;
  int64_t workspace_stride;  // bytes per group
  int first_group;
  float threshold_scale[kGroupsPerLaunch];
};

/// Scratch of one group, in global memory. 256-byte aligned parts.
struct Scratch {
  uint64_t* column_weights;  // [n]
  uint64_t* offset_weights;  // [n]
  uint64_t* local_mass;      // [n + 1]: of offsets [0, i), for i <= local width
  uint64_t* block_weights;   // [blocks]
  uint32_t* column_scores;   // [n] keys
  uint32_t* column_ranks;    // [n]; column_scores itself for kMassPerCost
  uint32_t* block_scores;    // [blocks]
  uint32_t* block_ranks;     // [blocks]
  int64_t bytes;

  __host__ __device__ Scratch(char* memory, int64_t n, int64_t blocks) {
    char* const begin = memory;
    const auto take = [&memory](int64_t size) {
      char* const part = memory;
      memory += (size + 255) / 256 * 256;
      return part;
    };
    column_weights = reinterpret_cast<uint64_t*>(take(n * 8));
    offset_weights = reinterpret_cast<uint64_t*>(take(n * 8));
    local_mass = reinterpret_cast<uint64_t*>(take((n + 1) * 8));
    block_weights = reinterpret_cast<uint64_t*>(take(blocks * 8));
    column_scores = reinterpret_cast<uint32_t*>(take(n * 4));
    column_ranks = reinterpret_cast<uint32_t*>(take(n * 4));
    block_scores = reinterpret_cast<uint32_t*>(take(blocks * 4));
    block_ranks = reinterpret_cast<uint32_t*>(take(blocks * 4));
    bytes = memory - begin;
  }
};

struct Shared {
  unsigned long long histogram[kBins];
  unsigned long long partial[kWarps];
  unsigned long long result;
  uint32_t low;
};

/// Sum over the block, for every thread.
__device__ uint64_t BlockSum(uint64_t value, Shared& shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared.partial[threadIdx.x % 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

/// Maximum over the block, for every thread.
__device__ float BlockMax(float value, Shared& shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = __float_as_uint(value);
  __syncthreads();
  value = __uint_as_float(static_cast<uint32_t>(shared.partial[threadIdx.x % 32]));
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

/// Inclusive prefix sum over the block; *total gets the sum of all.
__device__ uint64_t BlockScan(uint64_t value, Shared& shared, uint64_t* total) {
  const int lane = threadIdx.x % 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t left = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += left;
  }
  __syncthreads();
  if (lane == 31) shared.partial[threadIdx.x / 32] = value;
  __syncthreads();
  uint64_t sums = shared.partial[lane];
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t left = __shfl_up_sync(kAllLanes, sums, offset);
    if (lane >= offset) sums += left;
  }
  *total = __shfl_sync(kAllLanes, sums, 31);
  const int warp = threadIdx.x / 32;
  const uint64_t before = __shfl_sync(kAllLanes, sums, warp > 0 ? warp - 1 : 0);
  return value + (warp > 0 ? before : 0);
}

/// Fills `weights` and returns their sum.
__device__ uint64_t Weights(const float* logits, int64_t n, uint64_t* weights, Shared& shared) {
  float max = selection::Sanitize(logits[0]);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    max = fmaxf(max, selection::Sanitize(logits[i]));
  }
  max = BlockMax(max, shared);
  uint64_t sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const uint64_t weight = selection::Weight(selection::Sanitize(logits[i]), max);
    weights[i] = weight;
    sum += weight;
  }
  return BlockSum(sum, shared);
}

/// Adds candidates [begin, end) whose key lies in [low, low + 2^bits * 2^shift) to the histogram.
template <typename Amount>
__device__ void Count(const uint32_t* keys, int64_t begin, int64_t end, uint32_t low, int shift,
                      int bits, const Amount& amount, Shared& shared) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    if (keys[i] < low) continue;
    const uint32_t bin = (keys[i] - low) >> shift;
    if (bin < (1u << bits)) {
      const uint64_t value = amount(i);
      if (value != 0) atomicAdd(&shared.histogram[bin], static_cast<unsigned long long>(value));
    }
  }
}

/// The largest cut for which {key >= cut} reaches `target`; kNothing for 0, 0 if all is not enough.
/// add(low, shift, bits) counts the candidates of a range of keys.
template <typename Add>
__device__ uint32_t Reach(uint64_t target, Shared& shared, const Add& add) {
  if (target == 0) return kNothing;
  constexpr int kBinsPerLane = kBins / 32;
  uint32_t low = 0;
  uint64_t above = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 20 : level == 1 ? 9 : 0;
    const int bits = level == 2 ? 9 : 11;
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    add(low, shift, bits);
    __syncthreads();
    // One warp walks the bins from the top: lane 0 holds the highest ones.
    if (threadIdx.x < 32) {
      const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerLane;
      uint64_t own = 0;
      for (int i = 0; i < kBinsPerLane; ++i) own += shared.histogram[top - i];
      uint64_t upto = own;
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t left = __shfl_up_sync(kAllLanes, upto, offset);
        if (threadIdx.x >= offset) upto += left;
      }
      const unsigned reached = __ballot_sync(kAllLanes, above + upto >= target);
      if (reached == 0) {
        if (threadIdx.x == 0) shared.low = kNothing;
      } else if (threadIdx.x == __ffs(reached) - 1) {
        uint64_t sum = above + upto - own;
        int bin = top;
        while (sum + shared.histogram[bin] < target) sum += shared.histogram[bin--];
        shared.low = low + (static_cast<uint32_t>(bin) << shift);
        shared.result = sum;
      }
    }
    __syncthreads();
    low = shared.low;
    above = shared.result;
    if (low == kNothing) return 0;  // only at the first level: later ones hold the amount found
  }
  return low;
}

/// Calls write(position, i) for the kept ones of [0, count) in ascending order, each warp for a
/// contiguous share; returns their number. `count` 32 at a time also go to word(i / 32, mask).
template <typename Keep, typename Write, typename Word>
__device__ int64_t Compact(int64_t count, Shared& shared, const Keep& keep, const Write& write,
                           const Word& word) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t words = (count + 31) / 32;
  const int64_t words_per_warp = (words + kWarps - 1) / kWarps;
  const int64_t begin = warp * words_per_warp * 32;
  const int64_t end = min(begin + words_per_warp * 32, words * 32);
  uint64_t own = 0;
  for (int64_t i = begin + lane; i < end; i += 32) own += i < count && keep(i) ? 1 : 0;
  for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(kAllLanes, own, offset);
  __syncthreads();
  if (lane == 0) shared.partial[warp] = own;
  __syncthreads();
  int64_t position = 0, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) position += shared.partial[w];
    total += shared.partial[w];
  }
  for (int64_t i = begin + lane; i < end; i += 32) {
    const bool kept = i < count && keep(i);
    const unsigned mask = __ballot_sync(kAllLanes, kept);
    if (kept) write(position + __popc(mask & ((1u << lane) - 1)), i);
    if (lane == 0) word(i / 32, mask);
    position += __popc(mask);
  }
  return total;
}

__global__ void __launch_bounds__(kThreads) SelectKernel(const __grid_constant__ SelectLaunch s) {
  __shared__ Shared shared;
  const int group = s.first_group + blockIdx.x;
  const Geometry& g = s.geometry;
  const int64_t n = g.n;
  const bool cumulative = s.params.rule == SelectionRule::kCumulative;
  Scratch scratch(s.workspace + group * s.workspace_stride, n, g.num_blocks);
  if (!cumulative) {
    scratch.column_ranks = scratch.column_scores;
    scratch.block_ranks = scratch.block_scores;
  }
  const float* vertical_logits = s.input.vertical_logits + group * s.input.logit_stride;
  const float* slash_logits = s.input.slash_logits + group * s.input.logit_stride;

  // Weights and scores.
  const uint64_t column_sum = Weights(vertical_logits, n, scratch.column_weights, shared);
  const uint64_t offset_sum = Weights(slash_logits, n, scratch.offset_weights, shared);
  __syncthreads();
  const int64_t width = min(n, g.local_width);
  {
    const double unit = selection::OffsetUnit(n, offset_sum);
    uint64_t carry = 0;
    for (int64_t first = 0; first < width; first += kThreads) {
      const int64_t o = first + threadIdx.x;
      const uint64_t mass =
          o < width ? selection::OffsetMass(scratch.offset_weights[o], n, o, unit) : 0;
      uint64_t total;
      const uint64_t sum = BlockScan(mass, shared, &total);
      if (o < width) scratch.local_mass[o + 1] = carry + sum;
      carry += total;
    }
    if (threadIdx.x == 0) scratch.local_mass[0] = 0;
    __syncthreads();
  }
  {
    const double unit = selection::OffsetUnit(n, column_sum);
    for (int64_t j = g.sinks + threadIdx.x; j < g.columns_end; j += kThreads) {
      scratch.column_scores[j] = selection::Key(selection::ColumnScore(
          scratch.column_weights[j], g, j, unit, scratch.local_mass[min(width, n - j)]));
    }
  }
  {
    // One warp per block of distances.
    const double unit = selection::BlockUnit(g, offset_sum);
    const int lane = threadIdx.x % 32;
    for (int64_t b = threadIdx.x / 32; b < g.num_blocks; b += kWarps) {
      const int64_t begin = max(int64_t{0}, b * kBandBlock - g.row_tile + 1);
      const int64_t end = min(n, (b + 1) * kBandBlock);
      uint64_t weight = 0;
      for (int64_t o = begin + lane; o < end; o += 32) {
        weight += scratch.offset_weights[o] *
                  static_cast<uint64_t>(selection::BlockOverlap(b, o, g.row_tile));
      }
      for (int offset = 16; offset > 0; offset /= 2) {
        weight += __shfl_xor_sync(kAllLanes, weight, offset);
      }
      if (lane == 0) {
        scratch.block_weights[b] = weight;
        scratch.block_scores[b] = selection::Key(selection::BlockScore(weight, g, b, unit));
      }
    }
  }
  __syncthreads();

  // Cuts: by the rule, then lowered by the minima, then raised by the cap.
  uint32_t column_cut, block_cut, cap_cut = 0;
  if (cumulative) {
    uint64_t forced_columns = 0, forced_blocks = 0;
    for (int64_t j = threadIdx.x; j < n; j += kThreads) {
      const uint64_t weight = scratch.column_weights[j];
      if (j < g.sinks || j >= g.columns_end) {
        forced_columns += weight;
      } else {
        scratch.column_ranks[j] = selection::Key(selection::WeightScore(weight));
      }
    }
    for (int64_t b = threadIdx.x; b < g.num_blocks; b += kThreads) {
      const uint64_t weight = scratch.block_weights[b];
      if (b < g.local_blocks) {
        forced_blocks += weight;
      } else {
        scratch.block_ranks[b] = selection::Key(selection::WeightScore(weight));
      }
    }
    forced_columns = BlockSum(forced_columns, shared);
    forced_blocks = BlockSum(forced_blocks, shared);
    const auto add_columns = [&](uint32_t low, int shift, int bits) {
      Count(
          scratch.column_ranks, g.sinks, g.columns_end, low, shift, bits,
          [&](int64_t j) { return scratch.column_weights[j]; }, shared);
    };
    const auto add_blocks = [&](uint32_t low, int shift, int bits) {
      Count(
          scratch.block_ranks, g.local_blocks, g.num_blocks, low, shift, bits,
          [&](int64_t b) { return scratch.block_weights[b]; }, shared);
    };
    const float tau_v = s.params.tau_vertical, tau_s = s.params.tau_slash;
    column_cut = tau_v >= 1.0f
                     ? 0
                     : Reach(selection::CumulativeTarget(tau_v, column_sum, forced_columns), shared,
                             add_columns);
    const uint64_t block_sum = offset_sum * static_cast<uint64_t>(g.row_tile);
    block_cut = tau_s >= 1.0f ? 0
                              : Reach(selection::CumulativeTarget(tau_s, block_sum, forced_blocks),
                                      shared, add_blocks);
  } else {
    column_cut = block_cut =
        selection::ThresholdCut(s.params.threshold, s.threshold_scale[blockIdx.x]);
  }
  {
    const auto one = [](int64_t) { return uint64_t{1}; };
    const int64_t min_columns = selection::MinimumCount(s.params.min_vertical_ratio, n, g.sinks);
    const int64_t min_blocks =
        selection::MinimumCount(s.params.min_slash_ratio, g.num_blocks, g.local_blocks);
    column_cut = min(
        column_cut,
        Reach(static_cast<uint64_t>(min_columns), shared, [&](uint32_t low, int shift, int bits) {
          Count(scratch.column_ranks, g.sinks, g.columns_end, low, shift, bits, one, shared);
        }));
    block_cut = min(
        block_cut,
        Reach(static_cast<uint64_t>(min_blocks), shared, [&](uint32_t low, int shift, int bits) {
          Count(scratch.block_ranks, g.local_blocks, g.num_blocks, low, shift, bits, one, shared);
        }));
  }
  if (s.params.max_density < 1.0f) {
    const auto column_pairs = [&](int64_t j) -> uint64_t {
      return scratch.column_ranks[j] >= column_cut ? selection::ColumnPairs(g, j) : 0;
    };
    const auto block_pairs = [&](int64_t b) -> uint64_t {
      return scratch.block_ranks[b] >= block_cut ? selection::BlockPairs(g, b) : 0;
    };
    uint64_t forced = 0, total = 0;
    for (int64_t j = threadIdx.x; j < g.columns_end; j += kThreads) {
      if (j < g.sinks) {
        forced += selection::ColumnPairs(g, j);
      } else {
        total += column_pairs(j);
      }
    }
    for (int64_t b = threadIdx.x; b < g.num_blocks; b += kThreads) {
      if (b < g.local_blocks) {
        forced += selection::BlockPairs(g, b);
      } else {
        total += block_pairs(b);
      }
    }
    forced = BlockSum(forced, shared);
    total = BlockSum(total, shared);
    const int64_t budget =
        selection::PairBudget(g, s.params.max_density, static_cast<int64_t>(forced));
    if (budget < 0) {
      cap_cut = kNothing;
    } else if (total > static_cast<uint64_t>(budget)) {
      cap_cut = 1 + Reach(static_cast<uint64_t>(budget) + 1, shared,
                          [&](uint32_t low, int shift, int bits) {
                            Count(scratch.column_scores, g.sinks, g.columns_end, low, shift, bits,
                                  column_pairs, shared);
                            Count(scratch.block_scores, g.local_blocks, g.num_blocks, low, shift,
                                  bits, block_pairs, shared);
                          });
    }
  }

  // The index.
  int32_t* verticals = s.index.verticals + group * s.index.vertical_stride;
  const int64_t num_verticals = Compact(
      g.columns_end, shared,
      [&](int64_t j) {
        return j < g.sinks ||
               (scratch.column_ranks[j] >= column_cut && scratch.column_scores[j] >= cap_cut);
      },
      [&](int64_t position, int64_t j) { verticals[position] = static_cast<int32_t>(j); },
      [](int64_t, uint32_t) {});
  int32_t* bands = s.index.bands + group * s.index.band_list_stride;
  uint32_t* bits = s.index.band_bits + group * s.index.band_stride;
  const int64_t num_bands = Compact(
      g.num_blocks, shared,
      [&](int64_t b) {
        return b < g.local_blocks ||
               (scratch.block_ranks[b] >= block_cut && scratch.block_scores[b] >= cap_cut);
      },
      [&](int64_t position, int64_t b) { bands[position] = static_cast<int32_t>(b); },
      [&](int64_t word, uint32_t mask) { bits[word] = mask; });
  if (threadIdx.x == 0) {
    s.index.num_verticals[group] = static_cast<int32_t>(num_verticals);
    s.index.num_bands[group] = static_cast<int32_t>(num_bands);
  }
}

}  // namespace

KernelStatus SelectCuda(const SelectionInput& input, const SelectionParams& params, void* workspace,
                        SparseIndexView* index, Stream stream) {
  if (!selection::Supported(input)) return KernelStatus::kUnsupportedShape;
  SelectLaunch s = {};
  s.input = input;
  s.params = params;
  s.geometry = selection::MakeGeometry(input, params);
  index->num_groups = input.num_groups;
  index->dense_from = s.geometry.dense_from;
  s.index = *index;
  s.workspace = static_cast<char*>(workspace);
  s.workspace_stride = Scratch(nullptr, s.geometry.n, s.geometry.num_blocks).bytes;
  if (s.workspace_stride * input.num_groups >
      SelectionWorkspaceBytes(input.num_groups, input.kv_tokens)) {
    return KernelStatus::kUnsupportedShape;
  }
  for (int first = 0; first < input.num_groups; first += kGroupsPerLaunch) {
    const int count = std::min(kGroupsPerLaunch, input.num_groups - first);
    s.first_group = first;
    for (int i = 0; i < count; ++i) {
      s.threshold_scale[i] =
          input.threshold_scale != nullptr ? input.threshold_scale[first + i] : 1.0f;
    }
    SelectKernel<<<count, kThreads, 0, cuda::AsCuda(stream)>>>(s);
  }
  return cuda::LaunchStatus();
}

}  // namespace vsprefill::kernels

// Pair counts of AttentionCuda's tile walk, exact: one block per (row tile, index
// group).
//
// `multiplied` counts what the tensor-core kernel does: 128 packed rows (padding included) times 64
// columns for every step of ColumnWalk.
#include <climits>

#include "kernels/attention.h"
#include "kernels/cuda/launch.h"

namespace vsprefill::kernels {
namespace {

constexpr int kThreads = 128;

struct CountParams {
  SparseIndexView index;
  TileIndexView tiles;  // blocks null: vertical-slash, or dense
  bool dense;
  int group_size, row_tile;
  int64_t q_start, kv_tokens, first_tile;
};

/// Number of the tile's rows (positions row_begin .. row_last) that may see column c.
__device__ int64_t Viewers(int64_t c, int64_t row_begin, int64_t row_last) {
  const int64_t first = c > row_begin ? c : row_begin;
  return row_last >= first ? row_last - first + 1 : 0;
}

__device__ int64_t BlockSum(int64_t value) {
  __shared__ int64_t partial[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t sum = 0;
  for (int i = 0; i < kThreads / 32; ++i) sum += partial[i];
  return sum;
}

__device__ void AtomicAdd(int64_t* target, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(value));
}

/// Adds one row tile of one group.
__device__ void AddCounts(PairCounts* counts, int64_t unmasked, int64_t steps, int64_t all,
                          int group_size) {
  AtomicAdd(&counts->unmasked, unmasked * group_size);
  AtomicAdd(&counts->multiplied, steps * kBandBlock * kPackedRows);
  AtomicAdd(&counts->dense, all * group_size);
}

/// Block-sparse: each thread counts some blocks, then some columns.
__device__ void CountTile(const CountParams& params, int group, int64_t tile, int64_t row_begin,
                          int64_t row_last, PairCounts* counts) {
  const TileIndexView& tiles = params.tiles;
  const uint32_t* blocks = tiles.BlocksOf(group, tile);
  const int64_t first = tile * params.row_tile;
  const int64_t last = first + params.row_tile - 1;
  const int64_t end = last < params.kv_tokens ? last + 1 : params.kv_tokens;  // as ColumnWalk
  const int64_t mean_blocks = tiles.k_means != nullptr ? first / kKeyBlock : 0;
  int64_t unmasked = 0, halves = 0, means = 0, columns = 0;
  for (int64_t b = threadIdx.x; b * kKeyBlock < end; b += kThreads) {
    if (!TestBit(blocks, b)) {
      means += b < mean_blocks;
      continue;
    }
    halves += b * kKeyBlock + kBandBlock < end ? 2 : 1;
    for (int64_t c = b * kKeyBlock; c < (b + 1) * kKeyBlock && c <= row_last; ++c) {
      unmasked += Viewers(c, row_begin, row_last);
    }
  }
  if (tiles.columns != nullptr) {
    const uint32_t* single = tiles.ColumnsOf(group, tile);
    for (int64_t c = threadIdx.x; c < end; c += kThreads) {
      if (!TestBit(single, c) || TestBit(blocks, c / kKeyBlock)) continue;
      ++columns;
      unmasked += Viewers(c, row_begin, row_last);
    }
  }
  unmasked = BlockSum(unmasked);
  halves = BlockSum(halves);
  means = BlockSum(means);
  columns = BlockSum(columns);
  if (threadIdx.x == 0) {
    const int64_t rows = row_last - row_begin + 1;
    const int64_t steps =
        halves + (columns + kBandBlock - 1) / kBandBlock + (means + kBandBlock - 1) / kBandBlock;
    AddCounts(counts, unmasked, steps, (row_begin + row_last + 2) * rows / 2, params.group_size);
  }
}

__global__ void __launch_bounds__(kThreads)
    CountPairsKernel(const __grid_constant__ CountParams params, PairCounts* counts) {
  const int group = blockIdx.y;
  const int64_t first = (params.first_tile + blockIdx.x) * params.row_tile;
  const int64_t last = first + params.row_tile - 1;
  const int64_t row_begin = first > params.q_start ? first : params.q_start;
  const int64_t row_last = (last < params.kv_tokens ? last : params.kv_tokens - 1);
  const int64_t rows = row_last - row_begin + 1;
  const int64_t all = (row_begin + row_last + 2) * rows / 2;
  if (params.tiles.blocks != nullptr) {
    CountTile(params, group, params.first_tile + blockIdx.x, row_begin, row_last, counts);
    return;
  }
  if (!params.dense && blockIdx.x == 0 && threadIdx.x == 0) {
    AtomicAdd(&counts->indexes, 1);
    AtomicAdd(&counts->vertical_columns, params.index.num_verticals[group]);
    AtomicAdd(&counts->slash_diagonals, int64_t{params.index.num_bands[group]} * kBandBlock);
  }
  if (params.dense || last >= params.index.dense_from) {
    if (threadIdx.x == 0) {
      AddCounts(counts, all, last / kBandBlock + 1, all, params.group_size);
    }
    return;
  }
  const SparseIndexView& index = params.index;
  int64_t unmasked = 0, bands = 0, columns = 0;
  const int num_bands = index.num_bands[group];
  for (int i = threadIdx.x; i < num_bands; i += kThreads) {
    const int64_t right =
        last - int64_t{index.bands[group * index.band_list_stride + i]} * kBandBlock;
    if (right < 0) break;
    ++bands;
    const int64_t left = right - kBandBlock + 1 > 0 ? right - kBandBlock + 1 : 0;
    if (right <= row_begin) {
      unmasked += (right - left + 1) * rows;
    } else {
      for (int64_t c = left; c <= right; ++c) unmasked += Viewers(c, row_begin, row_last);
    }
  }
  const int num_verticals = index.num_verticals[group];
  const uint32_t* bits = index.band_bits + group * index.band_stride;
  for (int i = threadIdx.x; i < num_verticals; i += kThreads) {
    const int64_t c = index.verticals[group * index.vertical_stride + i];
    if (c > last) break;
    const int64_t block = (last - c) / kBandBlock;
    if ((bits[block >> 5] >> (block & 31)) & 1) continue;
    ++columns;
    unmasked += Viewers(c, row_begin, row_last);
  }
  unmasked = BlockSum(unmasked);
  bands = BlockSum(bands);
  columns = BlockSum(columns);
  if (threadIdx.x == 0) {
    const int64_t steps = bands + (columns + kBandBlock - 1) / kBandBlock;
    AddCounts(counts, unmasked, steps, all, params.group_size);
  }
}

}  // namespace

KernelStatus CountPairsCuda(const AttentionShape& shape, const AttentionSequence& s,
                            PairCounts* counts, Stream stream) {
  if (shape.num_kv_heads <= 0 || shape.num_q_heads % shape.num_kv_heads != 0 ||
      shape.group_size() > kPackedRows || s.kv_tokens >= (int64_t{1} << 30) ||
      !SupportedIndex(shape, s)) {
    return KernelStatus::kUnsupportedShape;
  }
  if (s.q_tokens == 0) return KernelStatus::kOk;
  CountParams params = {};
  params.dense = s.dense();
  if (s.index != nullptr) params.index = *s.index;
  if (s.tiles != nullptr) params.tiles = *s.tiles;
  const int num_groups = IndexGroups(shape, s);
  params.group_size = shape.num_q_heads / num_groups;
  params.row_tile = RowTilePositions(params.group_size);
  params.q_start = s.kv_tokens - s.q_tokens;
  params.kv_tokens = s.kv_tokens;
  params.first_tile = params.q_start / params.row_tile;
  const int64_t tiles = (s.kv_tokens - 1) / params.row_tile + 1 - params.first_tile;
  const dim3 grid(static_cast<unsigned>(tiles), num_groups);
  CountPairsKernel<<<grid, kThreads, 0, cuda::AsCuda(stream)>>>(params, counts);
  return cuda::LaunchStatus();
}

}  // namespace vsprefill::kernels

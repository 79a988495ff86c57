// Selection on the device, without a sort and without the host: the rules of kernels/selection.h,
// bit for bit what SelectCpu gives. All sums are integers, so the order in which threads add does
// not matter.
//
// A team of threads works on each KV group: one block (select.cu) or a cluster of blocks
// (sm90/select_sm90.cu). Steps: weights; scores; cuts by radix histograms over the score bits
// (three levels of 11, 11 and 9 bits, so exact); compaction. Columns and blocks of distances go
// through the steps side by side.
//
// A team type has: int rank(), number of this block in the team; int size(), blocks, at most
// kMaxTeam; Sync(), a barrier that makes shared and global writes visible to the team;
// In(rank, pointer), the place in that block's shared memory of an object in this one's.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/select_kernels.h"

namespace vsprefill::kernels::cuda {

inline constexpr int kSelectThreads = 1024;  // of a block
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kMaxTeam = 8;

namespace select {

using selection::Geometry;
using selection::kNothing;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBins = 2048;

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

/// One number of the columns (vertical logits) and one of the blocks (slash logits).
struct Pair {
  uint64_t columns, blocks;
};

/// A 64-bit sum in two words: shared memory adds words by itself, 64 bits in a loop of exchanges.
struct Bin {
  uint32_t low, high;

  __device__ uint64_t Get() const { return uint64_t{high} << 32 | low; }
  __device__ void Set(uint64_t value) {
    low = static_cast<uint32_t>(value);
    high = static_cast<uint32_t>(value >> 32);
  }
  __device__ void Add(uint64_t value) {
    const uint32_t word = static_cast<uint32_t>(value);
    uint32_t rest = static_cast<uint32_t>(value >> 32);
    if (word != 0) {
      const uint32_t before = atomicAdd(&low, word);
      if (before + word < before) ++rest;  // carry
    }
    if (rest != 0) atomicAdd(&high, rest);
  }
};

struct Shared {
  Bin histogram[kBins];
  Pair partial[kSelectWarps];
  Pair exchange[2];
  uint64_t above;  // amount above the bin found
  uint32_t low;    // first key of the bin found
};

__device__ inline uint64_t WarpSum(uint64_t value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

struct Add {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Larger {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

/// Order-preserving integer of any float but NaN, and the way back.
__device__ inline uint32_t OrderKey(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float FromOrderKey(uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

/// Selects for one group.
template <typename Team>
class Selector {
 public:
  __device__ Selector(const SelectLaunch& launch, int number, Shared& shared, const Team& team)
      : s_(launch),
        g_(launch.geometry),
        group_(launch.first_group + number),
        threshold_scale_(launch.threshold_scale[number]),
        shared_(shared),
        team_(team),
        scratch_(launch.workspace + group_ * launch.workspace_stride, g_.n, g_.num_blocks),
        thread_(team.rank() * kSelectThreads + static_cast<int>(threadIdx.x)),
        threads_(team.size() * kSelectThreads),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {
    if (!cumulative()) {
      scratch_.column_ranks = scratch_.column_scores;
      scratch_.block_ranks = scratch_.block_scores;
    }
  }

  __device__ void Run() {
    Weights();
    LocalMass();
    BlockScores();
    team_.Sync();
    ColumnScores();
    if (cumulative()) {
      CumulativeCuts();
    } else {
      column_cut_ = block_cut_ = selection::ThresholdCut(s_.params.threshold, threshold_scale_);
      team_.Sync();
    }
    ApplyMinima();
    if (s_.params.max_density < 1.0f) ApplyCap();
    WriteIndex();
  }

 private:
  __device__ bool cumulative() const { return s_.params.rule == SelectionRule::kCumulative; }

  /// Both reduced over the team, for every thread; a barrier. `op` of 0 and x is x.
  template <typename Op>
  __device__ Pair Reduce(Pair value, const Op& op) {
    const auto reduce_warp = [&] {
      for (int offset = 16; offset > 0; offset /= 2) {
        value.columns = op(value.columns, __shfl_xor_sync(kAllLanes, value.columns, offset));
        value.blocks = op(value.blocks, __shfl_xor_sync(kAllLanes, value.blocks, offset));
      }
    };
    reduce_warp();
    __syncthreads();
    if (lane_ == 0) shared_.partial[warp_] = value;
    __syncthreads();
    value = shared_.partial[lane_];
    reduce_warp();
    if (team_.size() == 1) return value;
    value = Exchange(value);
    reduce_warp();
    return value;
  }

  /// Publishes this block's value; lane r gets that of block r, the others zeros. A barrier.
  __device__ Pair Exchange(Pair value) {
    // Two places in turn: a block writes one again only after a barrier that follows all reads.
    Pair* const place = &shared_.exchange[exchanges_++ % 2];
    if (threadIdx.x == 0) *place = value;
    team_.Sync();
    return lane_ < team_.size() ? *team_.In(lane_, place) : Pair{0, 0};
  }

  __device__ void Weights() {
    const float* vertical = s_.input.vertical_logits + group_ * s_.input.logit_stride;
    const float* slash = s_.input.slash_logits + group_ * s_.input.logit_stride;
    uint32_t column_key = 0, offset_key = 0;
    for (int64_t i = thread_; i < g_.n; i += threads_) {
      column_key = max(column_key, OrderKey(selection::Sanitize(vertical[i])));
      offset_key = max(offset_key, OrderKey(selection::Sanitize(slash[i])));
    }
    const Pair keys = Reduce({column_key, offset_key}, Larger());
    const float column_max = FromOrderKey(static_cast<uint32_t>(keys.columns));
    const float offset_max = FromOrderKey(static_cast<uint32_t>(keys.blocks));
    Pair sums = {0, 0};
    for (int64_t i = thread_; i < g_.n; i += threads_) {
      const uint64_t column = selection::Weight(selection::Sanitize(vertical[i]), column_max);
      const uint64_t offset = selection::Weight(selection::Sanitize(slash[i]), offset_max);
      scratch_.column_weights[i] = column;
      scratch_.offset_weights[i] = offset;
      sums.columns += column;
      sums.blocks += offset;
    }
    sums_ = Reduce(sums, Add());
  }

  /// Prefix sums of the mass that the local band's offsets give an average column; one block.
  __device__ void LocalMass() {
    if (team_.rank() != 0) return;
    const int64_t width = min(g_.n, g_.local_width);
    const double unit = selection::OffsetUnit(g_.n, sums_.blocks);
    uint64_t carry = 0;
    for (int64_t first = 0; first < width; first += kSelectThreads) {
      const int64_t o = first + threadIdx.x;
      uint64_t mass =
          o < width ? selection::OffsetMass(scratch_.offset_weights[o], g_.n, o, unit) : 0;
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t left = __shfl_up_sync(kAllLanes, mass, offset);
        if (lane_ >= offset) mass += left;
      }
      __syncthreads();
      if (lane_ == 31) shared_.partial[warp_].columns = mass;
      __syncthreads();
      const uint64_t of_warp = shared_.partial[lane_].columns;
      mass += carry + WarpSum(lane_ < warp_ ? of_warp : 0);
      carry += WarpSum(of_warp);
      if (o < width) scratch_.local_mass[o + 1] = mass;
    }
    if (threadIdx.x == 0) scratch_.local_mass[0] = 0;
  }

  /// One warp per block of distances.
  __device__ void BlockScores() {
    const double unit = selection::BlockUnit(g_, sums_.blocks);
    for (int64_t b = thread_ / 32; b < g_.num_blocks; b += threads_ / 32) {
      const int64_t begin = max(int64_t{0}, b * kBandBlock - g_.row_tile + 1);
      const int64_t end = min(g_.n, (b + 1) * kBandBlock);
      uint64_t weight = 0;
      for (int64_t o = begin + lane_; o < end; o += 32) {
        weight += scratch_.offset_weights[o] *
                  static_cast<uint64_t>(selection::BlockOverlap(b, o, g_.row_tile));
      }
      weight = WarpSum(weight);
      if (lane_ == 0) {
        scratch_.block_weights[b] = weight;
        scratch_.block_scores[b] = selection::Key(selection::BlockScore(weight, g_, b, unit));
      }
    }
  }

  __device__ void ColumnScores() {
    const int64_t width = min(g_.n, g_.local_width);
    const double unit = selection::OffsetUnit(g_.n, sums_.columns);
    for (int64_t j = g_.sinks + thread_; j < g_.columns_end; j += threads_) {
      scratch_.column_scores[j] = selection::Key(selection::ColumnScore(
          scratch_.column_weights[j], g_, j, unit, scratch_.local_mass[min(width, g_.n - j)]));
    }
  }

  __device__ void CumulativeCuts() {
    Pair forced = {0, 0};
    for (int64_t j = thread_; j < g_.n; j += threads_) {
      const uint64_t weight = scratch_.column_weights[j];
      if (j < g_.sinks || j >= g_.columns_end) {
        forced.columns += weight;
      } else {
        scratch_.column_ranks[j] = selection::Key(selection::WeightScore(weight));
      }
    }
    for (int64_t b = thread_; b < g_.num_blocks; b += threads_) {
      const uint64_t weight = scratch_.block_weights[b];
      if (b < g_.local_blocks) {
        forced.blocks += weight;
      } else {
        scratch_.block_ranks[b] = selection::Key(selection::WeightScore(weight));
      }
    }
    forced = Reduce(forced, Add());
    const float tau_v = s_.params.tau_vertical, tau_s = s_.params.tau_slash;
    if (tau_v < 1.0f) {
      column_cut_ = Reach(selection::CumulativeTarget(tau_v, sums_.columns, forced.columns),
                          [&](uint32_t low, int shift, int bits) {
                            CountColumns(scratch_.column_ranks, low, shift, bits,
                                         [&](int64_t j) { return scratch_.column_weights[j]; });
                          });
    }
    if (tau_s < 1.0f) {
      const uint64_t sum = sums_.blocks * static_cast<uint64_t>(g_.row_tile);
      block_cut_ = Reach(selection::CumulativeTarget(tau_s, sum, forced.blocks),
                         [&](uint32_t low, int shift, int bits) {
                           CountBlocks(scratch_.block_ranks, low, shift, bits,
                                       [&](int64_t b) { return scratch_.block_weights[b]; });
                         });
    }
  }

  /// Lowers the cuts until enough candidates of each kind are in.
  __device__ void ApplyMinima() {
    const auto one = [](int64_t) { return uint64_t{1}; };
    const int64_t columns = selection::MinimumCount(s_.params.min_vertical_ratio, g_.n, g_.sinks);
    const int64_t blocks =
        selection::MinimumCount(s_.params.min_slash_ratio, g_.num_blocks, g_.local_blocks);
    column_cut_ = min(column_cut_,
                      Reach(static_cast<uint64_t>(columns), [&](uint32_t low, int shift, int bits) {
                        CountColumns(scratch_.column_ranks, low, shift, bits, one);
                      }));
    block_cut_ = min(block_cut_,
                     Reach(static_cast<uint64_t>(blocks), [&](uint32_t low, int shift, int bits) {
                       CountBlocks(scratch_.block_ranks, low, shift, bits, one);
                     }));
  }

  /// Raises both cuts together until the estimated density is within the cap.
  __device__ void ApplyCap() {
    const auto column_pairs = [&](int64_t j) -> uint64_t {
      return scratch_.column_ranks[j] >= column_cut_ ? selection::ColumnPairs(g_, j) : 0;
    };
    const auto block_pairs = [&](int64_t b) -> uint64_t {
      return scratch_.block_ranks[b] >= block_cut_ ? selection::BlockPairs(g_, b) : 0;
    };
    uint64_t forced = 0, total = 0;
    for (int64_t j = thread_; j < g_.columns_end; j += threads_) {
      if (j < g_.sinks) {
        forced += selection::ColumnPairs(g_, j);
      } else {
        total += column_pairs(j);
      }
    }
    for (int64_t b = thread_; b < g_.num_blocks; b += threads_) {
      if (b < g_.local_blocks) {
        forced += selection::BlockPairs(g_, b);
      } else {
        total += block_pairs(b);
      }
    }
    const Pair sums = Reduce({forced, total}, Add());
    const int64_t budget =
        selection::PairBudget(g_, s_.params.max_density, static_cast<int64_t>(sums.columns));
    if (budget < 0) {
      cap_cut_ = kNothing;
    } else if (sums.blocks > static_cast<uint64_t>(budget)) {
      cap_cut_ =
          1 + Reach(static_cast<uint64_t>(budget) + 1, [&](uint32_t low, int shift, int bits) {
            CountColumns(scratch_.column_scores, low, shift, bits, column_pairs);
            CountBlocks(scratch_.block_scores, low, shift, bits, block_pairs);
          });
    }
  }

  /// Adds candidates whose key lies in [low, low + 2^bits * 2^shift) to this block's histogram.
  template <typename Amount>
  __device__ void Count(const uint32_t* keys, int64_t begin, int64_t end, uint32_t low, int shift,
                        int bits, const Amount& amount) {
    for (int64_t i = begin + thread_; i < end; i += threads_) {
      if (keys[i] < low) continue;
      const uint32_t bin = (keys[i] - low) >> shift;
      if (bin < (1u << bits)) shared_.histogram[bin].Add(amount(i));
    }
  }
  template <typename Amount>
  __device__ void CountColumns(const uint32_t* keys, uint32_t low, int shift, int bits,
                               const Amount& amount) {
    Count(keys, g_.sinks, g_.columns_end, low, shift, bits, amount);
  }
  template <typename Amount>
  __device__ void CountBlocks(const uint32_t* keys, uint32_t low, int shift, int bits,
                              const Amount& amount) {
    Count(keys, g_.local_blocks, g_.num_blocks, low, shift, bits, amount);
  }

  /// The largest cut for which {key >= cut} reaches `target`; kNothing for 0, 0 if all is not
  /// enough. count(low, shift, bits) counts the candidates of a range of keys.
  template <typename CountRange>
  __device__ uint32_t Reach(uint64_t target, const CountRange& count) {
    if (target == 0) return kNothing;
    uint32_t low = 0;
    uint64_t above = 0;
    for (int level = 0; level < 3; ++level) {
      const int shift = level == 0 ? 20 : level == 1 ? 9 : 0;
      const int bits = level == 2 ? 9 : 11;
      __syncthreads();
      for (int i = threadIdx.x; i < kBins; i += kSelectThreads) shared_.histogram[i].Set(0);
      __syncthreads();
      count(low, shift, bits);
      team_.Sync();
      if (team_.rank() == 0) {
        AddHistograms();
        if (warp_ == 0) FindBin(target, low, shift, above);
      }
      team_.Sync();
      low = *team_.In(0, &shared_.low);
      above = *team_.In(0, &shared_.above);
      if (low == kNothing) return 0;  // only at the first level: later ones hold the amount found
    }
    return low;
  }

  /// Adds the other blocks' histograms to this one's.
  __device__ void AddHistograms() {
    if (team_.size() == 1) return;
    for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) {
      uint64_t sum = 0;
      for (int rank = 0; rank < team_.size(); ++rank) {
        sum += team_.In(rank, &shared_.histogram[bin])->Get();
      }
      shared_.histogram[bin].Set(sum);
    }
    __syncthreads();
  }

  /// Walks the bins from the top until `target` is reached. One warp; lane 0 has the highest bins.
  __device__ void FindBin(uint64_t target, uint32_t low, int shift, uint64_t above) {
    constexpr int kBinsPerLane = kBins / 32;
    const int top = kBins - 1 - lane_ * kBinsPerLane;
    uint64_t own = 0;
    for (int i = 0; i < kBinsPerLane; ++i) own += shared_.histogram[top - i].Get();
    uint64_t upto = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t left = __shfl_up_sync(kAllLanes, upto, offset);
      if (lane_ >= offset) upto += left;
    }
    const unsigned reached = __ballot_sync(kAllLanes, above + upto >= target);
    if (reached == 0) {
      if (lane_ == 0) shared_.low = kNothing;
    } else if (lane_ == __ffs(reached) - 1) {
      uint64_t sum = above + upto - own;
      int bin = top;
      while (sum + shared_.histogram[bin].Get() < target) sum += shared_.histogram[bin--].Get();
      shared_.low = low + (static_cast<uint32_t>(bin) << shift);
      shared_.above = sum;
    }
  }

  __device__ bool KeepColumn(int64_t j) const {
    return j < g_.columns_end && (j < g_.sinks || (scratch_.column_ranks[j] >= column_cut_ &&
                                                   scratch_.column_scores[j] >= cap_cut_));
  }
  __device__ bool KeepBlock(int64_t b) const {
    return b < g_.num_blocks && (b < g_.local_blocks || (scratch_.block_ranks[b] >= block_cut_ &&
                                                         scratch_.block_scores[b] >= cap_cut_));
  }

  /// This warp's contiguous share of [0, count), in whole words of 32.
  struct Share {
    int64_t begin, end;
  };
  __device__ Share ShareOf(int64_t count) const {
    const int64_t words = (count + 31) / 32;
    const int64_t per_warp = (words + threads_ / 32 - 1) / (threads_ / 32);
    const int64_t begin = thread_ / 32 * per_warp * 32;
    return {begin, min(begin + per_warp * 32, words * 32)};
  }

  __device__ void WriteIndex() {
    const Share columns = ShareOf(g_.columns_end), blocks = ShareOf(g_.num_blocks);
    Pair own = {0, 0};
    for (int64_t j = columns.begin + lane_; j < columns.end; j += 32) own.columns += KeepColumn(j);
    for (int64_t b = blocks.begin + lane_; b < blocks.end; b += 32) own.blocks += KeepBlock(b);
    own = {WarpSum(own.columns), WarpSum(own.blocks)};
    __syncthreads();
    if (lane_ == 0) shared_.partial[warp_] = own;
    __syncthreads();
    const Pair of_warp = shared_.partial[lane_];
    Pair before = {WarpSum(lane_ < warp_ ? of_warp.columns : 0),
                   WarpSum(lane_ < warp_ ? of_warp.blocks : 0)};
    Pair total = {WarpSum(of_warp.columns), WarpSum(of_warp.blocks)};
    if (team_.size() > 1) {
      const Pair of_block = Exchange(total);
      const bool lower = lane_ < team_.rank();
      before.columns += WarpSum(lower ? of_block.columns : 0);
      before.blocks += WarpSum(lower ? of_block.blocks : 0);
      total = {WarpSum(of_block.columns), WarpSum(of_block.blocks)};
    }

    int32_t* verticals = s_.index.verticals + group_ * s_.index.vertical_stride;
    int32_t* bands = s_.index.bands + group_ * s_.index.band_list_stride;
    uint32_t* bits = s_.index.band_bits + group_ * s_.index.band_stride;
    const unsigned lower_lanes = (1u << lane_) - 1;
    for (int64_t j = columns.begin + lane_; j < columns.end; j += 32) {
      const bool kept = KeepColumn(j);
      const unsigned mask = __ballot_sync(kAllLanes, kept);
      if (kept) verticals[before.columns + __popc(mask & lower_lanes)] = static_cast<int32_t>(j);
      before.columns += __popc(mask);
    }
    for (int64_t b = blocks.begin + lane_; b < blocks.end; b += 32) {
      const bool kept = KeepBlock(b);
      const unsigned mask = __ballot_sync(kAllLanes, kept);
      if (kept) bands[before.blocks + __popc(mask & lower_lanes)] = static_cast<int32_t>(b);
      if (lane_ == 0) bits[b / 32] = mask;
      before.blocks += __popc(mask);
    }
    if (thread_ == 0) {
      s_.index.num_verticals[group_] = static_cast<int32_t>(total.columns);
      s_.index.num_bands[group_] = static_cast<int32_t>(total.blocks);
    }
    team_.Sync();  // no block leaves while another may read its shared memory
  }

  const SelectLaunch& s_;
  const Geometry& g_;
  const int group_;
  const float threshold_scale_;
  Shared& shared_;
  const Team team_;
  Scratch scratch_;
  const int thread_, threads_;  // in the team
  const int lane_, warp_;       // in the block
  int exchanges_ = 0;
  Pair sums_ = {0, 0};  // of all weights
  uint32_t column_cut_ = 0, block_cut_ = 0, cap_cut_ = 0;
};

}  // namespace select
}  // namespace vsprefill::kernels::cuda

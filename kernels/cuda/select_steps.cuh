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

/// One number of the columns (vertical logits) and one of the blocks (slash logits).
struct Pair {
  uint64_t columns, blocks;
};

/// A 64-bit sum in two words: shared memory adds words by itself, 64 bits in a loop of exchanges.
struct Bin {
  uint32_t low, high;

  __device__ uint64_t Get() const { return uint64_t{high} << 32 | low; }
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

struct alignas(16) BinPair {
  Bin first, second;
};

struct Shared {
  alignas(16) Bin histogram[kBins];
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
        scratch_(launch.workspace + group_ * launch.scratch.bytes),
        thread_(team.rank() * kSelectThreads + static_cast<int>(threadIdx.x)),
        threads_(team.size() * kSelectThreads),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {}

  __device__ void Run() {
    Weights();
    LocalMass();
    BlockScores();
    team_.Sync();
    ColumnScores();
    if (cumulative()) {
      Ranks();
    } else {
      column_cut_ = block_cut_ = selection::ThresholdCut(s_.params.threshold, threshold_scale_);
      team_.Sync();
    }
    Cuts();
    WriteIndex();
  }

 private:
  /// What is counted to find a cut, in this order.
  enum Measure { kColumnMass, kBlockMass, kColumnCount, kBlockCount, kPairs };

  // Scratch: see ScratchLayout.
  template <typename T>
  __device__ T* At(int64_t offset) const {
    return reinterpret_cast<T*>(scratch_ + offset);
  }
  __device__ uint64_t* column_weights() const { return At<uint64_t>(s_.scratch.column_weights); }
  __device__ uint64_t* offset_weights() const { return At<uint64_t>(s_.scratch.offset_weights); }
  __device__ uint64_t* local_mass() const { return At<uint64_t>(s_.scratch.local_mass); }
  __device__ uint64_t* block_weights() const { return At<uint64_t>(s_.scratch.block_weights); }
  __device__ uint32_t* column_scores() const { return At<uint32_t>(s_.scratch.column_scores); }
  __device__ uint32_t* column_ranks() const { return At<uint32_t>(s_.scratch.column_ranks); }
  __device__ uint32_t* block_scores() const { return At<uint32_t>(s_.scratch.block_scores); }
  __device__ uint32_t* block_ranks() const { return At<uint32_t>(s_.scratch.block_ranks); }

  // Sizes, below 2^31.
  __device__ int n() const { return static_cast<int>(g_.n); }
  __device__ int blocks() const { return static_cast<int>(g_.num_blocks); }
  __device__ int sinks() const { return static_cast<int>(g_.sinks); }
  __device__ int columns_end() const { return static_cast<int>(g_.columns_end); }
  __device__ int local_blocks() const { return static_cast<int>(g_.local_blocks); }

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

  /// Inclusive prefix sum over this block's threads.
  __device__ uint64_t BlockScan(uint64_t value) {
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t left = __shfl_up_sync(kAllLanes, value, offset);
      if (lane_ >= offset) value += left;
    }
    __syncthreads();
    if (lane_ == 31) shared_.partial[warp_].columns = value;
    __syncthreads();
    return value + WarpSum(lane_ < warp_ ? shared_.partial[lane_].columns : 0);
  }

  __device__ void Weights() {
    const float* vertical = s_.input.vertical_logits + group_ * s_.input.logit_stride;
    const float* slash = s_.input.slash_logits + group_ * s_.input.logit_stride;
    uint32_t column_key = 0, offset_key = 0;
    for (int i = thread_; i < n(); i += threads_) {
      column_key = max(column_key, OrderKey(selection::Sanitize(vertical[i])));
      offset_key = max(offset_key, OrderKey(selection::Sanitize(slash[i])));
    }
    const Pair keys = Reduce({column_key, offset_key}, Larger());
    const float column_max = FromOrderKey(static_cast<uint32_t>(keys.columns));
    const float offset_max = FromOrderKey(static_cast<uint32_t>(keys.blocks));
    Pair sums = {0, 0};
#pragma unroll 1
    for (int i = thread_; i < n(); i += threads_) {
      const uint64_t column = selection::Weight(selection::Sanitize(vertical[i]), column_max);
      const uint64_t offset = selection::Weight(selection::Sanitize(slash[i]), offset_max);
      column_weights()[i] = column;
      offset_weights()[i] = offset;
      sums.columns += column;
      sums.blocks += offset;
    }
    sums_ = Reduce(sums, Add());
  }

  /// Prefix sums of the mass that the local band's offsets give an average column; one block.
  __device__ void LocalMass() {
    if (team_.rank() != 0) return;
    const int width = static_cast<int>(min(g_.n, g_.local_width));
    const double unit = selection::OffsetUnit(g_.n, sums_.blocks);
    uint64_t carry = 0;
#pragma unroll 1
    for (int first = 0; first < width; first += kSelectThreads) {
      const int o = first + static_cast<int>(threadIdx.x);
      const uint64_t mass =
          o < width ? selection::OffsetMass(offset_weights()[o], g_.n, o, unit) : 0;
      const uint64_t sum = carry + BlockScan(mass);
      if (o < width) local_mass()[o + 1] = sum;
      // The last thread's sum goes on to the next round.
      __syncthreads();
      if (threadIdx.x == kSelectThreads - 1) shared_.above = sum;
      __syncthreads();
      carry = shared_.above;
    }
    if (threadIdx.x == 0) local_mass()[0] = 0;
  }

  /// One warp per block of distances.
  __device__ void BlockScores() {
    const double unit = selection::BlockUnit(g_, sums_.blocks);
#pragma unroll 1
    for (int b = thread_ / 32; b < blocks(); b += threads_ / 32) {
      const int begin = max(0, b * kBandBlock - static_cast<int>(g_.row_tile) + 1);
      const int end = min(n(), (b + 1) * kBandBlock);
      uint64_t weight = 0;
      for (int o = begin + lane_; o < end; o += 32) {
        weight +=
            offset_weights()[o] * static_cast<uint64_t>(selection::BlockOverlap(b, o, g_.row_tile));
      }
      weight = WarpSum(weight);
      if (lane_ == 0) {
        block_weights()[b] = weight;
        block_scores()[b] = selection::Key(selection::BlockScore(weight, g_, b, unit));
      }
    }
  }

  __device__ void ColumnScores() {
    const int width = static_cast<int>(min(g_.n, g_.local_width));
    const double unit = selection::OffsetUnit(g_.n, sums_.columns);
#pragma unroll 1
    for (int j = sinks() + thread_; j < columns_end(); j += threads_) {
      column_scores()[j] = selection::Key(selection::ColumnScore(
          column_weights()[j], g_, j, unit, local_mass()[min(width, n() - j)]));
    }
  }

  /// Ranks of kCumulative, and the mass of the forced part.
  __device__ void Ranks() {
    Pair forced = {0, 0};
    for (int j = thread_; j < n(); j += threads_) {
      const uint64_t weight = column_weights()[j];
      if (j < sinks() || j >= columns_end()) {
        forced.columns += weight;
      } else {
        column_ranks()[j] = selection::Key(selection::WeightScore(weight));
      }
    }
    for (int b = thread_; b < blocks(); b += threads_) {
      const uint64_t weight = block_weights()[b];
      if (b < local_blocks()) {
        forced.blocks += weight;
      } else {
        block_ranks()[b] = selection::Key(selection::WeightScore(weight));
      }
    }
    forced_ = Reduce(forced, Add());
  }

  /// Cuts by the rule, then lowered by the minima, then raised by the cap.
  __device__ void Cuts() {
#pragma unroll 1  // one copy of Reach: cold instructions cost more than the loop
    for (int measure = cumulative() ? kColumnMass : kColumnCount; measure <= kPairs; ++measure) {
      const uint64_t target = Target(measure);
      const uint32_t cut = target == 0 ? kNothing : Reach(target, measure);
      switch (measure) {
        case kColumnMass:
          column_cut_ = s_.params.tau_vertical < 1.0f ? cut : 0;
          break;
        case kBlockMass:
          block_cut_ = s_.params.tau_slash < 1.0f ? cut : 0;
          break;
        case kColumnCount:
          column_cut_ = min(column_cut_, cut);
          break;
        case kBlockCount:
          block_cut_ = min(block_cut_, cut);
          break;
        default:
          if (target != 0) cap_cut_ = 1 + cut;
      }
    }
  }

  /// What the candidates have to reach; 0: nothing, which for kPairs means that the cap is no limit
  /// (or that it leaves nothing, and cap_cut_ is set).
  __device__ uint64_t Target(int measure) {
    const SelectionParams& params = s_.params;
    switch (measure) {
      case kColumnMass:
        return params.tau_vertical < 1.0f ? selection::CumulativeTarget(
                                                params.tau_vertical, sums_.columns, forced_.columns)
                                          : 0;
      case kBlockMass:
        return params.tau_slash < 1.0f
                   ? selection::CumulativeTarget(params.tau_slash,
                                                 sums_.blocks * static_cast<uint64_t>(g_.row_tile),
                                                 forced_.blocks)
                   : 0;
      case kColumnCount:
        return selection::MinimumCount(params.min_vertical_ratio, g_.n, g_.sinks);
      case kBlockCount:
        return selection::MinimumCount(params.min_slash_ratio, g_.num_blocks, g_.local_blocks);
      default:
        return params.max_density < 1.0f ? PairsOverBudget() : 0;
    }
  }

  /// One more than the pairs left for candidates, or 0 if those inside the cuts are not more.
  __device__ uint64_t PairsOverBudget() {
    uint64_t forced = 0, total = 0;
    for (int j = thread_; j < columns_end(); j += threads_) {
      if (j < sinks()) {
        forced += selection::ColumnPairs(g_, j);
      } else {
        total += Amount(kPairs, true, j);
      }
    }
    for (int b = thread_; b < blocks(); b += threads_) {
      if (b < local_blocks()) {
        forced += selection::BlockPairs(g_, b);
      } else {
        total += Amount(kPairs, false, b);
      }
    }
    const Pair sums = Reduce({forced, total}, Add());
    const int64_t budget =
        selection::PairBudget(g_, s_.params.max_density, static_cast<int64_t>(sums.columns));
    if (budget < 0) {
      cap_cut_ = kNothing;
      return 0;
    }
    return sums.blocks > static_cast<uint64_t>(budget) ? static_cast<uint64_t>(budget) + 1 : 0;
  }

  /// What candidate column or block `i` contributes.
  __device__ uint64_t Amount(int measure, bool column, int i) const {
    switch (measure) {
      case kColumnMass:
        return column_weights()[i];
      case kBlockMass:
        return block_weights()[i];
      case kPairs:
        if (column) {
          return column_ranks()[i] >= column_cut_ ? selection::ColumnPairs(g_, i) : 0;
        }
        return block_ranks()[i] >= block_cut_ ? selection::BlockPairs(g_, i) : 0;
      default:
        return 1;
    }
  }

  /// Adds candidates whose key lies in [low, low + 2^bits * 2^shift) to this block's histogram.
  __device__ void Count(int measure, uint32_t low, int shift, int bits) {
    const auto count = [&](const uint32_t* keys, int begin, int end, bool column) {
      for (int i = begin + thread_; i < end; i += threads_) {
        if (keys[i] < low) continue;
        const uint32_t bin = (keys[i] - low) >> shift;
        if (bin < (1u << bits)) shared_.histogram[bin].Add(Amount(measure, column, i));
      }
    };
    // The cap ranks both kinds together, by score; each kind's own rule ranks it by itself.
    if (measure != kBlockMass && measure != kBlockCount) {
      count(measure == kPairs ? column_scores() : column_ranks(), sinks(), columns_end(), true);
    }
    if (measure != kColumnMass && measure != kColumnCount) {
      count(measure == kPairs ? block_scores() : block_ranks(), local_blocks(), blocks(), false);
    }
  }

  /// The largest cut for which {key >= cut} reaches `target` > 0; 0 if all is not enough.
  __device__ uint32_t Reach(uint64_t target, int measure) {
    uint32_t low = 0;
    uint64_t above = 0;
#pragma unroll 1
    for (int level = 0; level < 3; ++level) {
      const int shift = level == 0 ? 20 : level == 1 ? 9 : 0;
      const int bits = level == 2 ? 9 : 11;
      __syncthreads();
      for (int i = threadIdx.x; i < kBins; i += kSelectThreads) shared_.histogram[i] = {0, 0};
      __syncthreads();
      Count(measure, low, shift, bits);
      team_.Sync();
      if (team_.rank() == 0) FindBin(target, low, shift, above);
      team_.Sync();
      low = shared_.low;
      above = shared_.above;
      if (low == kNothing) return 0;  // only at the first level: later ones hold the amount found
    }
    return low;
  }

  /// Walks the team's bins from the top until `target` is reached. One block; a thread has two
  /// bins, the first thread the highest.
  __device__ void FindBin(uint64_t target, uint32_t low, int shift, uint64_t above) {
    static_assert(kBins == 2 * kSelectThreads);
    const int top = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
    uint64_t upper = 0, lower = 0;
#pragma unroll  // all loads at once: the way to another block is long
    for (int rank = 0; rank < kMaxTeam; ++rank) {
      if (rank >= team_.size()) continue;
      const BinPair bins =
          *team_.In(rank, reinterpret_cast<const BinPair*>(&shared_.histogram[top - 1]));
      upper += bins.second.Get();
      lower += bins.first.Get();
    }
    const uint64_t upto = above + BlockScan(upper + lower);
    const uint64_t before = upto - upper - lower;
    if (before < target && upto >= target) {
      const bool first = before + upper >= target;
      Tell(low + (static_cast<uint32_t>(first ? top : top - 1) << shift),
           first ? before : before + upper);
    }
    if (threadIdx.x == kSelectThreads - 1 && upto < target) Tell(kNothing, 0);
  }

  /// The bin found, to every block.
  __device__ void Tell(uint32_t low, uint64_t above) {
    for (int rank = 0; rank < team_.size(); ++rank) {
      *team_.In(rank, &shared_.low) = low;
      *team_.In(rank, &shared_.above) = above;
    }
  }

  __device__ bool KeepColumn(int j) const {
    return j < columns_end() &&
           (j < sinks() || (column_ranks()[j] >= column_cut_ && column_scores()[j] >= cap_cut_));
  }
  __device__ bool KeepBlock(int b) const {
    return b < blocks() && (b < local_blocks() ||
                            (block_ranks()[b] >= block_cut_ && block_scores()[b] >= cap_cut_));
  }

  /// This warp's contiguous share of [0, count), in whole words of 32.
  struct Share {
    int begin, end;
  };
  __device__ Share ShareOf(int count) const {
    const int words = (count + 31) / 32, warps = threads_ / 32;
    const int per_warp = (words + warps - 1) / warps;
    const int begin = thread_ / 32 * per_warp * 32;
    return {begin, min(begin + per_warp * 32, words * 32)};
  }

  __device__ void WriteIndex() {
    const Share columns = ShareOf(columns_end()), distances = ShareOf(blocks());
    Pair own = {0, 0};
    for (int j = columns.begin + lane_; j < columns.end; j += 32) own.columns += KeepColumn(j);
    for (int b = distances.begin + lane_; b < distances.end; b += 32) own.blocks += KeepBlock(b);
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
    for (int j = columns.begin + lane_; j < columns.end; j += 32) {
      const bool kept = KeepColumn(j);
      const unsigned mask = __ballot_sync(kAllLanes, kept);
      if (kept) verticals[before.columns + __popc(mask & lower_lanes)] = j;
      before.columns += __popc(mask);
    }
    for (int b = distances.begin + lane_; b < distances.end; b += 32) {
      const bool kept = KeepBlock(b);
      const unsigned mask = __ballot_sync(kAllLanes, kept);
      if (kept) bands[before.blocks + __popc(mask & lower_lanes)] = b;
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
  char* const scratch_;         // this group's
  const int thread_, threads_;  // in the team
  const int lane_, warp_;       // in the block
  int exchanges_ = 0;
  Pair sums_ = {0, 0};    // of all weights
  Pair forced_ = {0, 0};  // of the forced part's (kCumulative)
  uint32_t column_cut_ = 0, block_cut_ = 0, cap_cut_ = 0;
};

}  // namespace select
}  // namespace vsprefill::kernels::cuda

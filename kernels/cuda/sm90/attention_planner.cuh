// The planner warp of the Hopper attention kernel: draws work items and walks their index.
#pragma once

#include <climits>
#include <cstdint>

#include "kernels/cuda/sm90/attention_tiles.cuh"
#include "kernels/cuda/sm90/ptx.cuh"

namespace vsprefill::kernels::cuda::sm90::attention {

/// Number of selected distance blocks 0 .. last_block. Called by a whole warp.
__device__ __forceinline__ int CountBlocks(const uint32_t* bits, int last_block) {
  const int words = last_block / 32 + 1;
  int count = 0;
  for (int i = threadIdx.x & 31; i < words; i += 32) {
    uint32_t word = bits[i];
    if (i == words - 1) word &= 0xffffffffu >> (31 - (last_block & 31));
    count += __popc(word);
  }
  return __reduce_add_sync(0xffffffffu, count);
}

/// The item after `item` for this block; one thread. Every block draws once for each item that it
/// computes, so the draw number num_items - 1 is the launch's last one: the counter is left at 0.
__device__ __forceinline__ int NextItem(const AttentionBatchSm90& batch, int item) {
  const int blocks = static_cast<int>(gridDim.x);
  if (batch.counter == nullptr) return item + blocks;
  const int draw = static_cast<int>(atomicAdd(batch.counter, 1u));
  if (draw == batch.num_items - 1) atomicExch(batch.counter, 0u);
  return blocks + draw;
}

/// Walks the index of one item after the other and publishes plans. One warp.
template <int kHeadDim>
class Planner {
 public:
  __device__ __forceinline__ Planner(const AttentionBatchSm90& batch, Shared<kHeadDim>& shared)
      : batch_(batch), shared_(shared), lane_(threadIdx.x & 31) {}

  __device__ __forceinline__ void Run() {
    for (int item = blockIdx.x; item < batch_.num_items;) {
      int next = 0;
      if (lane_ == 0) next = NextItem(batch_, item);
      work_ = FindWorkItem(batch_.base, item);
      PlanItem();
      item = __shfl_sync(0xffffffffu, next, 0);
    }
    work_.sequence = -1;
    Publish(0, kNothing, kNothing);
  }

 private:
  __device__ __forceinline__ void PlanItem() {
    const SequenceParams& s = batch_.base.sequences[work_.sequence];
    first_row_ = work_.tile * batch_.base.row_tile;
    last_row_ = first_row_ + batch_.base.row_tile - 1;
    if (s.blocks != nullptr) {
      PlanBlocks(s);
    } else {
      PlanBands(s);
    }
  }

  /// Block-sparse: each selected block is a tile of its own, but the last visible one where the
  /// rows see only its first half.
  __device__ __forceinline__ void PlanBlocks(const SequenceParams& s) {
    const int last_column = min(last_row_, s.kv_tokens - 1);
    const int last_block = last_column / kKeyBlock;
    block_bits_ =
        s.blocks + int64_t{work_.group} * s.blocks_stride + int64_t{work_.tile} * s.block_words;
    column_bits_ = nullptr;
    num_verticals_ = next_vertical_ = 0;
    if (s.columns != nullptr) {
      column_bits_ = s.columns + int64_t{work_.group} * s.columns_stride +
                     int64_t{work_.tile / s.tiles_per_set} * s.column_words;
      num_verticals_ = last_column + 1;
    }
    LoadCandidates();

    int first = kFirst;
    int block = -1;  // found, not published yet
    for (int begin = 0; begin <= last_block / 32; begin += 32) {
      const int index = begin + lane_;
      uint32_t word = index <= last_block / 32 ? block_bits_[index] : 0;
      if (index == last_block / 32) word &= 0xffffffffu >> (31 - last_block % 32);
      for (uint32_t filled = __ballot_sync(0xffffffffu, word != 0); filled != 0;
           filled &= filled - 1) {
        const int from = __ffs(static_cast<int>(filled)) - 1;
        for (uint32_t bits = __shfl_sync(0xffffffffu, word, from); bits != 0; bits &= bits - 1) {
          if (block >= 0) {
            PublishBlock(first, block);
            first = 0;
          }
          block = (begin + from) * 32 + __ffs(static_cast<int>(bits)) - 1;
        }
      }
    }
    const bool half = block == last_block && last_column % kKeyBlock < kHalf;
    if (block >= 0 && !half) {
      PublishBlock(first | (num_verticals_ == 0 ? kLast : 0), block);
      first = 0;
      if (num_verticals_ == 0) return;
    }
    PlanVerticals(first, half ? block * kKeyBlock + kHalf - 1 : kNothing);
  }

  __device__ __forceinline__ void PublishBlock(int flags, int block) {
    const int near = block * kKeyBlock + kHalf - 1;
    Publish(flags | MaskBand(0, near) | MaskBand(1, near + kHalf), near, near + kHalf);
  }

  /// Vertical-slash, or dense.
  __device__ __forceinline__ void PlanBands(const SequenceParams& s) {
    block_bits_ = column_bits_ = nullptr;
    const int last_block = last_row_ / kBandBlock;
    const bool dense = s.bands == nullptr || IsDense(s, work_.tile);
    int num_bands = last_block + 1;  // at least partly right of column 0
    first_band_ = 0;
    bands_ = verticals_ = nullptr;
    num_verticals_ = next_vertical_ = 0;
    if (!dense) {
      bands_ = s.bands + work_.group * s.band_list_stride;
      verticals_ = s.verticals + work_.group * s.vertical_stride;
      band_bits_ = s.band_bits + work_.group * s.band_stride;
      num_verticals_ = s.num_verticals[work_.group];
      num_bands = CountBlocks(band_bits_, last_block);
    } else if (s.bands != nullptr && s.dense_parts > 1) {
      // Whole tiles, as equally many as can be.
      const int tiles = (num_bands + 1) / 2;
      first_band_ = work_.part * tiles / s.dense_parts * 2;
      num_bands = min(num_bands, (work_.part + 1) * tiles / s.dense_parts * 2) - first_band_;
    }
    LoadCandidates();

    int first = kFirst;
    int nearest = 0;  // columns of the bands of tiles 16 i to 16 i + 15, one per lane
    for (int t = 0; t < num_bands / 2; ++t) {
      if (t % 16 == 0) nearest = Nearest(2 * t + lane_, num_bands);
      const int near = __shfl_sync(0xffffffffu, nearest, 2 * t % 32);
      const int far = __shfl_sync(0xffffffffu, nearest, 2 * t % 32 + 1);
      const int masked = MaskBand(0, near) | MaskBand(1, far);
      const bool last = t == num_bands / 2 - 1 && num_bands % 2 == 0 && num_verticals_ == 0;
      Publish(first | masked | (last ? kLast : 0), near, far);
      first = 0;
    }
    if (num_bands % 2 != 0 || num_verticals_ > 0 || num_bands == 0) {
      PlanVerticals(first, num_bands % 2 != 0 ? Nearest(num_bands - 1, num_bands) : kNothing);
    }
  }

  /// The tiles behind the whole tiles of bands or blocks: single columns. `near`: nearest column of
  /// the half left over, if any.
  __device__ __forceinline__ void PlanVerticals(int first, int near) {
    int flags = first;
    int filled = 0;  // columns in the slots of this tile and the next
    if (near != kNothing) {
      flags |= MaskBand(0, near);
      filled = kHalf;
    }
    for (;;) {
      // One column past the tile tells that there is another tile.
      while (filled <= kColumns && next_vertical_ < num_verticals_) filled = Compact(filled);
      int32_t* columns = shared_.columns[tile_ % kPlans];
      for (int n = filled + lane_; n < kColumns; n += 32) columns[n] = INT_MAX;
      __syncwarp();
      if (near == kNothing && columns[kHalf - 1] > first_row_) flags |= kMasked0;
      if (columns[kColumns - 1] > first_row_) flags |= kMasked1;
      if (near == kNothing && filled > 0) flags |= kGather0;
      if (filled > kHalf) flags |= kGather1;
      if (filled <= kColumns) break;
      Publish(flags, near, kNothing);
      flags = 0;
      near = kNothing;
      filled -= kColumns;
    }
    Publish(flags | kLast, near, kNothing);
  }

  /// Looks at the next 128 verticals and appends those that no band covers to the `filled` columns
  /// of this tile and the next; returns how many there are then.
  __device__ __forceinline__ int Compact(int filled) {
    bool keep[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      // What is no candidate is -1 or INT_MAX.
      keep[u] = static_cast<uint32_t>(candidate_[u]) <= static_cast<uint32_t>(last_row_);
      if (keep[u]) {
        const bool blocks = block_bits_ != nullptr;
        const int block =
            blocks ? candidate_[u] / kKeyBlock : (last_row_ - candidate_[u]) / kBandBlock;
        keep[u] = !TestBit(blocks ? block_bits_ : band_bits_, block);
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint32_t kept = __ballot_sync(0xffffffffu, keep[u]);
      if (keep[u]) {
        const int n = filled + __popc(kept & ((1u << lane_) - 1));
        shared_.columns[(tile_ + n / kColumns) % kPlans][n % kColumns] = candidate_[u];
      }
      filled += __popc(kept);
    }
    next_vertical_ += 128;
    // Candidates ascend: behind a column right of the row tile nothing is visible.
    if (__any_sync(0xffffffffu, candidate_[3] > last_row_)) next_vertical_ = num_verticals_;
    LoadCandidates();
    return filled;
  }

  __device__ __forceinline__ void LoadCandidates() {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int i = next_vertical_ + u * 32 + lane_;
      candidate_[u] = INT_MAX;
      if (i < num_verticals_) {
        candidate_[u] = column_bits_ == nullptr ? verticals_[i] : TestBit(column_bits_, i) ? i : -1;
      }
    }
  }

  /// Column of band number `i` that is nearest to the row tile.
  __device__ __forceinline__ int Nearest(int i, int num_bands) const {
    if (i >= num_bands) return 0;
    return last_row_ - (bands_ == nullptr ? first_band_ + i : bands_[i]) * kBandBlock;
  }

  /// If some pair of a row and a column of the band may be invisible: writes the band's columns,
  /// and returns the half's flag.
  __device__ __forceinline__ int MaskBand(int half, int near) {
    if (near <= first_row_ && near >= kHalf - 1) return 0;
    int32_t* columns = shared_.columns[tile_ % kPlans] + half * kHalf;
    for (int n = lane_; n < kHalf; n += 32) columns[n] = near - (kHalf - 1) + n;
    __syncwarp();
    return half == 0 ? kMasked0 : kMasked1;
  }

  /// Publishes the plan of this tile, and waits until the places of the next two are free: columns
  /// that a tile cannot hold are written to the one behind it.
  __device__ __forceinline__ void Publish(int flags, int near, int far) {
    const Slot<kPlans> slot(tile_);
    if (lane_ == 0) {
      shared_.plans[slot.index] = {work_, flags, {near - (kHalf - 1), far - (kHalf - 1)}};
    }
    BarrierArrive(SharedAddress(&shared_.plan_full[slot.index]));  // each lane, for its columns
    ++tile_;
    const Slot<kPlans> ahead(tile_ + 1);
    WaitEmpty(shared_.plan_empty, ahead.index, ahead.parity);
    __syncwarp();
  }

  static constexpr int kNothing = -1;  // the 64 columns up to it: all left of the sequence

  const AttentionBatchSm90& batch_;
  Shared<kHeadDim>& shared_;
  const int lane_;
  uint32_t tile_ = 0;  // counted over all items of the block
  WorkItem work_;
  int first_row_, last_row_;
  int first_band_;        // of the item's part of a dense row tile
  const int32_t* bands_;  // null: every block from first_band_ on
  const int32_t* verticals_;
  const uint32_t* band_bits_;
  const uint32_t* block_bits_;   // null: vertical-slash or dense
  const uint32_t* column_bits_;  // null: `verticals_` lists the single columns
  int num_verticals_, next_vertical_;
  int candidate_[4];  // verticals (or columns) next_vertical_ + 32 u + lane
};

}  // namespace vsprefill::kernels::cuda::sm90::attention

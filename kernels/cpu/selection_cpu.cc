// Selection without a sort: cuts are found by radix histograms over the bits of the float32 scores
// (three levels of 11, 11 and 9 bits, so the result is exact), sets are then one comparison per
// candidate. One task per KV group; integer sums, so threads cannot change the result.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/parallel.h"
#include "kernels/selection.h"
#include "kernels/selection_math.h"

namespace vsprefill::kernels {
namespace {

using selection::Geometry;
using selection::kNothing;

constexpr int kBins = 2048;

constexpr int64_t AlignUp(int64_t bytes) { return (bytes + 255) / 256 * 256; }

/// Distance positions of all blocks, for any row tile.
constexpr int64_t MaxDistances(int64_t n) { return (BandBlocks(n, kPackedRows) + 1) * kBandBlock; }

/// Scratch of one group.
struct Scratch {
  uint64_t* column_weights;  // [n]
  uint64_t* offset_weights;  // [n]
  uint64_t* sums;            // [distances + 1]: H(j) first, then the second prefix sum of blocks
  uint64_t* block_weights;   // [blocks]
  uint64_t* histogram;       // [kBins]
  uint32_t* column_scores;   // [n] keys
  uint32_t* column_ranks;    // [n]; column_scores itself for kMassPerCost
  uint32_t* block_scores;    // [blocks]
  uint32_t* block_ranks;     // [blocks]
  static int64_t Bytes(int64_t n) {
    const int64_t blocks = MaxDistances(n) / kBandBlock;
    return 2 * AlignUp(n * 8) + AlignUp((MaxDistances(n) + 1) * 8) + AlignUp(blocks * 8) +
           AlignUp(kBins * 8) + 2 * AlignUp(n * 4) + 2 * AlignUp(blocks * 4);
  }
  Scratch(char* memory, int64_t n) {
    const int64_t blocks = MaxDistances(n) / kBandBlock;
    auto take = [&memory](int64_t bytes) { return std::exchange(memory, memory + AlignUp(bytes)); };
    column_weights = reinterpret_cast<uint64_t*>(take(n * 8));
    offset_weights = reinterpret_cast<uint64_t*>(take(n * 8));
    sums = reinterpret_cast<uint64_t*>(take((MaxDistances(n) + 1) * 8));
    block_weights = reinterpret_cast<uint64_t*>(take(blocks * 8));
    histogram = reinterpret_cast<uint64_t*>(take(kBins * 8));
    column_scores = reinterpret_cast<uint32_t*>(take(n * 4));
    column_ranks = reinterpret_cast<uint32_t*>(take(n * 4));
    block_scores = reinterpret_cast<uint32_t*>(take(blocks * 4));
    block_ranks = reinterpret_cast<uint32_t*>(take(blocks * 4));
  }
};

// The two loops over all tokens, compiled once per instruction set; all give the same integers.

/// Fills `weights` and returns their sum.
inline __attribute__((always_inline)) uint64_t WeightsLoop(const float* logits, int64_t n,
                                                           uint64_t* weights) {
  float max = selection::Sanitize(logits[0]);
  for (int64_t i = 1; i < n; ++i) max = std::max(max, selection::Sanitize(logits[i]));
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = selection::Weight(selection::Sanitize(logits[i]), max);
    sum += weights[i];
  }
  return sum;
}

/// Keys of the scores of columns [begin, end), whose local mass is `local_mass` throughout.
inline __attribute__((always_inline)) void ColumnKeysLoop(const uint64_t* weights,
                                                          const Geometry& g, int64_t begin,
                                                          int64_t end, double unit,
                                                          uint64_t local_mass, uint32_t* keys) {
  const Geometry copy = g;  // the compiler need not fear that a key overwrites it
  for (int64_t j = begin; j < end; ++j) {
    keys[j] = selection::Key(selection::ColumnScore(weights[j], copy, j, unit, local_mass));
  }
}

#define VSP_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw")))

uint64_t WeightsBase(const float* logits, int64_t n, uint64_t* weights) {
  return WeightsLoop(logits, n, weights);
}
VSP_AVX512 uint64_t WeightsAvx512(const float* logits, int64_t n, uint64_t* weights) {
  return WeightsLoop(logits, n, weights);
}
uint64_t Weights(const float* logits, int64_t n, uint64_t* weights) {
  return ActiveCpuIsa() >= CpuIsa::kAvx512 ? WeightsAvx512(logits, n, weights)
                                           : WeightsBase(logits, n, weights);
}

void ColumnKeysBase(const uint64_t* weights, const Geometry& g, int64_t begin, int64_t end,
                    double unit, uint64_t local_mass, uint32_t* keys) {
  ColumnKeysLoop(weights, g, begin, end, unit, local_mass, keys);
}
VSP_AVX512 void ColumnKeysAvx512(const uint64_t* weights, const Geometry& g, int64_t begin,
                                 int64_t end, double unit, uint64_t local_mass, uint32_t* keys) {
  ColumnKeysLoop(weights, g, begin, end, unit, local_mass, keys);
}
void ColumnKeys(const uint64_t* weights, const Geometry& g, int64_t begin, int64_t end, double unit,
                uint64_t local_mass, uint32_t* keys) {
  return ActiveCpuIsa() >= CpuIsa::kAvx512
             ? ColumnKeysAvx512(weights, g, begin, end, unit, local_mass, keys)
             : ColumnKeysBase(weights, g, begin, end, unit, local_mass, keys);
}

/// Adds candidates [begin, end) whose key lies in [low, low + 2^bits * 2^shift) to the histogram.
template <typename Amount>
void Count(const uint32_t* keys, int64_t begin, int64_t end, uint32_t low, int shift, int bits,
           const Amount& amount, uint64_t* histogram) {
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t bin = (keys[i] - low) >> shift;  // wraps to a large bin below `low`
    if (keys[i] >= low && bin < (1u << bits)) histogram[bin] += amount(i);
  }
}

/// The largest cut for which {key >= cut} reaches `target`; kNothing for 0, 0 if all is not enough.
/// add(low, shift, bits, histogram) counts the candidates of a range of keys.
template <typename Add>
uint32_t Reach(uint64_t target, uint64_t* histogram, const Add& add) {
  if (target == 0) return kNothing;
  uint32_t low = 0;
  uint64_t above = 0;
  for (const auto& [shift, bits] : {std::pair{20, 11}, std::pair{9, 11}, std::pair{0, 9}}) {
    std::fill_n(histogram, size_t{1} << bits, 0);
    add(low, shift, bits, histogram);
    int bin = (1 << bits) - 1;
    for (; bin >= 0 && above + histogram[bin] < target; --bin) above += histogram[bin];
    if (bin < 0) return 0;  // only at the first level: later ones hold the amount found before
    low += static_cast<uint32_t>(bin) << shift;
  }
  return low;
}

/// One group's selection, in the order of kernels/selection.h.
class GroupSelector {
 public:
  GroupSelector(const SelectionInput& input, const SelectionParams& params, const Geometry& g,
                int group, char* memory)
      : input_(input), params_(params), g_(g), group_(group), scratch_(memory, g.n) {}

  void Run(SparseIndexView* index) {
    Score();
    RuleCuts();
    column_cut_ = std::min(column_cut_, MinimumCut(scratch_.column_ranks, g_.sinks, g_.columns_end,
                                                   params_.min_vertical_ratio, g_.n, g_.sinks));
    block_cut_ =
        std::min(block_cut_, MinimumCut(scratch_.block_ranks, g_.local_blocks, g_.num_blocks,
                                        params_.min_slash_ratio, g_.num_blocks, g_.local_blocks));
    if (params_.max_density < 1.0f) cap_cut_ = CapCut();
    Write(index);
  }

 private:
  bool cumulative() const { return params_.rule == SelectionRule::kCumulative; }

  void Score() {
    const int64_t n = g_.n;
    column_sum_ =
        Weights(input_.vertical_logits + group_ * input_.logit_stride, n, scratch_.column_weights);
    offset_sum_ =
        Weights(input_.slash_logits + group_ * input_.logit_stride, n, scratch_.offset_weights);
    if (!cumulative()) {
      scratch_.column_ranks = scratch_.column_scores;
      scratch_.block_ranks = scratch_.block_scores;
    }

    const double offset_unit = selection::OffsetUnit(n, offset_sum_);
    const int64_t width = std::min(n, g_.local_width);
    uint64_t* local_mass = scratch_.sums;  // [i]: of offsets [0, i), i <= width
    local_mass[0] = 0;
    for (int64_t o = 0; o < width; ++o) {
      local_mass[o + 1] =
          local_mass[o] + selection::OffsetMass(scratch_.offset_weights[o], n, o, offset_unit);
    }
    const double column_unit = selection::OffsetUnit(n, column_sum_);
    // Only the last columns see less than the whole local band.
    const int64_t cut = std::clamp(n - width, g_.sinks, g_.columns_end);
    ColumnKeys(scratch_.column_weights, g_, g_.sinks, cut, column_unit, local_mass[width],
               scratch_.column_scores);
    for (int64_t j = cut; j < g_.columns_end; ++j) {
      scratch_.column_scores[j] = selection::Key(selection::ColumnScore(
          scratch_.column_weights[j], g_, j, column_unit, local_mass[std::min(width, n - j)]));
    }

    // Second prefix sum of the offset weights; differences are exact modulo 2^64.
    uint64_t* sums = scratch_.sums;
    const int64_t distances = g_.num_blocks * kBandBlock;
    uint64_t first = 0, second = 0;
    sums[0] = 0;
    for (int64_t x = 1; x <= distances; ++x) {
      if (x <= n) first += scratch_.offset_weights[x - 1];
      second += first;
      sums[x] = second;
    }
    auto sum_to = [sums](int64_t x) { return x > 0 ? sums[x] : 0; };
    const double block_unit = selection::BlockUnit(g_, offset_sum_);
    for (int64_t b = 0; b < g_.num_blocks; ++b) {
      const int64_t begin = b * kBandBlock, end = begin + kBandBlock;
      scratch_.block_weights[b] =
          sum_to(end) - sum_to(begin) - sum_to(end - g_.row_tile) + sum_to(begin - g_.row_tile);
      scratch_.block_scores[b] =
          selection::Key(selection::BlockScore(scratch_.block_weights[b], g_, b, block_unit));
    }
  }

  void RuleCuts() {
    if (!cumulative()) {
      const float* scale = input_.threshold_scale;
      column_cut_ = block_cut_ =
          selection::ThresholdCut(params_.threshold, scale != nullptr ? scale[group_] : 1.0f);
      return;
    }
    uint64_t forced_columns = 0, forced_blocks = 0;
    for (int64_t j = 0; j < g_.n; ++j) {
      if (j < g_.sinks || j >= g_.columns_end) {
        forced_columns += scratch_.column_weights[j];
      } else {
        scratch_.column_ranks[j] =
            selection::Key(selection::WeightScore(scratch_.column_weights[j]));
      }
    }
    for (int64_t b = 0; b < g_.num_blocks; ++b) {
      if (b < g_.local_blocks) {
        forced_blocks += scratch_.block_weights[b];
      } else {
        scratch_.block_ranks[b] = selection::Key(selection::WeightScore(scratch_.block_weights[b]));
      }
    }
    column_cut_ = TauCut(scratch_.column_ranks, scratch_.column_weights, g_.sinks, g_.columns_end,
                         params_.tau_vertical, column_sum_, forced_columns);
    block_cut_ =
        TauCut(scratch_.block_ranks, scratch_.block_weights, g_.local_blocks, g_.num_blocks,
               params_.tau_slash, offset_sum_ * static_cast<uint64_t>(g_.row_tile), forced_blocks);
  }

  uint32_t TauCut(const uint32_t* keys, const uint64_t* weights, int64_t begin, int64_t end,
                  float tau, uint64_t total, uint64_t forced) {
    if (tau >= 1.0f) return 0;
    auto add = [&](uint32_t low, int shift, int bits, uint64_t* histogram) {
      Count(
          keys, begin, end, low, shift, bits, [&](int64_t i) { return weights[i]; }, histogram);
    };
    return Reach(selection::CumulativeTarget(tau, total, forced), scratch_.histogram, add);
  }

  uint32_t MinimumCut(const uint32_t* keys, int64_t begin, int64_t end, float ratio, int64_t total,
                      int64_t forced) {
    auto add = [&](uint32_t low, int shift, int bits, uint64_t* histogram) {
      Count(
          keys, begin, end, low, shift, bits, [](int64_t) { return 1; }, histogram);
    };
    return Reach(static_cast<uint64_t>(selection::MinimumCount(ratio, total, forced)),
                 scratch_.histogram, add);
  }

  uint64_t KeptColumnPairs(int64_t j) const {
    return scratch_.column_ranks[j] >= column_cut_ ? selection::ColumnPairs(g_, j) : 0;
  }
  uint64_t KeptBlockPairs(int64_t b) const {
    return scratch_.block_ranks[b] >= block_cut_ ? selection::BlockPairs(g_, b) : 0;
  }

  uint32_t CapCut() {
    int64_t forced = 0;
    for (int64_t j = 0; j < g_.sinks; ++j) forced += selection::ColumnPairs(g_, j);
    for (int64_t b = 0; b < g_.local_blocks; ++b) forced += selection::BlockPairs(g_, b);
    const int64_t budget = selection::PairBudget(g_, params_.max_density, forced);
    if (budget < 0) return kNothing;
    uint64_t total = 0;
    for (int64_t j = g_.sinks; j < g_.columns_end; ++j) total += KeptColumnPairs(j);
    for (int64_t b = g_.local_blocks; b < g_.num_blocks; ++b) total += KeptBlockPairs(b);
    if (total <= static_cast<uint64_t>(budget)) return 0;
    auto add = [&](uint32_t low, int shift, int bits, uint64_t* histogram) {
      Count(
          scratch_.column_scores, g_.sinks, g_.columns_end, low, shift, bits,
          [&](int64_t j) { return KeptColumnPairs(j); }, histogram);
      Count(
          scratch_.block_scores, g_.local_blocks, g_.num_blocks, low, shift, bits,
          [&](int64_t b) { return KeptBlockPairs(b); }, histogram);
    };
    return Reach(static_cast<uint64_t>(budget) + 1, scratch_.histogram, add) + 1;
  }

  void Write(SparseIndexView* index) const {
    int32_t* verticals = index->verticals + group_ * index->vertical_stride;
    int32_t num_verticals = 0;
    for (int64_t j = 0; j < g_.columns_end; ++j) {
      const bool keep = j < g_.sinks || (scratch_.column_ranks[j] >= column_cut_ &&
                                         scratch_.column_scores[j] >= cap_cut_);
      if (keep) verticals[num_verticals++] = static_cast<int32_t>(j);
    }
    index->num_verticals[group_] = num_verticals;

    int32_t* bands = index->bands + group_ * index->band_list_stride;
    uint32_t* bits = index->band_bits + group_ * index->band_stride;
    std::fill_n(bits, BandWords(g_.n, static_cast<int>(g_.row_tile)), 0u);
    int32_t num_bands = 0;
    for (int64_t b = 0; b < g_.num_blocks; ++b) {
      const bool keep = b < g_.local_blocks || (scratch_.block_ranks[b] >= block_cut_ &&
                                                scratch_.block_scores[b] >= cap_cut_);
      if (!keep) continue;
      bands[num_bands++] = static_cast<int32_t>(b);
      bits[b / 32] |= 1u << (b % 32);
    }
    index->num_bands[group_] = num_bands;
  }

  const SelectionInput& input_;
  const SelectionParams& params_;
  const Geometry& g_;
  const int group_;
  Scratch scratch_;
  uint64_t column_sum_ = 0, offset_sum_ = 0;
  uint32_t column_cut_ = 0, block_cut_ = 0, cap_cut_ = 0;
};

}  // namespace

int64_t SelectionWorkspaceBytes(int num_groups, int64_t kv_tokens) {
  return num_groups * Scratch::Bytes(kv_tokens);
}

KernelStatus SelectCpu(const SelectionInput& input, const SelectionParams& params, void* workspace,
                       SparseIndexView* index, Stream) {
  if (!selection::Supported(input)) return KernelStatus::kUnsupportedShape;
  const Geometry g = selection::MakeGeometry(input, params);
  index->num_groups = input.num_groups;
  index->dense_from = g.dense_from;
  ParallelFor(input.num_groups, [&](int64_t group, int) {
    char* memory = static_cast<char*>(workspace) + group * Scratch::Bytes(g.n);
    GroupSelector(input, params, g, static_cast<int>(group), memory).Run(index);
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

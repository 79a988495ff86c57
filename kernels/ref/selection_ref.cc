// Selection as it is defined (kernels/selection.h), with plain loops and sorting: the oracle of the
// other implementations.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "kernels/selection.h"
#include "kernels/selection_math.h"

namespace vsprefill::kernels {
namespace {

using selection::Geometry;
using selection::kNothing;

/// A column or block that the rules decide about.
struct Candidate {
  int64_t id = 0;
  uint32_t score = 0;   // Key of the mass per cost
  uint32_t rank = 0;    // Key of what the rule compares
  uint64_t weight = 0;  // predicted mass
  uint64_t pairs = 0;   // estimated cost
};

std::vector<uint64_t> Weights(const float* logits, int64_t n) {
  float max = selection::Sanitize(logits[0]);
  for (int64_t i = 1; i < n; ++i) max = std::max(max, selection::Sanitize(logits[i]));
  std::vector<uint64_t> weights(n);
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = selection::Weight(selection::Sanitize(logits[i]), max);
  }
  return weights;
}

uint64_t Sum(const std::vector<uint64_t>& values, int64_t begin, int64_t end) {
  uint64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += values[i];
  return sum;
}

/// The largest cut for which {key >= cut} reaches `target`; kNothing for 0, 0 if all is not enough.
uint32_t Reach(std::vector<std::pair<uint32_t, uint64_t>> keys_and_amounts, uint64_t target) {
  if (target == 0) return kNothing;
  std::sort(keys_and_amounts.begin(), keys_and_amounts.end(), std::greater<>());
  uint64_t sum = 0;
  for (const auto& [key, amount] : keys_and_amounts) {
    sum += amount;
    if (sum >= target) return key;
  }
  return 0;
}

/// Drops the candidates of one kind that rule and minimum do not want.
void Cut(uint32_t rule_cut, int64_t min_count, std::vector<Candidate>& candidates) {
  std::vector<std::pair<uint32_t, uint64_t>> counts;
  for (const Candidate& c : candidates) counts.emplace_back(c.rank, 1);
  const uint32_t cut = std::min(rule_cut, Reach(counts, static_cast<uint64_t>(min_count)));
  std::erase_if(candidates, [cut](const Candidate& c) { return c.rank < cut; });
}

uint32_t CumulativeCut(const std::vector<Candidate>& candidates, float tau, uint64_t total,
                       uint64_t forced) {
  if (tau >= 1.0f) return 0;
  std::vector<std::pair<uint32_t, uint64_t>> weights;
  for (const Candidate& c : candidates) weights.emplace_back(c.rank, c.weight);
  return Reach(weights, selection::CumulativeTarget(tau, total, forced));
}

/// Drops the cheapest-to-lose candidates of both kinds until their pairs fit.
void Cap(int64_t budget, std::vector<Candidate>& columns, std::vector<Candidate>& blocks) {
  uint32_t cut = kNothing;
  if (budget >= 0) {
    std::vector<std::pair<uint32_t, uint64_t>> pairs;
    for (const Candidate& c : columns) pairs.emplace_back(c.score, c.pairs);
    for (const Candidate& c : blocks) pairs.emplace_back(c.score, c.pairs);
    uint64_t total = 0;
    for (const auto& [key, amount] : pairs) total += amount;
    if (total <= static_cast<uint64_t>(budget)) return;
    cut = Reach(pairs, static_cast<uint64_t>(budget) + 1) + 1;
  }
  std::erase_if(columns, [cut](const Candidate& c) { return c.score < cut; });
  std::erase_if(blocks, [cut](const Candidate& c) { return c.score < cut; });
}

void SelectGroup(const SelectionInput& input, const SelectionParams& params, const Geometry& g,
                 int group, SparseIndexView* index) {
  const auto column_weights = Weights(input.vertical_logits + group * input.logit_stride, g.n);
  const auto offset_weights = Weights(input.slash_logits + group * input.logit_stride, g.n);
  const uint64_t column_sum = Sum(column_weights, 0, g.n);
  const uint64_t offset_sum = Sum(offset_weights, 0, g.n);
  const bool cumulative = params.rule == SelectionRule::kCumulative;

  const double column_unit = selection::OffsetUnit(g.n, column_sum);
  const double offset_unit = selection::OffsetUnit(g.n, offset_sum);
  std::vector<uint64_t> local_mass(g.n + 1, 0);  // [i]: of offsets [0, min(i, Lw))
  for (int64_t o = 0; o < g.n; ++o) {
    local_mass[o + 1] = local_mass[o];
    if (o < g.local_width) {
      local_mass[o + 1] += selection::OffsetMass(offset_weights[o], g.n, o, offset_unit);
    }
  }
  std::vector<Candidate> columns;
  for (int64_t j = g.sinks; j < g.columns_end; ++j) {
    const float score =
        selection::ColumnScore(column_weights[j], g, j, column_unit, local_mass[g.n - j]);
    const float rank = cumulative ? selection::WeightScore(column_weights[j]) : score;
    columns.push_back({j, selection::Key(score), selection::Key(rank), column_weights[j],
                       static_cast<uint64_t>(selection::ColumnPairs(g, j))});
  }

  std::vector<uint64_t> block_weights(g.num_blocks, 0);
  for (int64_t b = 0; b < g.num_blocks; ++b) {
    const int64_t begin = std::max<int64_t>(0, b * kBandBlock - g.row_tile + 1);
    for (int64_t o = begin; o < std::min(g.n, (b + 1) * kBandBlock); ++o) {
      block_weights[b] += offset_weights[o] * selection::BlockOverlap(b, o, g.row_tile);
    }
  }
  const double block_unit = selection::BlockUnit(g, offset_sum);
  std::vector<Candidate> blocks;
  for (int64_t b = g.local_blocks; b < g.num_blocks; ++b) {
    const float score = selection::BlockScore(block_weights[b], g, b, block_unit);
    const float rank = cumulative ? selection::WeightScore(block_weights[b]) : score;
    blocks.push_back({b, selection::Key(score), selection::Key(rank), block_weights[b],
                      static_cast<uint64_t>(selection::BlockPairs(g, b))});
  }

  uint32_t column_cut, block_cut;
  if (cumulative) {
    const uint64_t forced_columns =
        Sum(column_weights, 0, g.sinks) + Sum(column_weights, g.columns_end, g.n);
    column_cut = CumulativeCut(columns, params.tau_vertical, column_sum, forced_columns);
    block_cut = CumulativeCut(blocks, params.tau_slash, offset_sum * g.row_tile,
                              Sum(block_weights, 0, g.local_blocks));
  } else {
    const float scale = input.threshold_scale != nullptr ? input.threshold_scale[group] : 1.0f;
    column_cut = block_cut = selection::ThresholdCut(params.threshold, scale);
  }
  Cut(column_cut, selection::MinimumCount(params.min_vertical_ratio, g.n, g.sinks), columns);
  Cut(block_cut, selection::MinimumCount(params.min_slash_ratio, g.num_blocks, g.local_blocks),
      blocks);
  if (params.max_density < 1.0f) {
    int64_t forced = 0;
    for (int64_t j = 0; j < g.sinks; ++j) forced += selection::ColumnPairs(g, j);
    for (int64_t b = 0; b < g.local_blocks; ++b) forced += selection::BlockPairs(g, b);
    Cap(selection::PairBudget(g, params.max_density, forced), columns, blocks);
  }

  int32_t* verticals = index->verticals + group * index->vertical_stride;
  int32_t num_verticals = 0;
  for (int64_t j = 0; j < g.sinks; ++j) verticals[num_verticals++] = static_cast<int32_t>(j);
  for (const Candidate& c : columns) verticals[num_verticals++] = static_cast<int32_t>(c.id);
  index->num_verticals[group] = num_verticals;

  int32_t* bands = index->bands + group * index->band_list_stride;
  int32_t num_bands = 0;
  for (int64_t b = 0; b < g.local_blocks; ++b) bands[num_bands++] = static_cast<int32_t>(b);
  for (const Candidate& c : blocks) bands[num_bands++] = static_cast<int32_t>(c.id);
  index->num_bands[group] = num_bands;

  uint32_t* bits = index->band_bits + group * index->band_stride;
  std::fill_n(bits, BandWords(g.n, static_cast<int>(g.row_tile)), 0u);
  for (int32_t i = 0; i < num_bands; ++i) bits[bands[i] / 32] |= 1u << (bands[i] % 32);
}

}  // namespace

KernelStatus SelectRef(const SelectionInput& input, const SelectionParams& params, void*,
                       SparseIndexView* index, Stream) {
  if (!selection::Supported(input)) return KernelStatus::kUnsupportedShape;
  const Geometry g = selection::MakeGeometry(input, params);
  index->num_groups = input.num_groups;
  index->dense_from = g.dense_from;
  for (int group = 0; group < input.num_groups; ++group) {
    SelectGroup(input, params, g, group, index);
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

// What the CPU selections of query_selection.h share: queries as lanes, logits of keys with them,
// softmax shares over lanes. Logits lie transposed, [column][lane], as in attention.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/query_selection.h"
#include "kernels/query_selection_math.h"

namespace vsprefill::kernels::cpu {

constexpr int PadLanes(int64_t rows) { return static_cast<int>((rows + 15) / 16 * 16); }

/// `rows` rows of head_dim elements as float32, contiguous.
void WidenRows(const void* base, int64_t offset, int64_t row_stride, int64_t rows, int head_dim,
               DType dtype, float* out);
/// Their mean as query_selection.h defines it.
void MeanRow(const void* base, int64_t offset, int64_t row_stride, int64_t rows, int head_dim,
             DType dtype, float* mean);

inline int64_t QueryOffset(const AttentionSequence& s, int head, int64_t position) {
  return (position - (s.kv_tokens - s.q_tokens)) * s.q_token_stride + head * s.q_head_stride;
}

/// Rows as lanes: float [depth][lanes], the lanes past the rows zero.
class QueryLanes {
 public:
  QueryLanes(int64_t rows, int64_t depth)
      : lanes_(PadLanes(rows)), depth_(depth), values_(depth * lanes_, 0.0f) {}
  int lanes() const { return lanes_; }
  int64_t depth() const { return depth_; }
  const float* values() const { return values_.data(); }
  /// Elements [first, first + count) of a lane.
  void Set(int lane, int64_t first, const float* row, int64_t count) {
    for (int64_t e = 0; e < count; ++e) values_[(first + e) * lanes_ + lane] = row[e];
  }
  /// Queries of one head at positions [begin, end), as lanes first_lane, first_lane + step, ...
  void SetQueries(const QuerySelectionInput& in, int head, int64_t begin, int64_t end,
                  int first_lane, int step);

 private:
  int lanes_;
  int64_t depth_;
  std::vector<float> values_;
};

/// logits[row][lane] = Sanitize(scale * dot(row, lane)) for contiguous float32 rows.
void RowLogits(const float* rows, int64_t count, const QueryLanes& queries, float scale,
               float* logits);
/// The same for the keys of columns [begin, end) of a KV head.
void KeyLogits(const QuerySelectionInput& in, int kv_head, int64_t begin, int64_t end,
               const QueryLanes& queries, float* logits);

/// weights[lane] = Weight(logits[lane], max[lane]); 0 where a logit is -infinity.
void LaneWeights(const float* logits, const float* max, int lanes, uint64_t* weights);

/// Softmax over columns, lane by lane, of logits [columns][lanes] of which lane i sees the first
/// visible[i] (the others are overwritten). Calls add(column, shares) for each column in ascending
/// order; lanes that see nothing have shares of 0.
template <typename Add>
void ForShares(float* logits, int64_t columns, int lanes, const int64_t* visible, const Add& add) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  std::vector<float> max(lanes, kHidden);
  for (int64_t c = 0; c < columns; ++c) {
    float* const row = logits + c * lanes;
    for (int i = 0; i < lanes; ++i) {
      if (c >= visible[i]) row[i] = kHidden;
      max[i] = max[i] < row[i] ? row[i] : max[i];
    }
  }
  std::vector<uint64_t> weights(lanes), sums(lanes, 0);
  for (int64_t c = 0; c < columns; ++c) {
    LaneWeights(logits + c * lanes, max.data(), lanes, weights.data());
    for (int i = 0; i < lanes; ++i) sums[i] += weights[i];
  }
  std::vector<double> units(lanes);
  for (int i = 0; i < lanes; ++i) units[i] = sums[i] > 0 ? selection::ShareUnit(sums[i]) : 0.0;
  for (int64_t c = 0; c < columns; ++c) {
    LaneWeights(logits + c * lanes, max.data(), lanes, weights.data());
    for (int i = 0; i < lanes; ++i) weights[i] = selection::Share(weights[i], units[i]);
    add(c, weights.data());
  }
}

/// Sums of the softmax of the chunk's last `rows` queries of a head over columns and over offsets
/// (row - column), each [kv_tokens].
void LastRowSums(const QuerySelectionInput& in, int head, int64_t rows, uint64_t* columns,
                 uint64_t* offsets);

/// The `count` largest values with the first `forced` before all others, as positions in no
/// particular order; of equal ones the earlier.
std::vector<int32_t> TopPositions(const uint64_t* values, int64_t size, int64_t forced,
                                  int64_t count);

/// Shapes that the CPU kernels take and sizes that selections do.
bool SupportedSelection(const QuerySelectionInput& in);
/// Sets groups and tiles of a block-sparse index and clears its blocks.
void ClearBlocks(const AttentionSequence& s, int groups, int group_size, TileIndexView* index);

}  // namespace vsprefill::kernels::cpu

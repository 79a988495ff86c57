// Naive causal attention, dense or vertical-slash, straight from the definition in sparse_index.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention.h"
#include "kernels/scalar.h"

namespace vsprefill::kernels {
namespace {

// Columns that the row tile of `position` reads in `group`, for this row (causal), ascending.
void VisibleColumns(const SparseIndexView* index, int group, int group_size, int64_t position,
                    const std::vector<bool>& is_vertical, std::vector<int64_t>* columns) {
  columns->clear();
  const int64_t tile = RowTilePositions(group_size);
  const int64_t tile_last = position / tile * tile + tile - 1;
  // A tile that holds any position >= dense_from is dense.
  const bool dense = index == nullptr || tile_last >= index->dense_from;
  for (int64_t c = 0; c <= position; ++c) {
    bool visible = dense || is_vertical[c];
    if (!visible) {
      const int64_t block = (tile_last - c) / kBandBlock;
      visible = (index->band_bits[group * index->band_stride + block / 32] >> (block % 32)) & 1u;
    }
    if (visible) columns->push_back(c);
  }
}

void OneSequence(const AttentionShape& shape, const AttentionSequence& s) {
  const int g = shape.group_size(), d = shape.head_dim;
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  std::vector<int64_t> columns;
  std::vector<double> scores, sum(d);
  for (int group = 0; group < shape.num_kv_heads; ++group) {
    std::vector<bool> is_vertical(s.kv_tokens, false);
    if (s.index != nullptr) {
      const int32_t* verticals = s.index->verticals + group * s.index->vertical_stride;
      for (int32_t i = 0; i < s.index->num_verticals[group]; ++i) {
        if (verticals[i] < s.kv_tokens) is_vertical[verticals[i]] = true;
      }
    }
    for (int64_t i = 0; i < s.q_tokens; ++i) {
      VisibleColumns(s.index, group, g, q_start + i, is_vertical, &columns);
      for (int head = group * g; head < (group + 1) * g; ++head) {
        const int64_t q_row = i * s.q_token_stride + head * s.q_head_stride;
        double max = -std::numeric_limits<double>::infinity();
        scores.clear();
        for (int64_t c : columns) {
          const int64_t k_row = group * s.kv_head_stride + c * s.kv_token_stride;
          double dot = 0;
          for (int e = 0; e < d; ++e) {
            dot += double{LoadScalar(s.q, q_row + e, shape.dtype)} *
                   double{LoadScalar(s.k, k_row + e, shape.dtype)};
          }
          scores.push_back(dot * double{shape.scale});
          max = std::max(max, scores.back());
        }
        double total = 0;
        std::fill(sum.begin(), sum.end(), 0.0);
        for (size_t j = 0; j < columns.size(); ++j) {
          const double p = std::exp(scores[j] - max);
          total += p;
          const int64_t v_row = group * s.kv_head_stride + columns[j] * s.kv_token_stride;
          for (int e = 0; e < d; ++e) sum[e] += p * double{LoadScalar(s.v, v_row + e, shape.dtype)};
        }
        const int64_t out_row = i * s.out_token_stride + head * s.out_head_stride;
        for (int e = 0; e < d; ++e) {
          StoreScalar(s.out, out_row + e, shape.dtype, static_cast<float>(sum[e] / total));
        }
      }
    }
  }
}

}  // namespace

KernelStatus AttentionRef(const AttentionShape& shape, const AttentionSequence* sequences,
                          int num_sequences, Stream /*stream*/) {
  if (shape.num_kv_heads <= 0 || shape.num_q_heads % shape.num_kv_heads != 0 ||
      shape.group_size() > kPackedRows) {
    return KernelStatus::kUnsupportedShape;
  }
  for (int i = 0; i < num_sequences; ++i) OneSequence(shape, sequences[i]);
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

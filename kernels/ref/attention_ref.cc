// Naive causal attention, dense, vertical-slash or block-sparse, straight from the definitions in
// sparse_index.h and tile_index.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention.h"
#include "kernels/scalar.h"

namespace vsprefill::kernels {
namespace {

// Columns that the row tile of `position` reads in an index group, for this row (causal),
// ascending.
void VisibleColumns(const AttentionSequence& s, int group, int group_size, int64_t position,
                    const std::vector<bool>& is_vertical, std::vector<int64_t>* columns) {
  columns->clear();
  const int64_t positions = RowTilePositions(group_size);
  const int64_t tile = position / positions, tile_last = (tile + 1) * positions - 1;
  // A tile that holds any position >= dense_from is dense.
  const bool dense = s.dense() || (s.index != nullptr && tile_last >= s.index->dense_from);
  for (int64_t c = 0; c <= position; ++c) {
    bool visible = dense;
    if (!dense && s.index != nullptr) {
      visible = is_vertical[c] || TestBit(s.index->band_bits + group * s.index->band_stride,
                                          (tile_last - c) / kBandBlock);
    } else if (!dense) {
      visible = TestBit(s.tiles->BlocksOf(group, tile), c / kKeyBlock) ||
                (s.tiles->columns != nullptr && TestBit(s.tiles->ColumnsOf(group, tile), c));
    }
    if (visible) columns->push_back(c);
  }
}

// Blocks that the row tile of `position` reads through their means.
std::vector<int64_t> MeanBlocks(const AttentionSequence& s, int group, int group_size,
                                int64_t position) {
  std::vector<int64_t> blocks;
  if (s.tiles == nullptr || s.tiles->k_means == nullptr) return blocks;
  const int64_t positions = RowTilePositions(group_size);
  const int64_t tile = position / positions;
  for (int64_t b = 0; (b + 1) * kKeyBlock <= tile * positions; ++b) {
    if (!TestBit(s.tiles->BlocksOf(group, tile), b)) blocks.push_back(b);
  }
  return blocks;
}

// A key that a row reads, with its value: where they lie and what is added to the scaled logit.
struct Key {
  const void* k;
  const void* v;
  int64_t offset;
  double bias;
};

void OneSequence(const AttentionShape& shape, const AttentionSequence& s) {
  const int groups = IndexGroups(shape, s);
  const int g = shape.num_q_heads / groups, d = shape.head_dim;
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  std::vector<int64_t> columns;
  std::vector<Key> keys;
  std::vector<double> scores, sum(d);
  for (int group = 0; group < groups; ++group) {
    const int64_t kv_head = group * g / shape.group_size();
    std::vector<bool> is_vertical(s.kv_tokens, false);
    if (s.index != nullptr) {
      const int32_t* verticals = s.index->verticals + group * s.index->vertical_stride;
      for (int32_t i = 0; i < s.index->num_verticals[group]; ++i) {
        if (verticals[i] < s.kv_tokens) is_vertical[verticals[i]] = true;
      }
    }
    for (int64_t i = 0; i < s.q_tokens; ++i) {
      VisibleColumns(s, group, g, q_start + i, is_vertical, &columns);
      keys.clear();
      for (int64_t c : columns) {
        keys.push_back({s.k, s.v, kv_head * s.kv_head_stride + c * s.kv_token_stride, 0.0});
      }
      for (int64_t b : MeanBlocks(s, group, g, q_start + i)) {
        keys.push_back({s.tiles->k_means, s.tiles->v_means,
                        (kv_head * s.tiles->means_stride + b) * d, std::log(double{kKeyBlock})});
      }
      for (int head = group * g; head < (group + 1) * g; ++head) {
        const int64_t q_row = i * s.q_token_stride + head * s.q_head_stride;
        double max = -std::numeric_limits<double>::infinity();
        scores.clear();
        for (const Key& key : keys) {
          double dot = 0;
          for (int e = 0; e < d; ++e) {
            dot += double{LoadScalar(s.q, q_row + e, shape.dtype)} *
                   double{LoadScalar(key.k, key.offset + e, shape.dtype)};
          }
          scores.push_back(dot * double{shape.scale} + key.bias);
          max = std::max(max, scores.back());
        }
        double total = 0;
        std::fill(sum.begin(), sum.end(), 0.0);
        for (size_t j = 0; j < keys.size(); ++j) {
          const double p = std::exp(scores[j] - max);
          total += p;
          for (int e = 0; e < d; ++e) {
            sum[e] += p * double{LoadScalar(keys[j].v, keys[j].offset + e, shape.dtype)};
          }
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
  for (int i = 0; i < num_sequences; ++i) {
    if (!SupportedIndex(shape, sequences[i])) return KernelStatus::kUnsupportedShape;
    OneSequence(shape, sequences[i]);
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels

// What the references of query_selection.h share: one logit, one softmax row, one mean, each as
// that header defines it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/query_selection.h"
#include "kernels/query_selection_math.h"
#include "kernels/scalar.h"

namespace vsprefill::kernels::ref {

using Vector = std::vector<float>;

inline Vector Row(const void* base, int64_t offset, int head_dim, DType dtype) {
  Vector row(head_dim);
  for (int e = 0; e < head_dim; ++e) row[e] = LoadScalar(base, offset + e, dtype);
  return row;
}
/// Query of a head at an absolute position of the chunk.
inline Vector Query(const QuerySelectionInput& in, int head, int64_t position) {
  const AttentionSequence& s = in.sequence;
  const int64_t i = position - (s.kv_tokens - s.q_tokens);
  return Row(s.q, i * s.q_token_stride + head * s.q_head_stride, in.shape.head_dim, in.shape.dtype);
}
/// Key that a query head reads.
inline Vector Key(const QuerySelectionInput& in, int head, int64_t column) {
  const AttentionSequence& s = in.sequence;
  const int64_t kv_head = head / in.shape.group_size();
  return Row(s.k, kv_head * s.kv_head_stride + column * s.kv_token_stride, in.shape.head_dim,
             in.shape.dtype);
}

/// dot(a, b) of query_selection.h on top of `sum`.
inline float Dot(const Vector& a, const Vector& b, float sum = 0) {
  for (size_t e = 0; e < a.size(); ++e) sum = std::fma(a[e], b[e], sum);
  return sum;
}
inline float Logit(const QuerySelectionInput& in, const Vector& q, const Vector& k) {
  return selection::Sanitize(Dot(q, k) * in.shape.scale);
}

/// Mean of rows, rounded to the element type.
inline Vector Mean(const std::vector<Vector>& rows, DType dtype) {
  Vector mean(rows[0].size(), 0.0f);
  for (const Vector& row : rows) {
    for (size_t e = 0; e < row.size(); ++e) mean[e] += row[e];
  }
  for (float& x : mean) {
    x /= static_cast<float>(rows.size());
    if (dtype == DType::kBF16) x = BF16ToFloat(FloatToBF16(x));
  }
  return mean;
}
inline Vector MeanKey(const QuerySelectionInput& in, int head, int64_t block) {
  std::vector<Vector> rows;
  const int64_t end = std::min((block + 1) * kKeyBlock, in.sequence.kv_tokens);
  for (int64_t c = block * kKeyBlock; c < end; ++c) rows.push_back(Key(in, head, c));
  return Mean(rows, in.shape.dtype);
}
inline Vector MeanQuery(const QuerySelectionInput& in, int head, int64_t begin, int64_t end) {
  std::vector<Vector> rows;
  for (int64_t i = begin; i < end; ++i) rows.push_back(Query(in, head, i));
  return Mean(rows, in.shape.dtype);
}

/// The softmax of a row of logits, as shares.
inline std::vector<uint64_t> Shares(const Vector& logits) {
  const float max = *std::max_element(logits.begin(), logits.end());
  std::vector<uint64_t> shares;
  uint64_t sum = 0;
  for (float x : logits) {
    shares.push_back(selection::Weight(x, max));
    sum += shares.back();
  }
  for (uint64_t& x : shares) x = selection::Share(x, selection::ShareUnit(sum));
  return shares;
}

/// Positions of `values`, largest value first, equal ones in ascending order.
inline std::vector<int64_t> Descending(const std::vector<uint64_t>& values) {
  std::vector<int64_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  return order;
}

/// Sets what every block-sparse selection sets: groups and tiles, with no block read.
inline void Clear(const AttentionSequence& s, int groups, int group_size, TileIndexView* index) {
  const selection::ChunkTiles tiles = selection::TilesOf(s, group_size);
  index->num_groups = groups;
  index->first_tile = tiles.first;
  index->num_tiles = tiles.count;
  std::fill_n(index->blocks, groups * tiles.count * index->block_words, 0u);
}

/// Writes one group of a vertical-slash index, both lists ascending.
inline void WriteGroup(const std::vector<int64_t>& verticals, const std::vector<int64_t>& bands,
                       int group, SparseIndexView* index) {
  index->num_verticals[group] = static_cast<int32_t>(verticals.size());
  std::copy(verticals.begin(), verticals.end(), index->verticals + group * index->vertical_stride);
  index->num_bands[group] = static_cast<int32_t>(bands.size());
  std::copy(bands.begin(), bands.end(), index->bands + group * index->band_list_stride);
  uint32_t* const bits = index->band_bits + group * index->band_stride;
  std::fill_n(bits, index->band_stride, 0u);
  for (int64_t band : bands) SetBit(bits, band);
}

inline bool Supported(const QuerySelectionInput& in) {
  return in.shape.num_kv_heads > 0 && in.shape.num_q_heads % in.shape.num_kv_heads == 0 &&
         in.shape.group_size() <= kPackedRows && selection::Supported(in);
}

}  // namespace vsprefill::kernels::ref

#include "kernels/cpu/query_scores.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/scalar.h"

namespace vsprefill::kernels::cpu {

void WidenRows(const void* base, int64_t offset, int64_t row_stride, int64_t rows, int head_dim,
               DType dtype, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t from = offset + r * row_stride;
    if (dtype == DType::kF32) {
      std::memcpy(out, static_cast<const float*>(base) + from, head_dim * sizeof(float));
    } else {
      const uint16_t* row = static_cast<const uint16_t*>(base) + from;
      for (int e = 0; e < head_dim; ++e) out[e] = BF16ToFloat(row[e]);
    }
    out += head_dim;
  }
}

void MeanRow(const void* base, int64_t offset, int64_t row_stride, int64_t rows, int head_dim,
             DType dtype, float* mean) {
  float row[kMaxHeadDim];
  std::fill_n(mean, head_dim, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    WidenRows(base, offset + r * row_stride, 0, 1, head_dim, dtype, row);
    for (int e = 0; e < head_dim; ++e) mean[e] += row[e];
  }
  for (int e = 0; e < head_dim; ++e) {
    mean[e] /= static_cast<float>(rows);
    if (dtype == DType::kBF16) mean[e] = BF16ToFloat(FloatToBF16(mean[e]));
  }
}

void QueryLanes::SetQueries(const QuerySelectionInput& in, int head, int64_t begin, int64_t end,
                            int first_lane, int step) {
  float row[kMaxHeadDim];
  for (int64_t i = begin; i < end; ++i) {
    WidenRows(in.sequence.q, QueryOffset(in.sequence, head, i), 0, 1, in.shape.head_dim,
              in.shape.dtype, row);
    Set(first_lane + static_cast<int>(i - begin) * step, 0, row, in.shape.head_dim);
  }
}

void RowLogits(const float* rows, int64_t count, const QueryLanes& queries, float scale,
               float* logits) {
  ActiveKernels().dot_products(rows, count, queries.values(), queries.depth(), queries.lanes(),
                               logits);
  for (int64_t i = 0; i < count * queries.lanes(); ++i) {
    logits[i] = selection::Sanitize(logits[i] * scale);
  }
}

void KeyLogits(const QuerySelectionInput& in, int kv_head, int64_t begin, int64_t end,
               const QueryLanes& queries, float* logits) {
  const AttentionSequence& s = in.sequence;
  static thread_local std::vector<float> keys;
  keys.resize(int64_t{kKeyBlock} * in.shape.head_dim);
  for (int64_t c = begin; c < end; c += kKeyBlock) {
    const int64_t count = std::min<int64_t>(kKeyBlock, end - c);
    WidenRows(s.k, kv_head * s.kv_head_stride + c * s.kv_token_stride, s.kv_token_stride, count,
              in.shape.head_dim, in.shape.dtype, keys.data());
    RowLogits(keys.data(), count, queries, in.shape.scale, logits + (c - begin) * queries.lanes());
  }
}

// Compiled once more for AVX-512, which has the 64-bit multiplications; the same integers.
namespace {

inline __attribute__((always_inline)) void WeightsLoop(const float* logits, const float* max,
                                                       int lanes, uint64_t* weights) {
  for (int i = 0; i < lanes; ++i) weights[i] = selection::Weight(logits[i], max[i]);
}
void WeightsBase(const float* logits, const float* max, int lanes, uint64_t* weights) {
  WeightsLoop(logits, max, lanes, weights);
}
__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw"))) void WeightsAvx512(
    const float* logits, const float* max, int lanes, uint64_t* weights) {
  WeightsLoop(logits, max, lanes, weights);
}

}  // namespace

void LaneWeights(const float* logits, const float* max, int lanes, uint64_t* weights) {
  ActiveCpuIsa() >= CpuIsa::kAvx512 ? WeightsAvx512(logits, max, lanes, weights)
                                    : WeightsBase(logits, max, lanes, weights);
}

void LastRowSums(const QuerySelectionInput& in, int head, int64_t rows, uint64_t* columns,
                 uint64_t* offsets) {
  const int64_t n = in.sequence.kv_tokens;
  QueryLanes queries(rows, in.shape.head_dim);
  queries.SetQueries(in, head, n - rows, n, 0, 1);
  std::vector<int64_t> visible(queries.lanes(), 0);
  for (int64_t i = 0; i < rows; ++i) visible[i] = n - rows + i + 1;
  static thread_local std::vector<float> logits;
  logits.resize(n * queries.lanes());
  KeyLogits(in, head / in.shape.group_size(), 0, n, queries, logits.data());
  std::fill_n(columns, n, 0);
  std::fill_n(offsets, n, 0);
  ForShares(logits.data(), n, queries.lanes(), visible.data(),
            [&](int64_t c, const uint64_t* shares) {
              const int64_t first = std::max<int64_t>(0, c - (n - rows));  // the first that sees c
              for (int64_t i = first; i < rows; ++i) {
                columns[c] += shares[i];
                offsets[n - rows + i - c] += shares[i];
              }
            });
}

std::vector<int32_t> TopPositions(const uint64_t* values, int64_t size, int64_t forced,
                                  int64_t count) {
  std::vector<int32_t> order(size);
  for (int64_t i = 0; i < size; ++i) order[i] = static_cast<int32_t>(i);
  count = std::min(count, size);
  const auto before = [values, forced](int32_t a, int32_t b) {
    const bool forced_a = a < forced, forced_b = b < forced;
    if (forced_a != forced_b) return forced_a;
    if (!forced_a && values[a] != values[b]) return values[a] > values[b];
    return a < b;
  };
  std::nth_element(order.begin(), order.begin() + count, order.end(), before);
  order.resize(count);
  return order;
}

bool SupportedSelection(const QuerySelectionInput& in) {
  return SupportedShape(in.shape) && selection::Supported(in);
}

void ClearBlocks(const AttentionSequence& s, int groups, int group_size, TileIndexView* index) {
  const selection::ChunkTiles tiles = selection::TilesOf(s, group_size);
  index->num_groups = groups;
  index->first_tile = tiles.first;
  index->num_tiles = tiles.count;
  std::fill_n(index->blocks, groups * tiles.count * index->block_words, 0u);
}

}  // namespace vsprefill::kernels::cpu

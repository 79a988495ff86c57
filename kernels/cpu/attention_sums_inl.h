// The two passes of the distillation targets over one row tile: rows of ONE query head are lanes,
// so a lane is a position, and columns come in consecutive runs.
#pragma once

#include "kernels/cpu/attention_inl.h"
#include "kernels/cpu/isa_kernels.h"

namespace vsprefill::kernels::cpu {
namespace {

// Columns whose probabilities are skewed together: row i of the buffer is shifted by i, so that a
// diagonal of the score tile is a column of the buffer.
constexpr int kSkewColumns = 16;
constexpr int kSkewWidth = kMaxBlockLanes + kSkewColumns;

/// Pass 1: the running maximum and sum of each lane.
template <class Words, bool kMasked, int kVectors>
VSP_INLINE void NormaliserBlock(const AttentionTile& tile, const ColumnBatch& batch, int first) {
  constexpr int kStride = 16 * kVectors;
  V16 top[kVectors];
  ScoreBlock<Words, kMasked, 0, kVectors>(tile, batch, first, top);
  const V16 scale = Set1(tile.scale_log2);
  for (int v = 0; v < kVectors; ++v) {
    float* const max = tile.max + first + 16 * v;
    float* const sum = tile.sum + first + 16 * v;
    const V16 before = Load(max), now = Max(before, Mul(top[v], scale));
    const V16 minus_max = Sub(Zero(), now);
    V16 total = Mul(Load(sum), Exp2<true>(Sub(before, now)));
    for (int c = 0; c < batch.count; ++c) {
      const V16 s = Load(tile.scores + c * kStride + 16 * v);
      total = Add(total, Exp2<true>(Fma(s, scale, minus_max)));
    }
    Store(max, now);
    Store(sum, total);
  }
}

/// Pass 2: adds the probabilities to their columns and diagonals. tile.max holds lse * log2(e).
template <class Words, bool kMasked, int kVectors>
VSP_INLINE void SumsBlock(const AttentionTile& tile, const ColumnBatch& batch, int first,
                          float* column_sums, float* diagonal_sums) {
  constexpr int kStride = 16 * kVectors;
  V16 top[kVectors];
  ScoreBlock<Words, kMasked, 0, kVectors>(tile, batch, first, top);
  const V16 scale = Set1(tile.scale_log2);
  V16 minus_lse[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    minus_lse[v] = Sub(Zero(), Load(tile.max + first + 16 * v));
  }
  // Lanes past the last row repeat it and must not count.
  const int live = tile.rows - first < kStride ? tile.rows - first : kStride;
  alignas(64) float weight[kStride];
  for (int i = 0; i < kStride; ++i) weight[i] = i < live ? 1.0f : 0.0f;
  // Zero outside of the skewed band, and nothing writes there.
  alignas(64) float skewed[kSkewColumns * kSkewWidth] = {};
  for (int group = 0; group < batch.count; group += kSkewColumns) {
    const int columns = batch.count - group < kSkewColumns ? batch.count - group : kSkewColumns;
    for (int i = 0; i < columns; ++i) {
      V16 total = Zero();
      for (int v = 0; v < kVectors; ++v) {
        const V16 s = Load(tile.scores + (group + i) * kStride + 16 * v);
        const V16 p = Mul(Exp2<true>(Fma(s, scale, minus_lse[v])), Load(weight + 16 * v));
        total = Add(total, p);
        Store(skewed + i * kSkewWidth + kSkewColumns - 1 - i + 16 * v, p);
      }
      column_sums[group + i] += SumLanes(total);
    }
    // Offset of element x: position of lane 0 - first column of the group + x - 15.
    float* const diagonal =
        diagonal_sums + tile.positions[first] - batch.columns[group] - (kSkewColumns - 1);
    for (int x = 0; x < kStride + kSkewColumns; x += 16) {
      V16 total = Load(diagonal + x);
      for (int i = 0; i < columns; ++i) total = Add(total, Load(skewed + i * kSkewWidth + x));
      Store(diagonal + x, total);
    }
  }
}

template <class Words, DType kDType, bool kMasked>
void Sums(const AttentionTile& tile, const ColumnBatch& batch, float* column_sums,
          float* diagonal_sums) {
  PackColumns<Words, kDType, false>(tile, batch, tile.head_dim);
  ForLaneBlocks(tile.lanes, [&]<int kVectors>(int first) {
    if (column_sums == nullptr) {
      NormaliserBlock<Words, kMasked, kVectors>(tile, batch, first);
    } else {
      SumsBlock<Words, kMasked, kVectors>(tile, batch, first, column_sums, diagonal_sums);
    }
  });
}

void AttentionSums(const AttentionTile& tile, const ColumnBatch& batch, float* column_sums,
                   float* diagonal_sums) {
  if (tile.dtype == DType::kBF16) {
    batch.masked
        ? Sums<AttentionBF16Words, DType::kBF16, true>(tile, batch, column_sums, diagonal_sums)
        : Sums<AttentionBF16Words, DType::kBF16, false>(tile, batch, column_sums, diagonal_sums);
  } else {
    batch.masked ? Sums<F32Words, DType::kF32, true>(tile, batch, column_sums, diagonal_sums)
                 : Sums<F32Words, DType::kF32, false>(tile, batch, column_sums, diagonal_sums);
  }
}

}  // namespace
}  // namespace vsprefill::kernels::cpu

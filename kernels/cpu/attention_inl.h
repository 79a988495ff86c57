// One row tile of flash attention: packed query rows are lanes, keys and values come in tiles of
// columns that the caller lists. Scores are kept transposed, [column][lane].
#pragma once

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/matmul_inl.h"

namespace vsprefill::kernels::cpu {
namespace {

// A running maximum is raised only when a score exceeds it by this much (log2 units), so the sums
// are rarely rescaled; probabilities then reach at most 2^8 instead of 1.
constexpr float kMaxSlack = 8.0f;
// Lower than any score.
constexpr float kNoMaximum = -1e30f;

#ifdef __AVX512BF16__
using AttentionBF16Words = BF16Words;  // multiplies pairs of bf16
#else
using AttentionBF16Words = F32Words;  // bf16 is widened when a tile is packed
#endif

/// Copies one key row into words.
template <class Words, DType kDType>
VSP_INLINE void PackKeyRow(const void* row, int head_dim, uint32_t* words) {
  if constexpr (kDType == DType::kBF16 && Words::kPerWord == 1) {
    for (int e = 0; e < head_dim; e += 16) {
      Store(reinterpret_cast<float*>(words) + e, LoadBF16(static_cast<const uint16_t*>(row) + e));
    }
  } else if constexpr (kDType == DType::kBF16) {
    for (int w = 0; w < head_dim / 2; w += 8) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + w),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                              static_cast<const uint16_t*>(row) + 2 * w)));
    }
  } else {
    for (int e = 0; e < head_dim; e += 16) {
      Store(reinterpret_cast<float*>(words) + e, Load(static_cast<const float*>(row) + e));
    }
  }
}

template <DType kDType>
VSP_INLINE const void* Row(const void* base, int64_t element) {
  return static_cast<const char*>(base) + element * (kDType == DType::kF32 ? 4 : 2);
}

/// Packs the listed keys, and with kValues the values, into the tile's buffers.
template <class Words, DType kDType, bool kValues>
VSP_INLINE void PackColumns(const AttentionTile& tile, const ColumnBatch& batch, int head_dim) {
  auto* keys = static_cast<uint32_t*>(tile.key_tile);
  auto* values = static_cast<uint32_t*>(tile.value_tile);
  alignas(64) static const float kZeros[kMaxHeadDim] = {};
  const int words = head_dim / Words::kPerWord;
  for (int c = 0; c < batch.count; c += Words::kPerWord) {
    const void* value_rows[2];
    for (int i = 0; i < Words::kPerWord; ++i) {
      const int32_t column = batch.columns[c + i];
      const bool padding = column == kPaddingColumn;
      const int64_t element = column * batch.token_stride;
      PackKeyRow<Words, kDType>(padding ? kZeros : Row<kDType>(batch.k, element), head_dim,
                                keys + (c + i) * words);
      value_rows[i] = padding ? kZeros : Row<kDType>(batch.v, element);
    }
    if constexpr (!kValues) {
      continue;
    } else if constexpr (Words::kPerWord == 1) {
      PackKeyRow<Words, kDType>(value_rows[0], head_dim, values + c * head_dim);
    } else {
#ifdef __AVX512BF16__
      for (int e = 0; e < head_dim; e += 16) {
        InterleaveRows(static_cast<const uint16_t*>(value_rows[0]) + e,
                       static_cast<const uint16_t*>(value_rows[1]) + e,
                       values + c / 2 * head_dim + e);
      }
#endif
    }
  }
}

/// Words of a packed row, rounded up to what TransposeWords writes.
VSP_INLINE int64_t PaddedWords(int words) { return (words + 15) / 16 * 16; }

/// Scores of the packed columns for 16 * kVectors lanes, to tile.scores; `top` gets their maxima.
template <class Words, bool kMasked, int kDim, int kVectors>
VSP_INLINE void ScoreBlock(const AttentionTile& tile, const ColumnBatch& batch, int first_lane,
                           V16 (&top)[kVectors]) {
  constexpr int kStride = 16 * kVectors;  // lanes of the block
  const int words = (kDim != 0 ? kDim : tile.head_dim) / Words::kPerWord;
  const auto* keys = static_cast<const uint32_t*>(tile.key_tile);
  const float* query = static_cast<const float*>(tile.query) + first_lane * PaddedWords(words);
  float* scores = tile.scores;
  for (int v = 0; v < kVectors; ++v) top[v] = Set1(-__builtin_inff());
  ForRowBlocks<RegisterRows<kVectors>()>(batch.count, [&]<int kM>(int c) VSP_LAMBDA_INLINE {
    V16 acc[kM][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] = Zero();
    }
    MultiplyBlock<Words, kM, kVectors>(keys + c * words, words, 1, query, kStride, words, acc);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kMasked) {
          acc[m][v] =
              MaskAfter(acc[m][v], tile.positions + first_lane + 16 * v, batch.columns[c + m]);
        }
        top[v] = Max(top[v], acc[m][v]);
        Store(scores + (c + m) * kStride + 16 * v, acc[m][v]);
      }
    }
  });
}

/// Scores, probabilities and output sums of the packed columns for 16 * kVectors lanes.
template <class Words, bool kPrecise, bool kMasked, int kDim, int kVectors>
VSP_INLINE void LaneBlock(const AttentionTile& tile, const ColumnBatch& batch, int first_lane) {
  constexpr int kRows = RegisterRows<kVectors>();
  constexpr int kStride = 16 * kVectors;  // lanes of the block
  const int head_dim = kDim != 0 ? kDim : tile.head_dim;
  const auto* values = static_cast<const uint32_t*>(tile.value_tile);
  float* sum_out = tile.sum_out + first_lane * head_dim;
  const float* scores = tile.scores;

  V16 top[kVectors];
  ScoreBlock<Words, kMasked, kDim, kVectors>(tile, batch, first_lane, top);
  const V16 scale = Set1(tile.scale_log2), bias = Set1(batch.bias_log2);
  bool raise = false;
  V16 reference[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    reference[v] = Load(tile.max + first_lane + 16 * v);
    top[v] = Add(Mul(top[v], scale), bias);
    raise |= AnyGreater(Sub(top[v], Set1(kMaxSlack)), reference[v]);
  }
  if (raise) {
    V16 factor[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      // Lane by lane, so that a row's result does not depend on the rows beside it.
      const V16 higher =
          SelectGreater(Sub(top[v], Set1(kMaxSlack)), reference[v], top[v], reference[v]);
      factor[v] = Exp2<true>(Sub(reference[v], higher));
      reference[v] = higher;
      Store(tile.max + first_lane + 16 * v, higher);
      float* sum = tile.sum + first_lane + 16 * v;
      Store(sum, Mul(Load(sum), factor[v]));
    }
    for (int e = 0; e < head_dim; ++e) {
      for (int v = 0; v < kVectors; ++v) {
        float* out = sum_out + e * kStride + 16 * v;
        Store(out, Mul(Load(out), factor[v]));
      }
    }
  }

  auto* probabilities = static_cast<uint32_t*>(tile.probabilities);
  for (int v = 0; v < kVectors; ++v) {
    const V16 minus_max = Sub(bias, reference[v]);
    V16 sum = Load(tile.sum + first_lane + 16 * v), sum_odd = Zero();
    for (int c = 0; c < batch.count; c += 2) {
      const float* s = scores + c * kStride + 16 * v;
      const V16 p0 = Exp2<kPrecise>(Fma(Load(s), scale, minus_max));
      const V16 p1 = Exp2<kPrecise>(Fma(Load(s + kStride), scale, minus_max));
      sum = Add(sum, p0);
      sum_odd = Add(sum_odd, p1);
      if constexpr (Words::kPerWord == 1) {
        float* p = reinterpret_cast<float*>(probabilities) + c * kStride + 16 * v;
        Store(p, p0);
        Store(p + kStride, p1);
      } else {
#ifdef __AVX512BF16__
        StorePairs(probabilities + c / 2 * kStride + 16 * v, p0, p1);
#endif
      }
    }
    Store(tile.sum + first_lane + 16 * v, Add(sum, sum_odd));
  }

  ForRowBlocks<kRows>(head_dim, [&]<int kM>(int e) VSP_LAMBDA_INLINE {
    V16 acc[kM][kVectors];
    float* out = sum_out + e * kStride;
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] = Load(out + m * kStride + 16 * v);
    }
    MultiplyBlock<Words, kM, kVectors>(values + e, 1, head_dim,
                                       reinterpret_cast<const float*>(probabilities), kStride,
                                       batch.count / Words::kPerWord, acc);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Store(out + m * kStride + 16 * v, acc[m][v]);
    }
  });
}

template <class Words, DType kDType, bool kMasked, int kDim>
void Columns(const AttentionTile& tile, const ColumnBatch& batch) {
  constexpr bool kPrecise = kDType == DType::kF32;
  PackColumns<Words, kDType, true>(tile, batch, kDim != 0 ? kDim : tile.head_dim);
  ForLaneBlocks(tile.lanes, [&]<int kVectors>(int first) {
    LaneBlock<Words, kPrecise, kMasked, kDim, kVectors>(tile, batch, first);
  });
}

template <class Words, DType kDType, bool kMasked>
void ColumnsByDim(const AttentionTile& tile, const ColumnBatch& batch) {
  switch (tile.head_dim) {
    case 64:
      return Columns<Words, kDType, kMasked, 64>(tile, batch);
    case 128:
      return Columns<Words, kDType, kMasked, 128>(tile, batch);
    default:
      return Columns<Words, kDType, kMasked, 0>(tile, batch);
  }
}

void AttentionColumns(const AttentionTile& tile, const ColumnBatch& batch) {
  if (tile.dtype == DType::kBF16) {
    batch.masked ? ColumnsByDim<AttentionBF16Words, DType::kBF16, true>(tile, batch)
                 : ColumnsByDim<AttentionBF16Words, DType::kBF16, false>(tile, batch);
  } else {
    batch.masked ? ColumnsByDim<F32Words, DType::kF32, true>(tile, batch)
                 : ColumnsByDim<F32Words, DType::kF32, false>(tile, batch);
  }
}

/// Transposes query rows into lanes.
template <class Words, DType kDType>
void PackQueries(const AttentionTile& tile, const void* const* query_rows) {
  const int words = tile.head_dim / Words::kPerWord;
  // An odd multiple of 16 bf16 ends in half a block: the words past it are copied and never read.
  alignas(64) uint32_t row_words[16][kMaxHeadDim] = {};
  const uint32_t* rows[16];
  int take;
  for (int first = 0; first < tile.lanes; first += 16 * take) {
    take = BlockVectors((tile.lanes - first) / 16);
    auto* block = static_cast<uint32_t*>(tile.query) + first * PaddedWords(words);
    for (int lane = 0; lane < 16 * take; lane += 16) {
      for (int i = 0; i < 16; ++i) {
        // Padding lanes repeat the last row: their results are never read.
        const int row = first + lane + i < tile.rows ? first + lane + i : tile.rows - 1;
        PackKeyRow<Words, kDType>(query_rows[row], tile.head_dim, row_words[i]);
      }
      for (int64_t w = 0; w < words; w += 16) {
        for (int i = 0; i < 16; ++i) rows[i] = row_words[i] + w;
        TransposeWords(rows, block + w * 16 * take + lane, 16 * take);
      }
    }
  }
}

void AttentionBegin(const AttentionTile& tile, const void* const* query_rows) {
  if (tile.dtype == DType::kBF16) {
    PackQueries<AttentionBF16Words, DType::kBF16>(tile, query_rows);
  } else {
    PackQueries<F32Words, DType::kF32>(tile, query_rows);
  }
  for (int64_t i = 0; i < int64_t{tile.head_dim} * tile.lanes; i += 16) {
    Store(tile.sum_out + i, Zero());
  }
  for (int lane = 0; lane < tile.lanes; lane += 16) {
    Store(tile.max + lane, Set1(kNoMaximum));
    Store(tile.sum + lane, Zero());
  }
}

void AttentionMerge(const AttentionTile* partials, int count) {
  const AttentionTile& to = partials[0];
  int take;
  for (int first = 0; first < to.lanes; first += 16 * take) {
    take = BlockVectors((to.lanes - first) / 16);
    for (int lane = first; lane < first + 16 * take; lane += 16) {
      V16 top = Load(to.max + lane);
      for (int i = 1; i < count; ++i) top = Max(top, Load(partials[i].max + lane));
      V16 sum = Zero();
      for (int i = 0; i < count; ++i) {
        const V16 factor = Exp2<true>(Sub(Load(partials[i].max + lane), top));
        sum = Fma(factor, Load(partials[i].sum + lane), sum);
        for (int e = 0; e < to.head_dim; ++e) {
          const int64_t at = first * to.head_dim + e * 16 * take + lane - first;
          const V16 before = i == 0 ? Zero() : Load(to.sum_out + at);
          Store(to.sum_out + at, Fma(factor, Load(partials[i].sum_out + at), before));
        }
      }
      Store(to.sum + lane, sum);
      Store(to.max + lane, top);
    }
  }
}

void AttentionFinish(const AttentionTile& tile, void* const* out_rows) {
  alignas(64) float sums[16 * 16], values[16 * 16];
  const uint32_t* rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = reinterpret_cast<const uint32_t*>(sums + 16 * i);
  int take;
  for (int first = 0; first < tile.lanes; first += 16 * take) {
    take = BlockVectors((tile.lanes - first) / 16);
    const float* block = tile.sum_out + first * tile.head_dim;
    for (int lane = 0; lane < 16 * take && first + lane < tile.rows; lane += 16) {
      const V16 inverse = Div(Set1(1.0f), Load(tile.sum + first + lane));
      const int left = tile.rows - first - lane;
      const int live = left < 16 ? left : 16;
      for (int e = 0; e < tile.head_dim; e += 16) {
        for (int i = 0; i < 16; ++i) {
          Store(sums + 16 * i, Mul(Load(block + (e + i) * 16 * take + lane), inverse));
        }
        TransposeWords(rows, reinterpret_cast<uint32_t*>(values), 16);
        for (int r = 0; r < live; ++r) {
          void* const out = out_rows[first + lane + r];
          if (tile.dtype == DType::kBF16) {
            StoreBF16(static_cast<uint16_t*>(out) + e, Load(values + 16 * r));
          } else {
            Store(static_cast<float*>(out) + e, Load(values + 16 * r));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace vsprefill::kernels::cpu

// VSIndexer inference for a run of tokens: tokens are lanes, hidden units the rows of A, so the
// weights are read where they lie and the second layer is a running sum per lane.
#pragma once

#include "kernels/cpu/attention_inl.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/matmul_inl.h"

namespace vsprefill::kernels::cpu {
namespace {

/// RMS-normalised head, as words of the first layer's input.
template <class Words, DType kDType>
VSP_INLINE void NormalisedWords(const void* base, int64_t first, int head_dim, uint32_t* words) {
  V16 squares = Zero();
  for (int e = 0; e < head_dim; e += 16) {
    const V16 x = LoadElements<kDType>(base, first + e);
    squares = Fma(x, x, squares);
  }
  const float mean = SumLanes(squares) / static_cast<float>(head_dim);
  const V16 inverse = Set1(1.0f / __builtin_sqrtf(mean + 1e-6f));
  for (int e = 0; e < head_dim; e += 16) {
    const V16 x = Mul(LoadElements<kDType>(base, first + e), inverse);
    if constexpr (Words::kPerWord == 1) {
      Store(reinterpret_cast<float*>(words) + e, x);
    } else {
      StoreBF16(reinterpret_cast<uint16_t*>(words) + e, x);
    }
  }
}

template <class Words, DType kDType>
VSP_INLINE void PackFeatures(const IndexerTask& task, int64_t words, uint32_t* features) {
  const IndexerInput& in = *task.input;
  const int d = task.layer->head_dim;
  const int lanes = (task.count + 15) / 16 * 16;
  alignas(64) uint32_t row_words[16][2 * kMaxHeadDim];
  const uint32_t* rows[16];
  int take;
  for (int first = 0; first < lanes; first += 16 * take) {
    take = BlockVectors((lanes - first) / 16);
    for (int lane = 0; lane < 16 * take; lane += 16) {
      for (int i = 0; i < 16; ++i) {
        // Padding lanes repeat the last token.
        const int t = first + lane + i < task.count ? first + lane + i : task.count - 1;
        const int64_t at = task.group * in.head_stride + (task.token + t) * in.token_stride;
        NormalisedWords<Words, kDType>(in.k, at, d, row_words[i]);
        NormalisedWords<Words, kDType>(in.v, at, d, row_words[i] + d / Words::kPerWord);
      }
      for (int64_t w = 0; w < words; w += 16) {
        for (int i = 0; i < 16; ++i) rows[i] = row_words[i] + w;
        TransposeWords(rows, features + first * words + w * 16 * take + lane, 16 * take);
      }
    }
  }
}

/// kWeights: how w1 is stored. Where a word is a float, bf16 rows are widened block by block.
template <class Words, DType kWeights>
void IndexerBlock(const IndexerTask& task, int64_t words, const uint32_t* features) {
  constexpr bool kWiden = kWeights == DType::kBF16 && Words::kPerWord == 1;
  constexpr bool kPrecise = kWeights == DType::kF32;
  const IndexerLayer& layer = *task.layer;
  const int lanes = (task.count + 15) / 16 * 16;
  const int64_t unit0 = int64_t{task.group} * layer.hidden;
  const char* w1 = static_cast<const char*>(layer.w1) +
                   unit0 * 2 * layer.head_dim * (kWeights == DType::kF32 ? 4 : 2);
  const float* b1 = layer.b1 + unit0;
  const float* w2_vertical = layer.w2 + 2 * unit0;
  const float* w2_slash = w2_vertical + layer.hidden;
  alignas(64) float vertical[kIndexerTokens], slash[kIndexerTokens];
  for (int lane = 0; lane < lanes; lane += 16) {
    Store(vertical + lane, Set1(layer.b2[2 * task.group]));
    Store(slash + lane, Set1(layer.b2[2 * task.group + 1]));
  }
  alignas(64) uint32_t widened[kWiden ? 12 * 2 * kMaxHeadDim : 1];
  ForRowBlocks<RegisterRows<kMaxBlockVectors>()>(
      layer.hidden, [&]<int kM>(int unit) VSP_LAMBDA_INLINE {
        const uint32_t* a = reinterpret_cast<const uint32_t*>(w1) + unit * words;
        if constexpr (kWiden) {
          const auto* bf16 = reinterpret_cast<const uint16_t*>(w1) + unit * words;
          for (int64_t i = 0; i < kM * words; i += 16) {
            Store(reinterpret_cast<float*>(widened) + i, LoadBF16(bf16 + i));
          }
          a = widened;
        }
        const auto block = [&]<int kVectors>(int first) VSP_LAMBDA_INLINE {
          V16 acc[kM][kVectors];
#pragma GCC unroll 16
          for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) acc[m][v] = Set1(b1[unit + m]);
          }
          MultiplyBlock<Words, kM, kVectors>(
              a, words, 1, reinterpret_cast<const float*>(features) + first * words, 16 * kVectors,
              words, acc);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            V16 sum_vertical = Load(vertical + first + 16 * v);
            V16 sum_slash = Load(slash + first + 16 * v);
#pragma GCC unroll 16
            for (int m = 0; m < kM; ++m) {
              const V16 x = Silu<kPrecise>(acc[m][v]);
              sum_vertical = Fma(x, Set1(w2_vertical[unit + m]), sum_vertical);
              sum_slash = Fma(x, Set1(w2_slash[unit + m]), sum_slash);
            }
            Store(vertical + first + 16 * v, sum_vertical);
            Store(slash + first + 16 * v, sum_slash);
          }
        };
        ForLaneBlocks(lanes, block);
      });
  for (int t = 0; t < task.count; ++t) {
    task.vertical_logits[t] = vertical[t];
    task.slash_logits[t] = slash[t];
  }
}

template <class Words, DType kWeights>
void IndexerByInput(const IndexerTask& task) {
  const int64_t words = 2 * task.layer->head_dim / Words::kPerWord;
  alignas(64) uint32_t features[2 * kMaxHeadDim * kIndexerTokens];
  if (task.input->dtype == DType::kBF16) {
    PackFeatures<Words, DType::kBF16>(task, words, features);
  } else {
    PackFeatures<Words, DType::kF32>(task, words, features);
  }
  IndexerBlock<Words, kWeights>(task, words, features);
}

void IndexerTokens(const IndexerTask& task) {
  if (task.layer->weight_dtype == DType::kBF16) {
    IndexerByInput<AttentionBF16Words, DType::kBF16>(task);
  } else {
    IndexerByInput<F32Words, DType::kF32>(task);
  }
}

}  // namespace
}  // namespace vsprefill::kernels::cpu

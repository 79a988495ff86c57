// What one instruction set provides: plain functions over plain structs, compiled once per
// instruction set from the *_inl.h files into an anonymous namespace (isa_<name>.cc), so that no
// function built with wide instructions can be picked by the linker for common code.
//
// "Lanes" are packed rows: a lane block holds a multiple of 16 of them, and every matrix product
// here is  C[m][lane] = sum_k A[m][k] * B[k][lane]  with A broadcast and lanes along the vectors.
// Keys are A, so gathered columns need no transposition, and row maxima and sums need no horizontal
// step.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/indexer.h"
#include "kernels/layer_ops.h"
#include "kernels/tensor_view.h"

namespace vsprefill::kernels::cpu {

/// Columns that AttentionColumns takes at most in one call.
inline constexpr int kColumnTile = 96;
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxLanes = 128;
inline constexpr int kMaxBlockLanes = 64;  // lanes computed together
/// A column that no row may see; pads a tile to an even count.
inline constexpr int32_t kPaddingColumn = INT32_MAX;

/// Running state of one row tile. Buffers are 64-byte aligned and hold the most that any shape
/// needs.
struct AttentionTile {
  DType dtype = DType::kBF16;
  int head_dim = 0;
  int rows = 0;                   // packed rows, the rest of the lanes is padding
  int lanes = 0;                  // rows rounded up to 16
  float scale_log2 = 0;           // softmax scale times log2(e)
  void* query = nullptr;          // 32-bit words [words per row, rounded up to 16][lanes]
  float* sum_out = nullptr;       // [head_dim][lanes]: sum of p v; both in lane blocks
  float* max = nullptr;           // [lanes]: reference maximum, times scale_log2
  float* sum = nullptr;           // [lanes]: sum of p
  int32_t* positions = nullptr;   // [lanes]: position of each row; padding repeats the last row's
  void* key_tile = nullptr;       // 32-bit words [kColumnTile][words per row]
  void* value_tile = nullptr;     // 32-bit words [kColumnTile or half][head_dim]
  float* scores = nullptr;        // [kColumnTile][kMaxBlockLanes]
  void* probabilities = nullptr;  // 32-bit words [kColumnTile][kMaxBlockLanes]
};

struct ColumnBatch {
  const void* k = nullptr;  // row of column 0
  const void* v = nullptr;
  int64_t token_stride = 0;          // elements
  const int32_t* columns = nullptr;  // kPaddingColumn where there is none
  int count = 0;                     // even, 1..kColumnTile
  bool masked = false;               // some row may not see some column
  float bias_log2 = 0;               // added to every score, log2 units (attention_columns only)
};

/// Tokens [token, token + count) of one KV group.
inline constexpr int kIndexerTokens = 64;
struct IndexerTask {
  const IndexerLayer* layer = nullptr;
  const IndexerInput* input = nullptr;
  int group = 0;
  int64_t token = 0;
  int count = 0;                     // 1..kIndexerTokens
  float* vertical_logits = nullptr;  // [count]; the slash prior is not added
  float* slash_logits = nullptr;
};

/// Rows of one head at consecutive positions, their RoPE undone, pooled (kernels/select_seer.h).
struct UnrotatePoolTask {
  const void* base = nullptr;
  int64_t offset = 0, row_stride = 0;  // elements
  int64_t rows = 0;                    // at least 1
  int head_dim = 0;
  DType dtype = DType::kBF16;
  const float* cos = nullptr;  // [rows, head_dim / 2], from the first row's position on
  const float* sin = nullptr;
  float *max = nullptr, *min = nullptr, *sum = nullptr;  // [head_dim] each, or null
};

struct IsaKernels {
  /// Packs the query rows and clears the sums. `query_rows`: [rows] pointers.
  void (*attention_begin)(const AttentionTile& tile, const void* const* query_rows);
  void (*attention_columns)(const AttentionTile& tile, const ColumnBatch& batch);
  /// Adds the sums of partials[1..count) of one tile, computed over other columns, to partials[0].
  void (*attention_merge)(const AttentionTile* partials, int count);
  /// out row r = sum_out[.][r] / sum[r], rounded to the dtype.
  void (*attention_finish)(const AttentionTile& tile, void* const* out_rows);
  /// Distillation targets: rows of one head as lanes, consecutive columns, values unused.
  /// column_sums null: tile.max and tile.sum become each lane's running maximum (log2 units) and
  /// sum. Else tile.max holds each lane's log-sum-exp in log2 units, and the probabilities are
  /// added to column_sums [batch.count] and to diagonal_sums, indexed by position - column, which
  /// must have 160 writable elements on either side of the valid offsets.
  void (*attention_sums)(const AttentionTile& tile, const ColumnBatch& batch, float* column_sums,
                         float* diagonal_sums);
  void (*indexer)(const IndexerTask& task);
  /// One token each.
  void (*rms_norm)(const RmsNormArgs& args, int64_t token);
  void (*qkv_rope_append)(const QkvRopeAppendArgs& args, int64_t token);
  void (*silu_mul)(const SiluMulArgs& args, int64_t token);
  /// c[m][lane] = sum over k of a[m][k] * b[k][lane]: float32, one fused multiply-add after the
  /// other in ascending k from 0, so the same bits on every instruction set. a: [rows, depth],
  /// b: [depth, lanes], c: [rows, lanes], all contiguous; lanes is a multiple of 16.
  void (*dot_products)(const float* a, int64_t rows, const float* b, int64_t depth, int lanes,
                       float* c);
  void (*unrotate_pool)(const UnrotatePoolTask& task);
};

const IsaKernels& Avx2Kernels();
const IsaKernels& Avx512Kernels();
const IsaKernels& Avx512Bf16Kernels();

inline const IsaKernels& ActiveKernels() {
  switch (ActiveCpuIsa()) {
    case CpuIsa::kAvx512Bf16:
      return Avx512Bf16Kernels();
    case CpuIsa::kAvx512:
      return Avx512Kernels();
    case CpuIsa::kAvx2:
      break;
  }
  return Avx2Kernels();
}

}  // namespace vsprefill::kernels::cpu

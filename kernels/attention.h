// Causal attention over a KV cache, dense, vertical-slash or block-sparse: host API of all
// implementations.
//
// Implementations: kernels/ref (naive, float64, the oracle), kernels/cpu (threaded, vectorised,
// chosen at run time: AVX2, AVX-512, AVX-512 bf16), kernels/cuda (tensor cores, sm_80+; chosen at
// run time on compute capability 9.0, bf16, head_dim 64 or 128: kernels/cuda/sm90). All agree
// within the tolerance table of docs/numerics.md for the same index.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/sparse_index.h"
#include "kernels/tensor_view.h"
#include "kernels/tile_index.h"

namespace vsprefill::kernels {

struct AttentionShape {
  int num_q_heads = 0;
  int num_kv_heads = 0;  // divides num_q_heads
  int head_dim = 0;      // CPU: any multiple of 16 up to 256; CUDA: 16, 32, 64, 80, 96 or 128
  DType dtype = DType::kBF16;
  float scale = 0;  // multiplies q . k, usually 1 / sqrt(head_dim)
  int group_size() const { return num_q_heads / num_kv_heads; }
};

/// One sequence of a varlen batch. Strides count elements; head_dim is contiguous.
struct AttentionSequence {
  const void* q = nullptr;  // [q_tokens, num_q_heads, head_dim]
  int64_t q_token_stride = 0, q_head_stride = 0;
  const void* k = nullptr;  // [num_kv_heads, kv_tokens, head_dim], after RoPE
  const void* v = nullptr;  // same strides as k
  int64_t kv_head_stride = 0, kv_token_stride = 0;
  void* out = nullptr;  // [q_tokens, num_q_heads, head_dim]
  int64_t out_token_stride = 0, out_head_stride = 0;
  int64_t q_tokens = 0;
  int64_t kv_tokens = 0;  // query i stands at position kv_tokens - q_tokens + i
  /// At most one of them; both null: dense causal attention. Either may be per KV group
  /// (num_groups == num_kv_heads) or per query head (num_groups == num_q_heads).
  const SparseIndexView* index = nullptr;
  const TileIndexView* tiles = nullptr;
  /// With an index whose rows from dense_from on are dense: AttentionWorkspaceBytes of device
  /// memory, 256-byte aligned, this sequence's alone until the launch has run; null where that is
  /// 0. CUDA on compute capability 9.0 then spreads each such row tile over several
  /// multiprocessors, which changes its rounding. Null: nothing is spread. Others ignore it.
  void* workspace = nullptr;
  bool dense() const { return index == nullptr && tiles == nullptr; }
};

/// Index groups of a sequence: sets of query heads that read the same keys and share row tiles.
inline int IndexGroups(const AttentionShape& shape, const AttentionSequence& s) {
  if (s.index != nullptr) return s.index->num_groups;
  if (s.tiles != nullptr) return s.tiles->num_groups;
  return shape.num_kv_heads;
}

/// Whether the sequence's index, if any, is per KV group or per query head.
inline bool SupportedIndex(const AttentionShape& shape, const AttentionSequence& s) {
  const int groups = IndexGroups(shape, s);
  return (groups == shape.num_kv_heads || groups == shape.num_q_heads) &&
         (s.index == nullptr || s.tiles == nullptr);
}

/// Parts that the columns of a row tile at or past dense_from are divided into where there is a
/// workspace. By the index alone, so that chunks give the bits of the whole.
inline int DenseRowParts(int64_t dense_from) {
  return static_cast<int>(std::clamp<int64_t>(dense_from / 1024, 1, 8));
}
/// Bytes of the workspace of a sequence of `kv_tokens` tokens, or of any chunk of it. 0: there is
/// nothing to spread, so many dense row tiles fill a device by themselves, or the kernel that
/// spreads them does not know the shape.
inline int64_t AttentionWorkspaceBytes(const AttentionShape& shape, int num_groups,
                                       int64_t dense_from, int64_t kv_tokens) {
  constexpr int64_t kMostTiles = 128;
  if (shape.dtype != DType::kBF16 || (shape.head_dim != 64 && shape.head_dim != 128)) return 0;
  if (dense_from < 0 || dense_from > kv_tokens || DenseRowParts(dense_from) == 1) return 0;
  const int row_tile = RowTilePositions(shape.num_q_heads / num_groups);
  const int64_t tiles = num_groups * ((kv_tokens - 1) / row_tile + 1 - dense_from / row_tile);
  if (tiles > kMostTiles) return 0;
  return tiles * DenseRowParts(dense_from) * kPackedRows * (shape.head_dim + 2) * 4;
}

/// Sums over rows and query heads, for density = unmasked / dense and cost_ratio = multiplied /
/// dense (dense: q_heads * sum over rows of visible keys).
struct PairCounts {
  int64_t unmasked = 0;  // (query, key) pairs that enter a softmax; pseudo-keys do not count
  int64_t multiplied =
      0;  // pairs that the kernel multiplies; padding, masked and pseudo-keys count
  int64_t dense = 0;
  // What vertical-slash indexes hold: sums over index groups and calls; 0 without such an index.
  int64_t indexes = 0;           // (call, index group) pairs that had one
  int64_t vertical_columns = 0;  // selected columns
  int64_t slash_diagonals = 0;   // selected distances, kBandBlock per band
};

/// out = softmax(scale * q k^T + causal mask + index mask) v for each of `num_sequences` sequences.
/// A row that may see no key cannot occur (each row sees itself through the local band, its own
/// block or density).
/// `sequences` is host memory in every implementation; the pointers in it are device memory for
/// CUDA. CPU: returns when done, uses ParallelFor (kernels/cpu/parallel.h). CUDA: enqueues on
/// `stream`, does not synchronise; one launch per 16 sequences; pointers 16-byte aligned, strides
/// multiples of 16 bytes, else kUnsupportedShape; the result does not depend on chunking or
/// batching. An index whose num_groups is neither head count: kUnsupportedShape.
using AttentionFn = KernelStatus (*)(const AttentionShape& shape,
                                     const AttentionSequence* sequences, int num_sequences,
                                     Stream stream);

KernelStatus AttentionRef(const AttentionShape& shape, const AttentionSequence* sequences,
                          int num_sequences, Stream stream);
KernelStatus AttentionCpu(const AttentionShape& shape, const AttentionSequence* sequences,
                          int num_sequences, Stream stream);
KernelStatus AttentionCuda(const AttentionShape& shape, const AttentionSequence* sequences,
                           int num_sequences, Stream stream);

/// Adds the pair counts of one sequence (one layer, all heads) to *counts: PairCounts in host
/// memory (CPU) or device memory (CUDA, atomically on `stream`). Uses only sizes and index of
/// `sequence`.
using CountPairsFn = KernelStatus (*)(const AttentionShape& shape,
                                      const AttentionSequence& sequence, PairCounts* counts,
                                      Stream stream);
KernelStatus CountPairsCpu(const AttentionShape& shape, const AttentionSequence& sequence,
                           PairCounts* counts, Stream stream);
KernelStatus CountPairsCuda(const AttentionShape& shape, const AttentionSequence& sequence,
                            PairCounts* counts, Stream stream);

}  // namespace vsprefill::kernels
